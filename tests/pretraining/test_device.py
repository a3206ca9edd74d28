"""Training on a GPU, without one: no step mixes devices, and none makes the host wait but those that are logged."""

import pytest
import torch
from fake_gpu import Enough, FakeGPU, OnGPU, real

from cim_models.backbones.vit import VITS
from cim_models.pretext.views import DRAWS
from cim_models.pretraining import cache, loop
from cim_models.pretraining.cache import OnDevice
from cim_models.pretraining.data import GlobalBatches, Pictures, batch_of
from cim_models.pretraining.memory import Meter
from cim_models.pretraining.readers import Files


@pytest.fixture
def steps(configure, photographs, out, monkeypatch):
    """`steps(model=…)` gives what the host did from step to step of a run that logs every second one."""
    monkeypatch.setitem(VITS, "cim_vit_tiny", {**VITS["cim_vit_tiny"], "depth": 1})
    monkeypatch.setattr(loop, "Accelerator", OnGPU)
    monkeypatch.setattr(loop, "build", real(loop.build))
    monkeypatch.setattr(loop, "location_prior", real(loop.location_prior))
    monkeypatch.setattr(loop, "Meter", lambda device: Meter(torch.device("cpu")))
    monkeypatch.setattr(cache, "room", lambda device: 10**9)

    def run(**changes):
        gpu, found = FakeGPU(), []

        def reached(points, done):
            found.append(gpu.take())
            if done == 3:
                raise Enough
            return False

        monkeypatch.setattr(loop.SavePoints, "reached", reached)
        config = configure(photographs(8, 64), out, log_every=2, optimiser__batch_size=2, precision="bf16", **changes)
        with pytest.raises(Enough), gpu:
            loop.pretrain(config)
        return found

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {"pretext__global_weight": 1.0, "pretext__global_hidden": 16, "optimiser__clip": 1.0},
        {"pretext__head": "cosine", "pretext__share_class_token": True},
        {"model": "cim_resnet18", "pretext__global_weight": 1.0, "pretext__global_summary": "mean"},
        {"data__cache": "device", "data__cache_side": 64, "pretext__freeze_patch_embed": True},
    ],
)
def test_a_step_on_a_gpu_mixes_no_devices_and_waits_for_nothing(steps, changes):
    _, step, logged = steps(**changes)
    assert step.waits == []
    sources = [(2,), (2, 4), (2,)] if "data__cache" in changes else [(2, 3, 64, 64)]
    assert step.copies == [*sources, (2, 2, DRAWS)]
    assert logged.waits  # of what is logged


def test_a_batch_that_did_harm_comes_from_the_cache_of_a_gpu(photographs, monkeypatch):
    monkeypatch.setattr(cache, "room", lambda device: 10**9)
    pictures = Pictures(Files(sorted(photographs(8, 64).iterdir())), 64, exemplars=2, draws=DRAWS, seed=0)
    with FakeGPU():
        squares = OnDevice(pictures, 64, 0, torch.device("cuda"))
        batch = batch_of(squares, GlobalBatches(8, 2, seed=0, total_steps=1), 0)
    assert batch["source"].device.type == "cpu" and batch["source"].shape == (2, 3, 64, 64)
