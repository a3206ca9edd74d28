"""cim_models.pretraining.loop: real runs on real files, the smallest that show what they should."""

import gc
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import time
import warnings
import weakref
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cim_models.errors import CheckpointError, ConfigError, DataError
from cim_models.pretext import views as views_module
from cim_models.pretext.colour import ColourConfig
from cim_models.pretext.measures import agreement, location_prior
from cim_models.pretext.views import make_views
from cim_models.pretraining import loop, schedules
from cim_models.pretraining.build import build
from cim_models.pretraining.config import PretrainConfig, load_recipe, to_dict
from cim_models.pretraining.data import GlobalBatches, Pictures, loader
from cim_models.pretraining.log import Log
from cim_models.pretraining.loop import pretrain
from cim_models.pretraining.readers import Files

TIMES = {"images_per_second", "data_wait", "peak_memory"}
NUMBERS = {
    "step", "steps", "epoch", "images_seen", "loss", "gap", "iou", "iou_shuffled", "cosine", "deviation", "prior_loss",
    "lr", "momentum", "grad_norm", "images_per_second", "data_wait", "unreadable", "peak_memory",
}  # fmt: skip


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_same_weights(left: Path, right: Path):
    """All tensors of two checkpoints, bit for bit."""
    states = [torch.load(path / "last.pt", weights_only=True) for path in (left, right)]
    models = [state["model"] for state in states]
    assert models[0].keys() == models[1].keys()
    assert [name for name in models[0] if not torch.equal(models[0][name], models[1][name])] == []
    optimisers = [state["optimiser"]["state"] for state in states]
    assert optimisers[0].keys() == optimisers[1].keys()
    for index, values in optimisers[0].items():
        assert all(torch.equal(value, optimisers[1][index][name]) for name, value in values.items())
    assert states[0]["step"] == states[1]["step"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, photographs, configure):
    """A finished run of four steps, and its configuration."""
    out = tmp_path_factory.mktemp("finished") / "a" / "run"
    config = configure(photographs(8, 64), out, optimiser__epochs=2.0, save_every=3, tensorboard=True)
    config.optimiser.batch_size, config.optimiser.warmup_epochs = 4, 1.0
    umask = os.umask(0o027)
    try:
        assert pretrain(config) == out
    finally:
        os.umask(umask)
    yield out, config
    shutil.rmtree(out)


def test_what_a_run_leaves(finished):
    out, config = finished
    names = {path.name for path in out.iterdir() if not path.name.startswith("events.out.tfevents.")}
    assert names == {
        "config.yaml", "log.jsonl", "samples.png", "last.pt", "online.safetensors", "target.safetensors",
        "head.safetensors",
    }  # fmt: skip
    assert {stat.S_IMODE((out / name).stat().st_mode) for name in names} == {0o640}
    assert load_recipe(out / "config.yaml") == config
    with Image.open(out / "samples.png") as sheet:
        assert min(sheet.size) > 64
        sheet.load()


def test_the_log(finished):
    out, config = finished
    lines = log_of(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(set(line) == NUMBERS and np.isfinite(list(line.values())).all() for line in lines)
    assert [line["images_seen"] for line in lines] == [4, 8, 12, 16] and {line["steps"] for line in lines} == {4}
    assert [line["epoch"] for line in lines] == [0.5, 1.0, 1.5, 2.0]
    rates = [schedules.learning_rate(step, 4, 2, config.optimiser.lr * 4 / 256) for step in range(4)]
    assert [line["lr"] for line in lines] == rates
    assert [line["momentum"] for line in lines] == [schedules.momentum(step, 4, 0.99) for step in range(4)]
    prior = location_prior(config.views, 64)
    assert {line["prior_loss"] for line in lines} == {prior.loss}
    assert all(line["grad_norm"] > 0 and line["images_per_second"] > 0 for line in lines)
    assert all(0 <= line["data_wait"] <= 1 and line["unreadable"] == 0 for line in lines)
    assert abs(lines[0]["loss"] - prior.constant_loss) < 0.1


def test_exported_encoders_are_timms(finished):
    out, _ = finished
    state = torch.load(out / "last.pt", weights_only=True)
    assert (state["step"], state["steps"]) == (4, 4)
    stock = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, global_pool="avg", fc_norm=False)
    for part in ("online", "target", "head"):
        saved = load_file(out / f"{part}.safetensors")
        prefix = f"{part}."
        model = {name.removeprefix(prefix): t for name, t in state["model"].items() if name.startswith(prefix)}
        assert saved.keys() == model.keys() and all(torch.equal(saved[name], model[name]) for name in saved)
        if part != "head":
            stock.load_state_dict(saved, strict=True)
        with safe_open(out / f"{part}.safetensors", "pt") as file:
            metadata = file.metadata()
        assert (metadata["architecture"], metadata["step"], metadata["images_seen"]) == ("cim_vit_tiny", "4", "16")
        assert json.loads(metadata["model_args"]) == {"img_size": 64}
        assert json.loads(metadata["pretext"])["head_width"] == 96


