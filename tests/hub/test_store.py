"""Only files whose bytes are right are ever given out; what is wrong is said."""

import dataclasses
import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.manifest import load_manifest
from cim_models.hub.store import MIRROR, check_file, released_files, resolve
from cim_models.hub.weights import from_path, read_header


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch):
    monkeypatch.delenv(MIRROR, raising=False)


def flip(path: Path) -> tuple[str, str]:
    """Flips one bit in the last tensor; sha256 before and after."""
    content = bytearray(path.read_bytes())
    before = hashlib.sha256(content).hexdigest()
    content[-5] ^= 1
    path.write_bytes(content)
    return before, hashlib.sha256(content).hexdigest()


def test_a_name_gives_verified_files(release):
    manifest, entry = release(pretext="head")
    found = resolve("cim_vit_tiny", manifest=manifest)
    assert found == resolve(entry.id, manifest=manifest)
    assert found.entry == entry and found.ours and found.model_args == entry.model_args
    assert {part: [path.name for path in paths] for part, paths in found.files.items()} == {
        "backbone": ["model.safetensors"],
        "pretext": ["pretext.safetensors"],
    }
    for file in entry.files:
        (path,) = found.files[file.part]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256


def test_an_architecture_means_what_holds_the_part(release):
    release("cim_vit_tiny.head", pretext="head", released="2026-01-01")
    manifest, _ = release("cim_vit_tiny.newer", released="2026-02-01")
    assert resolve("cim_vit_tiny", manifest=manifest).name == "cim_vit_tiny.newer"
    assert resolve("cim_vit_tiny", manifest=manifest, part="pretext").name == "cim_vit_tiny.head"
    assert resolve("cim_vit_tiny", "cim_vit_tiny.head", manifest).name == "cim_vit_tiny.head"


@pytest.mark.parametrize("damage", ["bit", "short", "long", "empty", "missing"])
@pytest.mark.parametrize("part", ["backbone", "pretext"])
def test_a_damaged_file_is_refused(release, damage, part):
    manifest, entry = release(pretext="head")
    file = next(file for file in entry.files if file.part == part)
    path = manifest.root / file.path
    if damage == "bit":
        before, after = flip(path)
        expected = (f"sha256 {before} expected, {after} found",)
    elif damage == "missing":
        path.unlink()
        expected = ("there is no ",)
    else:
        size = {"short": file.size - 1, "long": file.size + 1, "empty": 0}[damage]
        path.write_bytes((path.read_bytes() + b"x")[:size])
        expected = (f"{file.size} bytes expected, {size} found",)
    with pytest.raises(WeightsError) as caught:
        resolve(entry.id, manifest=manifest)
    for text in (*expected, str(path), entry.id, MIRROR, "install cim-models again"):
        assert text in str(caught.value)


@pytest.mark.parametrize("layout", ["{path}", "{id}/{name}", "{name}"])
def test_the_mirror_comes_first(release, tmp_path, monkeypatch, layout):
    manifest, entry = release(pretext="head")
    mirror = tmp_path / "mirror"
    for file in entry.files:
        place = mirror / layout.format(path=file.path, id=entry.id, name=Path(file.path).name)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(manifest.root / file.path, place)
    monkeypatch.setenv(MIRROR, str(mirror))
    for paths in released_files(entry, manifest.root).values():
        assert all(path.is_relative_to(mirror) for path in paths)
    shutil.rmtree(manifest.root / "weights")
    assert resolve(entry.id, manifest=manifest).ours


def test_a_damaged_mirror_is_passed_over_and_named(release, tmp_path, monkeypatch, caplog):
    manifest, entry = release()
    shutil.copytree(manifest.root / "weights", tmp_path / "mirror" / "weights")
    monkeypatch.setenv(MIRROR, str(tmp_path / "mirror"))
    bad, good = (root / entry.files[0].path for root in (tmp_path / "mirror", manifest.root))
    before, after = flip(bad)
    with caplog.at_level(logging.WARNING, "cim_models"):
        assert released_files(entry, manifest.root) == {"backbone": (good,)}
    assert str(bad) in caplog.text and after in caplog.text
    flip(good)
    with pytest.raises(WeightsError) as caught:
        released_files(entry, manifest.root)
    assert str(bad) in str(caught.value) and str(good) in str(caught.value) and before in str(caught.value)
    monkeypatch.setenv(MIRROR, str(tmp_path / "nowhere"))
    with pytest.raises(WeightsError, match=f"{MIRROR}=.*nowhere is neither a folder nor an address"):
        released_files(entry, manifest.root)


def test_all_shards_are_verified(release):
    manifest, entry = release(pretext="head")
    files = tuple(dataclasses.replace(file, part="backbone") for file in entry.files)
    sharded = dataclasses.replace(entry, files=files)
    (paths,) = released_files(sharded, manifest.root).values()
    assert [path.name for path in paths] == ["model.safetensors", "pretext.safetensors"]
    flip(paths[1])
    with pytest.raises(WeightsError, match="pretext.safetensors is damaged"):
        released_files(sharded, manifest.root)


