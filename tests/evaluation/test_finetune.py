"""Fine-tuning: it learns, what it writes is what it measured, and everybody can load it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data.auto_augment import RandAugment
from torchmetrics.functional.classification import multiclass_accuracy

import cim_models
from cim_models import cli
from cim_models.errors import CheckpointError, ConfigError, DataError, WeightsError
from cim_models.evaluation.encoders import find_weights, open_encoder
from cim_models.evaluation.finetune import (
    DEFAULT,
    FinetuneConfig,
    batch_sums,
    build_classifier,
    finetune,
    training_transform,
)
from cim_models.evaluation.splits import hold_out, read_split
from cim_models.hub.manifest import load_manifest
from cim_models.images import read_image

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ["columns", "rings", "rows"]
QUICK = FinetuneConfig(
    epochs=6, lr=6e-3, layer_decay=1.0, auto_augment="none", mixup=0.0, cutmix=0.0, erasing=0.0, crop_area=(0.5, 1.0),
    workers=0, precision="fp32",
)  # fmt: skip


def pattern(name: str, index: int, size: int = 64) -> Image.Image:
    """A noisy grating or rings in some colour."""
    rng = np.random.default_rng([CLASSES.index(name), index])
    y, x = np.mgrid[:size, :size]
    shift = rng.uniform(0, 2 * np.pi)
    waves = {"columns": 0.8 * x + shift, "rows": 0.8 * y + shift, "rings": 0.5 * np.hypot(x - 32, y - 32) + shift}
    field = 128 + 60 * np.sin(waves[name])[..., None] * rng.uniform(0.3, 1, 3) + rng.normal(0, 20, (size, size, 3))
    return Image.fromarray(np.clip(field, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def patterns(tmp_path_factory) -> Path:
    """`train` with 3 × 24 pictures, `val` with 3 × 10."""
    root = tmp_path_factory.mktemp("patterns")
    for split, numbers in (("train", range(24)), ("val", range(1000, 1010))):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for number in numbers:
                pattern(name, number).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def tuned(patterns, run, tmp_path_factory):
    """A finished run of the random encoder of `run`: its folder and its report."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    return out, finetune(str(run), patterns / "train", patterns / "val", out, config=QUICK)


def logits_of(model, paths) -> torch.Tensor:
    transform = cim_models.create_transform(model)
    with torch.no_grad():
        return model.eval()(torch.stack([transform(read_image(path)) for path in paths]))


def test_it_beats_chance_and_the_best_weights_are_those_that_were_measured(tuned, patterns):
    out, report = tuned
    saved = json.loads((out / "finetune.json").read_text())
    assert saved["result"]["headline"] > 0.6 and saved["result"]["chance"] == pytest.approx(1 / 3)
    assert saved["result"]["scores"] == {"top-1": saved["result"]["headline"]} and "top-1" in str(report)
    paths = [path for name in CLASSES for path in sorted((patterns / "val" / name).iterdir())]
    labels = torch.arange(3).repeat_interleave(10)
    logits = logits_of(cim_models.create_model("cim_vit_tiny", weights=out), paths)
    expected = multiclass_accuracy(logits, labels, 3, average="micro").item()
    assert saved["result"]["headline"] == pytest.approx(expected, abs=1e-6)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert saved["result"]["loss"] == pytest.approx(loss, rel=1e-4)
    history = saved["result"]["history"]
    assert len(history) == 6 and history[-1]["images_seen"] == saved["result"]["images_seen"] == 16 * 6 * 4
    assert saved["result"]["best_epoch"] in {line["epoch"] for line in history}
    top = max(line["score"] for line in history)
    assert next(line for line in history if line["epoch"] == saved["result"]["best_epoch"])["score"] == top