def test_tensorboard_shows_the_log(finished):
    out, _ = finished
    events = EventAccumulator(str(out))
    events.Reload()
    lines = log_of(out)
    for name in ("loss", "gap", "lr", "grad_norm"):
        shown = events.Scalars(name)
        assert [event.step for event in shown] == [1, 2, 3, 4]
        assert [event.value for event in shown] == pytest.approx([line[name] for line in lines])


def test_tensorboard_shows_a_run_that_went_on(tmp_path):
    """What was shown up to the checkpoint stays, what came after it is replaced."""
    for start, loss in ((0, 1.0), (2, 2.0)):
        log = Log(tmp_path, PretrainConfig(tensorboard=True), start, enabled=True)
        for step in range(start + 1, 5 if start else 4):
            log.write({"step": step, "loss": loss})
        log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_a_damaged_log_is_named_before_it_is_replaced(tmp_path):
    for content in (b'{"step": 1}\n\0\0\n', b'{"loss": 1}\n', b"[]\n"):
        (tmp_path / "log.jsonl").write_bytes(content)
        with pytest.raises(CheckpointError, match="log.jsonl is damaged: repair it, or remove it to go on without it"):
            Log(tmp_path, PretrainConfig(), 1, enabled=True)
        assert (tmp_path / "log.jsonl").read_bytes() == content


def test_the_configuration_of_a_run_that_went_on_repeats_it(tmp_path):
    Log(tmp_path, PretrainConfig(resume=True, seed=3), 0, enabled=True)
    assert load_recipe(tmp_path / "config.yaml") == PretrainConfig(seed=3)


def test_a_run_is_not_overwritten(finished):
    out, config = finished
    before = (out / "last.pt").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="run holds a run; give --resume to go on with it, or another --out"):
        pretrain(config)
    assert (out / "last.pt").stat().st_mtime_ns == before


def test_a_finished_run_has_nothing_to_resume(finished, configure):
    out, config = finished
    before = log_of(out), (out / "last.pt").stat().st_mtime_ns
    again = configure(config.data.path, out, optimiser__epochs=2.0, optimiser__warmup_epochs=1.0, resume=True)
    assert pretrain(again) == out
    assert (log_of(out), (out / "last.pt").stat().st_mtime_ns) == before


def test_a_run_of_another_configuration_is_not_resumed(finished, configure):
    out, config = finished
    other = configure(config.data.path, out, optimiser__epochs=2.0, optimiser__warmup_epochs=1.0, resume=True, seed=1)
    with pytest.raises(CheckpointError, match="of another configuration: seed: 0 in the checkpoint, 1 asked for"):
        pretrain(other)


def test_a_run_with_other_images_is_not_resumed(finished, configure, photographs):
    out, _ = finished
    other = configure(photographs(12, 64), out, optimiser__epochs=2.0, optimiser__warmup_epochs=1.0, resume=True)
    with pytest.raises(CheckpointError, match="a run of 4 steps, now there would be 6: the images"):
        pretrain(other)


def test_a_warm_up_longer_than_the_run(configure, photographs, out):
    with pytest.raises(ConfigError, match="would never reach its peak"):
        pretrain(configure(photographs(8, 64), out, optimiser__warmup_epochs=3.0))


