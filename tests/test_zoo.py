"""benchmarks/zoo: pictures in shards → a run that is interrupted → its evaluation → a report → a release."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cim_models import backbones
from cim_models.errors import ConfigError
from cim_models.evaluation.report import report
from cim_models.evaluation.splits import read_split
from cim_models.hub.load import create_model
from cim_models.hub.manifest import load_manifest
from cim_models.hub.provenance import seen_by
from cim_models.hub.release import release
from cim_models.pretraining.config import from_dict, load_recipe
from cim_models.pretraining.readers import open_records

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "benchmarks" / "zoo"
SMALL = {
    "log_every": 2,
    "data": {"size": 32, "cache_side": 32, "workers": 0},
    "diagnostics": {"held_out": 0},
    "views": {"context_size": 64, "exemplars": {"size": 32, "count": 2}},
    "pretext": {"head_width": 32, "head_heads": 2, "global_hidden": 16},
    "optimiser": {"batch_size": 4},
}
"""How the runs of these tests differ from the recipe."""


def script(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"zoo_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs() -> ModuleType:
    return script(ZOO / "runs.py")


@pytest.fixture
def pictures(photographs, tmp_path) -> Path:
    """Three classes of eight pictures."""
    for index, path in enumerate(sorted(photographs(24, 64).glob("*.jpg"))):
        folder = tmp_path / "data" / "train" / f"class{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return tmp_path / "data" / "train"


def call(path: Path, *words: object, **options) -> subprocess.Popen:
    """Starts a script where the parser of `cim`, which machines with a GPU may lack, cannot be imported."""
    start = (
        "import runpy, sys; sys.modules['tyro'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], {}, '__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", start, str(path), *map(str, words)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def call_here(monkeypatch: pytest.MonkeyPatch, module: ModuleType, words: list[str]) -> int:
    """Runs a script that is a module already."""
    monkeypatch.setattr(sys, "argv", [str(module.__file__), *words])
    return module.main()


def table(path: Path, **fields) -> Path:
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.mark.parametrize("name", ["models", "search", "ablations", "cpu"])
def test_every_run_of_a_table_is_a_configuration(runs, pictures, name, tmp_path):
    read = runs.read_table(ZOO / f"{name}.yaml")
    for run in read.runs:
        whole = runs.configuration(read, run, pictures, tmp_path, 120)
        whole.check()
        assert whole.optimiser.warmup_epochs == pytest.approx(whole.optimiser.epochs / 20)
        start = runs.configuration(read, run, pictures, tmp_path, 12, start=True)
        assert start.views.exemplars.angle == (0.0, 0.0) and start.views.colour.jitter == 0
    changed = {json.dumps(differs, sort_keys=True) for differs in read.runs.values()}
    assert len(changed) == len(read.runs)


def test_what_a_table_cannot_say(runs, tmp_path):
    for fields, message in (
        ({"runs": {"a": {}}}, "either minutes or images"),
        ({"runs": {}, "images": 5}, "no runs"),
        ({"runs": {"a": {}}, "image": 5}, "no field 'image'"),
    ):
        with pytest.raises(ConfigError, match=message):
            runs.read_table(table(tmp_path / "table.yaml", **fields))
    broken = from_dict(runs.Table, {"runs": {"a": {"optimiser": {"rate": 1}}}, "images": 5}, "table")
    with pytest.raises(ConfigError, match="a: optimiser: no field 'rate'"):
        runs.configuration(broken, "a", tmp_path, tmp_path, 5)


def test_a_run_has_the_last_word_over_its_table(runs, pictures, tmp_path):
    fields = {"settings": {**SMALL, "seed": 3}, "runs": {"a": None, "b": {"seed": 4, "views": {"context_size": 96}}}}
    read = runs.read_table(table(tmp_path / "t.yaml", images=32, **fields))
    a, b = (runs.configuration(read, name, pictures, tmp_path, 32) for name in "ab")
    assert (a.seed, a.views.context_size, a.views.exemplars.size) == (3, 64, 32)
    assert (b.seed, b.views.context_size, b.views.exemplars.size) == (4, 96, 32)


def test_a_budget_of_minutes_is_one_of_images_found_once(runs, pictures, tmp_path, monkeypatch):
    read = runs.read_table(table(tmp_path / "t.yaml", minutes=0.5, same_images=True, runs={"a": SMALL, "b": SMALL}))
    monkeypatch.setattr(runs, "PACE", 6)
    images = runs.budget(read, "b", pictures, tmp_path / "out")
    assert images > 0 and json.loads((tmp_path / "out" / "images.json").read_text()) == {"a": images}
    (tmp_path / "out" / "images.json").write_text('{"a": 7}')
    assert runs.budget(read, "a", pictures, tmp_path / "out") == runs.budget(read, "b", pictures, tmp_path / "out") == 7


def test_other_minutes_take_the_place_of_a_table_s_budget(runs, tmp_path):
    for budget in ({"minutes": 20}, {"images": 5}):
        path = table(tmp_path / "t.yaml", runs={"a": {}}, **budget)
        read = runs.read_table(path, minutes=6.5)
        assert (read.minutes, read.images) == (6.5, None)
        with pytest.raises(ConfigError, match="minutes is 0"):
            runs.read_table(path, minutes=0)


def test_a_run_goes_on_from_what_its_table_names(runs, pictures, tmp_path):
    """In place of random weights: with easy exemplars first, or at once; what it cost is said as far as it is known."""
    embedded, seen = "cim_vit_tiny.tin200_e5", 499_968
    settings = {**SMALL, "pretext": {"global_hidden": 16}, "init": embedded}
    for start_images, stages in ((0, ["one"]), (4, ["one", "start/one"])):
        out = tmp_path / str(start_images)
        read = runs.read_table(table(tmp_path / "t.yaml", images=40, start_images=start_images, runs={"one": settings}))
        runs.train(read, "one", pictures, out)
        assert load_recipe(out / stages[-1] / "config.yaml").init == embedded
        assert seen_by(out / "one" / "online.safetensors")["images_seen"] == seen + 40
        for stage in stages:
            (out / stage / "cost.jsonl").write_text('{"device": "H", "seconds": 36, "watts": 1000}\n')
        said = script(ZOO / "release.py").hardware(out / "one")
        assert said.startswith("H, ") and "kWh" not in said  # what made the embedded weights is not known


def test_shards_hold_what_the_folder_holds(pictures, tmp_path):
    pack = script(ZOO / "pack.py").pack
    shards = pack(pictures, tmp_path, size=30_720)
    assert len(shards) > 1 and all(shard.stat().st_size <= 30_720 for shard in shards)
    packed, loose = open_records(f"{tmp_path}/train-*.tar"), open_records(pictures)
    assert [packed.content(i) for i in range(len(packed))] == [
        Path(loose.content(i)).read_bytes() for i in range(len(loose))
    ]
    for shard in shards:
        with tarfile.open(shard) as archive:
            archive.extractall(tmp_path / "there", filter="data")
    assert (
        read_split(tmp_path / "there" / "train").fingerprint()["sha256"] == read_split(pictures).fingerprint()["sha256"]
    )
    assert len(pack(pictures, tmp_path, size=0)) == 24  # one alone may be larger


def test_a_measurement_that_ended_before_its_first_checkpoint_begins_again(pictures, tmp_path):
    evaluate = script(ROOT / "benchmarks" / "evaluate.py")
    (tmp_path / "runs" / "result").mkdir(parents=True)
    settings = {"epochs": 1, "held_out": 0, "image_size": 64, "workers": 0}
    evaluate.measure(tmp_path / "result.json", "finetune", "cim_vit_tiny", [pictures] * 2, settings, tmp_path / "runs")
    assert json.loads((tmp_path / "result.json").read_text())["protocol"] == "finetune-1"


@pytest.mark.slow
def test_from_pictures_to_a_release(runs, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs_of = table(Path("t.yaml"), images=240, held_out=0.25, runs={"one": SMALL, "two": SMALL})
    words = (ZOO / "runs.py", runs_of, "data/train", "--out", "runs", "--only", "one")

    process = call(*words)
    while process.poll() is None and not Path("runs/one/last.pt").exists():
        if Path("runs/one/log.jsonl").exists() and Path("runs/one/log.jsonl").read_text():
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    said = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert runs.finished(Path("runs/start/one")) and not runs.finished(Path("runs/one"))

    process = call(*words)
    said = process.communicate(timeout=300)
    assert process.returncode == 0 and "all is done" in said[0], said
    assert runs.finished(Path("runs/one"))
    costs = [json.loads(line) for line in Path("runs/one/cost.jsonl").read_text().splitlines()]
    assert len(costs) == 2 and all(cost["seconds"] > 0 for cost in costs)
    train, val = (read_split(f"runs/held-out/{part}.csv") for part in ("train", "val"))
    assert (len(train.paths), len(val.paths)) == (18, 6)
    listed = {Path("runs/held-out", line).resolve() for line in Path("runs/held-out/train.txt").read_text().split()}
    assert listed == {path.resolve() for path in train.paths}

    monkeypatch.setitem(sys.modules, "tyro", None)
    evaluate, release = script(ROOT / "benchmarks" / "evaluate.py"), script(ZOO / "release.py")
    data = ["--data", "runs/held-out/train.csv", "runs/held-out/val.csv", "--seeds", "1", "--out", "results"]
    for protocol, settings in (("knn", ["--ks", "5"]), ("finetune", ["--epochs", "1", "--held-out", "0"])):
        command = ["runs/one/online.safetensors", *data, "--protocols", protocol, "--runs", "tuned"]
        command += ["--", "--image-size", "64", "--workers", "0", *settings]
        for _ in range(2):  # the second time nothing is left to do
            assert call_here(monkeypatch, evaluate, command) == 0
    kinds = {"knn": ["random", "weights"], "finetune": ["random", "scratch", "weights"]}
    names = [f"{name}-runs-one-online-{kind}-0.json" for name, known in kinds.items() for kind in known]
    assert sorted(os.listdir("results")) == sorted(names)
    markdown = report((Path("results"),)).markdown
    assert "| runs/one/online.safetensors | " in markdown and "| images seen | minutes |" in markdown

    Path("root").mkdir()
    Path("root/weights_manifest.json").write_text('{"version": 1, "entries": {}}')
    Path("root/README.md").write_text("<!-- models -->\n<!-- /models -->\n")
    words = ["runs/one", "--tag", "test", "--results", "results", "--root", "root"]
    assert call_here(monkeypatch, release, words) == 0
    entry = load_manifest(Path("root")).entries["cim_vit_tiny.test"]
    found = {metric.name: metric.value for metric in entry.metrics}
    reports = {name: json.loads(Path("results", name).read_text())["result"] for name in names}
    assert found["finetune_accuracy.random"] == reports["finetune-runs-one-online-random-0.json"]["headline"]
    card = Path("root/weights/cim_vit_tiny.test/README.md").read_text()
    assert "after 240 images" in card and "minutes of training" in card and "64 × 64 pixels, labels unused" in card


def test_a_rival_costs_what_a_run_costs(runs, pictures, tmp_path):
    pytest.importorskip("lightly", reason="needs what rivals are made of: pip install --no-deps lightly==1.6.0")
    rivals = script(ZOO / "rivals.py")
    read = runs.read_table(table(tmp_path / "t.yaml", images=32, start_images=0, runs={"one": SMALL}))
    config = runs.configuration(read, "one", pictures, tmp_path, 32)
    config.backbone.img_size = 64
    runs.pretrain(config)
    for method, encoders in (("mae", ["online"]), ("dino", ["online", "target"])):
        out = tmp_path / method
        rivals.rival(method, tmp_path / "one", out)
        assert sorted(path.stem for path in out.glob("*.safetensors")) == encoders
        for encoder in encoders:
            assert seen_by(out / f"{encoder}.safetensors")["images_seen"] == 32
            start, end = backbones.build("cim_vit_tiny", img_size=64), create_model(out / f"{encoder}.safetensors")
            assert not end.blocks[-1].mlp.fc2.weight.equal(start.blocks[-1].mlp.fc2.weight)
            torch.testing.assert_close(end.pos_embed, start.pos_embed, atol=1e-5, rtol=0)

    made = release(tmp_path / "one", id="cim_vit_tiny.one", root=tmp_path / "root")
    rivals.rival("mae", made, tmp_path / "again", data=pictures)
    first, again = (load_file(tmp_path / name / "online.safetensors") for name in ("mae", "again"))
    assert all(again[name].equal(tensor) for name, tensor in first.items())
    with pytest.raises(ConfigError, match="does not name its images; give them with --data"):
        rivals.rival("mae", made, tmp_path / "none")
