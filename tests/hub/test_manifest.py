"""The manifest says what is wrong with it, and where."""

import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.entry import (
    Data,
    Entry,
    Golden,
    Metric,
    Preprocessing,
    Pretext,
    WeightFile,
    key_digest,
    read_entry,
    to_dict,
)
from cim_models.hub.manifest import Manifest, data_root, info, load_manifest, table, write_manifest
from cim_models.hub.names import Name, parse_name

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def entry(release) -> Entry:
    return release(pretext="head")[1]


def test_the_released_manifest_is_valid_and_beside_the_package():
    manifest = load_manifest()
    assert manifest.root == data_root() == ROOT
    written = json.loads((ROOT / "weights_manifest.json").read_text())
    assert list(manifest.entries) == sorted(written["entries"])
    assert {id: to_dict(entry) for id, entry in manifest.entries.items()} == written["entries"]


def test_written_and_read_again(release, tmp_path):
    release("cim_vit_tiny.one")
    manifest, _ = release("cim_vit_tiny.another", pretext="head")
    assert list(manifest.entries) == ["cim_vit_tiny.another", "cim_vit_tiny.one"]
    (tmp_path / "second").mkdir()
    write_manifest(Manifest(tmp_path / "second", dict(reversed(manifest.entries.items()))))
    first, second = ((tmp_path / name / "weights_manifest.json").read_text() for name in ("root", "second"))
    assert first == second and load_manifest(tmp_path / "second").entries == manifest.entries


def test_a_bad_entry_is_not_written(release, tmp_path):
    manifest, entry = release()
    before = (tmp_path / "root" / "weights_manifest.json").read_bytes()
    with pytest.raises(ConfigError, match="cim_vit_tiny.one: field released"):
        write_manifest(manifest.with_entry(dataclasses.replace(entry, released="yesterday")))
    files = [path.name for path in (tmp_path / "root").iterdir() if path.is_file()]
    assert files == ["weights_manifest.json"]
    assert (tmp_path / "root" / "weights_manifest.json").read_bytes() == before


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Entry)])
def test_every_field_is_required_and_typed(entry, field):
    data = to_dict(entry)
    with pytest.raises(ConfigError, match=rf"here: missing field {field}$"):
        read_entry({key: value for key, value in data.items() if key != field}, "here")
    with pytest.raises(ConfigError, match=rf"here: field {field}: .* is not "):
        read_entry(data | {field: 1.5}, "here")
    with pytest.raises(ConfigError, match=rf"here: unknown field {field}_$"):
        read_entry(data | {f"{field}_": data[field]}, "here")


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("files", 1, "sha256"), "0" * 63, "files[1].sha256"),
        (("files", 0, "size"), 0, "files[0].size"),
        (("files", 0, "size"), True, "files[0].size"),
        (("files", 0, "path"), "../secret", "files[0].path"),
        (("files", 0, "path"), "/secret", "files[0].path"),
        (("files", 0, "part"), "tail", "files[0].part"),
        (("files",), [], "files"),
        (("files", 0), "model.safetensors", "files[0]"),
        (("id",), "cim_vit_small.one", "id"),
        (("id",), "cim_vit_tiny", "id"),
        (("model_args",), {"num_classes": 3}, "model_args"),
        (("num_classes",), -1, "num_classes"),
        (("num_classes",), True, "num_classes"),
        (("kind",), "other", "kind"),
        (("dtype",), "int8", "dtype"),
        (("sources", 0), "hf-hub:org/name@main", "sources[0]"),
        (("sources", 0), "ftp://somewhere", "sources[0]"),
        (("preprocessing", "input_size"), [3, 64], "preprocessing.input_size"),
        (("preprocessing", "input_size"), [3, 64, 0], "preprocessing.input_size"),
        (("preprocessing", "mean", 1), "0.5", "preprocessing.mean[1]"),
        (("pretext", "context_size"), 64.0, "pretext.context_size"),
        (("metrics", 0, "value"), "high", "metrics[0].value"),
        (("golden", 0, "output", 3), None, "golden[0].output[3]"),
        (("licence",), "", "licence"),
        (("key_digest",), "xyz", "key_digest"),
        (("released",), "2026-02-30", "released"),
        (("released",), "20260101", "released"),
    ],
)
def test_wrong_values_are_named(entry, path, value, field):
    data = place = to_dict(entry)
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ConfigError) as caught:
        read_entry(data, "here")
    assert f"here: field {field}: " in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["entries"]["cim_vit_tiny.one"].pop("dtype"), "entry cim_vit_tiny.one: missing field dtype"),
        (
            lambda data: data["entries"]["cim_vit_tiny.one"]["files"][0].update(name="x"),
            "entry cim_vit_tiny.one: unknown field files[0].name",
        ),
        (lambda data: data["entries"].update(other=data["entries"]["cim_vit_tiny.one"]), "entry other: field id"),
        (lambda data: data.update(version=2), "version 2"),
        (lambda data: data.update(more=2), "not of the form"),
    ],
)
def test_the_file_and_the_entry_are_named(release, tmp_path, change, message):
    release()
    path = tmp_path / "root" / "weights_manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError) as caught:
        load_manifest(tmp_path / "root")
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", '{"version": 1', "[]"])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "weights_manifest.json").write_text(content)
    with pytest.raises(ConfigError, match="weights_manifest.json"):
        load_manifest(tmp_path)
    with pytest.raises(ConfigError, match="weights_manifest.json"):
        load_manifest(tmp_path / "elsewhere")


