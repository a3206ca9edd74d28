"""Over real HTTP, with the Hub's own client: the right files or an error that says what to do, never other bytes."""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download
from loopback import FOREVER, TOKEN, Loopback

from cim_models.errors import WeightsError
from cim_models.hub import download, waiting
from cim_models.hub.access import Access
from cim_models.hub.load import create_model
from cim_models.hub.manifest import load_manifest
from cim_models.hub.store import MIRROR, resolve

MODEL = "/objects/"
"""Of the requests for the content of large files."""


def read(found) -> dict[str, bytes]:
    """Content by name of what was found, whatever the files are called in the cache."""
    names = {file.sha256: Path(file.path).name for file in found.entry.files}
    contents = [path.read_bytes() for paths in found.files.values() for path in paths]
    return {names[hashlib.sha256(content).hexdigest()]: content for content in contents}


def cached(tmp_path: Path) -> list[Path]:
    """Every file that is kept for later, but not locks."""
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def no_bad_byte(tmp_path: Path) -> bool:
    """Whether everything in the cache has the content that its name says."""
    files = [path for path in cached(tmp_path) if path.parent.name == "sha256"]
    return all(path.stem == hashlib.sha256(path.read_bytes()).hexdigest() for path in files)


def test_a_name_becomes_files_and_a_warm_start_asks_nobody(hub, published, tmp_path):
    manifest, entry, contents = published
    found = resolve("cim_vit_tiny", manifest=manifest)
    assert read(found) == contents and found.ours and found.entry == entry
    commit = entry.sources[0].partition("@")[2]
    assert all(commit in request.path for request in hub.requests("resolve"))
    assert len(hub.requests(f"GET {MODEL}")) == 2 and no_bad_byte(tmp_path)
    assert {path.stem for paths in found.files.values() for path in paths} == {file.sha256 for file in entry.files}
    hub.log.clear()
    assert resolve("cim_vit_tiny", manifest=manifest) == found and not hub.log
    hub.stop()
    assert read(resolve("cim_vit_tiny", manifest=manifest)) == contents


@pytest.mark.parametrize("redirect", [True, False])
def test_no_token_leaves_the_machine_unless_it_is_given(published, hub, monkeypatch, redirect):
    """The Hub's client sends HF_TOKEN to whatever HF_ENDPOINT names."""
    manifest, entry, contents = published
    hub.redirect = redirect
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    resolve(entry.id, manifest=manifest)
    assert hub.log and not [request for request in hub.log if "authorization" in request.headers]
    hub.log.clear()
    resolve(entry.id, manifest=manifest, access=Access(cache_dir=manifest.root / "other", token=True))
    assert all("authorization" in request.headers for request in hub.requests("/resolve/"))
    assert not [request for request in hub.requests(MODEL) if "authorization" in request.headers]


PASSING = {
    "503 on the question": ("HEAD", dict(status=503)),
    "429 on the question": ("HEAD", dict(status=429)),
    "503 on the file": ("GET .*resolve", dict(status=503)),
    "503 of the large files' store": (f"GET {MODEL}", dict(status=503, times=2)),
    "lost answer": ("GET", dict(lost=True)),
    "silent once": ("HEAD", dict(silent=True)),
    "reset in the middle": (MODEL, dict(reset=300_000)),
    "closed in the middle, twice": (MODEL, dict(cut=300_000, times=2)),
    "silent in the middle": (MODEL, dict(stall=300_000)),
    "short": (MODEL, dict(short=300_000)),
    "empty": (MODEL, dict(short=0)),
    "flipped bit": (MODEL, dict(flip=True)),
    "larger Content-Length": (MODEL, dict(length=1000)),
    "smaller Content-Length": (MODEL, dict(length=-1000)),
    "compressed": (MODEL, dict(compress=True)),
    "slow": (MODEL, dict(pause=0.1)),
}


@pytest.mark.parametrize("trouble", PASSING)
def test_a_trouble_that_passes(hub, published, tmp_path, trouble):
    manifest, entry, contents = published
    where, fault = PASSING[trouble]
    hub.fault(where, **fault)
    assert read(resolve(entry.id, manifest=manifest)) == contents
    assert not hub.faults and no_bad_byte(tmp_path)


