"""cim_models.pretraining.build: the model and the optimiser of a run."""

import torch

from cim_models.pretraining.build import adamw, build


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
