"""Vision transformers: the stock timm networks with the method's position embedding, and all that timm's can do."""

import math

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from cim_models.backbones import ARCHITECTURES, VisionTransformer, build
from cim_models.backbones.tokens import resample_pos_embed
from cim_models.backbones.vit import VITS, sincos_pos_embed
from cim_models.errors import ConfigError

STOCK = {
    "cim_vit_tiny": "vit_tiny_patch16_224",
    "cim_vit_small": "vit_small_patch16_224",
    "cim_vit_base": "vit_base_patch16_224",
    "cim_vit_large": "vit_large_patch16_224",
    "cim_vit_huge": "vit_huge_patch14_224",
}


def small(**kwargs) -> nn.Module:
    """`cim_vit_tiny`, shallow and for small images."""
    torch.manual_seed(0)
    return build("cim_vit_tiny", **{"depth": 2, "img_size": 64, **kwargs}).eval()


def formula(width: int, rows: int, columns: int) -> np.ndarray:
    """The position embedding, number by number."""
    table = np.zeros((rows, columns, width))
    quarter = width // 4
    for y in range(rows):
        for x in range(columns):
            for i in range(quarter):
                frequency = 1 / 10000 ** (i / quarter)
                table[y, x, i], table[y, x, quarter + i] = math.sin(x * frequency), math.cos(x * frequency)
                table[y, x, 2 * quarter + i], table[y, x, 3 * quarter + i] = (
                    math.sin(y * frequency),
                    math.cos(y * frequency),
                )
    return table.reshape(rows * columns, width)


def test_every_vit_has_its_stock_model():
    assert set(STOCK) == set(VITS) == {name for name in ARCHITECTURES if "vit" in name}


@pytest.mark.parametrize(("name", "stock"), STOCK.items())
def test_parameters_are_those_of_the_stock_model(name, stock):
    with torch.device("meta"):
        ours, theirs = build(name), timm.create_model(stock, num_classes=0)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert isinstance(ours, VisionTransformer) and ours.num_classes == 0
    assert {m.eps for m in ours.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert not ours.pos_embed.requires_grad
    assert all(p.requires_grad for key, p in ours.named_parameters() if key != "pos_embed")
    assert ours.dynamic_img_size
    assert [len(ours.blocks), ours.blocks[0].attn.num_heads] == [VITS[name]["depth"], VITS[name]["num_heads"]]


@pytest.mark.parametrize(("width", "grid"), [(192, (14, 14)), (64, (3, 5))])
def test_position_embedding_is_the_formula(width, grid):
    assert np.allclose(sincos_pos_embed(width, grid).numpy(), formula(width, *grid), atol=1e-6)


def test_position_embedding_of_a_model_is_fixed_and_travels():
    model = build("cim_vit_tiny", depth=1)
    assert not model.pos_embed[0, 0].any()
    assert np.allclose(model.pos_embed[0, 1:].numpy(), formula(192, 14, 14), atol=1e-6)
    assert "pos_embed" in model.state_dict() and not model.pos_embed.requires_grad


@pytest.mark.parametrize("size", [224, 160, 64])
def test_position_embedding_is_the_released_one(shared, size):
    expected = load_file(shared / "reference" / "expected.safetensors")[f"expected.pos_embed_{size}"]
    embed = build("cim_vit_tiny", depth=1).pos_embed.detach()
    assert torch.allclose(resample_pos_embed(embed, (14, 14), (size // 16, size // 16)), expected, atol=2e-5)


def test_initialisation():
    torch.manual_seed(0)
    model = build("cim_vit_tiny", depth=2)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    for weight, fans in [
        (model.patch_embed.proj.weight, (3 * 256, 192)),
        (model.blocks[0].attn.qkv.weight, (192, 192)),
        (model.blocks[0].mlp.fc1.weight, (192, 768)),
    ]:
        limit = math.sqrt(6 / sum(fans))
        assert weight.abs().max() <= limit + 1e-6
        assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_unknown_name():
    with pytest.raises(ConfigError, match="cim_vit_tiny"):
        build("cim_vit_tinny")
    with pytest.raises(ConfigError, match="cim_resnet50"):
        build("something else")


def test_features_are_the_mean_of_the_patch_tokens():
    model, x = small(), torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 17, 192)
    assert torch.allclose(model(x), tokens[:, 1:].mean(1), atol=1e-6)


def test_forward_intermediates_and_features_only_give_the_features():
    model, x = small(depth=4), torch.randn(2, 3, 64, 64)
    final, maps = model.forward_intermediates(x, indices=[1, 3], norm=True)
    assert torch.equal(final, model.forward_features(x))
    expected = final[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    assert torch.equal(maps[-1], expected)

    extractor = small(depth=4, features_only=True, out_indices=(1, 3))
    features = extractor(x)
    assert extractor.feature_info.channels() == [192, 192] and extractor.feature_info.reduction() == [16, 16]
    assert all(torch.equal(*pair) for pair in zip(features, model.forward_intermediates(x, [1, 3])[1], strict=True))
    assert len(small(depth=4, features_only=True)(x)) == 3


def test_reset_classifier():
    model, x = small(num_classes=5), torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 5)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.get_classifier() is model.head
    model.reset_classifier(0, global_pool="token")
    assert torch.equal(model(x), model.forward_features(x)[:, 0])


def test_gradient_checkpointing_gives_the_same_gradients():
    model, x = small().train(), torch.randn(2, 3, 64, 64)
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(x).square().sum().backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys() and "pos_embed" not in actual
    assert all(torch.allclose(actual[name], expected[name], atol=1e-6) for name in expected)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts(channels):
    assert small(in_chans=channels)(torch.randn(2, channels, 64, 64)).shape == (2, 192)


def test_images_of_other_sizes_and_shapes():
    model = small()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 192)
    assert model.forward_features(torch.randn(1, 3, 96, 48)).shape == (1, 1 + 6 * 3, 192)
    wide = small(img_size=(32, 96))
    assert np.allclose(wide.pos_embed[0, 1:].numpy(), formula(192, 2, 6), atol=1e-6)
    assert wide.forward_features(torch.randn(1, 3, 32, 96)).shape == (1, 13, 192)