def test_a_run_that_started_from_a_release_passes_its_licence_on(run, patterns, tmp_path):
    before = load_manifest().default("cim_vit_tiny")
    mine = shutil.copytree(run, tmp_path / "mine")
    config = {"init": before.id, "data": {"size": 64}, "views": {"context_size": 64, "exemplars": {"size": 32}}}
    (mine / "config.yaml").write_text(json.dumps(config))
    (mine / "log.jsonl").write_text('{"step": 1, "images_seen": 0, "epoch": 0}\n')
    splits, quick = (patterns / "train", patterns / "val"), replace(QUICK, epochs=1, held_out=0)
    for start, untrained, expected in (
        (mine, False, before),
        (mine / "target.safetensors", False, before),
        (mine, True, None),
    ):
        out = tmp_path / f"{start.stem}_{untrained}"
        finetune(str(start), *splits, out, config=quick, limit_per_class=2, random_init=untrained)
        entry = json.loads((out / "config.json").read_text())["cim_models"]
        assert entry["licence"] == (expected.licence if expected else "not stated")
        assert [data["name"] for data in entry["data"]] == [
            *(d.name for d in (expected.data if expected else ())),
            "train",
        ]
        assert entry["summary"].startswith(f"cim_vit_tiny from {'random weights' if untrained else start.name}, ")


def test_the_report_says_how(tuned, patterns, run):
    _, report = tuned
    assert report.protocol.startswith("finetune-1, lr=0.006, layer_decay=1.0") and "drop_path" not in report.protocol
    assert report.settings["training_images"] == 66 and report.settings["held_out_images"] == 6
    assert report.settings["seed"] == 0 and report.settings["epochs"] == 6 and report.settings["images_per_step"] == 4
    assert report.data["train"]["images"] == 72 and report.data["val"]["unreadable"] == []
    assert report.model["architecture"] == "cim_vit_tiny" and report.model["transform"]["input_size"] == (3, 64, 64)
    words = report.command.split()
    assert words[:4] == ["cim", "evaluate", "finetune", str(run)] and "--crop-area 0.5 1.0" in report.command
    assert "--auto-augment none" in report.command and "--drop-path" not in words and "--resume" not in words


PLAIN = """
import sys
sys.modules["cim_models"] = None
import timm, torch
from safetensors.torch import load_file, save_file
from timm.data.auto_augment import RandAugment
folder, picture, out = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
assert list(model.pretrained_cfg["label_names"]) == ["columns", "rings", "rows"], model.pretrained_cfg
with torch.no_grad():
    save_file({"logits": model(load_file(picture)["picture"])}, out)
"""


def logits_of_plain_timm(folder: Path, pictures: torch.Tensor, place: Path) -> torch.Tensor:
    """What timm makes of a folder in a process that cannot import cim_models."""
    save_file({"picture": pictures}, place / "picture.safetensors")
    command = [sys.executable, "-c", PLAIN, folder, place / "picture.safetensors", place / "logits.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr
    return load_file(place / "logits.safetensors")["logits"]


def test_best_and_last_load_everywhere_with_their_labels(tuned, tmp_path):
    out, report = tuned
    pictures = torch.randn(2, 3, 64, 64)
    state = torch.load(out / "last.pt", weights_only=True)
    for folder, tensors in ((out, state["best"]), (out / "last", state["model"])):
        model = cim_models.create_model("cim_vit_tiny", weights=folder).eval()
        assert model.pretrained_cfg["label_names"] == tuple(CLASSES) and model.num_classes == 3
        assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
        with torch.no_grad():
            logits = model(pictures)
        assert logits.shape == (2, 3)
        assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(pictures), logits)
        torch.testing.assert_close(logits_of_plain_timm(folder, pictures, tmp_path), logits, atol=0, rtol=0)
        entry = json.loads((folder / "config.json").read_text())["cim_models"]
        assert entry["kind"] == "finetuned" and entry["num_classes"] == 3 and entry["model_args"]["fc_norm"] is True
    encoder = open_encoder(str(out))
    assert encoder.num_classes == 0 and encoder(pictures.to(next(encoder.parameters()).device)).shape == (2, 192)
    card = (out / "README.md").read_text()
    assert "finetune_top1" in card and f"{report.result['headline']:.1%}" in card
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