LASTING = {
    "503 for ever": ("HEAD", dict(status=503), "the server answers 503 .*HF_ENDPOINT.*cim fetch.*CIM_MODELS_MIRROR"),
    "503 of the files": ("GET", dict(status=503), "the server answers 503"),
    "silent": ("", dict(silent=True), "the server cannot be reached: .*timed out"),
    "silent in the middle": (MODEL, dict(stall=300_000, ranges=False), "the server cannot be reached"),
    "a byte now and then": (MODEL, dict(trickle=0.01), "less than 100,000 bytes arrived in 2 s"),
    "cut again and again": (MODEL, dict(cut=1000), "the server cannot be reached: peer closed"),
    "never a byte": (MODEL, dict(cut=0), "the server cannot be reached: peer closed"),
    "always cut at one place": (MODEL, dict(cut=300_000, ranges=False), "the server cannot be reached: peer closed"),
    "flipped bit": (MODEL, dict(flip=True), "sha256 [0-9a-f]+ expected, [0-9a-f]+ found: twice, so it is the source"),
    "short": (MODEL, dict(short=300_000), "[0-9]+ bytes expected, 300000 found: twice"),
    "smaller Content-Length": (MODEL, dict(length=-1000), "bytes expected, [0-9]+ found: twice"),
    "401": ("HEAD", dict(status=401, code="RepoNotFound"), r"no such repository, or it is private \(401\).*token"),
    "bad token": (
        "HEAD",
        dict(status=401, message="Invalid credentials in Authorization header"),
        "refused .401, Invalid credentials.*check the token, or leave it out",
    ),
    "403 gated": ("HEAD", dict(status=403, code="GatedRepo"), r"gated \(403\): accept the terms.*token=True"),
    "403": ("HEAD", dict(status=403), r"refused \(403.*check the name and HF_ENDPOINT"),
    "404 file": ("HEAD", dict(status=404, code="EntryNotFound"), r"there is no such file \(404\)"),
    "404 revision": ("HEAD", dict(status=404, code="RevisionNotFound"), r"there is no such revision \(404\)"),
    "404": ("HEAD", dict(status=404), r"refused \(404.*check the name and HF_ENDPOINT"),
}


@pytest.mark.parametrize("trouble", LASTING)
def test_a_trouble_that_lasts(hub, published, tmp_path, trouble):
    manifest, entry, contents = published
    where, fault, message = LASTING[trouble]
    hub.fault(where, times=FOREVER, **fault)
    start = time.monotonic()
    with pytest.raises(WeightsError, match=message) as caught:
        resolve(entry.id, manifest=manifest)
    assert time.monotonic() - start < 20, "patience is 2.5 seconds here"
    assert entry.id in str(caught.value) and entry.sources[0] in str(caught.value)
    assert not [path for path in cached(tmp_path) if path.suffix == ".safetensors"]
    hub.faults.clear()
    assert read(resolve(entry.id, manifest=manifest)) == contents


@pytest.mark.slow
@pytest.mark.parametrize("where", ["", "GET", MODEL])
def test_nobody_waits_long_for_a_server_that_is_down(hub, published, monkeypatch, where):
    """With the patience that users get: silent from the start, behind the first answer, in the middle of a file."""
    manifest, entry, _ = published
    monkeypatch.setattr(download, "IDLE", waiting.IDLE)
    monkeypatch.setattr(waiting, "STEP", 8.0)
    hub.fault(where, times=FOREVER, stall=1000, **({} if where == MODEL else {"silent": True}))
    start = time.monotonic()
    with pytest.raises(WeightsError, match="cannot be reached"):
        resolve(entry.id, manifest=manifest)
    assert time.monotonic() - start < 30


