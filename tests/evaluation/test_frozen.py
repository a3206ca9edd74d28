"""What every protocol starts from: the same mistakes have the same errors, whatever is measured."""

import shutil
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from cim_models import evaluation
from cim_models.cli import COMMANDS
from cim_models.errors import ConfigError, DataError
from cim_models.evaluation.encoders import open_encoder
from cim_models.evaluation.features import extract_all
from cim_models.evaluation.frozen import FrozenConfig
from cim_models.evaluation.splits import read_split
from cim_models.images import find_images

PROTOCOLS = {
    "knn": (evaluation.knn, {"ks": (1,)}),
    "linear": (evaluation.linear, {"epochs": 1}),
    "lowshot": (evaluation.lowshot, {"draws": 1, "shots": (1,)}),
}


@pytest.fixture(params=PROTOCOLS)
def measure(request, splits, run):
    """Runs a protocol on `train` and `val`."""
    function, few = PROTOCOLS[request.param]

    def call(model=str(run), config=None, **options):
        folders = (options.pop("train", splits / "train"), options.pop("val", splits / "val"))
        out = options.pop("out", splits / "out.json")
        return function(model, *folders, out, config=FrozenConfig(workers=0, **(config or {})), **few, **options)

    return call


def test_a_class_that_cannot_be_read(splits, measure):
    for path in find_images(splits / "val" / "odd"):
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"val/odd/.*jpg: not an image; no image of the class 'odd' in .*val"):
        measure()
    assert not (splits / "out.json").exists()


@pytest.mark.parametrize("out", [".", "folder", "file/out.json"])
def test_a_report_that_cannot_be_written_is_said_before_anything_is_measured(splits, measure, monkeypatch, out):
    (splits / "folder").mkdir()
    (splits / "file").write_bytes(b"")
    monkeypatch.chdir(splits)
    with pytest.raises(ConfigError, match=f"{out}: cannot be written"):
        measure("resnet18", out=Path(out), config={"cache": splits / "cache"}, random_init=True)
    assert not (splits / "cache").exists()


@pytest.mark.parametrize("wrong", [{"ks": ()}, {"ks": (0, 1)}, {"temperature": 0.0}])
def test_neighbours_that_cannot_be_asked_for_are_said_before_features_are_extracted(splits, run, wrong):
    config = FrozenConfig(workers=0, cache=splits / "cache")
    with pytest.raises(ConfigError, match=r"ks=\(.*temperature="):
        evaluation.knn(str(run), splits / "train", splits / "val", splits / "out.json", config=config, **wrong)
    assert not (splits / "cache").exists()


def test_classes_that_differ(splits, measure):
    (splits / "val" / "odd").rename(splits / "val" / "strange")
    with pytest.raises(DataError, match="train has classes that .*val has not: odd"):
        measure()


def test_images_in_both_splits_are_said(splits, measure, caplog):
    measure()
    assert "images are in" not in caplog.text
    names = [path.relative_to(splits) for path in find_images(splits / "train")]
    (splits / "val.csv").write_text("".join(f"train/../{name},{name.parts[1]}\n" for name in names[2:]))
    measure(val=splits / "val.csv")
    assert f"{splits / 'val.csv'}: 14 images are in {splits / 'train'}, too, such as" in caplog.text


def test_features_that_are_not_finite(splits, measure, run, tmp_path):
    shutil.copytree(run, tmp_path / "bad")
    file = tmp_path / "bad" / "online.safetensors"
    tensors = load_file(file)
    tensors["norm.weight"][0] = torch.nan
    save_file(tensors, file, {"architecture": "cim_vit_tiny", "model_args": '{"depth": 2, "img_size": 64}'})
    with pytest.raises(DataError, match="train/even/.*jpg: the encoder's features of this image are not finite"):
        measure(str(tmp_path / "bad"), config={"cache": splits / "cache"})
    assert not [path for path in (splits / "cache").rglob("*") if path.is_file()]


def test_a_file_of_labels_and_a_cache_give_the_numbers_of_folders(splits, measure):
    expected = measure()
    for name in ("train", "val"):
        found = read_split(splits / name)
        pairs = zip(found.paths, found.labels.tolist(), strict=True)
        (splits / f"{name}.csv").write_text("".join(f"{p.relative_to(splits)},{found.classes[c]}\n" for p, c in pairs))
    listed = measure(train=splits / "train.csv", val=splits / "val.csv")
    assert listed.result == expected.result and listed.data["train"]["images"] == 16
    for _ in range(2):
        assert measure(config={"cache": splits / "cache"}).result == expected.result


def test_a_peer_from_its_file(splits, measure):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        peer = timm.create_model("test_vit", num_classes=0)
    torch.save({"model": peer.state_dict()}, splits / "peer.pth")
    options = dict(image_size=64, config={"seed": 3, "pooling": "class"})
    report = measure("test_vit", weights=str(splits / "peer.pth"), **options)
    random = measure("test_vit", random_init=True, **options)
    assert report.result == random.result
    assert report.model["weights_sha256"] == random.model["weights_sha256"]
    assert report.model["weights"] == str(splits / "peer.pth") and random.model["seed"] == 3


@pytest.mark.parametrize("name", [*PROTOCOLS, "report"])
def test_a_command_is_the_public_function(name):
    module, _, function = COMMANDS[f"evaluate {name}"][0].partition(":")
    assert getattr(import_module(module), function) is getattr(evaluation, name)


def test_all_features_at_once_are_those_of_one_batch_after_another(splits, run):
    paths = read_split(splits / "train").paths
    (splits / "broken.jpg").write_text("no picture")
    encoder = open_encoder(str(run))
    found = extract_all(encoder, [*paths[:3], splits / "broken.jpg", *paths[3:]], batch_size=2, workers=0)
    assert found.indices.tolist() == [0, 1, 2, *range(4, 17)] and list(found.unreadable) == [3]
    torch.testing.assert_close(found.features, extract_all(encoder, paths, workers=0).features)
