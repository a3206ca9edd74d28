"""No run is lost: not to a kill in the middle of a save, not to a scheduler, not to a full disk."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from cim_models.errors import CheckpointError
from cim_models.pretraining import checkpoint
from cim_models.pretraining.config import PretrainConfig, to_dict
from cim_models.pretraining.loop import pretrain

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

RUNS = """
import json, os, sys, time, traceback
import torch
from cim_models import backbones
from cim_models.pretraining import load_recipe, pretrain, schedules

torch.set_num_threads(1)
build = backbones.build
backbones.build = lambda name, **options: build(name, embed_dim=24, depth=1, num_heads=2, **options)
config = load_recipe(sys.argv[1])


def signalling(function, calls, number):
    def wrapped(*arguments):
        calls[0] -= 1
        if calls[0] == 0:
            os.kill(os.getpid(), number)
        return function(*arguments)

    return wrapped


def child(writes, steps, number):
    code = 1
    try:
        calls = [writes]
        os.fsync, os.replace = (signalling(function, calls, 9) for function in (os.fsync, os.replace))
        schedules.momentum = signalling(schedules.momentum, [steps], number)
        pretrain(config)
        code = 0
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


statuses, unbroken = [], 0.0
for out, writes, steps, number, seconds in json.loads(sys.argv[2]):
    config.out = out
    if not (process := os.fork()):
        child(writes, steps, number)
    start = time.perf_counter()
    if seconds:
        time.sleep(seconds * unbroken)
        os.kill(process, 9)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    unbroken = unbroken or time.perf_counter() - start
print(json.dumps(statuses))
"""
"""Forks runs, one after another, for each of: directory, fsyncs and renames until SIGKILL, steps until a signal, which
signal, time until SIGKILL as a share of the first run's."""


def runs(config: PretrainConfig, plan: list[tuple[Path, int, int, int, float]], folder: Path) -> list[int]:
    """Exit codes of runs one after another, each a process of its own, with a model 24 wide."""
    (folder / "run.yaml").write_text(yaml.safe_dump(to_dict(config)))
    plan_text = json.dumps([(str(out), *rest) for out, *rest in plan])
    done = subprocess.run(
        [sys.executable, "-c", RUNS, folder / "run.yaml", plan_text], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def small(configure, images: Path, out: Path, steps: int, **changes) -> PretrainConfig:
    """A run of steps of a few milliseconds on 16 images, that saves after each of them."""
    return configure(
        images, out, resume="auto", optimiser__epochs=steps / 4, optimiser__warmup_epochs=0.5, save_minutes=None,
        save_every=1, precision="fp32", keep=2, data__size=32, backbone__img_size=32, backbone__drop_path=0.1,
        views__context_size=32, views__exemplars__size=16, pretext__head_width=16, pretext__head_heads=2, **changes,
    )  # fmt: skip


def assert_the_same_run(left: Path, right: Path, steps: int):
    """Weights and optimiser bit for bit, and the log but for its times."""
    states = [torch.load(run / "last.pt", weights_only=True) for run in (left, right)]
    assert states[0]["step"] == states[1]["step"] == steps
    tensors = [
        {**state["model"], **{f"{i}.{k}": v for i, s in state["optimiser"]["state"].items() for k, v in s.items()}}
        for state in states
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert [name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])] == []
    times = ("images_per_second", "data_wait", "peak_memory")
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k not in times}
            for line in (run / "log.jsonl").read_text().splitlines()
        ]
        for run in (left, right)
    ]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == list(range(1, steps + 1))


def kill(configure, images: Path, folder: Path, kills: int, steps: int):
    """Kills a run again and again, half the times anywhere and half the times in a save; then lets it end.

    Until the last kill it does half of its steps and one more for each kill at most: it needs more than twice as many.
    """
    rng, unbroken, broken = random.Random(kills), folder / "unbroken", folder / "broken"
    plan = [(unbroken, 0, 0, 0, 0.0)]
    for index in range(kills):
        anywhere = (broken, 0, 0, 0, rng.uniform(0, 1 / kills))
        in_a_save = (broken, rng.randrange(3, 24), 0, 0, 0.0)
        plan.append(in_a_save if index % 2 else anywhere)
    plan.append((broken, 0, 0, 0, 0.0))
    codes = runs(small(configure, images, unbroken, steps), plan, folder)
    assert codes == [0, *[-signal.SIGKILL] * kills, 0]
    assert_the_same_run(unbroken, broken, steps)
    kept = [path.name for path in checkpoint.kept(broken)]
    assert kept == [f"step-{step:08}.pt" for step in (steps - 1, steps)]
    assert not [path for path in broken.iterdir() if path.name.startswith(".")]