def test_a_name_server_that_is_silent(hub, published, monkeypatch):
    """The system waits for one half a minute or longer, and tells nobody how to make that shorter."""
    manifest, entry, contents = published
    answers, ask = threading.Event(), socket.getaddrinfo
    with monkeypatch.context() as context:
        context.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answers.wait(60) and ask(*args, **kwargs))
        for name in (entry.id, "hf-hub:org/name"):
            start = time.monotonic()
            with pytest.raises(WeightsError, match="cannot be reached: no answer in [34] s, perhaps of a name"):
                resolve(name, manifest=manifest)
            assert time.monotonic() - start < 20
    answers.set()
    assert read(resolve(entry.id, manifest=manifest)) == contents


def test_down_without_a_cache(hub, published):
    manifest, entry, _ = published
    hub.stop()
    with pytest.raises(WeightsError, match="cannot be reached: .*refused.*HF_ENDPOINT"):
        resolve(entry.id, manifest=manifest)


def test_an_interrupted_download_goes_on(hub, published, tmp_path):
    manifest, entry, contents = published
    then = dict(where="GET .*resolve.*model.safetensors", times=FOREVER, status=503)
    hub.fault(MODEL, cut=400_000, first=lambda: hub.fault(**then))
    with pytest.raises(WeightsError, match="503"):
        resolve(entry.id, manifest=manifest)
    (partial,) = (tmp_path / "cache").rglob("*.partial")
    assert partial.stat().st_size == 400_000
    hub.faults.clear()
    hub.log.clear()
    assert read(resolve(entry.id, manifest=manifest)) == contents
    assert hub.requests(MODEL)[0].headers["range"] == "bytes=400000-" and not list(tmp_path.rglob("*.partial"))


def test_what_had_arrived_may_be_wrong_too(hub, published, tmp_path):
    manifest, entry, contents = published
    resolve(entry.id, manifest=manifest)
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        content = b"x" * (len(path.read_bytes()) // 2)
        path.rename(path.with_name(f".{path.name}.partial")).write_bytes(content)
    assert read(resolve(entry.id, manifest=manifest)) == contents and no_bad_byte(tmp_path)


@pytest.mark.parametrize("damage", ["bit", "short", "empty", "gone"])
def test_a_damaged_cache_repairs_itself(hub, published, tmp_path, caplog, damage):
    """The Hub's client hands such files out for ever."""
    manifest, entry, contents = published
    found = resolve(entry.id, manifest=manifest)
    (path,) = found.files["backbone"]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"bit": bytes(content), "short": bytes(content[:100]), "empty": b""}[damage])
    hub.log.clear()
    with pytest.raises(WeightsError, match="requests are forbidden: .*cim fetch"):
        resolve(entry.id, manifest=manifest, access=Access(local_files_only=True))
    assert not hub.log
    with caplog.at_level(logging.WARNING, "cim_models"):
        assert read(resolve(entry.id, manifest=manifest)) == contents
    assert len(hub.requests(f"GET {MODEL}")) == 1 and no_bad_byte(tmp_path)
    assert damage == "gone" or f"{path} is damaged" in caplog.text


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs Unix's users")
def test_the_last_folder_is_ours_or_not_used(hub, published, tmp_path, monkeypatch):
    """Where everybody may make folders, somebody else may have made ours, to change what was verified."""
    manifest, entry, contents = published
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        (tmp_path / name).write_text("a file where a folder should be")
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    found = resolve(entry.id, manifest=manifest)
    last = tmp_path / "tmp" / f"cim_models-{os.getuid()}"
    assert read(found) == contents and all(path.is_relative_to(last) for path in found.files["backbone"])
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    last.rename(tmp_path / "tmp" / "cim_models-4242")
    with pytest.raises(WeightsError, match="no folder for downloads can be written to: .*HF_HUB_CACHE"):
        resolve(entry.id, manifest=manifest)


@pytest.mark.parametrize("said", ["1", "true", "ON"])
def test_offline_by_the_environment_of_the_moment(hub, published, monkeypatch, said):
    """The Hub's client reads HF_HUB_OFFLINE once, when it is imported."""
    manifest, entry, contents = published
    monkeypatch.setenv("HF_HUB_OFFLINE", said)
    with pytest.raises(WeightsError, match="requests are forbidden: load it once online"):
        resolve(entry.id, manifest=manifest)
    assert not hub.log
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    resolve(entry.id, manifest=manifest)
    monkeypatch.setenv("HF_HUB_OFFLINE", said)
    hub.log.clear()
    assert read(resolve(entry.id, manifest=manifest)) == contents and not hub.log


