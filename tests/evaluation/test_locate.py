"""The heat map of a pair of pictures: the probabilities of the model itself, at the picture's proportions."""

import pytest
import torch
from PIL import Image

from cim_models import create_pretext
from cim_models.errors import ConfigError, DataError, WeightsError
from cim_models.evaluation.locate import locate, overlay, square
from cim_models.images import find_images
from cim_models.pretext.views import normalise


@pytest.fixture
def pair(tmp_path, photographs):
    """A context of 300 × 150 pixels and a part of it."""
    picture = Image.open(find_images(photographs(8, 300))[0]).crop((0, 0, 300, 150))
    picture.save(tmp_path / "context.png")
    picture.crop((30, 40, 130, 90)).save(tmp_path / "exemplar.png")
    return tmp_path / "context.png", tmp_path / "exemplar.png"


def test_it_says_where_the_model_is_most_certain(tmp_path, pair, run):
    found = locate(*pair, tmp_path / "new" / "heat.png", model=str(run))
    context, exemplar = (Image.open(path) for path in pair)
    inputs = normalise(square(context, 64))[None], normalise(square(exemplar, 32))[None, None]
    heat = create_pretext(run).eval().locate(*inputs)[0, 0]
    assert found.probability == pytest.approx(float(heat.max()), abs=1e-5)
    row, column = int(found.y / 150 * 64), int(found.x / 300 * 64)
    assert float(heat[row, column]) == pytest.approx(float(heat.max()), abs=1e-5)
    assert found.area == pytest.approx(float((heat > 0.5).float().mean()), abs=1e-3)
    with Image.open(found.path) as sheet:
        assert sheet.size == (300, 150) and sheet.format == "PNG"
    assert str(found.path) in str(found) and f"{found.probability:.2f}" in str(found)


def test_a_square_is_squashed_not_cropped():
    picture = Image.new("RGB", (200, 40), "black")
    picture.paste("red", (0, 0, 100, 40))
    squared = square(picture, 16)
    assert squared.shape == (3, 16, 16) and squared.max() <= 1
    assert (squared[0, :, :7] == 1).all() and (squared[0, :, 9:] == 0).all() and (squared[1:] == 0).all()


def test_colours_follow_the_probabilities():
    heat = torch.zeros(8, 8)
    heat[:, 4:] = 1
    sheet = overlay(Image.new("RGB", (2000, 400), "grey"), heat)
    assert sheet.size == (1024, 205)
    dark, bright = sheet.getpixel((100, 100)), sheet.getpixel((900, 100))
    assert sum(bright) > 2 * sum(dark)


@pytest.mark.parametrize(("size", "shown"), [((1, 5000), (1, 1024)), ((5000, 1), (1024, 1)), ((2048, 3), (1024, 2))])
def test_a_line_of_pixels_has_a_heat_map(size, shown):
    assert overlay(Image.new("RGB", size, "grey"), torch.rand(8, 8)).size == shown


def test_what_cannot_be_is_said(tmp_path, pair, run):
    context, exemplar = pair
    with pytest.raises(DataError, match="nowhere.png"):
        locate(context, tmp_path / "nowhere.png", tmp_path / "heat.png", model=str(run))
    with pytest.raises(WeightsError, match="no correlation head"):
        locate(context, exemplar, tmp_path / "heat.png", model=str(run / "online.safetensors"))
    with pytest.raises(ConfigError, match="cannot be written"):
        locate(context, exemplar, context / "heat.png", model=str(run))
    assert not (tmp_path / "heat.png").exists()
