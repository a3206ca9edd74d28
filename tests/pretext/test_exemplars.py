"""The geometry of exemplars and maps, at 1,000 draws, against what coordinates, polygons and rejection sampling say."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from cim_models.pretext.exemplars import (
    DRAWS,
    ExemplarConfig,
    Rectangles,
    cover,
    crop,
    draw_rectangles,
    sample_points,
)

SOURCES = [(224, 224), (64, 64), (300, 180), (97, 131)]


def draw(height: int, width: int, n: int = 1000, seed: int = 0, **settings) -> Rectangles:
    uniforms = torch.rand(1, n, DRAWS, generator=torch.Generator().manual_seed(seed))
    return draw_rectangles(uniforms, height, width, ExemplarConfig(**settings))


def coordinates(height: int, width: int) -> torch.Tensor:
    """A source whose channels say x, y (pixel centres at .5) and 1."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)])[None]


def corners(rectangles: Rectangles, reach: float = 1.0) -> np.ndarray:
    """(N, 4, 2): upper left, upper right, lower right, lower left as the exemplar shows them, by numpy."""
    centre, half, angle, flip = (t[0].double().numpy() for t in rectangles)
    u = np.stack([np.cos(angle), np.sin(angle)], 1) * half[:, :1] * np.where(flip > 0, -1, 1)[:, None]
    v = np.stack([-np.sin(angle), np.cos(angle)], 1) * half[:, 1:]
    return np.stack([centre + reach * (a * u + b * v) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))], axis=1)


def polygon(points: np.ndarray, source: tuple[int, int], size: int, oversample: int = 4) -> np.ndarray:
    """The share of each context pixel that a polygon in source pixels covers."""
    side = size * oversample
    canvas = Image.new("L", (side, side))
    scaled = points * [side / source[1], side / source[0]] - 0.5  # PIL's pixel centres are whole numbers
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in scaled.tolist()], fill=1)
    return np.asarray(canvas, dtype=float).reshape(size, oversample, size, oversample).mean((1, 3))


@pytest.mark.parametrize("source", SOURCES)
def test_rectangles_lie_inside_the_source(source):
    points = corners(draw(*source))
    assert points.min() > -1e-3
    assert (points <= [source[1] + 1e-3, source[0] + 1e-3]).all()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("size", [64, 24])
