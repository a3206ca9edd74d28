"""cim_models.pretraining.build: the model and the optimiser of a run."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cim_models.pretext.views import DRAWS, make_views
from cim_models.pretraining.build import adamw, build

READ = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")
"""Operators whose results the host waits for."""
WRITTEN = ("tensor", "as_tensor", "new_tensor")
"""Functions that copy Python's numbers to a device, for which the host waits, too."""


class NothingRead(TorchDispatchMode):
    """Fails where the host would wait for a device: numbers that are read, copies from and to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        devices = {x.device.type for x in args if isinstance(x, torch.Tensor)}
        devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") is not None else set()
        assert name not in READ or devices == {"cpu"}, name
        assert name not in ("_to_copy", "copy_") or len(devices) == 1, (name, devices)
        return func(*args, **kwargs)


class NothingWritten(TorchFunctionMode):
    """Fails where numbers of Python's become a tensor of a device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert func.__name__ not in WRITTEN or result.device.type == "cpu", func.__name__
        return result


@pytest.mark.parametrize("model", ["cim_vit_tiny", "cim_resnet18"])
@pytest.mark.parametrize("changes", [{}, {"pretext__global_weight": 1.0, "pretext__global_hidden": 8}])
def test_a_step_never_makes_the_host_wait(configure, model, changes):
    """On the device that holds no numbers: whatever asks for one fails there."""
    config = configure("images", "out", model=model, **changes)
    meta = torch.device("meta")
    cim = build(config, 0.0).to(meta)
    source = torch.zeros(4, 3, 64, 64, dtype=torch.uint8, device=meta)
    uniforms = torch.zeros(4, 2, DRAWS, device=meta)

    def step() -> None:
        cim(*make_views(source, uniforms, config.views)).loss.backward()
        torch.nn.utils.clip_grad_norm_(cim.parameters(), 1.0)
        cim.update_target(0.99)

    step()  # also makes the constants and the position embeddings, once
    with NothingRead(), NothingWritten():
        step()


def test_the_optimiser_is_timms_grouping_fused(configure):
    cim = build(configure("images", "out"), 0.0)
    optimiser = adamw(cim, configure("images", "out").optimiser, torch.device("cpu"))
    assert optimiser.defaults["fused"] and optimiser.defaults["betas"] == (0.9, 0.95)
    decayed = {id(p) for group in optimiser.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in cim.named_parameters():
        assert (id(parameter) in decayed) == (parameter.requires_grad and parameter.ndim > 1), name
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in cim.parameters() if p.requires_grad}


def test_residual_networks_are_channels_last(configure):
    cim = build(configure("images", "out", model="cim_resnet18"), 0.0)
    for encoder in (cim.online, cim.target):
        assert encoder.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
        features = encoder.forward_features(torch.randn(2, 3, 64, 64))
        assert features.is_contiguous(memory_format=torch.channels_last)
