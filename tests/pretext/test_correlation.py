"""Correlation heads against plain formulas: one exemplar at a time, explicit attention, explicit InfoNCE."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cim_models.backbones.tokens import Tokens
from cim_models.backbones.vit import sincos_pos_embed
from cim_models.pretext import correlation
from cim_models.pretext.correlation import CorrelationHead, CosineHead, CrossAttention, GlobalHead, info_nce, upsample

B, K, M, DIM, GRID = 2, 3, 5, 24, (4, 4)


def tokens(batch: int = B, grid: tuple[int, int] = GRID, prefix: int = 1) -> Tokens:
    patches = torch.randn(batch, grid[0] * grid[1], DIM)
    first = torch.randn(batch, prefix, DIM)
    return Tokens(first[:, 0] if prefix else patches.mean(1), patches, grid, first)


@pytest.fixture
def head() -> CorrelationHead:
    torch.manual_seed(0)
    head = CorrelationHead(DIM, width=32, num_heads=4)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.2)
    return head


def test_attention_is_the_formula():
    torch.manual_seed(0)
    attention, context, exemplars = CrossAttention(32, 4), torch.randn(B, 16, 32), torch.randn(B, K, M, 32)
    q, (k, v) = attention.q(context), attention.kv(exemplars).chunk(2, dim=-1)
    out = torch.empty(B, K, 16, 32)
    for h in range(4):
        part = slice(8 * h, 8 * h + 8)
        weights = torch.einsum("bnc,bkmc->bknm", q[..., part], k[..., part]).div(math.sqrt(8)).softmax(-1)
        out[..., part] = torch.einsum("bknm,bkmc->bknc", weights, v[..., part])
    assert torch.allclose(attention(context, exemplars), attention.proj(out), atol=1e-5)


def test_all_exemplars_at_once_are_one_after_the_other(head):
    context, exemplars = tokens(), torch.randn(B, K, M, DIM)
    together = head(context, exemplars, 32)
    apart = torch.cat([head(context, exemplars[:, k : k + 1], 32) for k in range(K)], dim=1)
    assert together.shape == (B, K, 32, 32)
    assert torch.allclose(together, apart, atol=1e-5)


def test_context_and_queries_are_projected_once_for_all_exemplars(head):
    sizes = {"embed": [], "q": []}
    head.embed.register_forward_hook(lambda _, args, out: sizes["embed"].append(tuple(args[0].shape)))
    head.attn.q.register_forward_hook(lambda _, args, out: sizes["q"].append(tuple(args[0].shape)))
    head(tokens(), torch.randn(B, K, M, DIM), 32)
    assert sizes == {"embed": [(B, 16, DIM), (B, K, M, DIM)], "q": [(B, 16, 32)]}


def reference(head: CorrelationHead, context: Tokens, exemplar: torch.Tensor, size: int) -> torch.Tensor:
    """One exemplar, all of the context's tokens (its class token too), written from the method's description."""
    width = head.embed.out_features
    positions = torch.cat([torch.zeros(len(context.prefix[0]), width), sincos_pos_embed(width, context.grid)])
    x = head.embed(context.sequence) + positions
    x = x + head.attn(head.norm1(x), head.norm1(head.embed(exemplar))[:, None])[:, 0]
    x = x + head.mlp.fc2(F.gelu(head.mlp.fc1(head.norm2(x))))
    x = head.norm(x)[:, context.prefix.shape[1] :]
    grid = x.transpose(1, 2).unflatten(2, context.grid)
    grid = F.conv2d(grid, head.predict.weight[:, :, None, None], head.predict.bias)
    return F.interpolate(grid, (size, size), mode="bilinear", align_corners=True)[:, 0]


@pytest.mark.parametrize("grid", [(4, 4), (3, 6)])
def test_a_class_token_among_the_queries_changes_nothing(head, grid):
    context, exemplars = tokens(grid=grid), torch.randn(B, K, M, DIM)
    logits = head(context, exemplars, 40)
    for k in range(K):
        assert torch.allclose(logits[:, k], reference(head, context, exemplars[:, k], 40), atol=1e-5)
    other = context._replace(prefix=torch.randn(B, 1, DIM), summary=torch.randn(B, DIM))
    assert torch.equal(head(other, exemplars, 40), logits)


def test_exemplars_have_no_order_but_contexts_have(head):
    context, exemplars = tokens(), torch.randn(B, K, M, DIM)
    logits = head.predict_grid(context, exemplars)
    assert torch.allclose(head.predict_grid(context, exemplars[:, :, torch.randperm(M)]), logits, atol=1e-5)
    turned = context._replace(patches=context.patches.flip(1))
    assert not torch.allclose(head.predict_grid(turned, exemplars).flip(2, 3), logits, atol=1e-2)


def test_position_embeddings_are_computed_once_per_grid(head, monkeypatch):
    calls = []
    monkeypatch.setattr(
        correlation, "sincos_pos_embed", lambda width, grid: calls.append(grid) or sincos_pos_embed(width, grid)
    )
    for grid in ((4, 4), (2, 3), (4, 4), (2, 3)):
        head(tokens(grid=grid), torch.randn(B, K, M, DIM), 32)
    assert calls == [(4, 4), (2, 3)]


def test_an_untrained_head_answers_with_the_prior():
    head = CorrelationHead(DIM, 32, 4)
    head.start_from(-1.1)
    assert torch.allclose(head(tokens(), torch.randn(B, K, M, DIM), 20), torch.tensor(-1.1))
    cosine = CosineHead()
    cosine.start_from(-1.1)
    assert torch.allclose(cosine(tokens(), torch.zeros(B, K, M, DIM), 20), torch.tensor(-1.1))


def test_initialisation_is_xavier_and_learns_from_the_second_step_on():
    torch.manual_seed(0)
    head = CorrelationHead(256, 128, 4)
    for layer in (head.embed, head.attn.q, head.attn.kv, head.attn.proj, head.mlp.fc1, head.mlp.fc2):
        limit = math.sqrt(6 / sum(layer.weight.shape))
        assert layer.weight.abs().max() <= limit and not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)
    assert not head.predict.weight.any()
    assert {m.eps for m in head.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}

    optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
    context = Tokens(torch.randn(B, 256), torch.randn(B, 16, 256), GRID, torch.randn(B, 1, 256))
    exemplars, target = torch.randn(B, K, M, 256), torch.rand(B, K, 16, 16)
    for learning in (False, True):
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(head(context, exemplars, 16), target).backward()
        assert bool(head.embed.weight.grad.any()) is learning
        optimiser.step()


def test_cosine_head_is_cosine_similarity():
    head, context, exemplars = CosineHead(), tokens(), torch.randn(B, K, M, DIM)
    nn.init.constant_(head.scale, 3.0)
    nn.init.constant_(head.bias, -0.5)
    similarity = F.cosine_similarity(context.patches[:, None], exemplars.mean(2)[:, :, None], dim=-1)
    expected = upsample(3 * similarity.unflatten(-1, GRID) - 0.5, 32)
    assert torch.allclose(head(context, exemplars, 32), expected, atol=1e-6)


def test_upsampling_aligns_corners():
    grid = torch.randn(B, K, 4, 4)
    maps = upsample(grid, 31)
    assert torch.allclose(maps[..., ::10, ::10], grid, atol=1e-6)
    assert upsample(grid.bfloat16(), 31).dtype == torch.float32


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 1)])
def test_upsampling_and_its_gradient_are_those_of_torch_whatever_the_autocast(grid):
    coarse, grads = torch.randn(B, K, *grid, requires_grad=True), torch.randn(B, K, 32, 32)
    expected = F.interpolate(coarse, (32, 32), mode="bilinear", align_corners=True)
    with torch.autocast("cpu", torch.bfloat16):
        maps = upsample(coarse, 32)
    for got, wanted in (
        (maps, expected),
        *zip(*(torch.autograd.grad(x, coarse, grads) for x in (maps, expected)), strict=True),
    ):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_heads_survive_deepcopy_and_a_state_dict(head):
    context, exemplars = tokens(), torch.randn(B, K, M, DIM)
    expected = head(context, exemplars, 32)
    assert torch.equal(copy.deepcopy(head)(context, exemplars, 32), expected)
    other = CorrelationHead(DIM, 32, 4)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(context, exemplars, 32), expected)


def test_global_head():
    torch.manual_seed(0)
    head = GlobalHead(DIM, hidden=32, out=16)
    kinds = [[type(m) for m in part] for part in (head.projector, head.predictor)]
    layer = [nn.Linear, nn.BatchNorm1d]
    assert kinds == [[*layer, nn.ReLU, *layer, nn.ReLU, *layer], [*layer, nn.ReLU, *layer]]
    for part in (head.projector, head.predictor):
        assert [m.affine for m in part if isinstance(m, nn.BatchNorm1d)][-1] is False
        assert all(m.bias is None for m in part if isinstance(m, nn.Linear))
    summaries = torch.randn(8, K, DIM)
    apart = torch.stack([head.predictor(head.projector(summaries[:, k])) for k in range(K)], 1)
    assert torch.equal(head(summaries), apart)
    assert head(summaries).shape == (8, K, 16)


@pytest.mark.parametrize("first", [0, 4])
def test_info_nce_is_its_formula(first):
    predictions, contexts, temperature = torch.randn(4, K, 16), torch.randn(8, 16), 0.2
    expected = torch.zeros(K)
    for k in range(K):
        for b in range(4):
            scores = [F.cosine_similarity(predictions[b, k], context, dim=0) / temperature for context in contexts]
            scores = torch.stack(scores)
            expected[k] += 2 * temperature * (scores.logsumexp(0) - scores[first + b]) / 4
    assert torch.allclose(info_nce(predictions, contexts, first, temperature), expected, atol=1e-5)


def test_info_nce_is_not_rounded_by_autocast():
    """Similarities of bfloat16 are multiples of 1/256 near 1, where the positives of a trained model are."""
    torch.manual_seed(0)
    contexts = torch.randn(64, 16)
    predictions = contexts[:, None].bfloat16() + 0.1 * torch.randn(64, K, 16).bfloat16()  # as autocast hands them on
    expected = info_nce(predictions.float(), contexts, 0, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(predictions, contexts, 0, 0.2), expected)