def test_files_of_the_hubs_own_client_are_used_where_they_lie(hub, published, tmp_path, caplog):
    manifest, entry, contents = published
    commit = entry.sources[0].partition("@")[2]
    theirs = [
        Path(hf_hub_download("org/name", name, revision=commit, endpoint=hub.endpoint, cache_dir=tmp_path / "cache"))
        for name in contents
    ]
    hub.log.clear()
    found = resolve(entry.id, manifest=manifest)
    assert read(found) == contents and not hub.log
    assert {path for paths in found.files.values() for path in paths} == set(theirs)
    content = bytearray(theirs[0].read_bytes())
    content[-5] ^= 1
    theirs[0].write_bytes(content)  # the client would hand it out
    theirs[1].resolve().unlink()  # a link that leads nowhere
    with caplog.at_level(logging.WARNING, "cim_models"):
        assert read(resolve(entry.id, manifest=manifest)) == contents
    assert f"{theirs[0]} is damaged" in caplog.text and hub.requests(f"GET {MODEL}")


def test_a_file_is_downloaded_once_whatever_commit_it_is_of(hub, published):
    """Without symlinks the Hub's client downloads it again for each."""
    manifest, entry, contents = published
    resolve(entry.id, manifest=manifest)
    commit = hub.add("org/name", hub.repositories["org/name"].commits[entry.sources[0][-40:]] | {"README.md": b"new"})
    hub.log.clear()
    later = dataclasses.replace(entry, sources=(f"hf-hub:org/name@{commit}",))
    assert read(resolve(entry.id, manifest=manifest.with_entry(later))) == contents and not hub.log


def test_a_branch_that_moves_in_between_changes_nothing(hub, published):
    """The Hub's client asks for the branch twice, and may keep the bytes of one commit under the name of another."""
    manifest, entry, contents = published
    other = {name: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:] for name, content in contents.items()}
    hub.fault("GET .*resolve", first=lambda: hub.add("org/name", other))
    assert read(resolve(entry.id, manifest=manifest)) == contents


@pytest.mark.parametrize("missing", ["model.safetensors", "pretext.safetensors"])
def test_a_part_of_a_release_is_no_release(hub, published, missing):
    """The Hub's client returns a folder with whatever it has when the server fails."""
    manifest, entry, _ = published
    hub.fault(f"resolve.*{missing}", times=FOREVER, status=503)
    with pytest.raises(WeightsError, match=f"{missing} .*503"):
        resolve(entry.id, manifest=manifest)
    hub.stop()
    with pytest.raises(WeightsError, match=f"{missing} .*cannot be reached"):
        resolve(entry.id, manifest=manifest)


# ---------------------------------------------------------------- which source


@pytest.fixture
def everywhere(hub, published, tmp_path):
    """The same release on the Hub and behind an address; with the entry that says so, in this order."""
    manifest, entry, contents = published
    hub.files = {f"x/{name}": content for name, content in contents.items()}
    entry = dataclasses.replace(entry, sources=(*entry.sources, f"{hub.endpoint}/files/x/"))
    return manifest.with_entry(entry), entry, contents


def test_sources_are_asked_in_their_order(hub, everywhere, tmp_path, monkeypatch):
    manifest, entry, contents = everywhere
    resolve(entry.id, manifest=manifest)
    assert hub.requests("resolve") and not hub.requests("/files/")
    hub.log.clear()
    turned = dataclasses.replace(entry, sources=entry.sources[::-1])
    access = Access(cache_dir=tmp_path / "second", token=TOKEN)
    assert read(resolve(entry.id, manifest=manifest.with_entry(turned), access=access)) == contents
    assert not hub.requests("resolve") and len(hub.requests("GET /files/")) == 2
    assert not [request for request in hub.log if "authorization" in request.headers], "the token is the Hub's"
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for name, content in contents.items():
        (mirror / name).write_bytes(content)
    monkeypatch.setenv(MIRROR, str(mirror))
    hub.log.clear()
    found = resolve(entry.id, manifest=manifest, access=Access(cache_dir=tmp_path / "third"))
    assert found.files["backbone"] == (mirror / "model.safetensors",) and not hub.log


