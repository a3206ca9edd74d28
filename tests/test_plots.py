"""cim_models.plots: sheets have the cells that they should, where they should."""

import numpy as np
import pytest
import torch
from PIL import Image

from cim_models.plots import MARGIN, SIDE, correlation_sheet, neighbour_sheet


def views(n: int = 2, k: int = 2, size: int = 32) -> tuple[torch.Tensor, ...]:
    """Red contexts, blue exemplars, and maps of the left half, predicted with certainty."""
    contexts = torch.tensor([0.8, 0, 0]).view(1, 3, 1, 1).expand(n, 3, size, size)
    exemplars = torch.tensor([0, 0, 1.0]).view(1, 1, 3, 1, 1).expand(n, k, 3, 16, 16)
    maps = (torch.arange(size) < size // 2).expand(n, k, size, size)
    return contexts, exemplars, maps, maps.float()


def cells(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    """How many cells' worth of pixels have exactly this colour."""
    return round(float((np.asarray(sheet) == colour).all(-1).sum()) / SIDE**2)


def test_correlation_sheet():
    contexts, exemplars, maps, probabilities = views()
    sheet = correlation_sheet(contexts, exemplars, maps, probabilities, ["first", "second"])
    assert sheet.mode == "RGB"
    assert cells(sheet, (0, 0, 255)) == 4
    pixels = np.asarray(sheet)
    for margin in (pixels[:MARGIN], pixels[:, :MARGIN], pixels[:, -8:], pixels[-5:]):
        assert (margin == 255).all()


def test_true_place_and_heat_are_where_they_belong():
    contexts, exemplars, maps, probabilities = views(1, 1)
    pixels = np.asarray(correlation_sheet(contexts, exemplars, maps, probabilities)).astype(int)
    row = pixels[MARGIN + 20 + SIDE // 2]
    context, exemplar, truth, heat = (row[start : start + SIDE] for start in (20, 168, 300, 432))
    assert (context == (204, 0, 0)).all() and (exemplar == (0, 0, 255)).all()
    assert (truth[10:50] == (204, 0, 0)).all() and (truth[70:, 1] > 150).all()
    assert heat[10:50].mean() > 2 * heat[70:].mean()


def test_correlation_sheet_without_maps():
    contexts, exemplars, maps, probabilities = views()
    with_maps = correlation_sheet(contexts, exemplars, maps, probabilities)
    without = correlation_sheet(contexts, exemplars, None, probabilities)
    assert without.width < with_maps.width and without.height == with_maps.height
    assert cells(without, (0, 0, 255)) == 4


@pytest.mark.parametrize("k", [1, 3, 4, 6])
def test_many_exemplars_go_on_below(k):
    sheet = correlation_sheet(*views(1, k), captions=["a caption"])
    assert cells(sheet, (0, 0, 255)) == k
    assert sheet.width <= 1404
    assert (sheet.height > 2 * SIDE) == (k > 3)


def test_half_precision_and_gradients():
    contexts, exemplars, maps, probabilities = views()
    expected = correlation_sheet(contexts, exemplars, maps, probabilities)
    halves = (contexts.bfloat16(), exemplars.half(), maps, probabilities.bfloat16().requires_grad_())
    assert np.abs(np.asarray(correlation_sheet(*halves), dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_neighbour_sheet():
    picture, tensor = Image.new("RGB", (300, 300), (0, 200, 0)), torch.zeros(3, 20, 20)
    tensor[2] = 1
    captions = [["a file name that is far too long for its cell.jpg", "0.91", "0.85"], ["b", "0.7"]]
    sheet = neighbour_sheet([[picture, tensor, tensor], [tensor, picture]], captions)
    assert sheet.mode == "RGB"
    assert cells(sheet, (0, 200, 0)) == 2 and cells(sheet, (0, 0, 255)) == 3
    gap = np.asarray(sheet)[:, 20 + SIDE : 40 + SIDE]
    assert (gap == 255).all(), "a caption left its cell"


def test_neighbours_are_shown_whole():
    wide = Image.new("L", (400, 100), 0)
    sheet = neighbour_sheet([[wide, wide]])
    assert cells(sheet, (0, 0, 0)) == 0 and round((np.asarray(sheet) == 0).all(-1).sum() / SIDE**2, 1) == 0.5


def test_a_caption_of_several_lines_is_one():
    picture = Image.new("RGB", (30, 30), (0, 200, 0))
    sheets = [neighbour_sheet([[picture, picture]], [[name, name]]) for name in ("two\nlines\r\n", "two lines")]
    assert sheets[0] == sheets[1]
