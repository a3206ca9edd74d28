"""Releases made on the spot: real files, a manifest, and plain copies of the package that carry them."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from loopback import Loopback
from safetensors.torch import save_file

from cim_models.backbones import build
from cim_models.hub import download, waiting
from cim_models.hub.entry import (
    Data,
    Entry,
    Golden,
    Metric,
    Preprocessing,
    Pretext,
    WeightFile,
    key_digest,
    to_dict,
)
from cim_models.hub.manifest import Manifest, load_manifest, write_manifest
from cim_models.hub.verify import golden_output
from cim_models.pretext.model import CIM, PretextConfig

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"cim_vit_tiny": {"depth": 2, "img_size": 64}, "cim_resnet18": {}}
HEAD = PretextConfig(head_width=64, head_heads=4)


def make_release(
    root: Path,
    id: str = "cim_vit_tiny.one",
    num_classes: int = 0,
    dtype: torch.dtype = torch.float32,
    released: str = "2026-01-01",
    pretext: str = "",
    model_args: dict | None = None,
) -> tuple[Manifest, Entry]:
    """Writes weights/ID and its entry: a random encoder, with `pretext` its `head` or instead of it a `whole` CIM."""
    architecture = id.partition(".")[0]
    args = SMALL[architecture] if model_args is None else model_args
    torch.manual_seed(len(id) + num_classes)
    encoder = build(architecture, num_classes=num_classes, **args)
    for parameter in encoder.parameters():  # biases and norms are not trivial in trained weights
        parameter.data += 0.02 * torch.randn_like(parameter)
    model = CIM(encoder, HEAD) if pretext else None
    if model is not None:
        torch.nn.init.normal_(model.head.predict.weight)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    if pretext != "whole":
        parts["backbone"] = dict(encoder.state_dict())
    if pretext == "whole":
        model.update_target(0.5)
        for parameter in model.target.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        parts["pretext"] = dict(model.state_dict())
    elif pretext == "head":
        parts["pretext"] = {f"head.{key}": value for key, value in model.head.state_dict().items()}

    folder = root / "weights" / id
    folder.mkdir(parents=True)
    files = []
    for part, tensors in parts.items():
        name = {"backbone": "model", "pretext": "pretext"}[part] + ".safetensors"
        stored = {k: (v.to(dtype) if v.is_floating_point() else v).clone().contiguous() for k, v in tensors.items()}
        save_file(stored, folder / name)
        content = (folder / name).read_bytes()
        files.append(WeightFile(f"weights/{id}/{name}", part, len(content), hashlib.sha256(content).hexdigest()))
    main = "pretext" if pretext == "whole" else "backbone"
    whole = model if pretext == "whole" else encoder
    for tensor in (*whole.parameters(), *whole.buffers()):  # what a reader of the file will compute with
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype).float()
    size = args.get("img_size", 64)
    size = (size, size) if isinstance(size, int) else size
    encoder.pretrained_cfg["input_size"] = (3, *size)
    entry = Entry(
        id=id,
        architecture=architecture,
        model_args=args,
        num_classes=num_classes,
        kind="pretext" if pretext == "whole" else "finetuned" if num_classes else "backbone",
        encoder="online",
        files=tuple(files),
        sources=("repository",),
        preprocessing=Preprocessing((3, *size), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bilinear", 0.8, "center"),
        pretext=Pretext(dataclasses.asdict(HEAD), size[0], 32) if pretext else None,
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in whole.parameters()),
        tensors=len(parts[main]),
        key_digest=key_digest({key: tuple(value.shape) for key, value in parts[main].items()}),
        licence="Apache-2.0",
        data=(Data("noise", "free"),),
        metrics=(Metric("kNN", 1.5, "noise", "cim evaluate knn"),),
        golden=(Golden(main, "waves", tuple(golden_output(whole)), 1e-4),),
        summary="A release for tests.",
        released=released,
    )
    (folder / "config.json").write_text(json.dumps({"cim_models": to_dict(entry)}))
    before = load_manifest(root) if (root / "weights_manifest.json").exists() else Manifest(root, {})
    write_manifest(before.with_entry(entry))
    return load_manifest(root), entry


@pytest.fixture
def release(tmp_path) -> Callable[..., tuple[Manifest, Entry]]:
    """`release(id, …)` makes another release beside those of this test: `make_release` in one folder."""
    return lambda *args, **kwargs: make_release(tmp_path / "root", *args, **kwargs)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Loopback]:
    """A Hub that HF_ENDPOINT names, with an empty cache, and little patience with it."""
    for name in list(os.environ):
        if name.startswith(("HF_", "CIM_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(waiting, "PAUSES", (0.02, 0.02, 0.02))
    monkeypatch.setattr(waiting, "STEP", 1.0)
    monkeypatch.setattr(download, "IDLE", 2.5)
    with Loopback() as hub:
        for name, value in hub.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        yield hub


def put_on_hub(hub: Loopback, manifest: Manifest, entry: Entry, repository: str = "org/name", **kwargs) -> Entry:
    """Moves the files of an entry from its repository to the Hub; the entry that says so is in the manifest."""
    folder = manifest.root / "weights" / entry.id
    commit = hub.add(repository, {path.name: path.read_bytes() for path in folder.iterdir()}, **kwargs)
    shutil.rmtree(folder)
    entry = dataclasses.replace(entry, sources=(f"hf-hub:{repository}@{commit}",))
    write_manifest(manifest.with_entry(entry))
    return entry


@pytest.fixture
def to_hub(hub) -> Callable[[Manifest, Entry], Entry]:
    """`to_hub(manifest, entry)`: `put_on_hub`, on the Hub of this test."""
    return partial(put_on_hub, hub)


@pytest.fixture
def published(hub, release) -> tuple[Manifest, Entry, dict[str, bytes]]:
    """A release that is on the Hub alone: the manifest, its entry, and the content of its files."""
    manifest, entry = release(pretext="head")
    contents = {Path(file.path).name: (manifest.root / file.path).read_bytes() for file in entry.files}
    entry = put_on_hub(hub, manifest, entry)
    return load_manifest(manifest.root), entry, contents


def make_copy(folder: Path) -> Path:
    """The package as an archive of the repository leaves it, with releases of its own."""
    ignore = shutil.ignore_patterns("__pycache__", "_data")
    shutil.copytree(ROOT / "cim_models", folder / "cim_models", ignore=ignore)
    shutil.copy(ROOT / "hubconf.py", folder)
    make_release(folder, "cim_vit_tiny.one", pretext="head", dtype=torch.float16)
    make_release(folder, "cim_vit_tiny.two", released="2026-02-01", pretext="head")
    make_release(folder, "cim_vit_tiny.classes", num_classes=5, released="2026-03-01")
    make_release(folder, "cim_resnet18.one")
    return folder


@pytest.fixture(scope="session")
def plain_copy(tmp_path_factory) -> Path:
    """`make_copy`, once; not to be written to."""
    return make_copy(tmp_path_factory.mktemp("plain") / "cim_models-main")


def in_python(code: str, *path: Path, cwd: Path, **environment: str) -> str:
    """Runs code in a process whose packages come from `path` first; warnings are errors. Returns what it prints."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "CIM_", "TORCH_HOME"))}
    clean |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=cwd, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture
def python(tmp_path) -> Callable[..., str]:
    """`python(code, folder)` runs code in a process of its own that imports the copy in `folder`."""
    (tmp_path / "empty").mkdir()
    return lambda code, *path, **environment: in_python(code, *path, cwd=tmp_path / "empty", **environment)
