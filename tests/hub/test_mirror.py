"""A laboratory's own releases, behind CIM_MODELS_MIRROR: known by their ids, and never in place of the package's."""

import dataclasses
import logging
import shutil
from pathlib import Path

import pytest
import timm
import torch
from loopback import FOREVER

from cim_models.cli import main
from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.access import Access
from cim_models.hub.entry import Entry
from cim_models.hub.load import create_model, create_pretext, list_models
from cim_models.hub.manifest import MIRROR, known_manifest, load_manifest, write_manifest
from cim_models.hub.store import resolve
from cim_models.hub.weights import from_path

ID = "cim_vit_tiny.ours"
OURS = load_manifest().entries


@pytest.fixture
def lab(release) -> Path:
    """What `cim release --root` leaves: an encoder that is newer than the package's."""
    return release(ID, pretext="head", released="2999-01-01")[0].root


@pytest.fixture(params=["folder", "address"])
def mirror(request, hub, lab, monkeypatch) -> Path:
    """The laboratory's folder, which is the mirror, or is served as it."""
    monkeypatch.setenv(MIRROR, str(lab))
    if request.param == "address":
        serve(hub, lab)
        monkeypatch.setenv(MIRROR, f"{hub.endpoint}/files/lab/")
    return lab


def serve(hub, lab: Path) -> None:
    files = [path for path in lab.rglob("*") if path.is_file()]
    hub.files = {f"lab/{path.relative_to(lab).as_posix()}": path.read_bytes() for path in files}


def same(model: torch.nn.Module, folder: Path) -> bool:
    expected = create_model(folder).state_dict()
    return all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [ID, "cim_resnet18.ours", "cim_resnet18"])
def test_by_name(hub, mirror, release, name):
    """An architecture is the mirror's where the package has no weights of it."""
    if name != ID:
        release("cim_resnet18.ours")
        serve(hub, mirror)
    folder = mirror / "weights" / (name if "." in name else f"{name}.ours")
    assert same(create_model(name, pretrained=True), folder)
    assert same(timm.create_model(name, pretrained=True), folder)
    assert same(create_model(name.partition(".")[0], weights=name), folder)
    assert create_model(f"{name.partition('.')[0]}.ours").pretrained_cfg["mean"] == (0.4, 0.5, 0.6), "random ones"
    if name == ID:
        assert same(create_pretext(name).online, folder)


def test_on_the_command_line(mirror, tmp_path, capsys):
    assert list_models(pretrained=True) == sorted([*OURS, ID])
    assert main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == list_models(pretrained=True)
    assert main(["info", ID]) == 0 and f"id: {ID}" in capsys.readouterr().out
    assert main(["verify", ID]) == 0
    assert f"{ID}  2 files, all as recorded" in capsys.readouterr().out
    assert main(["fetch", ID, "--to", str(tmp_path / "stick")]) == 0
    assert from_path(tmp_path / "stick").entry == load_manifest(mirror).entries[ID]


def test_what_the_package_knows_means_what_it_says(hub, mirror):
    """Whatever a mirror has under the same id, and however new its others are; it is not even asked."""
    before = resolve("cim_vit_tiny", manifest=load_manifest())
    theirs = load_manifest(mirror)
    ours: Entry = before.entry
    impostor = dataclasses.replace(theirs.entries[ID], id=ours.id, released="2999-12-31")
    write_manifest(theirs.with_entry(impostor))
    shutil.copytree(mirror / "weights" / ID, mirror / "weights" / ours.id)
    serve(hub, mirror)
    for name in ("cim_vit_tiny", ours.id):
        found = resolve(name)
        assert found.entry == ours and found.files == before.files
    assert not hub.log
    assert known_manifest().entries[ours.id] == ours and known_manifest(ID).entries[ours.id] == ours
    assert dict(load_manifest().entries) == OURS, "what release and publish write"


def test_a_damaged_file_of_its_own(hub, mirror):
    path = mirror / "weights" / ID / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    serve(hub, mirror)
    with pytest.raises(WeightsError, match=f"{ID}: .*sha256 .* expected, .* found"):
        create_model(ID, pretrained=True)


@pytest.mark.parametrize("mirror", ["address"], indirect=True)
def test_away(hub, mirror, tmp_path, caplog, capsys):
    """As it was when it was last reached; where it never was, an error that names it, and lists without it."""
    resolve(ID)
    hub.log.clear()
    resolve(ID)
    assert [request.path for request in hub.log] == ["/files/lab/weights_manifest.json"]
    resolve(ID, access=Access(local_files_only=True))
    assert len(hub.log) == 1
    hub.fault("", times=FOREVER, status=503)
    with caplog.at_level(logging.WARNING, "cim_models"):
        assert resolve(ID).entry == load_manifest(mirror).entries[ID]
    assert "the server answers 503; used what it was when it was last asked for" in caplog.text
    with pytest.raises(WeightsError, match=f"{hub.endpoint}/files/lab: the server answers 503; no weights are .*{ID}"):
        resolve(ID, access=Access(cache_dir=tmp_path / "empty"))
    shutil.rmtree(tmp_path / "cache")
    assert main(["list"]) == 0
    said = capsys.readouterr()
    assert all(id in said.out for id in OURS) and ID not in said.out
    with pytest.raises(WeightsError, match="requests are forbidden"):
        resolve(ID, access=Access(local_files_only=True))


@pytest.mark.parametrize("mirror", ["address"], indirect=True)
def test_an_answer_of_somebody_else_is_not_kept(hub, mirror):
    """Of a page to log in to a network, for instance, which says that all is well."""
    known = resolve(ID)
    hub.fault("GET .*weights_manifest.json", status=200)
    with pytest.raises(ConfigError, match="weights_manifest.json: cannot be read as JSON"):
        resolve(ID)
    assert resolve(ID, access=Access(local_files_only=True)) == known


def test_without_a_manifest(hub, mirror, capsys):
    """Such as folders that `cim fetch` made: they mirror what the package knows."""
    (mirror / "weights_manifest.json").unlink()
    serve(hub, mirror)
    with pytest.raises(WeightsError, match=f"no weights_manifest.json .*weights=FOLDER; no weights .*{ID}"):
        create_model(ID, pretrained=True)
    with pytest.raises(WeightsError, match="cim_resnet18 has no released weights yet"):
        create_model("cim_resnet18", pretrained=True)
    assert list_models(pretrained=True) == list(OURS)
    assert same(create_model("cim_vit_tiny", weights=mirror / "weights" / ID), mirror / "weights" / ID)


BAD = {
    "{": "cannot be read as JSON",
    '{"entries": {}}': "not of the form",
    '{"version": 1, "entries": {"x": {}}}': "entry x: missing field",
}


@pytest.mark.parametrize("content", BAD)
def test_a_bad_manifest_is_named(hub, mirror, content):
    (mirror / "weights_manifest.json").write_text(content)
    serve(hub, mirror)
    with pytest.raises(ConfigError, match=f"weights_manifest.json: {BAD[content]}"):
        create_model(ID, pretrained=True)