def test_the_default_is_the_newest_that_fits(release):
    release("cim_vit_tiny.old", released="2026-01-01", pretext="head")
    release("cim_vit_tiny.new", released="2026-03-01")
    release("cim_vit_tiny.whole", released="2026-04-01", pretext="whole")
    manifest, _ = release("cim_vit_tiny.classes", released="2026-05-01", num_classes=3)
    assert manifest.find("cim_vit_tiny").tag == "new"
    assert manifest.find("cim_vit_tiny", "pretext").tag == "whole"
    assert manifest.find("cim_vit_tiny.classes").num_classes == 3
    assert manifest.find("cim_vit_tiny.whole").parts == ("pretext",)
    with pytest.raises(WeightsError, match=r"'cim_vit_tiny.nwe': did you mean cim_vit_tiny.new"):
        manifest.find("cim_vit_tiny.nwe")
    with pytest.raises(WeightsError, match=r"'zebra': there are cim_vit_tiny.classes, "):
        manifest.find("zebra")
    with pytest.raises(WeightsError, match="there are none yet"):
        Manifest(manifest.root, {}).find("cim_vit_tiny")


def test_texts_of_the_released_manifest():
    entries = load_manifest().entries
    lines = table().splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(entries) or not entries
    for id, entry in entries.items():
        assert yaml.safe_load(info(id)) == to_dict(entry)
    with pytest.raises(WeightsError, match="'cim_vit_unknown'"):
        info("cim_vit_unknown")


def test_every_field_is_documented(repository):
    root, _ = repository
    page = (root / "docs" / "weights.md").read_text().split("## The manifest")[1].split("\n## ")[0]
    kinds = (Entry, WeightFile, Preprocessing, Pretext, Data, Metric, Golden)
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert names == set(re.findall(r"`(\w+)`", page)) & names