def test_nothing_to_resume(photographs, configure, out):
    with pytest.raises(CheckpointError, match="run/last.pt: no checkpoint to resume"):
        pretrain(configure(photographs(8, 64), out, resume=True))
    assert not out.exists()


KILLED = """
import logging, sys, torch
logging.basicConfig()
torch.set_num_threads(int(sys.argv[2]))
from cim_models.pretraining import load_recipe, pretrain
pretrain(load_recipe(sys.argv[1]))
"""


def started(config: PretrainConfig, folder: Path) -> subprocess.Popen:
    """A run in a process of its own: bits are compared between fresh processes."""
    (folder / "run.yaml").write_text(yaml.safe_dump(to_dict(config)))
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, folder / "run.yaml", str(torch.get_num_threads())],
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, photographs, configure):
    """SIGKILL after the first checkpoint, resume, and compare: weights, optimiser and log of an unbroken run."""
    images = tmp_path / "images"
    shutil.copytree(photographs(200, 64), images)
    changes = dict(
        optimiser__accumulation=2, optimiser__batch_size=2, optimiser__epochs=5 / 50, optimiser__warmup_epochs=2 / 50,
        backbone__drop_path=0.2, data__workers=1, log_every=3, save_every=2,
    )  # fmt: skip
    order = list(GlobalBatches(200, 2, seed=0, total_steps=10))
    names = sorted(path.name for path in images.iterdir())
    early, late = (names[order[batch][0][1]] for batch in (1, 7))  # of steps 2 and 4
    (images / early).write_text("not an image")
    (images / late).write_bytes((images / late).read_bytes()[:300])

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    try:
        config = configure(images, unbroken, **changes)
        with started(config, tmp_path) as process:
            process.communicate()
        config.out = str(broken)
        with started(config, tmp_path) as process:
            while process.poll() is None and not (broken / "last.pt").exists():
                time.sleep(0.005)
            process.kill()
            assert (broken / "last.pt").exists(), process.stderr.read().decode()
        step = torch.load(broken / "last.pt", weights_only=True)["step"]
        assert step < 5
        with open(broken / "log.jsonl", "a") as file:
            file.write('{"step": 5, "steps": 5, "lo')
        config.resume = True
        with started(config, tmp_path) as process:
            messages = process.communicate()[1].decode()
        assert_same_weights(unbroken, broken)
        logs = [
            [{k: v for k, v in line.items() if k not in TIMES} for line in log_of(out)] for out in (unbroken, broken)
        ]
        assert logs[0] == logs[1]
        assert [line["step"] for line in logs[0] if "loss" in line] == [2, 3, 4, 5]
        skipped = [line for line in logs[0] if "skipped" in line]
        assert [line["step"] for line in skipped] == [2, 4] and [line["unreadable"] for line in skipped] == [1, 2]
        assert skipped[0]["skipped"] == f"{images / early}: not an image" and late in skipped[1]["skipped"]
        assert [line["unreadable"] for line in logs[0] if "loss" in line] == [1, 1, 2, 2]
        if step == 2:
            assert messages.count("skipped ") == 1
    finally:
        for out in (unbroken, broken):
            shutil.rmtree(out, ignore_errors=True)


def easy(configure, images: Path, out: Path):
    """50 steps of 32 images: unturned squares of one size, nothing recoloured."""
    batches = len(list(images.rglob("*.*"))) // 32
    return configure(
        images, out, optimiser__batch_size=32, optimiser__epochs=50 / batches, optimiser__warmup_epochs=5 / batches,
        optimiser__lr=0.016, optimiser__momentum=0.9, log_every=5, data__flip=0.0, data__crop_area=(1.0, 1.0),
        data__crop_ratio=(1.0, 1.0), views__colour=ColourConfig.off(), views__exemplars__area=(0.25, 0.25),
        views__exemplars__ratio=(1.0, 1.0), views__exemplars__angle=(0.0, 0.0), views__exemplars__flip=0.0,
    )  # fmt: skip


