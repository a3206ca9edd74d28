"""A run becomes a release: the same numbers by every way of loading, texts that follow from the entry, all or nothing."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from cim_models import create_model, create_pretext, create_transform
from cim_models.backbones import build
from cim_models.cli import main
from cim_models.errors import CheckpointError, ConfigError
from cim_models.hub import card, folder
from cim_models.hub import release as module
from cim_models.hub.manifest import load_manifest, write_manifest
from cim_models.hub.verify import verify
from cim_models.pretext.model import CIM, PretextConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIG = PretextConfig(head_width=32, head_heads=4, global_weight=0.5, global_hidden=8)
METRICS = [
    {"name": "knn_top1.target", "value": 0.091, "data": "Tiny val", "command": "cim evaluate knn target"},
    {"name": "knn_top1.online", "value": 0.083, "data": "Tiny val", "command": "cim evaluate knn online"},
    {"name": "knn_top1.random", "value": 0.024, "data": "Tiny val", "command": "cim evaluate knn random"},
    {"name": "shuffled-exemplar gap", "value": 0.24613, "data": "Tiny val", "command": "python | gap"},
]
TEXTS = dict(summary="Small, for tests.", data="Tiny", terms="research only", licence="Apache-2.0", hardware="2 cores")


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
        numbers = dict(loss=40 / step, prior_loss=0.45, gap=0.246, iou=0.43, iou_shuffled=0.17)
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


def images(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------- the same model


@pytest.mark.parametrize(("encoder", "dtype"), [("target", "float16"), ("online", "float32"), ("target", "bfloat16")])
def test_the_released_encoder_is_the_runs(tmp_path, root, encoder, dtype):
    cim = make_run(tmp_path / "run")
    made = module.release(tmp_path / "run", id="cim_vit_tiny.t1", encoder=encoder, dtype=dtype, root=root)
    manifest = load_manifest(root)
    expected = getattr(cim, encoder)
    precision = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 0}[dtype]
    for model in (
        create_model("cim_vit_tiny.t1", pretrained=True, manifest=manifest),
        create_model("cim_vit_tiny", weights=made),
        create_model(made),
    ):
        held = model.state_dict()
        assert all(torch.equal(held[k], v.to(getattr(torch, dtype)).float()) for k, v in expected.state_dict().items())
        torch.testing.assert_close(model.eval()(images()), expected(images()), rtol=0, atol=10 * precision)
    assert not any(key.startswith(("head", "fc")) for key in load_file(made / "model.safetensors"))
    assert {value.dtype for value in load_file(made / "pretext.safetensors").values()} == {getattr(torch, dtype)}


def test_one_encoder_and_the_head_locate(tmp_path, root):
    cim = make_run(tmp_path / "run")
    made = module.release(tmp_path / "run", id="cim_vit_tiny.t1", dtype="float32", root=root)
    cim.online.load_state_dict(cim.target.state_dict())
    exemplars = images(32)[:, None]
    pretext = create_pretext(made).eval()
    torch.testing.assert_close(pretext.locate(images(), exemplars), cim.locate(images(), exemplars), rtol=0, atol=1e-6)
    assert pretext.config == dataclasses.replace(CONFIG, global_weight=0.0) and pretext.global_head is None
    entry = load_manifest(root).entries["cim_vit_tiny.t1"]
    assert (entry.pretext.context_size, entry.pretext.exemplar_size) == (64, 32)


@pytest.mark.parametrize("architecture", ["cim_vit_tiny", "cim_resnet18"])
def test_the_entry_says_what_the_files_hold(tmp_path, root, architecture):
    make_run(tmp_path / "run", architecture)
    module.release(tmp_path / "run", id=f"{architecture}.t1", root=root)
    manifest = load_manifest(root)
    verify(f"{architecture}.t1", manifest)
    entry = manifest.entries[f"{architecture}.t1"]
    assert (entry.kind, entry.num_classes, entry.sources) == ("backbone", 0, ("repository",))
    assert [golden.part for golden in entry.golden] == ["backbone", "pretext"]
    wrong = dataclasses.replace(entry.golden[0], output=tuple(value + 1e-3 for value in entry.golden[0].output))
    write_manifest(manifest.with_entry(dataclasses.replace(entry, golden=(wrong,))))
    with pytest.raises(Exception, match="golden output of the backbone"):
        verify(f"{architecture}.t1", load_manifest(root))


STOCK = """
import sys, torch
{prepare}
import timm
from safetensors.torch import load_file, save_file
data = load_file("images.safetensors")
model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
ten = timm.create_model("local-dir:{folder}", pretrained=True, num_classes=10)
assert ten(data["images"]).shape == (2, 10)
cfg = timm.data.resolve_data_config(model=model)
assert cfg["input_size"] == (3, 64, 64) and cfg["crop_pct"] == 0.8 and cfg["mean"] == (0.485, 0.456, 0.406), cfg
assert model.pretrained_cfg["license"] == "Apache-2.0" and model.pretrained_cfg["tag"] == "t1"
save_file({{"output": model(data["images"]), "maps": model.forward_features(data["images"])}}, "output.safetensors")
"""


@pytest.mark.parametrize("prepare", ["import cim_models", "sys.modules['cim_models'] = None"])
@pytest.mark.parametrize("architecture", ["cim_vit_tiny", "cim_resnet18"])
def test_stock_timm_loads_the_folder(tmp_path, root, architecture, prepare):
    """With our package imported, and where it cannot be."""
    make_run(tmp_path / "run", architecture)
    made = module.release(tmp_path / "run", id=f"{architecture}.t1", root=root, licence="Apache-2.0", crop_pct=0.8)
    save_file({"images": images()}, tmp_path / "images.safetensors")
    code = STOCK.format(folder=made, prepare=prepare)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    output, model = load_file(tmp_path / "output.safetensors"), create_model(made).eval()
    torch.testing.assert_close(output["output"], model(images()), rtol=0, atol=1e-6)
    torch.testing.assert_close(output["maps"], model.forward_features(images()), rtol=0, atol=1e-5)


def test_transformers_loads_the_folder(run, root):
    transformers = pytest.importorskip("transformers", reason="needs transformers, which is optional")
    made = module.release(run, id="cim_vit_tiny.t1", root=root)
    model = transformers.AutoModel.from_pretrained(made).eval()
    expected = create_model(made).eval().forward_features(images())
    torch.testing.assert_close(model(images()).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_config_json_is_one_that_stock_tools_read(run, root):
    made = module.release(run, id="cim_vit_tiny.t1", root=root)
    config = json.loads((made / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224" and config["num_features"] == 192
    assert (config["num_classes"], config["global_pool"]) == (0, "avg")
    assert "num_classes" not in config["model_args"] and "model_type" not in config
    from timm.models import PretrainedCfg

    assert PretrainedCfg(**config["pretrained_cfg"]).fixed_input_size is True
    assert config["cim_models"]["id"] == "cim_vit_tiny.t1"


# ---------------------------------------------------------------- texts


def test_the_card_says_what_a_user_must_know(run, root):
    made = module.release(run, id="cim_vit_tiny.t1", root=root, metrics=run / "metrics.json", **TEXTS)
    text = (made / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front["library_name"]) == ("apache-2.0", "timm") and "timm" in front["tags"]
    for said in (
        "Small, for tests.",
        "- Tiny: research only",
        "- Hardware: 2 cores",
        "- Time: 5.3 hours",
        "- Images: 76,800 seen",
        "| knn_top1.target | 9.1% | Tiny val | `cim evaluate knn target` |",
        "| shuffled-exemplar gap | 0.2461 | Tiny val | `python / gap` |",
        "The backbone is the **target** encoder.",
        "9.1%, against 8.3% for the online encoder and 2.4% for the random weights",
        "- Licence: Apache-2.0",
        "## Limits",
    ):
        assert said in text, said
    assert len(card.snippet(load_manifest(root).entries["cim_vit_tiny.t1"]).splitlines()) == 6


def test_a_licence_that_the_hub_does_not_know(run, root):
    made = module.release(run, id="cim_vit_tiny.t1", root=root, licence="S-Lab License 1.0 (non-commercial)")
    front = yaml.safe_load((made / "README.md").read_text().split("---")[1])
    assert (front["license"], front["license_name"]) == ("other", "s-lab-license-1.0-non-commercial")


def test_nothing_of_the_machine_is_published(run, root):
    made = module.release(run, id="cim_vit_tiny.t1", root=root)
    for path in made.glob("*.*"):
        assert str(run.parent).encode() not in path.read_bytes() and b"me.jpg" not in path.read_bytes(), path
    assert sorted(path.name for path in made.iterdir()) == sorted(
        ["README.md", "config.json", "log.jsonl", "model.safetensors", "pretext.safetensors", "recipe.yaml"]
    )
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in made.iterdir()) and made.stat().st_mode & 0o055 == 0o055


def test_the_recipe_is_one(run, root):
    from cim_models.pretraining.config import load_recipe

    made = module.release(run, id="cim_vit_tiny.t1", root=root)
    recipe = load_recipe(made / "recipe.yaml")
    assert (recipe.model, recipe.views.exemplars.size, recipe.out) == ("cim_vit_tiny", 32, "")


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A plain copy of the package with a release of its own in it."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "cim_models", folder / "cim_models", ignore=shutil.ignore_patterns("__pycache__", "_data"))
    make_run(folder / "run")
    module.release(folder / "run", id="cim_vit_tiny.t1", root=make_root(folder), metrics=folder / "run/metrics.json")
    return folder


def test_the_snippet_of_the_card_runs(copy, tmp_path):
    text = (copy / "weights" / "cim_vit_tiny.t1" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "photo.jpg")
    code += "print(tuple(output.shape), float(output.double().sum()))\n"
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    model = create_model(copy / "weights" / "cim_vit_tiny.t1").eval()
    with Image.open(tmp_path / "photo.jpg") as image:
        expected = model(create_transform(model)(image.convert("RGB"))[None])
    assert done.stdout.startswith("(1, 192) ")
    assert float(done.stdout.split()[-1]) == pytest.approx(float(expected.double().sum()), abs=1e-3)


def test_readme_has_the_table_of_the_manifest(run, root):
    module.release(run, id="cim_vit_tiny.t1", root=root, metrics=run / "metrics.json", **TEXTS)
    text = (root / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- models -->\n| name |") and text.endswith("|\n<!-- /models -->\n\nEnd\n")
    row = "| 64 × 64 | Tiny | knn_top1 9.1% (random weights 2.4%), Tiny val | Apache-2.0 |"
    assert "[`cim_vit_tiny.t1`](weights/cim_vit_tiny.t1/README.md)" in text and row in text
    assert card.readme_with_table(text, load_manifest(root)) == text
    with pytest.raises(ConfigError, match="<!-- models -->"):
        card.readme_with_table("# no table", load_manifest(root))


def released_entries():
    return load_manifest(ROOT).entries.values() if (ROOT / "weights_manifest.json").is_file() else ()


@pytest.mark.parametrize("entry", released_entries(), ids=lambda entry: entry.id)
def test_cards_follow_from_their_entries(entry):
    made = ROOT / "weights" / entry.id
    assert (made / "README.md").read_text() == card.render_card(entry, made), "render the card again"
    assert json.loads((made / "config.json").read_text())["cim_models"] == folder.to_dict(entry)


def test_this_readme_has_the_table_of_this_manifest():
    if not (ROOT / "README.md").is_file():
        pytest.skip("needs the README.md of the repository")
    text = (ROOT / "README.md").read_text()
    assert card.readme_with_table(text, load_manifest(ROOT)) == text, "run cim_models.hub.card.update_readme"


def test_a_card_is_rendered_the_same_again(copy):
    entry = load_manifest(copy).entries["cim_vit_tiny.t1"]
    made = copy / "weights" / entry.id
    assert (made / "README.md").read_text() == card.render_card(entry, made)


# ---------------------------------------------------------------- all or nothing


def test_an_id_is_released_once(run, root, tmp_path):
    made = module.release(run, id="cim_vit_tiny.t1", root=root)
    before = contents(root)
    with pytest.raises(ConfigError, match="cim_vit_tiny.t1 is released already"):
        module.release(run, id="cim_vit_tiny.t1", root=root)
    assert contents(root) == before
    module.release(run, id="cim_vit_tiny.t1", root=root, replace=True, encoder="online")
    assert load_manifest(root).entries["cim_vit_tiny.t1"].encoder == "online"
    verify("cim_vit_tiny.t1", load_manifest(root))
    assert [path.name for path in made.parent.iterdir()] == ["cim_vit_tiny.t1"]


def test_a_failure_restores_what_was_there(run, root, monkeypatch):
    def full(manifest):
        raise OSError(28, "No space left on device")

    module.release(run, id="cim_vit_tiny.t1", root=root)
    before = contents(root)
    monkeypatch.setattr(module, "write_manifest", full)
    for id in ("cim_vit_tiny.t1", "cim_vit_tiny.t2"):
        with pytest.raises(ConfigError, match=f"{id} cannot be written.*No space left"):
            module.release(run, id=id, root=root, replace=True, encoder="online")
        assert contents(root) == before
    assert [path.name for path in (root / "weights").iterdir()] == ["cim_vit_tiny.t1"]


def test_a_folder_that_cannot_be_made(run, root):
    (root / "weights").write_text("in the way")
    before = contents(root)
    with pytest.raises(ConfigError, match="weights/cim_vit_tiny.t1 cannot be written"):
        module.release(run, id="cim_vit_tiny.t1", root=root)
    assert contents(root) == before


IN_A_PROCESS = """
import os, signal, sys, resource
from pathlib import Path
from cim_models.errors import ConfigError
from cim_models.hub import card, folder, release
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
{sabotage}
try:
    release.release(Path(sys.argv[1]), id="cim_vit_tiny.t1", root=Path(sys.argv[2]), encoder="online", replace=True)
