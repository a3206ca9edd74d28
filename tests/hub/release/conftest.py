"""Run directories made on the spot, roots to release into, and processes that use what was released."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from cim_models.backbones import build
from cim_models.pretext.model import CIM, PretextConfig

ROOT = Path(__file__).resolve().parents[3]
CONFIG = PretextConfig(head_width=32, head_heads=4, global_weight=0.5, global_hidden=8)
METRICS = [
    {"name": "knn_top1.target", "value": 0.091, "data": "Tiny val", "command": "cim evaluate knn target"},
    {"name": "knn_top1.online", "value": 0.083, "data": "Tiny val", "command": "cim evaluate knn online"},
    {"name": "knn_top1.random", "value": 0.024, "data": "Tiny val", "command": "cim evaluate knn random"},
    {"name": "shuffled-exemplar gap", "value": 0.24613, "data": "Tiny val", "command": "python | gap"},
]


def make_run(run: Path, architecture: str = "cim_vit_tiny", **args) -> CIM:
    """The files of a run directory, as docs/pretraining.md describes them, and the model that they hold."""
    torch.manual_seed(0)
    args = args or (dict(depth=2, img_size=64) if "vit" in architecture else {})
    cim = CIM(build(architecture, **args), CONFIG)
    for parameter in (*cim.online.parameters(), *cim.target.parameters(), *cim.head.parameters()):
        parameter.data += 0.02 * torch.randn_like(parameter)
    run.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "architecture": architecture, "model_args": json.dumps(args), "images_seen": "76800"}
    metadata["pretext"] = json.dumps(dataclasses.asdict(CONFIG))
    for name in ("online", "target", "head"):
        save_file(getattr(cim, name).state_dict(), run / f"{name}.safetensors", metadata)
    config = {
        "out": str(run),
        "model": architecture,
        "data": {"path": str(run.parent / "private"), "size": 64, "workers": 2},
        "views": {"context_size": 64, "exemplars": {"size": 32, "count": 4}},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    records = [{"step": 3, "skipped": f"{run.parent}/private/me.jpg: truncated", "unreadable": 1}]
    for step in (100, 200):
        numbers = dict(epoch=step / 100, loss=40 / step, prior_loss=0.45, gap=0.246, iou=0.43, iou_shuffled=0.17)
        records.append({"step": step, "images_seen": 384 * step, "images_per_second": 4.0, **numbers})
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "metrics.json").write_text(json.dumps(METRICS))
    return cim.eval()


def make_root(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "weights_manifest.json").write_text('{"version": 1, "entries": {}}')
    (root / "README.md").write_text("# Title\n\n<!-- models -->\n<!-- /models -->\n\nEnd\n")
    return root


@pytest.fixture
def run(tmp_path) -> Path:
    make_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def root(tmp_path) -> Path:
    return make_root(tmp_path / "root")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_python(code: str, path: Path, *arguments: object, cwd: Path) -> str:
    """Runs code in a process whose cim_models is the one in `path`; returns what it prints."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def images(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def making() -> SimpleNamespace:
    """What this file defines."""
    return SimpleNamespace(**globals())