@pytest.mark.parametrize("fault", [dict(status=503), dict(status=404), dict(silent=True), dict(flip=True)])
def test_the_next_source_helps_out(hub, everywhere, tmp_path, fault):
    manifest, entry, contents = everywhere
    hub.fault("resolve|/objects/" if "flip" in fault else "resolve", times=FOREVER, **fault)
    assert read(resolve(entry.id, manifest=manifest)) == contents and no_bad_byte(tmp_path)
    hub.fault("files", times=FOREVER, status=404)
    with pytest.raises(WeightsError) as caught:
        resolve(entry.id, manifest=manifest, access=Access(cache_dir=tmp_path / "empty"))
    assert all(source in str(caught.value) for source in entry.sources)


def test_a_source_that_is_away_is_asked_once(hub, everywhere):
    manifest, entry, contents = everywhere
    hub.fault("resolve", times=FOREVER, silent=True)
    assert read(resolve(entry.id, manifest=manifest)) == contents
    assert len(hub.requests("resolve")) <= 3, "for both files together"


def test_the_repository_comes_before_the_network(hub, published):
    manifest, entry, contents = published
    folder = manifest.root / "weights" / entry.id
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    assert resolve(entry.id, manifest=manifest).files["backbone"] == (folder / "model.safetensors",) and not hub.log
    (folder / "model.safetensors").write_bytes(b"x")
    assert read(resolve(entry.id, manifest=load_manifest(manifest.root))) == contents
    shutil.rmtree(folder)


def test_another_endpoint_and_another_cache_for_one_call(hub, published, tmp_path):
    manifest, entry, contents = published
    with Loopback() as mirror:
        mirror.repositories, mirror.objects = hub.repositories, hub.objects
        access = Access(endpoint=mirror.endpoint + "/", cache_dir=tmp_path / "elsewhere")
        assert read(resolve(entry.id, manifest=manifest, access=access)) == contents
        assert mirror.log and not hub.log and list((tmp_path / "elsewhere").rglob("*.safetensors"))


def test_a_mirror_with_an_address(hub, everywhere, tmp_path, monkeypatch):
    """It is laid out like the repository, and asked before the sources; what it lacks comes from them."""
    manifest, entry, contents = everywhere
    hub.files |= {f"mirror/weights/{entry.id}/model.safetensors": contents["model.safetensors"]}
    monkeypatch.setenv(MIRROR, f"{hub.endpoint}/files/mirror/")
    access = Access(cache_dir=tmp_path / "second", token=TOKEN)
    assert read(resolve(entry.id, manifest=manifest, access=access)) == contents
    asked = [request.path for request in hub.requests("GET /files/|GET .*resolve")]
    assert [path.rpartition("/")[2] for path in asked] == ["model.safetensors", *2 * ["pretext.safetensors"]]
    assert ["/files/mirror/" in path for path in asked] == [True, True, False]
    assert not [request for request in hub.requests("/files/") if "authorization" in request.headers]


def test_a_classifier_knows_its_classes(hub, release, to_hub, tmp_path, caplog):
    """From the folder of the repository, and from the Hub; where nobody can be asked, the weights alone."""
    manifest, entry = release("cim_vit_tiny.pets", num_classes=3)
    config = manifest.root / "weights" / entry.id / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"label_names": ["cat", "dog", "owl"]}))
    assert resolve(entry.id, manifest=manifest).labels == ("cat", "dog", "owl")
    entry = to_hub(manifest, entry)
    manifest = load_manifest(manifest.root)
    for _ in range(2):
        assert resolve(entry.id, manifest=manifest).labels == ("cat", "dog", "owl")
        hub.stop()
    model = create_model(entry.id, pretrained=True, manifest=manifest)
    assert model.pretrained_cfg["label_names"] == ("cat", "dog", "owl")
    for path in (tmp_path / "cache").rglob("config.json*"):
        path.unlink()
    assert resolve(entry.id, manifest=manifest).labels == () and "names of its classes are not known" in caplog.text
