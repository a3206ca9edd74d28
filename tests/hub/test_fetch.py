"""`cim fetch`: a folder that a machine without a network loads, by either of two ways."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from loopback import FOREVER, TOKEN

from cim_models.cli import main
from cim_models.errors import ConfigError, WeightsError
from cim_models.hub import folder as folders
from cim_models.hub.fetch import fetch
from cim_models.hub.load import create_model, create_pretext
from cim_models.hub.manifest import Manifest, load_manifest
from cim_models.hub.provenance import provenance_files
from cim_models.hub.store import MIRROR
from cim_models.hub.weights import from_path


def by_both_ways(folder, manifest, entry, monkeypatch):
    """The model, from a machine on which there is nothing but the folder and the installed package."""
    with monkeypatch.context() as context:
        context.setenv("HF_HUB_OFFLINE", "1")
        context.setenv("HF_HUB_CACHE", str(folder.parent / "nothing"))
        context.setenv("XDG_CACHE_HOME", str(folder.parent / "nothing"))
        given = create_model(entry.architecture, weights=folder)
        context.setenv(MIRROR, str(folder))
        mirrored = create_model(
            entry.id, pretrained=True, manifest=Manifest(folder.parent / "nothing", manifest.entries)
        )
        assert create_pretext(entry.id, manifest=manifest) and create_pretext(folder)
    assert all(torch.equal(mirrored.state_dict()[key], value) for key, value in given.state_dict().items())
    assert given.pretrained_cfg["mean"] == mirrored.pretrained_cfg["mean"] == (0.4, 0.5, 0.6)
    return given


def test_from_the_hub(hub, published, tmp_path, monkeypatch):
    manifest, entry, contents = published
    expected = create_model(entry.id, pretrained=True, manifest=manifest).state_dict()
    made = fetch(entry.id, to=tmp_path / "usb" / "stick", root=manifest.root)
    assert {path.name for path in made.iterdir()} == {*contents, "config.json", "README.md"}
    assert all((made / name).read_bytes() == content for name, content in contents.items())
    assert from_path(made).entry == entry
    whole = fetch(entry.id, to=tmp_path / "whole", whole=True, root=manifest.root)
    assert all((whole / name).read_bytes() == content for name, content in contents.items()), "it is one file already"
    model = by_both_ways(made, manifest, entry, monkeypatch)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())
    assert fetch("cim_vit_tiny", to=made, root=manifest.root) == made, "again"
    again = fetch("hf-hub:org/name", to=tmp_path / "other", root=manifest.root)
    assert from_path(again).entry.files == entry.files


def test_many_releases_in_one_mirror(hub, published, release, tmp_path, monkeypatch):
    manifest, entry, _ = published
    release("cim_vit_tiny.two", released="2026-02-01")
    for id in (entry.id, "cim_vit_tiny.two"):
        fetch(id, to=tmp_path / "mirror" / id, root=manifest.root)
    monkeypatch.setenv(MIRROR, str(tmp_path / "mirror"))
    shutil.rmtree(manifest.root / "weights")
    hub.stop()
    for id in (entry.id, "cim_vit_tiny.two"):
        assert create_model(id, pretrained=True, manifest=load_manifest(manifest.root), cache_dir=tmp_path / "none")


def test_what_the_hub_has_of_its_training_comes_along(hub, published, tmp_path):
    manifest, entry, _ = published
    texts = {f"recipe{n}.yaml": f"# Hardware: {n or 'last'} laptop\n" for n in ("", "-1", "-2")}
    texts |= {f"log{n}.jsonl": f'{{"images_seen": 7{n.removeprefix("-")}}}\n' for n in ("", "-1", "-2")}
    commit = entry.sources[0].partition("@")[2]
    hub.repositories["org/name"].commits[commit] |= {name: text.encode() for name, text in texts.items()}
    for name in ("hf-hub:org/name", entry.id):
        made = fetch(name, to=tmp_path / name, root=manifest.root)
        assert {path.name: path.read_text() for path in provenance_files(made)} == texts
        assert "- Hardware: last laptop" in (made / "README.md").read_text()


def test_several_processes_and_one_folder(release, tmp_path):
    """Each makes it again, and none of them what another one has begun."""
    manifest, entry = release(pretext="head")
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: fetch(entry.id, to=tmp_path / "made", root=manifest.root), range(12)))
    assert made == {tmp_path / "made"} and from_path(tmp_path / "made").entry == entry
    assert {path.name for path in tmp_path.iterdir()} == {"made", "root"}


def test_a_link_to_a_folder_elsewhere(release, tmp_path):
    manifest, entry = release()
    (tmp_path / "disk").mkdir()
    (tmp_path / "stick").symlink_to(tmp_path / "disk")
    for _ in ("new", "again"):
        fetch(entry.id, to=tmp_path / "stick", root=manifest.root)
        assert (tmp_path / "stick").is_symlink() and from_path(tmp_path / "disk").entry == entry
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "root", "stick"}


def test_the_command(hub, published, tmp_path, capsys):
    manifest, entry, _ = published
    hub.repositories["org/name"].private = True
    command = ["fetch", entry.id, "--to", str(tmp_path / "made"), "--root", str(manifest.root)]
    assert main(command) == 1
    assert "private (401)" in capsys.readouterr().err and not (tmp_path / "made").exists()


def test_a_private_repository(hub, published, tmp_path, monkeypatch):
    manifest, entry, _ = published
    hub.repositories["org/name"].private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(WeightsError, match=r"private \(401\)"):
        fetch(entry.id, to=tmp_path / "made", root=manifest.root)
    assert fetch(entry.id, to=tmp_path / "made", token=True, root=manifest.root)


def test_shards(hub, published, tmp_path, monkeypatch):
    """The index is fetched with them, and stands for all."""
    manifest, entry, _ = published
    made = fetch(entry.id, to=tmp_path / "made", root=manifest.root)
    model = create_model(made)
    monkeypatch.setattr(folders, "SHARD", 1_500_000)
    tensors = {"backbone": model.state_dict(), "pretext": create_pretext(made).head.state_dict()}
    tensors["pretext"] = {f"head.{key}": value for key, value in tensors["pretext"].items()}
    source = tmp_path / "sharded"
    source.mkdir()
    entry = folders.write_folder(source, replace(entry, id="cim_vit_tiny.shards", **folders.BLANK), tensors, {})
    commit = hub.add("org/shards", {path.name: path.read_bytes() for path in source.iterdir()})
    found = create_model(f"hf-hub:org/shards@{commit}")
    assert all(torch.equal(found.state_dict()[key], value) for key, value in model.state_dict().items())
    made = fetch("hf-hub:org/shards", to=tmp_path / "fetched", root=manifest.root)
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {path.name for path in made.glob("model-*")}
    assert len(list(made.glob("model-*"))) > 1 and create_model(made / "model.safetensors.index.json")
    hub.fault("objects", times=FOREVER, status=503)
    with pytest.raises(WeightsError, match="model-00001-of-.*503"):
        create_model(f"hf-hub:org/shards@{commit}", cache_dir=tmp_path / "empty")


def test_nothing_is_lost_or_left_half(hub, published, tmp_path, small_files):
    manifest, entry, _ = published
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    for place in (other, other / "mine.txt"):
        with pytest.raises(ConfigError, match=f"{place} holds something else than {entry.id}"):
            fetch(entry.id, to=place, root=manifest.root)
    assert (other / "mine.txt").read_text() == "mine"
    with small_files(), pytest.raises(ConfigError, match="made cannot be written"):
        fetch(entry.id, to=tmp_path / "made", root=manifest.root)
    assert not [path for path in tmp_path.iterdir() if "made" in path.name]
    hub.add("org/timm", {"config.json": b'{"architecture": "cim_vit_tiny"}', "model.safetensors": b"x"})
    with pytest.raises(WeightsError, match="org/timm@.* is no release of this package"):
        fetch("hf-hub:org/timm", to=tmp_path / "made", root=manifest.root)


def test_a_release_is_fetched_with_all_that_tells_of_its_runs(tmp_path):
    entry = next(iter(load_manifest().entries.values()))
    released = load_manifest().root / "weights" / entry.id
    made = fetch(entry.id, to=tmp_path / "stick")
    assert {path.name: path.read_bytes() for path in made.iterdir()} == {
        path.name: path.read_bytes() for path in released.iterdir()
    }
