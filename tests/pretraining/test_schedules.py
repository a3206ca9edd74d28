"""cim_models.pretraining.schedules: against torch's own schedulers, the released momentum, and closed forms."""

import math

import pytest
import torch
from safetensors.torch import load_file

from cim_models.pretraining.schedules import learning_rate, momentum


def of_torch(scheduler, peak, steps, **options):
    """Learning rates of the first `steps` steps under one of torch's schedulers."""
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    schedule, rates = scheduler(optimiser, **options), []
    for _ in range(steps):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("steps", "warmup", "floor"), [(100, 10, 0.0), (37, 5, 1e-4), (50, 2, 0.0)])
def test_learning_rate_is_torchs_linear_and_cosine(steps, warmup, floor):
    peak = 3e-3
    linear, cosine = torch.optim.lr_scheduler.LinearLR, torch.optim.lr_scheduler.CosineAnnealingLR
    expected = of_torch(linear, peak, warmup, start_factor=1 / warmup, total_iters=warmup - 1)
    expected += of_torch(cosine, peak, steps - warmup, T_max=steps - warmup, eta_min=floor)
    ours = [learning_rate(step, steps, warmup, peak, floor) for step in range(steps)]
    assert ours == pytest.approx(expected, rel=1e-9)


def test_learning_rate_in_closed_form():
    assert [learning_rate(step, 8, 4, 1.0) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(6, 8, 4, 1.0) == pytest.approx(0.5)
    assert learning_rate(7, 8, 4, 1.0, 0.2) == pytest.approx(0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2)
    assert learning_rate(8, 8, 4, 1.0, 0.2) == pytest.approx(0.2)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (1, 40), (5, 5), (5, 100), (5, 0)])
def test_short_runs(steps, warmup):
    rates = [learning_rate(step, steps, warmup, 1.0) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[0] == (1 / warmup if warmup else 1.0)


def test_momentum_is_the_released_one(shared):
    expected = load_file(shared / "reference" / "expected.safetensors")["expected.momentum_schedule"]
    ours = [momentum(step, 100, 0.99) for step in (0, 1, 10, 50, 99)]
    assert ours == pytest.approx(expected.tolist(), abs=1e-7)


@pytest.mark.parametrize("base", [0.0, 0.9, 0.996, 1.0])
def test_momentum_in_closed_form(base):
    values = [momentum(step, 40, base) for step in range(41)]
    assert values == pytest.approx([1 - (1 - base) * math.cos(math.pi * step / 80) ** 2 for step in range(41)])
    assert values[0] == pytest.approx(base) and values[40] == 1
    assert values == sorted(values)
