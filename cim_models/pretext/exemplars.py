"""Exemplars: rotated rectangles of a source, cropped and mapped by batched analytic geometry.

Everything is a pure function of uniform random numbers, on the device of its tensors: the same numbers give the same
exemplars, however a batch is split over processes.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cim_models.pretext.constants import constant

CANDIDATES = 10
"""Rectangles drawn for each exemplar, of which the first that fits into the source is taken."""
DRAWS = 5 * CANDIDATES + 1
"""Uniform numbers that one exemplar uses."""
SHRINK = 1.5
"""Source pixels per exemplar pixel beyond which the crop reads an average-pooled level of the source."""


@dataclass
class ExemplarConfig:
    """The distribution of exemplars; the defaults are those of the released recipe."""

    count: int = 6
    """Exemplars per image (K)."""
    size: int = 64
    """Side of an exemplar in pixels (T)."""
    area: tuple[float, float] = (0.05, 0.48)
    """Least and greatest area, as a fraction of the source's; equal numbers fix the scale."""
    ratio: tuple[float, float] = (1 / 3, 3.0)
    """Least and greatest width / height, log-uniform; (1, 1) fixes the shape."""
    angle: tuple[float, float] = (-45.0, 45.0)
    """Least and greatest rotation in degrees; (0, 0) turns rotation off."""
    flip: float = 0.5
    """Probability that an exemplar is mirrored along its own width."""


class Rectangles(NamedTuple):
    """Rotated rectangles in source pixels; x to the right, y down, (0, 0) the source's upper left corner."""

    centre: Tensor
    """(B, K, 2): x, y."""
    half: Tensor
    """(B, K, 2): half width along u, half height along v."""
    angle: Tensor
    """(B, K) radians: u = (cos θ, sin θ), v = (−sin θ, cos θ)."""
    flip: Tensor
    """(B, K) bool: the exemplar shows −u to the right."""

    @property
    def axes(self) -> tuple[Tensor, Tensor]:
        """Unit vectors u and v, (B, K, 2) each."""
        cos, sin = self.angle.cos(), self.angle.sin()
        return torch.stack([cos, sin], dim=-1), torch.stack([-sin, cos], dim=-1)


def draw_rectangles(uniforms: Tensor, height: int, width: int, config: ExemplarConfig) -> Rectangles:
    """Draws rectangles that lie inside the source, whole.

    Area, log ratio and angle are uniform; a rectangle whose bounding box does not fit is drawn again, and the last
    candidate is shrunk until it does. Its centre is uniform over all positions where it lies inside.

    Args:
        uniforms: (B, K, DRAWS) in [0, 1).
        height: Of the source, in pixels.
        width: Of the source, in pixels.
        config: The distribution.
    """
    flip = uniforms[..., -1] < config.flip
    area, ratio, angle, x, y = uniforms[..., :-1].unflatten(-1, (CANDIDATES, 5)).unbind(-1)
    (least, most), (narrow, wide), (left, right) = config.area, config.ratio, config.angle
    area = (least + (most - least) * area) * (height * width)
    ratio = narrow * (wide / narrow) ** ratio
    angle = torch.deg2rad(left + (right - left) * angle)

    half = 0.5 * torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=-1)
    cos, sin = angle.cos().abs(), angle.sin().abs()
    reach = torch.stack([half[..., 0] * cos + half[..., 1] * sin, half[..., 0] * sin + half[..., 1] * cos], dim=-1)
    limit = constant((width / 2, height / 2), reach.device, reach.dtype)
    excess = (reach / limit).amax(dim=-1)
    fits = excess <= 1
    fits[..., -1] = True
    chosen = fits.int().argmax(dim=-1, keepdim=True)

    def pick(values: Tensor) -> Tensor:
        return values.gather(2, chosen).squeeze(2)

    shrink = pick(excess).clamp_min(1)
    half, reach = (
        torch.stack([pick(pair[..., 0]), pick(pair[..., 1])], dim=-1) / shrink[..., None] for pair in (half, reach)
    )
    centre = limit + (limit - reach) * (2 * torch.stack([pick(x), pick(y)], dim=-1) - 1)
    return Rectangles(centre, half, pick(angle), flip)


def crop(source: Tensor, rectangles: Rectangles, size: int) -> Tensor:
    """Resamples each rectangle to a square, bilinearly, straight from the source.

    A crop that shrinks by more than `SHRINK` reads the matching level of an average-pooled pyramid.

    Args:
        source: (B, C, H, W) float.
        rectangles: Of (B, K).
        size: Side T of the result in pixels.

    Returns:
        (B, K, C, T, T).
    """
    atlas, corners, sizes = _pyramid(source, levels=_deepest_level(source, size))
    shrink = 2 * rectangles.half.prod(dim=-1).sqrt() / size
    level = ((shrink / SHRINK).log2().floor().long() + 1).clamp(0, len(sizes) - 1)
    corner, extent, scale = corners[level], sizes[level], 0.5 ** level[..., None]
    unit = 2 / constant((atlas.shape[3], atlas.shape[2]), corners.device)
    centre, u, v = _frame(rectangles)
    grid = _lattice((centre * scale + corner) * unit - 1, u * scale * unit, v * scale * unit, size)
    least, greatest = (x[:, :, None, None] * unit - 1 for x in (corner + 0.5, corner + extent - 0.5))
    grid = torch.clamp(grid, least, greatest).flatten(1, 2).to(atlas.dtype)
    crops = F.grid_sample(atlas, grid, padding_mode="border", align_corners=False)
    return crops.unflatten(2, (rectangles.angle.shape[1], size)).transpose(1, 2)