def test_random_rows_come_from_the_same_command(patterns, run, tmp_path):
    config = replace(QUICK, epochs=0.25, layer_decay=0.8)
    reports = {}
    for name, options in {
        "trained": {}, "random": {"random_init": True}, "scratch": {"from_scratch": True},
        "other": {"random_init": True, "config": replace(config, seed=1)},
    }.items():  # fmt: skip
        options = {"config": config, **options}
        reports[name] = finetune(str(run), patterns / "train", patterns / "val", tmp_path / name, **options)
    assert len({report.model["weights_sha256"] for report in reports.values()}) == 3
    assert reports["random"].model["weights_sha256"] == reports["scratch"].model["weights_sha256"]
    assert [report.model["random_init"] for report in reports.values()] == [False, True, True, True]
    assert {report.settings["steps"] for report in reports.values()} == {4}
    scales = {name: report.settings["layer_decay"] for name, report in reports.items()}
    assert scales == {"trained": 0.8, "random": 0.8, "scratch": 1.0, "other": 0.8}
    assert len({report.protocol for report in reports.values()}) == 1  # rows of one table
    assert "--from-scratch" in reports["scratch"].command and "--random-init" in reports["random"].command


@pytest.mark.parametrize("name", ["cim_vit_tiny", "cim_resnet18", "test_vit", "test_resnet", "test_convnext"])
def test_a_classifier_is_the_encoder_with_a_new_head(name):
    torch.manual_seed(0)
    encoder = open_encoder(name, random_init=True, image_size=96, device="cpu")
    found = find_weights(name)
    assert (found is None) == name.startswith("test_")
    classifier = build_classifier(encoder, (found and found.model_args) or {}, 7, DEFAULT)
    same = build_classifier(encoder, (found and found.model_args) or {}, 7, DEFAULT)
    held, mine = encoder.state_dict(), classifier.state_dict()
    moved = {"norm.weight", "norm.bias"} if "vit" in name else set()
    assert held.keys() - mine == moved and all(torch.equal(held[key], mine[key]) for key in held.keys() - moved)
    assert all(torch.equal(value, mine[key]) for key, value in same.state_dict().items())
    assert ("fc_norm.weight" in mine) == ("vit" in name)
    assert classifier(torch.randn(2, 3, 96, 96)).shape == (2, 7)
    drops = {module.drop_prob for module in classifier.modules() if isinstance(module, timm.layers.DropPath)}
    assert max(drops, default=0) == pytest.approx(0.1)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_stochastic_depth_is_that_of_the_recipe(rate):
    """Swin has some of its own, which 0 has to take away."""
    encoder = open_encoder("swin_tiny_patch4_window7_224", random_init=True, device="cpu")
    classifier = build_classifier(encoder, {}, 7, replace(DEFAULT, drop_path=rate))
    drops = [module.drop_prob for module in classifier.modules() if isinstance(module, timm.layers.DropPath)]
    assert max(drops) == pytest.approx(rate)


def test_a_model_of_timm_becomes_a_folder_of_timm(patterns, tmp_path):
    out = tmp_path / "out"
    config = replace(QUICK, epochs=0.2, drop_path=0.0)
    options = dict(random_init=True, image_size=64, config=config)
    finetune("test_resnet", patterns / "train", patterns / "val", out, **options)
    pictures = torch.randn(2, 3, 64, 64)
    state = torch.load(out / "last.pt", weights_only=True)["model"]
    model = timm.create_model("test_resnet", num_classes=3).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(logits_of_plain_timm(out, pictures, tmp_path), model(pictures), atol=0, rtol=0)


def test_a_peer_starts_from_its_file(patterns, tmp_path):
    """A checkpoint of another method trains as the same weights do that come another way, and goes on after a stop."""
    with torch.random.fork_rng():
        torch.manual_seed(QUICK.seed)
        peer = timm.create_model("test_vit", num_classes=0)
    torch.save({"epoch": 3, "model": {f"backbone.{k}": v for k, v in peer.state_dict().items()}}, tmp_path / "peer.pth")
    folders, config = (patterns / "train", patterns / "val"), replace(QUICK, epochs=0.5)
    same = dict(weights=str(tmp_path / "peer.pth"), image_size=64, config=config)
    reports = [finetune("test_vit", *folders, tmp_path / "peer", **same)]
    reports += [finetune("test_vit", *folders, tmp_path / "seed", random_init=True, image_size=64, config=config)]
    assert reports[0].result == reports[1].result and reports[0].settings["steps"] == 8
    assert reports[0].model["weights_sha256"] == reports[1].model["weights_sha256"]
    assert reports[0].model["weights"] == str(tmp_path / "peer.pth") and f"--weights {tmp_path}" in reports[0].command
    files = [tmp_path / name / "model.safetensors" for name in ("peer", "seed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not torch.equal(load_file(files[0])["patch_embed.proj.weight"], peer.patch_embed.proj.weight)
    assert finetune("test_vit", *folders, tmp_path / "peer", **same, resume=True).result == reports[0].result
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "peer.pth")
    with pytest.raises(CheckpointError, match="is of another run: weights_sha256"):
        finetune("test_vit", *folders, tmp_path / "peer", **same, resume=True)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "peer.pth")
    with pytest.raises(WeightsError, match="peer.pth"):
        finetune("test_vit", *folders, tmp_path / "other", **same)
    assert not (tmp_path / "other").exists()


