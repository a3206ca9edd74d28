"""The first look at an encoder: what it writes, on the photographs of scikit-image and on a folder."""

import shutil
import sys

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cim_models.errors import ConfigError, DataError
from cim_models.evaluation import load_features, quickstart
from cim_models.evaluation.quickstart import GRID, PHOTOGRAPHS, _others, _tiles, photographs
from cim_models.hub.manifest import load_manifest
from cim_models.images import find_images, read_image


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"network: {arguments}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def test_the_default_photographs_are_those_that_are_installed():
    paths = photographs()
    assert 4 <= len(paths) <= len(PHOTOGRAPHS) and all("skimage" in path.parts for path in paths)
    assert min(min(read_image(path).size) for path in paths) > 200


def test_without_scikit_image_it_says_what_to_do(monkeypatch, tmp_path, run):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ConfigError, match=r"pip install 'cim-models\[demo\]'"):
        quickstart(None, tmp_path / "out", model=str(run))


def test_the_embedded_encoder_or_else_one_made_here(tmp_path, run, no_network):
    entries = load_manifest().entries.values()
    released = any(entry.architecture == "cim_vit_tiny" and entry.pretext is not None for entry in entries)
    found = quickstart(None, tmp_path, **({} if released else {"model": str(run)}))
    features, names = load_features(found.features)
    assert len(features) == len(photographs()) == found.images and names == [str(path) for path in photographs()]
    for path, width in ((found.neighbours, 700), (found.correlation, 1000)):
        with Image.open(path) as sheet:
            assert sheet.mode == "RGB" and sheet.width > width and sheet.height > 700
            assert len(sheet.resize((32, 32)).getcolors(1024)) > 100
        assert str(path) in str(found)
    tiles = found.images * GRID**2
    assert found.same_chance == pytest.approx((GRID**2 - 1) / (tiles - 1))
    assert found.same > 2 * found.same_chance
    if released:
        assert found.iou > found.iou_shuffled + 0.05


def test_a_folder_of_ones_own(tmp_path, photographs, run):
    folder = tmp_path / "mine"
    shutil.copytree(photographs(11, 80), folder)
    (folder / "broken.jpg").write_text("no picture")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    found = quickstart(folder, tmp_path / "out", model=str(run))
    again = quickstart(folder, tmp_path / "again", model=str(run))
    assert found.images == 12 and found.same is not None
    for name in ("features.safetensors", "neighbours.png", "correlation.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert (found.iou, found.same) == (again.iou, again.same)


def test_one_image(tmp_path, photographs, run):
    found = quickstart(find_images(photographs(11, 80))[0], tmp_path, model=str(run))
    assert found.images == 1 and found.iou_shuffled is None and "another image" not in str(found)


def test_many_images_are_compared_as_they_are(tmp_path, photographs, run):
    found = quickstart(photographs(60, 64), tmp_path, model=str(run))
    assert found.images == 60 and found.same is None and "tile" not in str(found)
    assert found.neighbours.is_file()


def test_no_images(tmp_path, run):
    with pytest.raises(DataError):
        quickstart(tmp_path, tmp_path / "out", model=str(run))
    with pytest.raises(ConfigError, match="cannot be written"):
        quickstart(photographs()[0], photographs()[0], model=str(run))


def test_neighbours_are_others():
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    features[7] = features[3]
    similarities = F.cosine_similarity(features[:, None], features[None], dim=2).fill_diagonal_(-2)
    own = [3, 7, 20]
    for query, row in zip(own, _others(features[own], features, own), strict=True):
        assert [i for i, _ in row] == similarities[query].topk(5).indices.tolist()
        torch.testing.assert_close(torch.tensor([s for _, s in row]), similarities[query].topk(5).values)
    assert [len(row) for row in _others(features[:2], features[:3], [0, 1])] == [2, 2]


@pytest.mark.parametrize("size", [(300, 200), (100, 101), (1, 1), (2, 500), (4000, 1000)])
def test_tiles_do_not_overlap_and_leave_nothing_out(size):
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    whole = image.copy()
    whole.thumbnail((768, 768))
    tiles = _tiles(image)
    assert len(tiles) == GRID**2
    expected = max(whole.width, GRID) * max(whole.height, GRID)
    assert sum(tile.width * tile.height for tile in tiles) == expected and min(min(tile.size) for tile in tiles) >= 1
