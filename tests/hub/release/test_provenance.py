"""A release tells of every run that its weights came from, and nothing of the machine."""

import json
import os
import shutil

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from cim_models.errors import CheckpointError
from cim_models.hub.manifest import load_manifest
from cim_models.hub.provenance import origin, read_stages, seen_by, texts
from cim_models.hub.release import release
from cim_models.hub.weights import Weights
from cim_models.pretraining.config import load_recipe

RELEASED = load_manifest().default("cim_vit_tiny").id


def follow(first, folder, images: int, steps: int, file: str = ""):
    """A run that started from another one, or from a file of it."""
    shutil.copytree(first, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "init": str(first / file), "out": str(folder)}))
    for name in ("online", "target", "head"):
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
        save_file(tensors, folder / f"{name}.safetensors", {**metadata, "images_seen": str(images)})
    lines = [json.loads(line) for line in (first / "log.jsonl").read_text().splitlines()]
    (folder / "log.jsonl").write_text("".join(json.dumps({**line, "steps": steps}) + "\n" for line in lines))
    return folder


def header(text: str) -> dict[str, str]:
    lines = [line[2:].partition(":") for line in text.splitlines() if line.startswith("# ")]
    return {key: value.strip() for key, _, value in lines}


def test_a_single_run(run):
    found = texts(read_stages(run, "target"), None, "photos", "a\nlaptop")
    assert sorted(found) == ["log.jsonl", "recipe.yaml"]
    assert header(found["recipe.yaml"]) == {
        "Command": "cim pretrain DATA --recipe recipe.yaml --out RUN", "Data": "photos", "Hardware": "a laptop",
        "Time": "5.3 hours", "Images": "76,800 seen",
    }  # fmt: skip
    assert "skipped" not in found["log.jsonl"] and len(found["log.jsonl"].splitlines()) == 2


def test_runs_that_started_from_others(run, tmp_path, root):
    second = follow(run, tmp_path / "second", images=38400, steps=200)
    third = follow(second, tmp_path / "third", images=76800, steps=300)
    found = texts(read_stages(third, "online"), None, "photos", "a laptop")
    assert sorted(found) == [f"{name}" for name in (
        "log-1.jsonl", "log-2.jsonl", "log.jsonl", "recipe-1.yaml", "recipe-2.yaml", "recipe.yaml")]  # fmt: skip
    commands = [header(found[name])["Command"] for name in ("recipe-1.yaml", "recipe-2.yaml", "recipe.yaml")]
    assert commands == [
        "cim pretrain DATA --recipe recipe-1.yaml --out RUN-1",
        "cim pretrain DATA --recipe recipe-2.yaml --out RUN-2 --init RUN-1",
        "cim pretrain DATA --recipe recipe.yaml --out RUN --init RUN-2",
    ]
    stopped = [header(found[name]).get("Stopped") for name in ("recipe-1.yaml", "recipe-2.yaml", "recipe.yaml")]
    assert stopped == [None, "after step 100 of 200", "after step 200 of 300"]
    assert len(found["log-2.jsonl"].splitlines()) == 1  # what the encoder did not see is not told
    assert not any(str(tmp_path) in text for text in found.values())

    folder = release(third, id="cim_vit_tiny.chain", root=root)
    for name in ("recipe-1.yaml", "recipe.yaml"):
        assert load_recipe(folder / name).views.exemplars.count == 4
    assert "192,000 images" in (folder / "README.md").read_text()
    for place in (third / "online.safetensors", folder / "model.safetensors"):
        assert seen_by(place) == {"images_seen": 192000, "epoch": 5, "minutes": 800}