def test_the_augmentation_of_the_recipe_fails_on_no_image():
    """timm's magnitudes are random: here each operation meets the greatest and the least."""
    transform = training_transform(open_encoder("cim_vit_tiny", image_size=32, device="cpu"), DEFAULT)
    policy = next(step for step in transform.transforms if isinstance(step, RandAugment))
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    assert len(policy.ops) == 15
    for operation in policy.ops:
        operation.prob, operation.magnitude_std = 1.0, 10.0
        for index in range(20):
            assert operation(pattern("rings", index)).size == (64, 64)
    assert transform(pattern("rows", 0)).shape == (3, 32, 32)


def test_the_example_runs_and_trains_in_its_only_epoch(patterns):
    run = "g = runpy.run_path(sys.argv[0]); print(max(group['lr'] for group in g['optimiser'].param_groups))"
    command = [sys.executable, "-c", f"import runpy, sys; del sys.argv[0]; {run}", ROOT / "examples" / "finetune.py"]
    command += [patterns / "train", patterns / "val", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "\ntop-1 " in done.stdout, done.stderr
    assert float(done.stdout.split()[-1]) > 0


def test_layers_have_rates_of_their_own_in_readme():
    blocks = [text.partition("```")[0] for text in (ROOT / "README.md").read_text().split("```python\n")]
    (block,) = (block for block in blocks if "AdamW" in block)
    exec(block, made := {})
    rates = {id(p): group["lr"] for group in made["optimiser"].param_groups for p in group["params"]}
    first, last = (rates[id(made["encoder"].blocks[i].mlp.fc1.weight)] for i in (0, 11))
    assert first / last == pytest.approx(0.8**11)


def test_the_example_counts_classes_as_in_training(patterns, tmp_path):
    """Also where the pictures to measure it on are not of all of them."""
    shutil.copytree(patterns / "val" / "rows", tmp_path / "val" / "rows")
    code = (ROOT / "examples" / "finetune.py").read_text().replace("range(epochs)", "()").replace("in tests)", "in ())")
    code += "\nprint({label for _, label in tests.dataset.reader.samples}, images.reader.class_to_idx)"
    command = [sys.executable, "-c", code, patterns / "train", tmp_path / "val", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    labels, _, classes = done.stdout.splitlines()[-1].partition(" ")
    assert eval(labels) == {eval(classes)["rows"]} != {0}, done.stderr


def test_sums_agree_with_torchmetrics():
    torch.manual_seed(0)
    logits, labels = torch.randn(500, 20), torch.randint(20, (500,))
    right, right5, loss, count = batch_sums(logits, labels).tolist()
    assert count == 500
    for hits, k in ((right, 1), (right5, 5)):
        expected = multiclass_accuracy(logits, labels, 20, top_k=k, average="micro").item()
        assert hits / 500 == pytest.approx(expected, abs=1e-6)
    assert loss / 500 == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert batch_sums(torch.randn(4, 2), torch.zeros(4).long())[1] == 4


def test_unreadable_images_are_replaced_or_left_out_and_named(patterns, run, tmp_path):
    shutil.copytree(patterns, tmp_path / "data")
    broken = [tmp_path / "data" / "train" / "rows" / f"{number}.png" for number in range(0, 24, 3)]
    broken.append(tmp_path / "data" / "val" / "rings" / "1003.png")
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    folders = tmp_path / "data" / "train", tmp_path / "data" / "val"
    report = finetune(str(run), *folders, tmp_path / "out", config=replace(QUICK, epochs=1, held_out=0.0))
    named = report.data["train"]["unreadable"]
    assert 1 <= len(named) <= 8 and all(any(line.startswith(str(path)) for path in broken) for line in named)
    assert [line.split(": ")[0] for line in report.data["val"]["unreadable"]] == [str(broken[-1])]
    assert report.result["history"] == [] and report.result["best_epoch"] == 1
    split = read_split(folders[0])
    held = hold_out(split.labels, QUICK.held_out, QUICK.seed)[1].tolist()
    split.paths[held[0]].write_text("no picture")
    report = finetune(str(run), *folders, tmp_path / "held", config=replace(QUICK, epochs=0.2))
    assert f"{split.paths[held[0]]}: not an image" in report.data["train"]["unreadable"]
    for path in (tmp_path / "data" / "val").rglob("*.png"):
        path.write_text("no picture")
    with pytest.raises(DataError, match="val: none of 30 images can be read; the first: .*png: not an image"):
        finetune(str(run), *folders, tmp_path / "out2", config=replace(QUICK, epochs=0.2, held_out=0.0))


def test_what_is_wrong_with_the_data_is_said_before_anything_is_trained(patterns, run, tmp_path):
    def tune(name="data", **changes):
        finetune(str(run), tmp_path / name / "train", tmp_path / name / "val", tmp_path / "out",
                 config=replace(QUICK, **changes))  # fmt: skip

    shutil.copytree(patterns, tmp_path / "data")
    train, val = tmp_path / "data" / "train", tmp_path / "data" / "val"
    with pytest.raises(DataError, match="nowhere.train: no such folder"):
        tune("nowhere")
    (train / "empty").mkdir()
    with pytest.raises(DataError, match="empty: this class folder holds no image"):
        tune()
    (train / "empty").rmdir()
    (val / "rings").rename(val / "circles")
    with pytest.raises(DataError, match="train has classes that .*val has not: rings"):
        tune()
    shutil.rmtree(val / "circles")
    shutil.rmtree(train / "rings")
    with pytest.raises(DataError, match="train: each class has one training image.*or held_out 0"):
        for name in ("rows", "columns"):
            for path in sorted((train / name).iterdir())[1:]:
                path.unlink()
        tune()
    with pytest.raises(DataError, match="2 training images do not fill a step of 8"):
        tune(held_out=0.0, batch_size=8)
    shutil.rmtree(train / "rows")
    with pytest.raises(DataError, match="train: 1 class; accuracy needs at least two"):
        tune()
    with pytest.raises(ConfigError, match="mixup is -1.0; it must be 0 or more"):
        tune(mixup=-1.0)
    with pytest.raises(ConfigError, match="tag='a b': give letters"):
        finetune(str(run), *(patterns / name for name in ("train", "val")), tmp_path / "out", config=QUICK, tag="a b")
    for words in ("rubbish", "rand-x9"):
        with pytest.raises(ConfigError, match=f"auto_augment='{words}' is not in timm's words"):
            training_transform(open_encoder(str(run), device="cpu"), replace(QUICK, auto_augment=words))
    assert not (tmp_path / "out").exists()


def test_another_run_in_the_folder_is_not_overwritten(tuned, patterns, run):
    out, _ = tuned
    with pytest.raises(CheckpointError, match="holds a run; give --resume"):
        finetune(str(run), patterns / "train", patterns / "val", out, config=QUICK)
    with pytest.raises(CheckpointError, match="config.drop_path: 0.1 in the checkpoint, 0.3 asked for"):
        finetune(str(run), patterns / "train", patterns / "val", out, config=replace(QUICK, drop_path=0.3), resume=True)


def test_other_preprocessing_is_another_run(patterns, tmp_path):
    """Tags of timm may differ in that alone."""
    options = dict(random_init=True, image_size=32, config=replace(QUICK, epochs=0.05, batch_size=4, held_out=0.0))
    folders = patterns / "train", patterns / "val"
    finetune("resnet18.tv_in1k", *folders, tmp_path / "out", **options)
    with pytest.raises(CheckpointError, match="transform.crop_pct: 0.875 in the checkpoint, 0.95 asked for"):
        finetune("resnet18.a1_in1k", *folders, tmp_path / "out", **options, resume=True)


FRESH = """
import sys, torch
from cim_models import cli
torch.set_num_threads(1)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_killed_run_goes_on_bit_for_bit(patterns, run, tmp_path):
    """SIGKILL after the first checkpoint, --resume, and compare: weights and history of an unbroken run."""
    flags = "--epochs 4 --batch-size 12 --workers 1 --device-batch 8 --ema 0.9 --precision fp32".split()
    data = ["evaluate", "finetune", str(run), str(patterns / "train"), str(patterns / "val")]

    def started(out: Path, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-c", FRESH, *data, "--out", str(out), "--tag", "same", *flags, *more]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with started(whole) as process:
        said = process.communicate()[0].decode()
    assert process.returncode == 0 and "top-1" in said, said
    with started(broken) as process:
        while process.poll() is None and not (broken / "last.pt").exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert torch.load(broken / "last.pt", weights_only=True)["step"] < 20 and not (broken / "config.json").exists()
    with started(broken, "--resume") as process:
        said = process.communicate()[0].decode()
    assert process.returncode == 0, said
    for name in ("model.safetensors", "last/model.safetensors", "training.jsonl"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    reports = [json.loads((out / "finetune.json").read_text()) for out in (whole, broken)]
    assert reports[0]["result"] == reports[1]["result"]
    assert reports[1]["command"] == reports[0]["command"].replace(str(whole), str(broken))  # repeats it from the start


def test_two_processes_share_a_step(patterns, run, tmp_path, launch):
    """The same steps as one process, the same numbers but for rounding, each image measured once, one table printed."""
    flags = (
        "--epochs 1 --batch-size 12 --workers 0 --drop-path 0 --mixup 0 --cutmix 0 --precision fp32 --lr 3e-3".split()
    )
    shutil.copytree(patterns / "val", tmp_path / "val")
    broken = [tmp_path / "val" / name for name in ("columns/1002.png", "rows/1003.png")]
    for path in broken:
        path.write_text("no picture")
    command = ["evaluate", "finetune", str(run), str(patterns / "train"), str(tmp_path / "val"), *flags, "--out"]
    done = launch(FRESH, *command, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert cli.main([*command, str(tmp_path / "one")]) == 0
    outs = [tmp_path / name for name in ("one", "two")]
    first, second = (json.loads((out / "finetune.json").read_text()) for out in outs)
    assert done.stdout.count("chance") == 1
    assert first["settings"] == second["settings"] and first["settings"]["steps"] == 5
    assert second["result"]["loss"] == pytest.approx(first["result"]["loss"], rel=1e-3)
    named = [line.split(": ")[0] for line in second["data"]["val"]["unreadable"]]
    assert named == [str(path) for path in broken] and first["data"] == second["data"]
    one, two = (load_file(out / "model.safetensors") for out in outs)
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-2
    files = [{str(path.relative_to(out)) for path in out.rglob("*")} for out in outs]
    assert files[0] == files[1]


@pytest.mark.slow
def test_two_minutes_on_imagenette_beat_chance(shared, tmp_path):
    """The embedded encoder on 10 × 60 real pictures; chance is 10 %."""
    for split in ("train", "val"):
        shutil.unpack_archive(shared / "data" / "imagenette" / f"{split}.zip", tmp_path)
    config = replace(QUICK, epochs=12, lr=2e-3, crop_area=(0.25, 1.0), drop_path=0.0, precision="auto")
    out = tmp_path / "out"
    report = finetune(
        "cim_vit_tiny", tmp_path / "train", tmp_path / "val", out, image_size=64, limit_per_class=60, config=config
    )
    assert report.data["val"]["images"] == 500 and report.result["headline"] > 0.2
    model = cim_models.create_model("cim_vit_tiny", weights=out).eval()
    names = sorted(path.name for path in (tmp_path / "val").iterdir())
    assert list(model.pretrained_cfg["label_names"]) == names
    paths = [path for name in names for path in sorted((tmp_path / "val" / name).iterdir())]
    predicted = torch.cat([logits_of(model, paths[start : start + 50]).argmax(1) for start in range(0, 500, 50)])
    right = (predicted == torch.arange(10).repeat_interleave(50)).float().mean().item()
    assert right == pytest.approx(report.result["headline"], abs=1e-6)
