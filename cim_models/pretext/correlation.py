"""Correlation heads: tokens of a context and of its exemplars → a map of log-odds for each exemplar."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from cim_models.backbones.tokens import Tokens
from cim_models.backbones.vit import sincos_pos_embed


class CrossAttention(nn.Module):
    """Queries from the context; keys and values from one exemplar at a time."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, context: Tensor, exemplars: Tensor) -> Tensor:
        """context (B, N, W) and exemplars (B, K, M, W) → (B, K, N, W); the queries are projected once for all K."""
        q = self.q(context).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(exemplars).unflatten(-1, (2, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        q = q[:, None].expand(-1, k.shape[1], -1, -1, -1)
        out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        return self.proj(out.transpose(1, 2).flatten(2)).unflatten(0, (len(context), -1))


class CorrelationHead(nn.Module):
    """One cross-attention block and a 1 × 1 convolution.

    Context tokens answer independently of each other, so the context's class token, which the prediction drops, is
    never computed.

    Args:
        dim: Width D of the encoders' tokens.
        width: Width W of the head.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over W.
    """

    def __init__(self, dim: int, width: int = 512, num_heads: int = 16, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = CrossAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, 1)
        self._pos_embeds: dict[tuple[tuple[int, int], torch.device], Tensor] = {}
        self.apply(_initialise)
        nn.init.zeros_(self.predict.weight)

    def forward(self, context: Tokens, exemplars: Tensor, size: int) -> Tensor:
        """Predicts the maps.

        Args:
            context: Tokens of B contexts.
            exemplars: (B, K, M, D) all tokens of the exemplars.
            size: Side S of the context in pixels.

        Returns:
            (B, K, S, S) log-odds that a context pixel belongs to the exemplar.
        """
        return upsample(self.predict_grid(context, exemplars), size)

    def predict_grid(self, context: Tokens, exemplars: Tensor) -> Tensor:
        """The prediction before upsampling: (B, K, h, w)."""
        x = self.embed(context.patches)
        x = x + self._pos_embed(context.grid, x)
        x = x[:, None] + self.attn(self.norm1(x), self.norm1(self.embed(exemplars)))
        x = x + self.mlp(self.norm2(x))
        return self.predict(self.norm(x)).squeeze(-1).unflatten(-1, context.grid)

    def start_from(self, log_odds: float) -> None:
        """Makes the untrained head answer with the prior's log-odds everywhere."""
        nn.init.constant_(self.predict.bias, log_odds)

    def _pos_embed(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        key = (grid, like.device)
        if key not in self._pos_embeds:
            self._pos_embeds[key] = sincos_pos_embed(self.embed.out_features, grid).to(like.device)
        return self._pos_embeds[key].to(like.dtype)


class CosineHead(nn.Module):
    """Ablation: cosine similarity of each context patch token and the exemplar's mean token, scaled and shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.tensor(0.0))

    def forward(self, context: Tokens, exemplars: Tensor, size: int) -> Tensor:
        """As `CorrelationHead.forward`."""
        similarity = F.normalize(exemplars.mean(dim=2), dim=-1) @ F.normalize(context.patches, dim=-1).transpose(1, 2)
        return upsample((self.scale * similarity + self.bias).unflatten(-1, context.grid), size)

    def start_from(self, log_odds: float) -> None:
        """As `CorrelationHead.start_from`, for similarity zero."""
        nn.init.constant_(self.bias, log_odds)


class GlobalHead(nn.Module):
    """Optional second loss: each exemplar's summary predicts its context's among all contexts (InfoNCE).

    Args:
        dim: Width D of the encoders' tokens.
        hidden: Width of the hidden layers.
        out: Width of the projections.
    """

    def __init__(self, dim: int, hidden: int = 4096, out: int = 256) -> None:
        super().__init__()
        self.projector = _mlp(dim, hidden, hidden, out)
        self.predictor = _mlp(out, hidden, out)
        self.apply(_initialise)

    def forward(self, summaries: Tensor) -> Tensor:
        """(B, K, D) summaries of exemplars → (B, K, out) predictions; batch statistics are per exemplar."""
        return torch.stack([self.predictor(self.projector(summary)) for summary in summaries.unbind(1)], dim=1)


def info_nce(predictions: Tensor, contexts: Tensor, first: int, temperature: float) -> Tensor:
    """InfoNCE × 2 · temperature, for each of the K exemplars.

    Args:
        predictions: (B, K, C) of the exemplars.
        contexts: (B', C) projections of all processes' contexts.
        first: Row of `contexts` that belongs to the first prediction.
        temperature: Of the softmax.

    Returns:
        (K,) losses, mean over the batch; in float32 whatever the autocast, which would round similarities near 1.
    """
    with _float32(predictions):
        logits = F.normalize(predictions.float(), dim=-1) @ F.normalize(contexts.float(), dim=-1).T / temperature
    labels = torch.arange(first, first + len(predictions), device=predictions.device)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(predictions.shape[1]), reduction="none")
    return 2 * temperature * losses.view(predictions.shape[:2]).mean(dim=0)


def upsample(grid: Tensor, size: int) -> Tensor:
    """(B, K, h, w) → (B, K, S, S) in float32, bilinear, corners aligned.

    By two products with the weights along each side. The backward pass of `F.interpolate` adds the gradients of
    hundreds of pixels to one number, which a GPU does one after the other.
    """
    down, across = (
        F.interpolate(torch.eye(n, device=grid.device).float()[None], size, mode="linear", align_corners=True)[0]
        for n in grid.shape[-2:]
    )
    with _float32(grid):
        return down.T @ (grid.float() @ across)


def _float32(x: Tensor) -> AbstractContextManager[None]:
    """Products on the device of x are as precise as what is multiplied, whatever the autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _mlp(*widths: int) -> nn.Sequential:
    """Linear layers without bias, each followed by BatchNorm, and ReLU in between; the last norm is not affine."""
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        last = i == len(widths) - 2
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after, affine=not last)]
        layers += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
