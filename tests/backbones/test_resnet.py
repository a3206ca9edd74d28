"""Residual networks: timm's own, under this package's names."""

import pytest
import timm
import torch
from torch import nn

from cim_models.backbones import ARCHITECTURES, build
from cim_models.backbones.resnet import RESNETS


def small(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return build("cim_resnet18", **kwargs).eval()


def test_every_resnet_is_an_architecture():
    assert set(RESNETS) == {name for name in ARCHITECTURES if "resnet" in name}


@pytest.mark.parametrize("name", RESNETS)
def test_parameters_are_those_of_the_stock_model(name):
    with torch.device("meta"):
        ours, theirs = build(name), timm.create_model(name.removeprefix("cim_"), num_classes=0)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert ours.num_classes == 0 and all(p.requires_grad for p in ours.parameters())


def test_weights_of_the_stock_model_give_its_features():
    theirs = timm.create_model("resnet18", num_classes=0).eval()
    ours, x = small(), torch.randn(2, 3, 64, 96)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(x), theirs(x))


def test_features_and_their_intermediates():
    model, x = small(), torch.randn(2, 3, 64, 96)
    final = model.forward_features(x)
    assert final.shape == (2, 512, 2, 3)
    assert torch.allclose(model(x), final.mean((2, 3)), atol=1e-6)
    last, maps = model.forward_intermediates(x, indices=[2, 4])
    assert torch.equal(last, final) and torch.equal(maps[-1], final)

    extractor = small(features_only=True, out_indices=(2, 4))
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(extractor(x), maps, strict=True))
    assert extractor.feature_info.channels() == [128, 512] and extractor.feature_info.reduction() == [8, 32]


def test_output_stride():
    assert small(output_stride=16).forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 512, 4, 4)


def test_reset_classifier():
    model, x = small(num_classes=5), torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 5)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.get_classifier() is model.fc
    model.reset_classifier(0)
    assert model(x).shape == (2, 512)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = small().train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        model(torch.randn(2, 3, 64, 64)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(*pair, rtol=1e-3, atol=1e-5) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts(channels):
    assert small(in_chans=channels)(torch.randn(2, channels, 64, 64)).shape == (2, 512)