def test_a_release_folder_is_verified_by_its_own_entry(release, tmp_path):
    manifest, entry = release(pretext="head")
    folder = shutil.copytree(manifest.root / "weights" / entry.id, tmp_path / "else where" / "copy")
    for given in (folder, str(folder), f"local-dir:{folder}", folder / "model.safetensors"):
        found = resolve("cim_vit_tiny", given, manifest)
        assert found.entry == entry and not found.ours and found.name == str(folder)
        assert found.files["backbone"] == (folder / "model.safetensors",)
    assert resolve(f"local-dir:{folder}", manifest=manifest) == found
    with pytest.raises(WeightsError, match="holds weights of cim_vit_tiny, not of cim_vit_small"):
        resolve("cim_vit_small", folder, manifest)
    flip(folder / "model.safetensors")
    with pytest.raises(WeightsError, match="model.safetensors is damaged"):
        resolve("cim_vit_tiny", folder, manifest)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="model.safetensors cannot be read"):
        resolve("cim_vit_tiny", folder, manifest)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read as JSON"), ("[]", "not a JSON object"), ('{"cim_models": {"id": "x"}}', "missing field")],
)
def test_a_bad_config_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WeightsError, match=message) as caught:
        from_path(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_run_directory(tmp_path):
    metadata = {"architecture": "cim_vit_tiny", "model_args": '{"img_size": 96}', "pretext": '{"head_width": 8}'}
    metadata["views"] = '{"context_size": 96, "exemplars": {"size": 48}}'
    for name in ("online", "target", "head"):
        save_file({"x": torch.zeros(2)}, tmp_path / f"{name}.safetensors", metadata)
    found = resolve("cim_vit_tiny", tmp_path)
    assert {part: paths[0].name for part, paths in found.files.items()} == {
        "backbone": "online.safetensors",
        "target": "target.safetensors",
        "head": "head.safetensors",
    }
    assert found.model_args == {"img_size": 96} and found.entry is None and not found.ours
    assert found.pretext.config == {"head_width": 8}
    assert (found.pretext.context_size, found.pretext.exemplar_size) == (96, 48)
    alone = resolve("cim_vit_tiny", tmp_path / "target.safetensors")
    assert dict(alone.files) == {"backbone": (tmp_path / "target.safetensors",)}
    (tmp_path / "target.safetensors").unlink()
    assert "target" not in resolve(tmp_path).files
    save_file({"x": torch.zeros(2)}, tmp_path / "online.safetensors", metadata | {"model_args": "{"})
    with pytest.raises(WeightsError, match="metadata that is not JSON"):
        resolve(tmp_path)


def test_a_folder_that_timm_wrote(tmp_path):
    config = {
        "architecture": "cim_vit_tiny",
        "num_classes": 7,
        "model_args": {"num_classes": 7, "img_size": 64},
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "crop_mode": "center",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").touch()
    for place in (tmp_path, tmp_path / "model.safetensors.index.json"):
        with pytest.raises(WeightsError, match=f"no {tmp_path}/model.safetensors: .*several files.*weights=FILE"):
            resolve(place)
    (tmp_path / "model.safetensors").touch()
    found = resolve(tmp_path)
    assert found.architecture == "cim_vit_tiny" and found.model_args == {"img_size": 64}
    assert found.preprocessing.mean == (0.5, 0.5, 0.5) and found.files["backbone"] == (tmp_path / "model.safetensors",)


def test_a_file_that_does_not_say_what_it_is(tmp_path):
    path = tmp_path / "plain.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    assert resolve("cim_vit_tiny", path).architecture == "cim_vit_tiny"
    assert resolve("cim_vit_tiny", path).model_args is None
    with pytest.raises(WeightsError, match="does not say which architecture"):
        resolve(path)


@pytest.mark.parametrize(
    "content", [b"", b"x" * 7, b"<html>" * 100, b"\xff" * 64, (8).to_bytes(8, "little") + b"not json"]
)
def test_a_file_that_is_no_safetensors(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="bad.safetensors is not a whole safetensors file"):
        read_header(path)
    save_file({"x": torch.zeros(64)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="bad.safetensors is not a whole safetensors file"):
        read_header(path)


def test_header(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3, dtype=torch.float16), "b": torch.tensor(1)}, path, {"key": "value"})
    header = read_header(path)
    assert header.metadata == {"key": "value"}
    assert header.shapes == {"a": (2, 3), "b": ()} and header.dtypes == {"a": "F16", "b": "I64"}


@pytest.mark.parametrize(
    ("name", "weights", "error", "message"),
    [
        ("cim_vit_tiny.one@v1", None, WeightsError, "cim_vit_tiny.one@v1: .*leave it out"),
        (
            "cim_vit_tiny.one",
            "somewhere.safetensors",
            ConfigError,
            "the name is an architecture, not 'cim_vit_tiny.one'",
        ),
        ("local-dir:here", "there", ConfigError, "the name is an architecture"),
        ("cim_vit_tiny.other", None, WeightsError, "did you mean cim_vit_tiny.one"),
        ("cim_vit_tiny", "cim_vit_tiny.onee", WeightsError, "did you mean cim_vit_tiny.one"),
        ("cim_vit_tiny", "nowhere/at/all.safetensors", WeightsError, "there is no nowhere"),
        ("cim_vit_small", "cim_vit_tiny.one", WeightsError, "holds weights of cim_vit_tiny, not of cim_vit_small"),
        ("cim-vit-tiny", None, ConfigError, "did you mean cim_vit_tiny"),
    ],
)
def test_what_cannot_be_found_is_explained(release, name, weights, error, message):
    manifest, _ = release()
    with pytest.raises(error, match=message):
        resolve(name, weights, manifest)


def test_other_files_and_folders_are_refused(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"x")
    with pytest.raises(WeightsError, match="import-official"):
        from_path(tmp_path / "model.pth")
    with pytest.raises(WeightsError, match="neither a release folder"):
        from_path(tmp_path)


def test_every_released_file_is_whole():
    manifest = load_manifest()
    for entry in manifest.entries.values():
        if "repository" in entry.sources:
            for file in entry.files:
                check_file(manifest.root / file.path, file)
