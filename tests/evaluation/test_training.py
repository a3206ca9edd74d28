"""The training loop: what a step sees, what it learns with, and that it goes on as if it had never stopped."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from cim_models.backbones import ARCHITECTURES, build
from cim_models.errors import CheckpointError, ConfigError, DataError
from cim_models.evaluation.batches import Steps, image_seed, seeded
from cim_models.evaluation.finetune import FinetuneConfig
from cim_models.evaluation.recipe import Plan, TrainConfig, make_plan
from cim_models.evaluation.training import Task, fit, layer_groups, settings_of


def depth_of(name: str) -> tuple[int, ...]:
    """Where a parameter stands in its network, by its name."""
    parts = name.split(".")
    if parts[0] == "blocks":
        return 1, int(parts[1])
    if parts[0].startswith("layer"):
        return 1, int(parts[0].removeprefix("layer")), int(parts[1])
    return (2,) if parts[0] in ("head", "fc", "norm", "fc_norm") else (0,)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layer_groups_hold_every_parameter_once_and_rise_with_depth(name):
    head = {} if "resnet" in name else {"fc_norm": True}
    with torch.device("meta"):
        model = build(name, num_classes=5, **head)
    groups = layer_groups(model, 0.05, 0.8)
    held = [parameter for group in groups for parameter in group["params"]]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(held) == len({id(parameter) for parameter in held}) == len(trained) > 30
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in trained.values()}
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    depths: dict[tuple[int, ...], set[float]] = {}
    for key, parameter in trained.items():
        depths.setdefault(depth_of(key), set()).add(scale[id(parameter)])
        assert decay[id(parameter)] == (0.05 if parameter.ndim > 1 and key != "cls_token" else 0)
    scales = [depths[depth] for depth in sorted(depths)]
    assert all(len(values) == 1 for values in scales)
    expected = [0.8**power for power in reversed(range(len(scales)))]
    assert [values.pop() for values in scales] == pytest.approx(expected)


@pytest.mark.parametrize("images", [20, 160, 1000, 25_000, 1_281_167])
def test_small_data_get_smaller_steps(images):
    plan = make_plan(TrainConfig(epochs=100), images, processes=2, even=True)
    assert plan.batch % 4 == 0 and plan.steps_per_epoch * plan.batch <= images
    assert plan.steps == 100 * plan.steps_per_epoch and plan.warmup == 5 * plan.steps_per_epoch
    assert plan.steps_per_epoch >= 16 or plan.batch == 4
    if images > 20_000:
        assert plan.batch == 1024 and plan.lr == pytest.approx(4.8e-3)
    else:
        assert plan.lr == pytest.approx(1.2e-3 * (plan.batch / 256) ** 0.5)


def test_short_runs_warm_up_for_a_fifth():
    assert make_plan(TrainConfig(epochs=2, batch_size=8), 160) == Plan(8, 20, 40, 8, pytest.approx(1.2e-3 / 32**0.5))
    with pytest.raises(DataError, match="3 training images do not fill a step of 4"):
        make_plan(TrainConfig(), 3, processes=2, even=True)
    with pytest.raises(DataError, match="100 training images do not fill a step of 256"):
        make_plan(TrainConfig(batch_size=256), 100)


def test_the_settings_say_which_precision_was_used(monkeypatch):
    for fast, auto in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("cim_models.precision.fast_bf16", lambda fast=fast: fast)
        plan = make_plan(TrainConfig(), 100)
        used = [settings_of(TrainConfig(precision=p), plan, 90, 10)["precision"] for p in ("auto", "bf16", "fp32")]
        assert used == [auto, "bf16", "fp32"]


def test_every_epoch_sees_each_image_once_in_another_order_and_goes_on_anywhere():
    plan = Plan(4, 5, 15, 0, 1.0)
    steps = list(Steps(21, plan, seed=3))
    assert len(steps) == 15 and [key[0] for step in steps for key in step] == [0] * 20 + [1] * 20 + [2] * 20
    orders = [[index for step in steps[5 * epoch : 5 * epoch + 5] for _, index in step] for epoch in range(3)]
    assert all(len(set(order)) == 20 for order in orders) and orders[0] != orders[1] != orders[2]
    for start in (1, 5, 14):
        assert list(Steps(21, plan, 3, start)) == steps[start:]
    halves = [list(Steps(21, plan, 3, 0, rank, 2)) for rank in range(2)]
    assert [left + right for left, right in zip(*halves, strict=True)] == steps


def test_random_numbers_are_a_function_of_the_key_and_come_back_after():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    drawn = []
    for key in ((0, 1, 2), (0, 1, 3), (0, 1, 2)):
        with image_seed(*key):
            drawn.append(draw())
    with seeded(0, 2, 1):
        drawn.append(draw())
    assert drawn[0] == drawn[2] and len({*drawn}) == 3 and draw() == expected


class Points(Dataset):
    """Two noisy clouds: (point (8,), cloud, nothing unreadable), with fresh noise in every epoch."""

    def __getitem__(self, key):
        epoch, index = key
        with image_seed(5, epoch, index):
            return torch.randn(8) + (index % 2), index % 2, []


class Interrupted(Exception):
    pass


def run(folder, config, resume=False, stop_after=None):
    """Trains a small network with all that has a state; `stop_after` so many epochs it stops for good."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))
    measured = []

    def measure(model):
        measured.append(model)
        assert not model.training
        if stop_after is not None and len(measured) > stop_after:
            raise Interrupted
        with image_seed(9, 0, 0):
            points, clouds = torch.randn(64, 8), torch.arange(64) % 2
        logits = model(points + clouds[:, None])
        accuracy = (logits.argmax(1) == clouds).float().mean().item()
        return {"top-1": accuracy, "loss": nn.functional.cross_entropy(logits, clouds).item()}, []

    groups = [
        {"params": list(model[:2].parameters()), "lr_scale": 0.5},
        {"params": list(model[2:].parameters()), "lr_scale": 1.0},
    ]
    task = Task(model, groups, Points(), 40, nn.CrossEntropyLoss(), measure if config.held_out else None)
    plan = make_plan(config, 40)
    return fit(task, config, plan, Accelerator(mixed_precision="no"), folder, {"data": "points"}, resume)