except ConfigError as error:
    sys.exit(f"refused: {{error}}")
"""


def in_a_process(sabotage: str, run: Path, root: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", IN_A_PROCESS.format(sabotage=sabotage), str(run), str(root)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "sabotage",
    [
        "folder.save_file = die",
        "folder.render_card = die",
        "Path.rename = die",
        "release.write_manifest = die",
        "release.update_readme = die",
    ],
)
def test_a_killed_release_can_be_run_again(run, root, sabotage):
    done = in_a_process(sabotage, run, root)
    assert done.returncode == -signal.SIGKILL, done.stderr
    entries = load_manifest(root).entries
    assert list(entries) == (["cim_vit_tiny.t1"] if "readme" in sabotage else [])
    if "manifest" not in sabotage and "readme" not in sabotage:
        assert not (root / "weights" / "cim_vit_tiny.t1").exists(), "no half-written folder under the name of the release"
    module.release(run, id="cim_vit_tiny.t1", root=root, replace="readme" in sabotage)
    verify("cim_vit_tiny.t1", load_manifest(root))
    assert [path.name for path in (root / "weights").iterdir()] == ["cim_vit_tiny.t1"]


def test_a_disk_that_is_full(run, root):
    """Files of this process may not grow beyond 100 kB: the tensors do not fit."""
    module.release(run, id="cim_vit_tiny.t1", root=root)
    before = contents(root)
    done = in_a_process("resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))", run, root)
    assert done.returncode == 1 and "refused: " in done.stderr and "cannot be written" in done.stderr, done.stderr
    assert contents(root) == before


# ---------------------------------------------------------------- runs and arguments that cannot be


@pytest.mark.parametrize("name", ["target.safetensors", "head.safetensors", "config.yaml", "log.jsonl"])
def test_runs_that_are_not_whole(run, root, name):
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: len(content) // 2] if name != "config.yaml" else b"[a")
    with pytest.raises(CheckpointError, match=str(run)):
        module.release(run, id="cim_vit_tiny.t1", root=root)
    (run / name).unlink()
    with pytest.raises(CheckpointError, match=f"{run}.*lacks {name}"):
        module.release(run, id="cim_vit_tiny.t1", root=root)
    assert not (root / "weights").exists() or not list((root / "weights").iterdir())


def test_files_that_no_run_wrote(run, root):
    save_file({"a": torch.zeros(1)}, run / "target.safetensors")
    with pytest.raises(CheckpointError, match="does not say its architecture, images_seen, model_args, pretext"):
        module.release(run, id="cim_vit_tiny.t1", root=root)


def test_a_configuration_that_no_run_wrote(run, root):
    for text in ("3", "data: {}", "{data: {size: 64}, views: 3}"):
        (run / "config.yaml").write_text(text)
        with pytest.raises(CheckpointError, match=f"{run}.*config.yaml"):
            module.release(run, id="cim_vit_tiny.t1", root=root)


@pytest.mark.parametrize("id", ["cim_vit_small.t1", "t1", "cim_vit_tiny", "cim_vit_tiny.", "cim_vit_tiny./../x"])
def test_ids_that_cannot_be(run, root, id):
    with pytest.raises(ConfigError, match=r"cim_vit_tiny\.TAG"):
        module.release(run, id=id, root=root)


@pytest.mark.parametrize("text", ["3", "{", "[3]", '[{"name": "a"}]', json.dumps([METRICS[0] | {"value": "high"}])])
def test_metrics_that_cannot_be(run, root, text):
    (run / "metrics.json").write_text(text)
    with pytest.raises(ConfigError, match="metrics"):
        module.release(run, id="cim_vit_tiny.t1", root=root, metrics=run / "metrics.json")
    assert not (root / "weights" / "cim_vit_tiny.t1").exists()


def test_numbers_that_float16_does_not_hold(tmp_path, root):
    make_run(tmp_path / "run")
    header = module.read_header(tmp_path / "run/target.safetensors").metadata
    tensors = load_file(tmp_path / "run/target.safetensors")
    save_file(tensors | {"norm.bias": tensors["norm.bias"] + 1e5}, tmp_path / "run/target.safetensors", header)
    with pytest.raises(ConfigError, match="not finite as float16: norm.bias"):
        module.release(tmp_path / "run", id="cim_vit_tiny.t1", root=root)
    module.release(tmp_path / "run", id="cim_vit_tiny.t1", root=root, dtype="bfloat16")


def test_the_command(run, root, capsys):
    assert main(["release", str(run), "--id", "cim_vit_tiny.t1", "--root", str(root), "--encoder", "online"]) == 0
    assert capsys.readouterr().out.strip() == str(root / "weights" / "cim_vit_tiny.t1")
    assert main(["release", str(run), "--id", "cim_vit_tiny.t1", "--root", str(root)]) == 1
    assert "released already" in capsys.readouterr().err