def test_exemplars_show_the_coordinates_of_their_rectangle(source, size):
    rectangles = draw(*source)
    exemplars = crop(coordinates(*source), rectangles, size)[0]
    assert (exemplars[:, 2] - 1).abs().max() < 1e-6
    points = sample_points(rectangles, size)[0]
    assert points.min() > 0 and points[..., 0].max() < source[1] and points[..., 1].max() < source[0]

    shown = torch.stack([exemplars[:, :2, i, j] for i, j in ((0, 0), (0, -1), (-1, -1), (-1, 0))], dim=1).numpy()
    level = np.maximum(0, np.floor(np.log2(2 * rectangles.half[0].prod(-1).sqrt().numpy() / size / 1.5)) + 1)
    tolerance = np.maximum(1, 2**level)  # at the rim of a pooled level half of its pixel is missing
    expected = corners(rectangles, 1 - 1 / size)
    assert (np.abs(shown - expected).max((1, 2)) <= tolerance).all()
    middle = F.avg_pool2d(exemplars[:, :2, size // 2 - 1 : size // 2 + 1, size // 2 - 1 : size // 2 + 1], 2)
    assert (middle.flatten(1) - rectangles.centre[0]).abs().max() < 1

    rim = torch.tensor([source[1], source[0]])
    margin = torch.from_numpy(1.5 * 2**level)[:, None, None, None]
    inner = ((points > margin) & (points < rim - margin)).all(-1)
    difference = (exemplars[:, :2].permute(0, 2, 3, 1) - points).abs().amax(-1)
    assert difference[inner].max() < 1e-3


def test_maps_are_the_footprint_of_the_sampled_points():
    size, exemplar = 160, 64
    rectangles = draw(224, 224)
    maps = cover(rectangles, (224, 224), size)[0]
    points = sample_points(rectangles, exemplar)[0].numpy()
    overlaps = []
    for grid, drawn in zip(points, maps.numpy(), strict=True):
        ring = np.stack([grid[0, 0], grid[0, -1], grid[-1, -1], grid[-1, 0]])
        ring = ring.mean(0) + (ring - ring.mean(0)) * exemplar / (exemplar - 1)
        footprint = polygon(ring, (224, 224), size) > 0.5
        overlaps.append((footprint & drawn).sum() / (footprint | drawn).sum())
    assert np.mean(overlaps) >= 0.97
    assert np.min(overlaps) >= 0.93


@pytest.mark.parametrize("source", SOURCES)
def test_maps_are_as_large_as_the_rectangles(source):
    rectangles = draw(*source)
    shares = cover(rectangles, source, 160).float().mean((2, 3))
    areas = 4 * rectangles.half.prod(-1) / (source[0] * source[1])
    assert shares.mean().item() == pytest.approx(areas.mean().item(), rel=0.01)
    assert (shares - areas).abs().max() < 0.01


def test_maps_of_a_source_that_is_not_square():
    source = (300, 180)
    rectangles = draw(*source, n=100)
    maps = cover(rectangles, source, 160)[0].numpy()
    for ring, drawn in zip(corners(rectangles), maps, strict=True):
        footprint = polygon(ring, source, 160) > 0.5
        assert (footprint & drawn).sum() / (footprint | drawn).sum() > 0.93


@pytest.mark.parametrize("source", [(224, 224), (300, 180)])
def test_distribution_is_that_of_rejection_sampling(source):
    height, width = source
    rng = np.random.default_rng(1)
    n = 200_000
    area = rng.uniform(0.05, 0.48, n) * height * width
    ratio = np.exp(rng.uniform(-math.log(3), math.log(3), n))
    angle = np.deg2rad(rng.uniform(-45, 45, n))
    w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
    box = np.stack(
        [w * np.cos(angle) + h * np.abs(np.sin(angle)), w * np.abs(np.sin(angle)) + h * np.cos(angle)], axis=1
    )
    fits = (box <= [width, height]).all(1)
    expected = {
        "area": area[fits] / (height * width),
        "log ratio": np.log(ratio[fits]),
        "angle": angle[fits],
        "x": (box[:, 0] / 2 + rng.random(n) * (width - box[:, 0]))[fits] / width,
        "y": (box[:, 1] / 2 + rng.random(n) * (height - box[:, 1]))[fits] / height,
    }
    drawn = draw(*source, n=20_000)
    half, centre = drawn.half[0].double().numpy(), drawn.centre[0].double().numpy()
    actual = {
        "area": 4 * half.prod(1) / (height * width),
        "log ratio": np.log(half[:, 0] / half[:, 1]),
        "angle": drawn.angle[0].double().numpy(),
        "x": centre[:, 0] / width,
        "y": centre[:, 1] / height,
    }
    levels = np.linspace(0.01, 0.99, 33)
    for name, values in expected.items():
        spread = np.quantile(values, 0.99) - np.quantile(values, 0.01)
        difference = np.abs(np.quantile(actual[name], levels) - np.quantile(values, levels)).max()
        assert difference < 0.02 * spread, name
    assert drawn.flip.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert actual["area"].min() >= 0.0499 and actual["area"].max() <= 0.4801
    assert np.abs(actual["log ratio"]).max() <= math.log(3) + 1e-4
    assert np.abs(actual["angle"]).max() <= math.pi / 4 + 1e-6


def test_fixed_scale_shape_and_no_rotation():
    drawn = draw(224, 224, area=(0.1, 0.1), ratio=(1, 1), angle=(0, 0), flip=0)
    assert torch.allclose(drawn.half, torch.tensor(0.5 * 224 * math.sqrt(0.1)))
    assert not drawn.angle.any() and not drawn.flip.any()
    assert draw(224, 224, flip=1).flip.all()


@pytest.mark.parametrize("source", [(64, 64), (300, 180)])
def test_a_draw_that_never_fits_is_shrunk(source):
    settings = dict(area=(0.9, 0.9), ratio=(2.0, 2.0), angle=(30.0, 30.0))
    rectangles = draw(*source, n=200, **settings)
    points = corners(rectangles)
    assert points.min() > -1e-3 and (points <= [source[1] + 1e-3, source[0] + 1e-3]).all()
    assert torch.allclose(rectangles.half[..., 0] / rectangles.half[..., 1], torch.tensor(2.0))
    extent = np.ptp(points, axis=1) / [source[1], source[0]]
    assert np.allclose(extent.max(1), 1, atol=1e-4)  # it touches, so it shrank no more than it had to


def test_the_first_candidate_that_fits_is_taken():
    uniforms = torch.full((1, 1, DRAWS), 0.5)
    uniforms[..., :5] = torch.tensor([0.999, 0.999, 0.5, 0.1, 0.1])  # 0.48 of the area at ratio 3 does not fit
    second = draw_rectangles(uniforms, 64, 64, ExemplarConfig())
    assert torch.allclose(second.centre, torch.tensor(32.0))
    assert 4 * second.half.prod().item() / 64**2 == pytest.approx(0.265, abs=1e-4)


def test_the_same_numbers_give_the_same_exemplars_however_a_batch_is_split():
    uniforms, source = torch.rand(6, 4, DRAWS), torch.rand(6, 3, 120, 120)
    config = ExemplarConfig()
    whole = draw_rectangles(uniforms, 120, 120, config)
    for part in ([0, 1, 2], [3], [4, 5]):
        rectangles = draw_rectangles(uniforms[part], 120, 120, config)
        for mine, all_of_them in zip(rectangles, whole, strict=True):
            assert torch.equal(mine, all_of_them[part])
        assert torch.equal(crop(source[part], rectangles, 32), crop(source, whole, 32)[part])
        assert torch.equal(cover(rectangles, (120, 120), 96), cover(whole, (120, 120), 96)[part])


def test_flip_mirrors_the_exemplar_and_leaves_its_map():
    rectangles = draw(100, 100, n=20, flip=0)
    mirrored = rectangles._replace(flip=~rectangles.flip)
    source = torch.rand(1, 3, 100, 100)
    assert torch.allclose(crop(source, mirrored, 32), crop(source, rectangles, 32).flip(-1), atol=1e-4)
    assert torch.equal(cover(mirrored, (100, 100), 50), cover(rectangles, (100, 100), 50))


def whole(height: int, width: int, angle: float = 0.0, flip: bool = False) -> Rectangles:
    """The rectangle that is the source itself."""
    half = torch.tensor([[[width / 2, height / 2]]])
    return Rectangles(half.clone(), half, torch.tensor([[angle]]), torch.tensor([[flip]]))


@pytest.mark.parametrize("pooling", [1, 2, 4])
def test_the_whole_source_is_its_average_pooled_self(pooling):
    source = torch.rand(2, 3, 32 * pooling, 32 * pooling)
    expected = F.avg_pool2d(source, pooling)

    def cut(**kwargs) -> torch.Tensor:
        rectangles = whole(32 * pooling, 32 * pooling, **kwargs)
        return crop(source, Rectangles(*(t.expand(2, *t.shape[1:]) for t in rectangles)), 32)[:, 0]

    assert torch.allclose(cut(), expected, atol=1e-4)
    assert torch.allclose(cut(flip=True), expected.flip(-1), atol=1e-4)
    assert torch.allclose(cut(angle=math.pi / 2), expected.rot90(1, (-2, -1)), atol=1e-3)
    assert torch.allclose(cut(angle=math.pi), expected.rot90(2, (-2, -1)), atol=1e-3)


def test_a_fine_checkerboard_does_not_alias():
    board = (torch.arange(512)[:, None] + torch.arange(512)) % 2
    source = board.float().expand(1, 3, 512, 512)
    exemplars = crop(source, draw(512, 512, n=200, area=(0.2, 0.48)), 64)
    assert (exemplars - 0.5).abs().max() < 1e-3


def test_shrunken_exemplars_are_nearer_to_area_averages_than_plain_sampling():
    source = F.avg_pool2d(torch.rand(1, 3, 400, 400, generator=torch.Generator().manual_seed(0)), 3, 1, 1)
    rectangles = draw(400, 400, n=40, area=(0.3, 0.48))
    grid = sample_points(rectangles, 256).flatten(1, 2) / 200 - 1
    averages = F.grid_sample(source, grid, align_corners=False).unflatten(2, (40, 256)).transpose(1, 2)
    averages = F.avg_pool2d(averages[0], 4)
    plain_grid = sample_points(rectangles, 64).flatten(1, 2) / 200 - 1
    plain = F.grid_sample(source, plain_grid, align_corners=False).unflatten(2, (40, 64)).transpose(1, 2)[0]
    ours = crop(source, rectangles, 64)[0]
    assert (ours - averages).square().mean() < 0.5 * (plain - averages).square().mean()


@pytest.mark.parametrize("source", [(1, 1), (2, 2), (3, 5), (1, 4000), (700, 3), (20, 900)])
def test_tiny_and_narrow_sources(source):
    rectangles = draw(*source, n=50)
    exemplars = crop(coordinates(*source), rectangles, 64)[0]
    assert torch.isfinite(exemplars).all()
    assert (exemplars[:, 2] - 1).abs().max() < 1e-6
    assert exemplars[:, 0].min() >= 0.4999 and exemplars[:, 0].max() <= source[1] - 0.4999
    assert exemplars[:, 1].min() >= 0.4999 and exemplars[:, 1].max() <= source[0] - 0.4999


def test_a_narrow_source_is_pooled_as_its_area_asks():
    stripes = (torch.arange(2000) % 2).float().expand(1, 3, 100, 2000)
    exemplars = crop(stripes, draw(100, 2000, n=50, area=(0.3, 0.3), ratio=(8.0, 8.0), angle=(0, 0)), 64)
    assert (exemplars - 0.5).abs().max() < 1e-3


def test_the_prior_of_the_maps():
    """Large rectangles that must fit lie in the middle: the best map that is the same for all images has this loss."""
    maps = cover(draw(224, 224, n=4000), (224, 224), 64)[0].float().mean(0)
    assert maps[31:33, 31:33].mean().item() == pytest.approx(0.73, abs=0.03)
    assert max(maps[32, 0], maps[32, -1], maps[0, 32], maps[-1, 32]) < 0.02
    assert max(maps[0, 0], maps[0, -1], maps[-1, 0], maps[-1, -1]) == 0
    assert torch.allclose(maps, maps.flip(0), atol=0.05) and torch.allclose(maps, maps.T, atol=0.05)
    assert F.binary_cross_entropy(maps, maps).item() == pytest.approx(0.40, abs=0.01)


def test_sources_of_other_precision_keep_it():
    source = coordinates(64, 64) / 64
    rectangles = draw(64, 64, n=10)
    assert crop(source.double(), rectangles, 16).dtype == torch.float64
    assert torch.allclose(crop(source.double(), rectangles, 16).float(), crop(source, rectangles, 16), atol=1e-5)