def test_key_digest():
    expected = hashlib.sha256(b"a [2, 3]\nb []").hexdigest()
    assert key_digest({"b": (), "a": (2, 3)}) == key_digest({"a": [2, 3], "b": []}) == expected
    assert key_digest({"a": (3, 2), "b": ()}) != expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cim_vit_tiny", Name("registry", "", "cim_vit_tiny")),
        ("cim_vit_tiny.tin25k_e3", Name("registry", "", "cim_vit_tiny", "tin25k_e3")),
        ("cim_vit_tiny.a.b-c@v1.0", Name("registry", "", "cim_vit_tiny", "a.b-c", "v1.0")),
        ("cim_vit_tiny@feat/x", Name("registry", "", "cim_vit_tiny", "", "feat/x")),
        ("hf-hub:org/name.x-y", Name("hf-hub", "org/name.x-y")),
        ("hf-hub:org/name@0123abc", Name("hf-hub", "org/name", revision="0123abc")),
        ("local-dir:some where/a@b:c", Name("path", "some where/a@b:c")),
        ("./cim_vit_tiny", Name("path", "./cim_vit_tiny")),
        ("~/x", Name("path", "~/x")),
        ("/x/y", Name("path", "/x/y")),
        ("x.safetensors", Name("path", "x.safetensors")),
        (Path("cim_vit_tiny"), Name("path", "cim_vit_tiny")),
        (r"C:\weights\tiny", Name("path", r"C:\weights\tiny")),
        ("D:/weights/tiny", Name("path", "D:/weights/tiny")),
    ],
)
def test_names(name, expected):
    assert parse_name(name) == expected


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cim-vit-tiny", "did you mean cim_vit_tiny?"),
        ("CIM ViT Tiny", "arch.tag@revision: did you mean cim_vit_tiny?"),
        ("", "there are cim_vit_tiny"),
        ("cim_vit_tiny.", "did you mean cim_vit_tiny?"),
        ("org/name", "did you mean hf-hub:org/name or local-dir:org/name?"),
        ("hf_hub:org/name", "did you mean hf-hub:org/name?"),
        ("hfhub:org/name", "did you mean hf-hub:org/name?"),
        ("local_dir:x", "did you mean local-dir:x?"),
        ("hf-hub:name", "hf-hub:org/name[@revision]"),
        ("hf-hub:org/name@", "hf-hub:org/name[@revision]"),
        ("hf-hub:cim_vit_tiny.x", "did you mean cim_vit_tiny.x?"),
        ("cim_vit_tiny:x", "did you mean cim_vit_tiny.x?"),
        ("org/name@v1", "did you mean hf-hub:org/name@v1 or"),
        ("https://huggingface.co/org/name.x", "did you mean hf-hub:org/name.x?"),
        ("https://huggingface.co/org/name/tree/v1", "did you mean hf-hub:org/name@v1?"),
        ("hf-hub:", "hf-hub:org/name[@revision]"),
        ("local-dir:", "local-dir:PATH"),
        ("https://example.org/x.safetensors", "there are hf-hub:org/name and local-dir:PATH"),
    ],
)
def test_names_that_are_none_get_an_offer(name, hint):
    with pytest.raises(ConfigError) as caught:
        parse_name(name, ["cim_vit_tiny", "cim_resnet50"])
    assert repr(name) in str(caught.value) and hint in str(caught.value)


def test_relative_folders_that_exist_are_paths(tmp_path, monkeypatch):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_name("runs/one") == Name("path", "runs/one")


def test_data_travels_inside_an_installed_package(plain_copy, tmp_path, python):
    """Beside the package in a plain copy, in `_data` where both exist; without torch."""
    code = "import sys; from cim_models.hub.manifest import *; print(data_root(), len(load_manifest().entries)); "
    code += "assert 'torch' not in sys.modules"
    assert python(code, plain_copy).split() == [str(plain_copy), "4"]
    installed = tmp_path / "site-packages"
    shutil.copytree(plain_copy / "cim_models", installed / "cim_models")
    data = installed / "cim_models" / "_data"
    data.mkdir()
    shutil.copy(plain_copy / "weights_manifest.json", data)
    shutil.copy(plain_copy / "weights_manifest.json", installed)
    assert python(code, installed).split() == [str(data), "4"]
    (installed / "weights_manifest.json").unlink()
    (data / "weights_manifest.json").unlink()
    code = "import cim_models.hub.manifest as m\ntry: m.data_root()\nexcept m.ConfigError as error: print(error)"
    assert "install cim-models again" in python(code, installed)