def test_runs_that_started_from_one_encoder_of_others(run, tmp_path):
    """They have what those started from, and what those saw, all the same."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "init": RELEASED}))
    second = follow(run, tmp_path / "second.1", images=38400, steps=200, file="target.safetensors")
    stages = read_stages(follow(second, tmp_path / "third", images=76800, steps=300), "target")
    began = origin(stages)
    assert began.entry.id == RELEASED
    found = texts(stages, began, "photos", "a laptop")
    commands = [header(found[name])["Command"] for name in ("recipe-1.yaml", "recipe-2.yaml", "recipe.yaml")]
    assert commands == [
        f"cim pretrain DATA --recipe recipe-1.yaml --out RUN-1 --init {RELEASED}",
        "cim pretrain DATA --recipe recipe-2.yaml --out RUN-2 --init RUN-1/target.safetensors",
        "cim pretrain DATA --recipe recipe.yaml --out RUN --init RUN-2",
    ]
    assert f"# Started from: {RELEASED}\n" in found["recipe-1.yaml"]


def test_how_long_the_release_was_trained_that_a_released_run_started_from(run, root, tmp_path):
    first = release(run, id="cim_vit_tiny.first", root=root)
    for id in ("second", "third"):
        last = follow(run, tmp_path / id, images=38400, steps=200, file=os.path.relpath(first, run))
        first = release(last, id=f"cim_vit_tiny.{id}", root=root)
        shutil.rmtree(last)
    shutil.rmtree(root / "weights" / "cim_vit_tiny.second")
    assert seen_by(first / "model.safetensors") == {"images_seen": 153600, "epoch": 4, "minutes": 640}
    recipe = first / "recipe.yaml"
    assert header(recipe.read_text())["Before"] == "115200 images, 3.0 epochs, 480.0 minutes"
    recipe.write_text(recipe.read_text().replace("# Before:", "# Before: 3 and"))
    with pytest.raises(CheckpointError, match=f"{recipe} is damaged: Before"):
        seen_by(first / "model.safetensors")


def test_weights_of_the_hub_are_called_as_everybody_finds_them(run):
    name = f"hf-hub:org/name@{'0' * 40}"
    began = Weights(name, "cim_vit_tiny", {}, entry=load_manifest().default("cim_vit_tiny"))
    recipe = header(texts(read_stages(run, "online"), began, "photos", "a laptop")["recipe.yaml"])
    assert recipe["Started from"] == name and recipe["Command"].endswith(f"--init {name}")


@pytest.mark.parametrize("file", ["", "online.safetensors"])
def test_runs_that_started_from_each_other(file, run, tmp_path):
    second = follow(run, tmp_path / "second", images=38400, steps=200, file=file)
    shutil.rmtree(run)
    follow(second, run, images=76800, steps=300)
    with pytest.raises(CheckpointError, match="run was written over by a run that started from it"):
        read_stages(run, "online")


def test_how_long_an_encoder_without_a_log_was_trained(run, tmp_path):
    shutil.copy(run / "online.safetensors", tmp_path)
    assert seen_by(tmp_path / "online.safetensors") == {} == seen_by(run / "last.pt")


def test_a_start_that_is_gone(run, tmp_path, caplog):
    second = follow(run, tmp_path / "second", images=38400, steps=200)
    moved = second.rename(tmp_path / "moved")
    third = follow(moved, tmp_path / "third", images=76800, steps=300)
    shutil.rmtree(moved)
    stages = read_stages(third, "online")
    assert len(stages) == 1 and origin(stages) is None
    assert "moved, which the run started from, is gone" in caplog.text
    assert seen_by(third / "online.safetensors") == {}


@pytest.mark.skipif(os.name == "nt" or not os.getuid(), reason="needs a user who may not read everything")
@pytest.mark.parametrize("name", ["theirs", "theirs/run"])
def test_a_start_that_may_not_be_read(name, run, tmp_path, caplog):
    third = follow(follow(run, tmp_path / "theirs" / "run", images=38400, steps=200), tmp_path / "third", 76800, 300)
    (tmp_path / name).chmod(0)
    try:
        assert origin(read_stages(third, "online")) is None and seen_by(third / "online.safetensors") == {}
    finally:
        (tmp_path / name).chmod(0o755)
    assert "theirs/run, which the run started from, is gone" in caplog.text


def test_a_start_that_is_damaged(run, tmp_path):
    second = follow(run, tmp_path / "second", images=38400, steps=200)
    third = follow(second, tmp_path / "third", images=76800, steps=300)
    (second / "log.jsonl").write_text("{")
    with pytest.raises(CheckpointError, match="second/log.jsonl is damaged"):
        read_stages(third, "online")
