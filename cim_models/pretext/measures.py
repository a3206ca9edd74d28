"""How well maps are predicted, and what is known of them without looking at an image."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cim_models.backbones.tokens import Tokens
from cim_models.pretext.exemplars import DRAWS, Rectangles, cover, draw_rectangles
from cim_models.pretext.views import ViewConfig

CHUNK = 256
"""Rectangles whose maps are made at once: more do not stay in a processor's caches."""


class Prior(NamedTuple):
    """The best that can be said of the maps of a distribution without looking at an image; losses in nats per pixel."""

    loss: float
    """Loss of the best map that is the same for all images: a model that learned nothing reaches it."""
    iou: float
    """Mean intersection over union of the maps and that map's pixels above probability 0.5."""
    constant_loss: float
    """Loss of the best single number."""
    log_odds: float
    """That number, as log-odds."""


def location_prior(config: ViewConfig, source_size: int, draws: int = 8192) -> Prior:
    """Measures the map prior of a distribution of exemplars, always on the same draws.

    Args:
        config: Holds the distribution.
        source_size: Side of the sources in pixels.
        draws: Rectangles to average over.
    """
    uniforms = torch.rand(draws, 1, DRAWS, generator=torch.Generator().manual_seed(0))
    rectangles = draw_rectangles(uniforms, source_size, source_size, config.exemplars)
    chunks = zip(*(values.split(CHUNK) for values in rectangles), strict=True)
    size, side = (source_size, source_size), min(config.context_size, 64)
    maps = torch.cat([cover(Rectangles(*chunk), size, side).flatten(1).float() for chunk in chunks])
    inside = maps.mean(dim=0)
    mean, best = inside.double().mean(), (inside > 0.5).float()
    intersection = maps @ best
    union = maps.sum(dim=1) + best.sum() - intersection
    overlap = torch.where(union > 0, intersection / union.clamp_min(1), 1.0).mean().item()
    return Prior(_entropy(inside.double()).mean().item(), overlap, _entropy(mean).item(), torch.logit(mean).item())


def iou(predicted: Tensor, maps: Tensor) -> Tensor:
    """Mean intersection over union of (B, K, S, S) bool maps; a pair of empty maps counts as 1."""
    intersection = (predicted & maps).sum(dim=(2, 3))
    union = (predicted | maps).sum(dim=(2, 3))
    return torch.where(union > 0, intersection / union.clamp_min(1), 1.0).mean()


@torch.no_grad()
def agreement(head: nn.Module, context: Tokens, exemplars: Tensor, logits: Tensor, maps: Tensor) -> dict[str, Tensor]:
    """Compares predictions with the maps, for the right exemplars and for those of the next image.

    Args:
        head: That predicted them.
        context: Tokens of two contexts or more.
        exemplars: (B, K, M, D) tokens.
        logits: (B, K, S, S), what the head says of these.
        maps: (B, K, S, S) bool.

    Returns:
        Scalars: `gap` (loss with the exemplars of the next image, minus the loss with the right ones; zero: the
        exemplars are ignored), `iou` and `iou_shuffled` at probability 0.5.
    """
    shuffled = head(context, exemplars.roll(1, dims=0), maps.shape[-1])
    loss, shuffled_loss = (F.binary_cross_entropy_with_logits(x, maps.float()) for x in (logits, shuffled))
    return {"gap": shuffled_loss - loss, "iou": iou(logits > 0, maps), "iou_shuffled": iou(shuffled > 0, maps)}


def _entropy(p: Tensor) -> Tensor:
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