def sample_points(rectangles: Rectangles, size: int) -> Tensor:
    """Where the pixel centres of the exemplars lie in the source: (B, K, T, T, 2) x, y in pixels."""
    return _lattice(*_frame(rectangles), size)


def _frame(rectangles: Rectangles) -> tuple[Tensor, Tensor, Tensor]:
    """The centre, and the steps from it to the middles of the exemplar's right and lower edges; (B, K, 2) each."""
    u, v = rectangles.axes
    mirror = 1 - 2 * rectangles.flip.to(u.dtype)
    return rectangles.centre, u * (rectangles.half[..., 0] * mirror)[..., None], v * rectangles.half[..., 1, None]


def _lattice(centre: Tensor, u: Tensor, v: Tensor, size: int) -> Tensor:
    """centre + s · u + t · v over the T × T pixel centres (s, t): (B, K, T, T, 2), one plane per coordinate."""
    steps = (torch.arange(size, device=centre.device) + 0.5) * (2 / size) - 1
    centre, u, v = (x.transpose(1, 2)[..., None] for x in (centre, u, v))
    across, down = u * steps, centre + v * steps
    return (across[..., None, :] + down[..., :, None]).movedim(1, -1)


def cover(rectangles: Rectangles, source_size: tuple[int, int], map_size: int) -> Tensor:
    """Maps: which context pixels have their centre inside the rectangle.

    Args:
        rectangles: Of (B, K).
        source_size: (H, W) of the source.
        map_size: Side S of the context in pixels.

    Returns:
        (B, K, S, S) bool.
    """
    height, width = source_size
    device, (u, v) = rectangles.angle.device, rectangles.axes
    down = (torch.arange(map_size, device=device) + 0.5) * (height / map_size) - rectangles.centre[..., 1, None]

    def interval(axis: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        """Between which x, in source pixels from the centre, the pixels of each row have |pixel · axis| ≤ half."""
        across, along = axis[..., 0, None], axis[..., 1, None] * down
        ends = (-half[..., None] - along) / across, (half[..., None] - along) / across
        return torch.fmin(*ends), torch.fmax(*ends)

    intervals = interval(u, rectangles.half[..., 0]), interval(v, rectangles.half[..., 1])
    left, right = torch.fmax(intervals[0][0], intervals[1][0]), torch.fmin(intervals[0][1], intervals[1][1])
    left, right = ((x + rectangles.centre[..., 0, None]) * (map_size / width) - 0.5 for x in (left, right))
    before = torch.ones(map_size + 1, map_size, dtype=torch.bool, device=device).tril_(-1)  # row n: n pixels
    first, end = left.ceil().clamp_(0, map_size).long(), (right.floor() + 1).clamp_(0, map_size).long()
    return before[end].bitwise_and_((~before)[first])


def _deepest_level(source: Tensor, size: int) -> int:
    """The coarsest pyramid level that a rectangle can ask for and that has a pixel."""
    height, width = source.shape[2:]
    shrink = math.sqrt(height * width) / size
    return max(0, min(math.floor(math.log2(shrink / SHRINK)) + 1, math.floor(math.log2(min(height, width)))))


def _pyramid(source: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packs average-pooled levels into one picture: the source, and to its right levels 1, 2, … below each other.

    Returns:
        The picture (B, C, H, W'), each level's upper left corner and its size, both (levels + 1, 2) as x, y.
    """
    height, width = source.shape[2:]
    corners, sizes, atlas, pooled, y = [(0, 0)], [(width, height)], source, source, 0
    if levels:
        atlas = source.new_empty(*source.shape[:3], width + width // 2)
        atlas[..., :width] = source
        atlas[..., width:] = 0
    for _ in range(levels):
        pooled = _halve(pooled)
        h, w = pooled.shape[2:]
        atlas[:, :, y : y + h, width : width + w] = pooled
        corners.append((width, y))
        sizes.append((w, h))
        y += h
    return atlas, constant(tuple(corners), source.device), constant(tuple(sizes), source.device)


def _halve(x: Tensor) -> Tensor:
    """Averages of 2 × 2 pixels of (B, C, H, W), as `avg_pool2d` gives them, which takes longer on a CPU."""
    height, width = (n // 2 * 2 for n in x.shape[2:])
    rows = x[:, :, 0:height:2] + x[:, :, 1:height:2]
    return (rows[..., 0:width:2] + rows[..., 1:width:2]).mul_(0.25)
