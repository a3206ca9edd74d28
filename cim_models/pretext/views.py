"""A batch of sources → what the model sees: contexts, exemplars and maps."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cim_models.pretext import colour, exemplars
from cim_models.pretext.colour import ColourConfig
from cim_models.pretext.constants import constant
from cim_models.pretext.exemplars import ExemplarConfig

DRAWS = exemplars.DRAWS + colour.DRAWS
"""Uniform numbers that one exemplar uses."""
CHUNK = 8
"""Sources that a CPU handles at once: more do not stay in its caches."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class ViewConfig:
    """How contexts and exemplars are made of a source."""

    context_size: int = 160
    """Side of the context in pixels (S)."""
    exemplars: ExemplarConfig = field(default_factory=ExemplarConfig)
    colour: ColourConfig = field(default_factory=ColourConfig)


class Views(NamedTuple):
    """The model's input, normalised with ImageNet's mean and deviation."""

    context: Tensor
    """(B, 3, S, S)."""
    exemplars: Tensor
    """(B, K, 3, T, T)."""
    maps: Tensor
    """(B, K, S, S) bool."""


def make_views(source: Tensor, uniforms: Tensor, config: ViewConfig) -> Views:
    """Cuts, recolours and normalises, on the source's device.

    Args:
        source: (B, 3, H, W) uint8, or float in [0, 1].
        uniforms: (B, K, DRAWS) in [0, 1).
        config: What to make.
    """
    if source.device.type == "cpu" and len(source) > CHUNK:
        chunks = zip(source.split(CHUNK), uniforms.split(CHUNK), strict=True)
        return Views(*map(torch.cat, zip(*(make_views(*chunk, config) for chunk in chunks), strict=True)))
    source = source.float() if source.is_floating_point() else source.float().div_(255)
    height, width = source.shape[2:]
    rectangles = exemplars.draw_rectangles(uniforms[..., : exemplars.DRAWS], height, width, config.exemplars)
    crops = exemplars.crop(source, rectangles, config.exemplars.size)
    crops = colour.recolour(crops, uniforms[..., exemplars.DRAWS :], config.colour)
    maps = exemplars.cover(rectangles, (height, width), config.context_size)
    size = (config.context_size, config.context_size)
    context = source if size == (height, width) else F.interpolate(source, size, mode="bilinear", antialias=True)
    return Views(normalise(context), normalise(crops), maps)


def normalise(images: Tensor) -> Tensor:
    """(…, 3, H, W) in [0, 1] → zero mean and unit deviation over ImageNet."""
    return (images - _channels(MEAN, images)).div_(_channels(DEVIATION, images))


def denormalise(images: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    return images * _channels(DEVIATION, images) + _channels(MEAN, images)


def _channels(values: tuple[float, float, float], like: Tensor) -> Tensor:
    return constant(values, like.device, like.dtype).view(3, 1, 1)
