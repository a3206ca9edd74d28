"""Tokens of both families, and the released rule for position embeddings of other sizes."""

import pytest
import torch
import torch.nn.functional as F

from cim_models.backbones import build
from cim_models.backbones.tokens import encode, resample_pos_embed


def vit(**kwargs):
    torch.manual_seed(0)
    return build("cim_vit_tiny", **{"depth": 2, "img_size": 64, **kwargs}).eval()


@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
def test_tokens_of_a_vit_are_its_features(size):
    model, images = vit(), torch.randn(2, 3, *size)
    tokens, expected = encode(model, images), model.forward_features(images)
    assert tokens.grid == (size[0] // 16, size[1] // 16)
    assert torch.equal(tokens.sequence, expected)
    assert torch.equal(tokens.summary, expected[:, 0]) and torch.equal(tokens.patches, expected[:, 1:])
    assert tokens.prefix.shape == (2, 1, 192)


@pytest.mark.parametrize("kwargs", [dict(class_token=False), dict(dynamic_img_size=False), dict(reg_tokens=2)])
def test_other_vits(kwargs):
    model, images = vit(**kwargs), torch.randn(2, 3, 64, 64)
    tokens, expected = encode(model, images), model.forward_features(images)
    assert torch.equal(tokens.sequence, expected) and tokens.grid == (4, 4) and tokens.patches.shape == (2, 16, 192)
    summary = expected[:, 0] if model.num_prefix_tokens else expected.mean(1)
    assert torch.equal(tokens.summary, summary)


def test_tokens_of_a_resnet_are_its_last_map():
    model, images = build("cim_resnet18").eval(), torch.randn(2, 3, 96, 64)
    tokens, expected = encode(model, images), model.forward_features(images)
    assert tokens.grid == (3, 2)
    assert torch.equal(tokens.patches.transpose(1, 2).unflatten(2, (3, 2)), expected)
    assert torch.allclose(tokens.summary, expected.mean((2, 3)), atol=1e-6)
    assert torch.equal(tokens.sequence, tokens.patches)


def test_a_given_position_embedding_takes_the_place_of_the_encoders_own():
    model, images = vit(), torch.randn(2, 3, 64, 64)
    own = encode(model, images)
    assert torch.allclose(encode(model, images, model.pos_embed).sequence, own.sequence, atol=1e-6)
    other = encode(model, images, torch.zeros_like(model.pos_embed))
    with torch.no_grad():
        model.pos_embed.zero_()
    assert torch.allclose(other.sequence, model.forward_features(images), atol=1e-6)


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = vit().train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        encode(model, torch.randn(2, 3, 64, 64)).sequence.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*gradients, strict=True))


def test_position_embedding_of_the_same_grid_is_itself():
    embed = torch.randn(1, 17, 8)
    assert resample_pos_embed(embed, (4, 4), (4, 4)) is embed


def cubic(t: float) -> list[float]:
    """Weights of the four neighbours at offset t, a = −0.75."""

    def weight(d: float) -> float:
        d = abs(d)
        if d <= 1:
            return 1.25 * d**3 - 2.25 * d**2 + 1
        return -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3 if d < 2 else 0.0

    return [weight(t + 1), weight(t), weight(1 - t), weight(2 - t)]


@pytest.mark.parametrize(("old", "new"), [((14, 14), (10, 10)), ((4, 6), (8, 3))])
def test_resampling_reads_at_the_released_scale(old, new):
    """Row i of the new grid reads at (i + ½) · old / (new + 0.1) − ½ of the old one, bicubically, edges repeated."""
    embed = torch.randn(1, 1 + old[0] * old[1], 3, dtype=torch.float64)
    table = embed[0, 1:].unflatten(0, old)
    matrices = []
    for before, after in zip(old, new, strict=True):
        matrix = torch.zeros(after, before, dtype=torch.float64)
        for i in range(after):
            place = (i + 0.5) * before / (after + 0.1) - 0.5
            first = int(place // 1)
            for offset, weight in enumerate(cubic(place - first)):
                matrix[i, min(max(first - 1 + offset, 0), before - 1)] += weight
        matrices.append(matrix)
    expected = torch.einsum("ih,hwd,jw->ijd", matrices[0], table, matrices[1]).flatten(0, 1)
    actual = resample_pos_embed(embed, old, new)
    assert torch.equal(actual[:, :1], embed[:, :1])
    assert torch.allclose(actual[0, 1:], expected, atol=1e-5)
    plain = F.interpolate(table.permute(2, 0, 1)[None], new, mode="bicubic")[0].flatten(1).T
    assert not torch.allclose(expected, plain, atol=1e-2)  # by size it would be another embedding