CONFIG = TrainConfig(epochs=6, batch_size=8, device_batch=4, lr=0.05, ema=0.9, workers=0, precision="fp32", clip=1.0)


def assert_equal(left, right):
    assert left.keys() == right.keys() and left
    assert not [key for key in left if not torch.equal(left[key], right[key])]


@pytest.mark.parametrize("changes", [{}, {"ema": 0.0, "workers": 1}, {"held_out": 0.0}])
def test_half_a_run_and_its_continuation_are_the_whole_run(tmp_path, changes):
    config = replace(CONFIG, **changes)
    whole = run(tmp_path / "whole", config)
    if not config.held_out:
        assert_equal(whole.best, whole.last)
        return
    with pytest.raises(Interrupted):
        run(tmp_path / "halves", config, stop_after=3)
    records = (tmp_path / "halves" / "training.jsonl").read_text().splitlines()
    assert [json.loads(record)["epoch"] for record in records] == [1, 2, 3]
    both = run(tmp_path / "halves", replace(config, workers=0), resume=True)
    assert_equal(whole.last, both.last)
    assert_equal(whole.best, both.best)
    assert whole.history == both.history and len(whole.history) == 6 and whole.epoch == both.epoch
    best = max(whole.history, key=lambda record: (record["held_out_top-1"], -record["held_out_loss"]))
    assert whole.epoch == best["epoch"] and best["held_out_top-1"] > 0.65
    again = run(tmp_path / "halves", config, resume=True)  # a finished run has nothing left to do
    assert_equal(whole.last, again.last)
    assert sorted(path.name for path in (tmp_path / "halves").iterdir()) == ["last.pt", "training.jsonl"]


def test_what_is_resumed_must_be_there_whole_and_the_same(tmp_path):
    with pytest.raises(CheckpointError, match="last.pt: no checkpoint to resume"):
        run(tmp_path, CONFIG, resume=True)
    run(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match="holds a run; give --resume"):
        run(tmp_path, CONFIG)
    with pytest.raises(CheckpointError) as error:
        run(tmp_path, replace(CONFIG, lr=0.1, seed=4), resume=True)
    assert "config.lr: 0.05 in the checkpoint, 0.1 asked for" in str(error.value) and "config.seed" in str(error.value)
    content = (tmp_path / "last.pt").read_bytes()
    for damage in (content[:-100], b"", content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]):
        (tmp_path / "last.pt").write_bytes(damage)
        with pytest.raises(CheckpointError, match="last.pt"):
            run(tmp_path, CONFIG, resume=True)


def test_parts_of_a_step_add_up_to_the_step(tmp_path):
    """Gradients of several backward passes are those of one, where no layer mixes the images of a batch."""
    results = []
    for device_batch in (8, 3):
        torch.manual_seed(0)
        model = nn.Linear(8, 2)
        config = replace(CONFIG, device_batch=device_batch, ema=0.0, held_out=0.0, epochs=1)
        task = Task(model, [{"params": list(model.parameters())}], Points(), 40, nn.CrossEntropyLoss(), None)
        fit(task, config, make_plan(config, 40), Accelerator(), tmp_path / str(device_batch), {}, False)
        results.append(model.weight.detach().clone())
    torch.testing.assert_close(*results)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(ConfigError, match="the loss is (nan|inf) after step 5 of 30"):
        run(tmp_path, replace(CONFIG, lr=1e30, warmup_epochs=0, clip=None))
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize(
    "changes", [{"lr": 0.0}, {"epochs": -1.0}, {"betas": (0.9, 1.0)}, {"held_out": 1.0}, {"ema": 1.0}, {"seed": -1}]
)
def test_settings_that_cannot_be_meant(changes):
    with pytest.raises(ConfigError, match=f"{next(iter(changes))} is .*must be"):
        replace(CONFIG, **changes).check()


def test_ranges_do_not_fall():
    with pytest.raises(ConfigError, match="crop_area is 0.5 to 0.2; it must not fall"):
        FinetuneConfig(crop_area=(0.5, 0.2)).check()