def gap_on(config) -> float:
    """Shuffled-exemplar gap of a finished run, over every image that it was trained on, with rectangles of its own."""
    cim = build(config, 0.0)
    cim.load_state_dict(torch.load(Path(config.out) / "last.pt", weights_only=True)["model"])
    pictures = Pictures(
        Files(sorted(Path(config.data.path).rglob("*.*"))), 64, (1.0, 1.0), (1.0, 1.0), 0.0, exemplars=2,
        draws=views_module.DRAWS, seed=99,
    )  # fmt: skip
    gaps = []
    for batch in loader(pictures, GlobalBatches(len(pictures), 40, seed=0, total_steps=len(pictures) // 40), 0):
        views = make_views(batch["source"], batch["uniforms"], config.views)
        with torch.no_grad():
            output = cim(*views)
            gaps.append(agreement(cim.head, output.context, output.exemplars, output.logits, views.maps)["gap"])
    return torch.stack(gaps).mean().item()


def assert_learns(config):
    pretrain(config)
    lines = log_of(Path(config.out))
    assert [line["step"] for line in lines] == list(range(5, 55, 5))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05
    assert abs(lines[0]["gap"]) < 0.02 and np.mean([line["gap"] for line in lines[-3:]]) > 0.03
    assert gap_on(config) > 0.03
    assert lines[-1]["deviation"] > 0.05


def test_50_steps_learn_something(photographs, configure, out):
    assert_learns(easy(configure, photographs(200, 64), out))


@pytest.mark.slow
def test_50_steps_learn_something_of_real_photographs(shared, tmp_path, configure, out):
    with zipfile.ZipFile(shared / "data" / "tiny-imagenet" / "val.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".JPEG")]
        archive.extractall(tmp_path / "photos", names[:: len(names) // 200][:200])
    assert_learns(easy(configure, tmp_path / "photos", out))


def test_a_loss_that_is_not_finite_stops_the_run(photographs, configure, out):
    images = photographs(12, 64)
    config = configure(
        images, out, optimiser__lr=1e30, optimiser__clip=None, optimiser__warmup_epochs=0.0, save_every=1, log_every=9
    )
    with pytest.raises(ConfigError, match=r"the loss is (nan|inf) at step 2: the batch is saved as .*nonfinite-step2-"):
        pretrain(config)
    last = torch.load(out / "last.pt", weights_only=True)
    assert last["step"] == 1 and all(t.isfinite().all() for t in last["model"].values())
    assert [line["step"] for line in log_of(out)] == [1]
    assert [path.name for path in out.glob("nonfinite*")] == ["nonfinite-step2-rank0.pt"]
    saved = torch.load(out / "nonfinite-step2-rank0.pt", weights_only=True)
    assert saved["step"] == 2 and saved["config"] == to_dict(config)
    assert len(saved["losses"]) == 1 and not np.isfinite(saved["losses"][0])
    pictures = Pictures(Files(sorted(images.iterdir())), 64, exemplars=2, draws=views_module.DRAWS, seed=0)
    second = list(loader(pictures, GlobalBatches(12, 4, seed=0, total_steps=2), 0))[1]
    assert torch.equal(saved["index"], second["index"]) and torch.equal(saved["source"], second["source"])
    assert torch.equal(saved["uniforms"], second["uniforms"])


def test_a_gradient_that_is_not_finite_stops_the_run(photographs, configure, out):
    """The loss is about 2e38, which float32 can hold; the norm of its gradient is not."""
    config = configure(photographs(12, 64), out, pretext__correlation_weight=3e38)
    with pytest.raises(ConfigError, match=r"the norm of the gradient is (nan|inf) at step 1: the batch is saved as"):
        pretrain(config)
    saved = torch.load(out / "nonfinite-step1-rank0.pt", weights_only=True)
    assert np.isfinite(saved["losses"]).all() and not np.isfinite(saved["grad_norm"])
    assert not (out / "last.pt").exists()


def broken_images(folder: Path, readable: int, unreadable: int) -> Path:
    folder.mkdir()
    for i in range(readable):
        Image.new("RGB", (40, 40), (i, 2 * i, 3 * i)).save(folder / f"{i}.png")
    for i in range(unreadable):
        (folder / f"bad{i}.jpg").write_bytes(b"\xff\xd8 not a picture")
    return folder


def test_too_many_unreadable_images(tmp_path, configure, out):
    config = configure(broken_images(tmp_path / "images", 14, 2), out, data__workers=1)
    with pytest.raises(DataError, match=r"of 16 images could not be read so far, more than 1%") as error:
        pretrain(config)
    assert "images/bad" in str(error.value) and not (out / "last.pt").exists()


def test_no_readable_image(tmp_path, configure, out):
    with pytest.raises(DataError, match=r"none readable of .* images tried \(of 8\); check the files"):
        pretrain(configure(broken_images(tmp_path / "images", 0, 8), out))


def test_no_images(tmp_path, configure, out):
    with pytest.raises(DataError, match="absent: no such file or folder"):
        pretrain(configure(tmp_path / "absent", out))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images in this folder"):
        pretrain(configure(tmp_path / "empty", out))
    assert not out.exists()


def test_names_that_are_not_unicode(tmp_path, configure, out):
    images = broken_images(tmp_path / "images", 200, 0)
    name = os.fsencode(images) + b"/caf\xe9.png"
    try:
        Path(os.fsdecode(name)).write_text("not an image")
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    index = sorted(os.listdir(images)).index(os.fsdecode(b"caf\xe9.png"))
    seed = next(s for s in range(500) if index in [i for _, i in list(GlobalBatches(201, 4, s, total_steps=1))[0]])
    pretrain(configure(images, out, optimiser__epochs=1 / 50, optimiser__warmup_epochs=0.0, seed=seed))
    lines = log_of(out)
    assert lines[0]["skipped"] == os.fsdecode(name) + ": not an image" and lines[1]["unreadable"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser__epochs": 0.1}, "a step takes 4 images .* too many for 0.1 epochs of 8; lower optimiser.accumu"),
        ({"optimiser__accumulation": 3, "optimiser__epochs": 9}, "a step takes 12 images .* too many for 9 ep"),
        ({"optimiser__batch_size": 9}, "8 images are fewer than one global batch of 9"),
        ({"optimiser__batch_size": 1}, "optimiser.batch_size is 1; it must be 2 or more"),
        ({"model": "vit_tiny"}, "no backbone is named 'vit_tiny'"),
        ({"backbone__img_size": 70}, "backbone.img_size is 70; it must be a multiple of cim_vit_tiny's patches of 16"),
        ({"views__context_size": 40}, "views.context_size is 40; it must be a multiple"),
        ({"views__exemplars__size": 8}, "views.exemplars.size is 8; it must be a multiple"),
        ({"pretext__head_heads": 5}, "head_width 96 must be a multiple of 4 and of head_heads 5"),
        ({"data__path": ""}, "data.path is empty"),
    ],
)
def test_runs_that_cannot_be(photographs, configure, out, changes, message):
    with pytest.raises(ConfigError, match=message):
        pretrain(configure(photographs(8, 64), out, **changes))
    assert not out.exists()


def test_a_file_in_place_of_a_run_directory(photographs, configure, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="out is .*, where no folder can be made"):
            pretrain(configure(photographs(8, 64), out))
    assert (tmp_path / "file").read_text() == "mine"


def test_no_more_readers_than_cores(photographs, configure, out, caplog):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    config = configure(photographs(8, 64), out, data__workers=cores + 5, optimiser__epochs=0.5)
    with caplog.at_level(logging.INFO, "cim_models"), warnings.catch_warnings():
        warnings.simplefilter("error")
        pretrain(config)
    assert [r.message for r in caplog.records if "readers" in r.message] == [
        f"{cores + 5} readers are asked for, but there are {cores} cores: reading with as many"
    ]


def test_a_resnet_with_all_that_can_be_switched(photographs, configure, out):
    config = configure(
        photographs(8, 64), out, model="cim_resnet18", optimiser__epochs=0.5, pretext__reduction="sum",
        pretext__global_weight=0.5, pretext__global_hidden=16, optimiser__clip=None, precision="fp32", seed=5,
        backbone__grad_checkpointing=True,
    )  # fmt: skip
    pretrain(config)
    (line,) = log_of(out)
    assert set(line) == NUMBERS | {"correlation_loss", "global_loss"}
    assert line["loss"] == pytest.approx(line["correlation_loss"] + 0.5 * line["global_loss"], rel=1e-5)
    assert line["prior_loss"] == pytest.approx(2 * location_prior(config.views, 64).loss)
    stock = timm.create_model("resnet18", num_classes=0)
    for part in ("online", "target"):
        saved = load_file(out / f"{part}.safetensors")
        stock.load_state_dict(saved, strict=True)
        assert int(saved["bn1.num_batches_tracked"]) == 1
        with safe_open(out / f"{part}.safetensors", "pt") as file:
            assert json.loads(file.metadata()["model_args"]) == {}


def test_how_often_gradients_add_up_is_the_configurations(photographs, configure, out, monkeypatch):
    """An environment that Accelerate reads for other programs does not shrink them."""
    norms = []
    for name in ("one", "two"):
        pretrain(configure(photographs(8, 64), out / name, optimiser__epochs=0.5))
        norms.append(log_of(out / name)[0]["grad_norm"])
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert norms[0] == norms[1]


def test_a_run_leaves_nothing_behind(photographs, configure, out, monkeypatch):
    """Memory is free at once, not when Python happens to look for cycles: the next run may need it."""
    models, caches = [], []
    cached = loop.cached

    def remember(*arguments):
        pictures = cached(*arguments)
        caches.append(weakref.ref(pictures.squares))
        return pictures

    monkeypatch.setattr(loop, "cached", remember)
    config = configure(photographs(8, 64), out, data__cache="device", optimiser__epochs=0.5)
    gc.collect()
    gc.disable()
    try:
        pretrain(config, lambda cim: models.append(weakref.ref(cim)) or {})
        assert [kept() for kept in models + caches] == [None, None]
    finally:
        gc.enable()


def test_stochastic_depth_is_the_online_encoders(configure):
    cim = build(configure("photos", "run", backbone__drop_path=0.9), -1.0).train()
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        online, target = ([encoder(images) for _ in range(2)] for encoder in (cim.online, cim.target))
    assert torch.equal(*target) and not torch.allclose(*online, atol=1e-3)
    assert torch.equal(target[0], cim.target.eval()(images))


def test_an_untrained_head_answers_with_the_prior(configure):
    config = configure("photos", "run")
    prior = location_prior(config.views, 64)
    cim = build(config, prior.log_odds)
    probabilities = cim.locate(torch.randn(1, 3, 64, 64), torch.randn(1, 2, 3, 32, 32))
    assert torch.allclose(probabilities, torch.tensor(prior.log_odds).sigmoid(), atol=1e-6)


def test_precision(photographs, configure, out, monkeypatch):
    """bf16 after a run in fp32 in the same process: weights and losses stay in fp32, the numbers nearly the same."""
    types, lines = [], []
    diagnose = loop.diagnose

    def spy(cim, output, views):
        types.append((output.loss.dtype, output.logits.dtype, torch.is_autocast_enabled("cpu")))
        return diagnose(cim, output, views)

    monkeypatch.setattr(loop, "diagnose", spy)
    monkeypatch.setattr("cim_models.precision.fast_bf16", lambda: False)
    for precision in ("auto", "fp32", "bf16"):
        shutil.rmtree(out, ignore_errors=True)
        pretrain(configure(photographs(8, 64), out, precision=precision, optimiser__epochs=0.25,
                           optimiser__warmup_epochs=0, optimiser__batch_size=2, views__exemplars__count=1))  # fmt: skip
        lines += log_of(out)
    assert types == [(torch.float32, torch.float32, enabled) for enabled in (False, False, True)]
    assert all(lines[0][name] == lines[1][name] for name in NUMBERS - TIMES)
    assert lines[2]["loss"] == pytest.approx(lines[0]["loss"], abs=1e-3)
    assert lines[2]["grad_norm"] != lines[0]["grad_norm"]
    assert lines[2]["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=0.05)
    assert {t.dtype for t in load_file(out / "online.safetensors").values()} == {torch.float32}