@needs_fork
def test_four_kills(configure, photographs, tmp_path):
    kill(configure, photographs(16, 32), tmp_path, kills=4, steps=12)


@needs_fork
@pytest.mark.slow
def test_twenty_kills(configure, photographs, tmp_path):
    kill(configure, photographs(16, 32), tmp_path, kills=20, steps=48)


@needs_fork
def test_a_run_that_is_told_to_end_saves_first(configure, photographs, tmp_path):
    """SIGTERM, as a scheduler sends it, then SIGINT, as a person does; neither between two of its own saves."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    config = small(configure, photographs(16, 32), unbroken, steps=12)
    config.save_every, config.log_every = 12, 12
    told = [(broken, 0, 3, signal.SIGTERM, 0.0), (broken, 0, 5, signal.SIGINT, 0.0)]
    codes = runs(config, [(unbroken, 0, 0, 0, 0.0), *told, (broken, 0, 0, 0, 0.0)], tmp_path)
    assert codes == [0, 143, 1, 0]
    assert [json.loads(line)["step"] for line in (broken / "log.jsonl").read_text().splitlines()] == [3, 8, 12]
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("unbroken", "broken")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.fixture
def full_at(monkeypatch, small_files):
    """`full_at(2)` fills the disk during the save after step 2, and frees it again."""

    def fill(step: int) -> None:
        save = checkpoint.save

        def with_a_full_disk(directory, states, done, *others):
            if done != step:
                return save(directory, states, done, *others)
            with small_files():
                return save(directory, states, done, *others)

        monkeypatch.setattr(checkpoint, "save", with_a_full_disk)

    return fill


def test_a_full_disk_does_not_end_a_run(configure, photographs, out, full_at, caplog):
    config = configure(photographs(8, 64), out, optimiser__epochs=1.5, save_every=1)
    seen = []

    def remember(*arguments):
        seen.append(torch.load(out / "last.pt", weights_only=True)["step"])
        return export(*arguments)

    export, checkpoint.export = checkpoint.export, remember
    full_at(2)
    try:
        pretrain(config)
    finally:
        checkpoint.export = export
    assert seen == [1, 3]  # after step 2 nothing else is written
    (message,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "last.pt: cannot be written: is the disk full?" in message and "the run goes on" in message
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 3


def test_a_disk_that_is_full_at_the_end(configure, photographs, out, full_at):
    config = configure(photographs(8, 64), out, save_every=3, save_minutes=None)
    full_at(4)
    with pytest.raises(CheckpointError, match="last.pt: cannot be written: is the disk full?"):
        pretrain(config)
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 3


def test_what_a_full_disk_keeps_back_at_the_end(configure, photographs, out, monkeypatch, small_files):
    config = configure(photographs(8, 64), out, resume="auto")
    export = checkpoint.export

    def with_a_full_disk(*arguments):
        with small_files():
            export(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "export", with_a_full_disk)
        with pytest.raises(CheckpointError, match="online.safetensors: cannot be written"):
            pretrain(config)
    last = torch.load(out / "last.pt", weights_only=True)
    pretrain(config)
    for part in checkpoint.PARTS:
        with safe_open(out / f"{part}.safetensors", "pt") as file:
            assert file.metadata()["step"] == str(last["step"])
            assert all(torch.equal(file.get_tensor(key), last["model"][f"{part}.{key}"]) for key in file.keys())


def test_auto_starts_or_goes_on(configure, photographs, out):
    config = configure(photographs(8, 64), out, resume="auto", optimiser__epochs=0.5)
    out.mkdir()
    (out / "log.jsonl").write_text('{"step": 1, "of": "a run that had no checkpoint yet"}\n')
    pretrain(config)
    written = (out / "last.pt").stat().st_mtime_ns
    (line,) = (out / "log.jsonl").read_text().splitlines()
    assert "loss" in json.loads(line)
    pretrain(config)
    assert (out / "last.pt").stat().st_mtime_ns == written
    config.seed = 1
    with pytest.raises(CheckpointError, match="another configuration: seed: 0 in the checkpoint, 1 asked for"):
        pretrain(config)
    shutil.rmtree(out)
