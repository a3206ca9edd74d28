"""Colour transformations of exemplars, a whole batch at once.

Each agrees with torchvision's functional form; which exemplars take it, and how strongly, comes from uniform numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cim_models.pretext.constants import constant

DRAWS = 9
"""Uniform numbers that one exemplar uses."""
BLUR_REACH = 3
"""Pixels that the blur reads to each side, in deviations of the strongest."""


@dataclass
class ColourConfig:
    """Probabilities and strengths; the defaults are those of the released recipe."""

    jitter: float = 0.8
    """Probability of brightness, contrast, saturation and hue jitter, in that order."""
    brightness: float = 0.4
    """Greatest relative change of brightness."""
    contrast: float = 0.4
    """Greatest relative change of contrast."""
    saturation: float = 0.2
    """Greatest relative change of saturation."""
    hue: float = 0.1
    """Greatest turn of the hue, in turns."""
    grey: float = 0.2
    """Probability that colour is removed."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Least and greatest deviation of the blur, in exemplar pixels."""
    solarise: float = 0.2
    """Probability that bright values are inverted."""

    @classmethod
    def off(cls) -> "ColourConfig":
        """No colour transformation at all."""
        return cls(jitter=0.0, grey=0.0, blur=0.0, solarise=0.0)


def recolour(exemplars: Tensor, uniforms: Tensor, config: ColourConfig) -> Tensor:
    """Jitter, grey, blur and solarisation, each with its probability.

    Args:
        exemplars: (B, K, 3, T, T) in [0, 1].
        uniforms: (B, K, DRAWS) in [0, 1).
        config: Probabilities and strengths.

    Returns:
        (B, K, 3, T, T) in [0, 1].
    """
    x = exemplars.clone(memory_format=torch.contiguous_format).flatten(0, 1)
    jitter, bright, contrast, saturation, hue, grey, blur, sigma, solar = uniforms.flatten(0, 1).unbind(-1)

    def jittered(x: Tensor, bright: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
        """Takes numbers from -1 to 1."""
        x = adjust_brightness(x, 1 + config.brightness * bright)
        x = adjust_contrast(x, 1 + config.contrast * contrast)
        x = adjust_saturation(x, 1 + config.saturation * saturation)
        return adjust_hue(x, config.hue * hue)

    if config.jitter > 0:
        strengths = (2 * draws - 1 for draws in (bright, contrast, saturation, hue))
        x = _some(x, jitter < config.jitter, jittered, *strengths)
    if config.grey > 0:
        x = _some(x, grey < config.grey, lambda x: greyscale(x).expand_as(x))
    if config.blur > 0:
        deviation = config.sigma[0] + (config.sigma[1] - config.sigma[0]) * sigma
        x = _some(x, blur < config.blur, partial(gaussian_blur, strongest=config.sigma[1]), deviation)
    if config.solarise > 0:
        x = _some(x, solar < config.solarise, solarise)
    return x.view_as(exemplars)


def _some(x: Tensor, chosen: Tensor, change: Callable[..., Tensor], *strengths: Tensor) -> Tensor:
    """Changes the pictures of (N, 3, H, W) that (N,) bool chooses; a CPU does so in place, and leaves the others be."""
    if x.device.type == "cpu":
        rows = chosen.nonzero().squeeze(1)
        return x.index_copy_(0, rows, change(x[rows], *(values[rows] for values in strengths)))
    return torch.where(_each(chosen), change(x, *strengths), x)


def _each(values: Tensor) -> Tensor:
    """(N,) → (N, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def greyscale(x: Tensor) -> Tensor:
    """Luma (N, 1, H, W) of (N, 3, H, W)."""
    return (0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]).unsqueeze(1)


def adjust_brightness(x: Tensor, factors: Tensor) -> Tensor:
    """Scales (N, 3, H, W) by (N,)."""
    return (x * _each(factors)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factors: Tensor) -> Tensor:
    """Scales the difference from the mean luma of each picture."""
    mean_luma = greyscale(x.mean(dim=(2, 3), keepdim=True))
    return torch.lerp(mean_luma, x, _each(factors)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factors: Tensor) -> Tensor:
    """Scales the difference from the luma of each pixel."""
    return torch.lerp(greyscale(x), x, _each(factors)).clamp_(0, 1)


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turns the hue of (N, 3, H, W) by (N,) turns, keeping value and chroma.

    A channel of an HSV colour is value − chroma · ramp, where the ramp is a trapezium around the opposite hue. Hence
    the distance from red is a sum of the channels: no case for each of the six pairs of greatest and least.
    """
    r, g, b = x.unbind(1)
    value, least = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = value - least
    from_red = torch.copysign((g - least).add_(b).sub_(r).add_(chroma), g - b)
    hue = from_red.div_((6 * chroma).clamp_min_(1e-8)).add_(turns.view(-1, 1, 1))
    distance = hue[:, None] - constant((1 / 2, 5 / 6, 1 / 6), x.device, x.dtype).view(1, 3, 1, 1)
    ramp = torch.rsub(distance.sub_(distance.round()).abs_(), 2, alpha=6).clamp_(0, 1)
    return torch.addcmul(value[:, None], chroma[:, None], ramp, value=-1)


def gaussian_blur(x: Tensor, sigmas: Tensor, strongest: float) -> Tensor:
    """Blurs (N, 3, H, W) by (N,) deviations in pixels, edges reflected; two small matrix products per picture.

    Args:
        x: Pictures.
        sigmas: Deviations.
        strongest: The greatest that there may be, which a GPU need not be asked for.
    """
    height, width = x.shape[2:]
    reach = math.ceil(BLUR_REACH * strongest)
    columns = _blur_matrices(width, sigmas.to(x.dtype), reach)
    rows = columns if height == width else _blur_matrices(height, sigmas.to(x.dtype), reach)
    across = (x.flatten(1, 2) @ columns.transpose(1, 2)).view_as(x)
    return (rows[:, None] @ across).clamp_(0, 1)


def _blur_matrices(size: int, sigmas: Tensor, reach: int) -> Tensor:
    """(N, size, size): row i holds the weights with which pixel i reads its line."""
    reach = min(reach, size - 1)
    offsets = torch.arange(-reach, reach + 1, device=sigmas.device)
    kernels = torch.softmax(-0.5 * (offsets / sigmas[:, None]) ** 2, dim=-1)
    source = torch.arange(size, device=sigmas.device)[:, None] + offsets
    source = source.abs()
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    reads = F.one_hot(source, size).to(kernels.dtype)
    return torch.einsum("no,ios->nis", kernels, reads)


def solarise(x: Tensor) -> Tensor:
    """Inverts the values of (N, 3, H, W) from 0.5 on."""
    return torch.minimum(x, 1 - x)
