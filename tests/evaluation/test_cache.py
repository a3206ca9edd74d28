"""Features on disk are used again only if they are whole and of the same weights, images, transform and pooling."""

import json
import logging
import os

import pytest
import torch

from cim_models.errors import ConfigError
from cim_models.evaluation.cache import CHECKED, split_features
from cim_models.evaluation.encoders import describe, open_encoder
from cim_models.evaluation.features import extract_all
from cim_models.evaluation.splits import read_split


@pytest.fixture
def encoder(run):
    """An encoder that counts the images it has seen."""
    model = open_encoder(str(run), device="cpu")
    model.seen = 0
    model.patch_embed.register_forward_pre_hook(
        lambda module, inputs: setattr(model, "seen", model.seen + len(inputs[0]))
    )
    return model


@pytest.fixture
def cached(encoder, splits):
    """Extracts `train` with a cache; returns features and how many images the encoder saw for it."""

    def get(pooling="patches", model=None, **options):
        model = model or encoder
        before = encoder.seen
        options = dict(cache=splits / "cache", workers=0) | options
        found = split_features(model, read_split(splits / "train"), describe(model, "x"), pooling, **options)
        return found, encoder.seen - before

    return get


def test_the_second_time_only_a_few_images_are_looked_at(encoder, splits, cached):
    (splits / "train" / "even" / "deep" / "aa.jpg").write_text("no picture")
    expected = extract_all(encoder, read_split(splits / "train").paths, workers=0)
    for images in (16, CHECKED):
        found, seen = cached()
        assert seen == images and found.unreadable == expected.unreadable and list(found.unreadable) == [8]
        assert torch.equal(found.features, expected.features) and torch.equal(found.indices, expected.indices)
    assert cached(cache=None)[1] == 16


def test_what_the_features_depend_on_has_its_own_place(splits, cached, run):
    cached()
    assert cached("both")[1] == 16 and cached(precision="bf16")[1] == 16
    assert cached("both")[1] == CHECKED and cached(precision="bf16")[1] == CHECKED
    first, again = cached("dense")[0].features, cached("dense")
    assert first.shape == (16, 192, 4, 4) and again[1] == CHECKED and torch.equal(first, again[0].features)
    cached(model=open_encoder(str(run), random_init=True))
    cached(model=open_encoder(str(run), image_size=96))
    assert len(list((splits / "cache").iterdir())) == 6
    first = read_split(splits / "train").paths[0]
    first.rename(first.with_name("z.jpg"))
    assert cached()[1] == 16


def test_damage_is_seen_and_repaired(splits, cached, caplog):
    expected = cached()[0].features.clone()
    (file,) = (splits / "cache").rglob("features.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:-4] + b"\0\0\0\0", whole[:100], b""):
        file.write_bytes(damaged)
        with caplog.at_level(logging.WARNING, "cim_models"):
            found, seen = cached()
        assert seen == 16 and torch.equal(found.features, expected) and "damaged; extracted again" in caplog.text
        caplog.clear()
    file.with_name("about.json").write_text("{")
    assert cached()[1] == 16 and cached()[1] == CHECKED
    file.unlink()
    assert cached()[1] == 16


def test_an_image_that_changed_unnoticed_is_seen(splits, cached, caplog):
    """Its size and its time of change are what they were."""
    cached()
    paths = read_split(splits / "train").paths
    status, other = paths[0].stat(), paths[-1].read_bytes()
    size = max(status.st_size, len(other))
    for path in paths[:1]:
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    cached()
    paths[0].write_bytes(other.ljust(size, b"\0"))
    os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    with caplog.at_level(logging.WARNING, "cim_models"):
        found, seen = cached()
    assert seen == CHECKED + 16 and "give other features than cached" in caplog.text
    torch.testing.assert_close(found.features[0], found.features[-1])


def test_an_interrupted_extraction_leaves_nothing_to_use(splits, cached, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cim_models.evaluation.cache.RowWriter.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            cached()
    assert not [path for path in (splits / "cache").rglob("*") if path.is_file()]
    assert cached()[1] == 16


def test_a_cache_that_cannot_be_written(splits, cached):
    (splits / "file").write_text("")
    with pytest.raises(ConfigError, match="file.*cannot be written"):
        cached(cache=splits / "file")


def test_about_a_cached_file(splits, cached):
    cached()
    (about,) = (json.loads(path.read_text()) for path in (splits / "cache").rglob("about.json"))
    assert (
        about["images"] == 16 and about["transform"]["input_size"] == [3, 64, 64] and len(about["weights_sha256"]) == 64
    )
