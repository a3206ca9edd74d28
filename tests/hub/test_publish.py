"""Published in one commit, verified, tagged, then recorded; and never half of it, whatever goes wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import get_session
from loopback import FOREVER, TOKEN

from cim_models.cli import main
from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.access import Access
from cim_models.hub.card import snippet
from cim_models.hub.load import create_model
from cim_models.hub.manifest import load_manifest
from cim_models.hub.publish import publish
from cim_models.hub.store import resolve

ROOT = Path(__file__).resolve().parents[2]
ID = "cim_vit_tiny.one"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # in the client's own upload


@pytest.fixture
def root(hub, release, monkeypatch) -> Path:
    """Of a manifest with a release, on the machine of somebody who is logged in."""
    manifest, entry = release(ID, pretext="head")
    (manifest.root / "weights" / ID / "README.md").write_text(f"# {ID}\n")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return manifest.root


def sent(root: Path, id: str = ID) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "weights" / id).iterdir()}


def published(hub, repo: str = "org/name") -> dict[str, bytes]:
    """What the head of a repository holds, apart from what the Hub itself put there."""
    repository = hub.repositories[repo]
    files = repository.commits[repository.branches["main"]]
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def recorded(root: Path, id: str = ID) -> tuple[str, ...]:
    return load_manifest(root).entries[id].sources


def assert_published(hub, root: Path, commits: int = 2) -> None:
    """Everything, once, tagged and recorded. The first commit is the Hub's own."""
    repository = hub.repositories["org/name"]
    head = repository.branches["main"]
    assert published(hub) == sent(root) and len(repository.commits) == commits
    assert repository.tags == {"one": head} and recorded(root) == ("repository", f"hf-hub:org/name@{head}")


@pytest.mark.parametrize("private", [False, True])
def test_publish(hub, root, private):
    said = publish(ID, repo="org/name", private=private, root=root)
    assert_published(hub, root)
    assert hub.repositories["org/name"].private is private
    assert hub.repositories["org/name"].branches["main"] in said and "model.safetensors" in said
    assert len(hub.requests("POST .*/commit/")) == 1 and "parentCommit" in hub.requests("/commit/")[0].body.decode()
    commit = hub.repositories["org/name"].branches["main"]
    for name in sent(root):
        assert hub.requests(f"GET .*resolve/{commit}/{name}"), "it was read back"
    assert not hub.requests("xet")


def test_what_was_published_is_what_everybody_loads(hub, root, tmp_path):
    publish(ID, repo="org/name", private=True, root=root)
    expected = create_model(ID, True, manifest=load_manifest(root)).state_dict()
    for path in (root / "weights" / ID).iterdir():
        path.unlink()
    with pytest.raises(WeightsError, match=r"private \(401\): check the name, or give token=True"):
        create_model(ID, True, manifest=load_manifest(root), cache_dir=tmp_path / "users")
    for name in (ID, f"{ID}@one", f"{ID}@main", "hf-hub:org/name", "hf-hub:org/name@one"):
        model = create_model(name, True, manifest=load_manifest(root), token=TOKEN, cache_dir=tmp_path / "users")
        assert all((model.state_dict()[key] == value).all() for key, value in expected.items())


def test_the_card_names_what_a_stranger_can_load(hub, root, tmp_path):
    """Whose package has another manifest, in which there is no such id."""
    card = root / "weights" / ID / "README.md"
    card.write_text(f"# {ID}\n\n```python\n{snippet(load_manifest(root).entries[ID])}```\n")
    before = card.read_bytes()
    publish(ID, repo="org/name", root=root)
    (name,) = re.findall(r'create_model\("(.+?)", pretrained=True\)', published(hub)["README.md"].decode())
    assert create_model(name, pretrained=True, cache_dir=tmp_path).pretrained_cfg["tag"] == "one"
    assert card.read_bytes() == before
    publish(ID, repo="org/name", root=root)
    assert len(hub.requests("POST .*/commit/")) == 1, "nothing differs"


def test_again_changes_nothing(hub, root):
    publish(ID, repo="org/name", root=root)
    before = recorded(root)
    hub.log.clear()
    publish(ID, repo="org/name", root=root)
    assert_published(hub, root)
    assert recorded(root) == before and not hub.requests("PUT|/commit/|preupload")


def test_a_dry_run_asks_nobody(hub, root, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    said = publish(ID, repo="org/name", dry_run=True, root=root)
    assert not hub.log and all(name in said for name in sent(root)) and "Nothing was sent" in said
    assert recorded(root) == ("repository",)


@pytest.mark.parametrize("repo", ["name", "hf-hub:org/name", "https://huggingface.co/org/name"])
def test_a_repository_is_org_and_name(hub, root, repo):
    with pytest.raises(ConfigError, match=f"{repo} is not of the form org/name"):
        publish(ID, repo=repo, dry_run=True, root=root)


def test_the_command(hub, root, capsys):
    assert main(["publish", ID, "--repo", "org/name", "--root", str(root), "--dry-run"]) == 0
    assert "Nothing was sent" in capsys.readouterr().out
    assert main(["publish", ID, "--repo", "org/name", "--root", str(root), "--private"]) == 0
    assert_published(hub, root)
    assert main(["publish", "cim_vit_tiny.other", "--repo", "org/name", "--root", str(root)]) == 1
    assert "there is no release 'cim_vit_tiny.other'" in capsys.readouterr().err


def test_another_release_of_the_architecture_follows(hub, root, release):
    """Its tag leads to it, the first one's still to the first; files that it lacks are gone from its commit."""
    for name in ("recipe-1.yaml", "recipe.yaml", "log-1.jsonl", "log.jsonl"):
        (root / "weights" / ID / name).write_text(f"{{}}  # {name}\n")
    publish(ID, repo="org/name", root=root)
    first = recorded(root)
    release("cim_vit_tiny.two", released="2026-02-01")
    publish("cim_vit_tiny.two", repo="org/name", root=root)
    assert recorded(root) == first and published(hub).keys() - sent(root, "cim_vit_tiny.two") == {"README.md"}
    repository = hub.repositories["org/name"]
    assert repository.tags == {"one": first[1][-40:], "two": repository.branches["main"]}
    assert publish(ID, repo="org/name", root=root) and recorded(root) == first
    publish(ID, repo="org/second", root=root)
    assert len(recorded(root)) == 3 and recorded(root)[2].startswith("hf-hub:org/second@")


TROUBLES = {
    "down": ("", dict(status=503, times=FOREVER), "the server answers 503"),
    "silent": ("GET /api/models", dict(silent=True, times=FOREVER), "cannot be reached: timed out"),
    "may not create": ("POST .*create", dict(status=403), "refused .403"),
    "preupload": ("POST .*preupload", dict(status=400), "400"),
    "upload": ("PUT", dict(status=403), "Error while uploading '(model|pretext).safetensors'"),
    "commit refused": ("POST .*/commit/", dict(status=503), "503"),
    "another commit": ("POST .*/commit/", dict(status=412), "somebody else has made a commit meanwhile"),
    "commit lost": ("POST .*/commit/", dict(lost=True), "disconnected"),
    "damaged there": ("GET /objects/", dict(flip=True, times=FOREVER), "sha256 .* expected, .* found: twice"),
    "truncated there": ("GET .*README.md", dict(short=3, times=FOREVER), "bytes expected, 3 found: twice"),
    "tag": ("POST .*/tag/", dict(status=500), "500"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_fails_is_not_recorded_and_can_be_run_again(hub, root, trouble):
    where, fault, message = TROUBLES[trouble]
    hub.fault(where, **fault)
    with pytest.raises(WeightsError, match=message) as caught:
        publish(ID, repo="org/name", root=root)
    assert f"{ID} to org/name: " in str(caught.value) and "nothing is recorded; run the command" in str(caught.value)
    assert recorded(root) == ("repository",)
    hub.faults.clear()
    publish(ID, repo="org/name", root=root)
    assert_published(hub, root)


def test_no_request_waits_for_ever(hub, root):
    """As the client's own would, which has no timeouts; it is as it was afterwards."""
    seen = []
    before = get_session().timeout
    hub.fault("PUT", first=lambda: seen.append(get_session().timeout))
    publish(ID, repo="org/name", root=root)
    (during,) = seen
    assert (during.connect, during.write, during.read) == (8, 15, 60)
    assert get_session().timeout == before


def test_whoever_was_silent_is_not_waited_for_as_long_again(hub, root, monkeypatch):
    """The client asks up to six times: a minute for each would be six."""
    seen = []
    monkeypatch.setattr(get_session(), "event_hooks", {"request": [seen.append]})
    before = get_session().event_hooks
    hub.fault("PUT", lost=True)
    publish(ID, repo="org/name", root=root)
    waits = [request.extensions["timeout"]["read"] for request in seen if request.method == "PUT"]
    assert sorted(waits) == [8, 60, 60] and get_session().event_hooks == before


def test_a_commit_of_somebody_else_is_not_lost(hub, root):
    """Made between the look at the head and our commit."""
    publish(ID, repo="org/name", root=root)
    hub.repositories["org/name"].tags.clear()
    theirs = published(hub) | {"notes.md": b"theirs"}
    (root / "weights" / ID / "README.md").write_text("# new\n")
    hub.fault("POST .*/commit/", first=lambda: hub.add("org/name", theirs))
    with pytest.raises(WeightsError, match="somebody else has made a commit meanwhile"):
        publish(ID, repo="org/name", root=root)
    publish(ID, repo="org/name", root=root)
    assert published(hub) == sent(root) | {"notes.md": b"theirs"}


KILLED = """
import sys
from pathlib import Path
from cim_models.hub.publish import publish
publish("cim_vit_tiny.one", repo="org/name", root=Path(sys.argv[1]))
assert "torch" not in sys.modules
"""
POINTS = ["POST .*create", "POST .*preupload", "PUT", "POST .*/commit/", "GET .*resolve", "POST .*/tag/"]


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_killed_and_run_again(hub, root, tmp_path, point, done):
    """Before the Hub does what is asked at this point, and after it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CIM_", "PYTHON"))}
    clean |= hub.environment(tmp_path) | {"PYTHONPATH": str(ROOT), "HF_TOKEN": TOKEN}
    command = [sys.executable, "-c", KILLED, str(root)]
    process = subprocess.Popen(command, env=clean, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def kill() -> None:
        process.kill()
        process.wait()

    hub.fault(point, **{"lost": True, "after" if done else "first": kill}, **({} if done else {"status": 503}))
    process.communicate(timeout=60)
    assert process.returncode == -9 and recorded(root) == ("repository",)
    publish(ID, repo="org/name", root=root)
    assert_published(hub, root)


# ---------------------------------------------------------------- what is refused


def test_folders_that_differ_from_the_manifest(hub, root):
    folder = root / "weights" / ID
    config = json.loads((folder / "config.json").read_text())
    config["cim_models"]["summary"] = "another"
    before = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="config.json differs from the manifest's entry: release it again"):
        publish(ID, repo="org/name", root=root)
    (folder / "config.json").write_text(before)
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsError, match="model.safetensors is damaged"):
        publish(ID, repo="org/name", root=root)
    assert not hub.log


def test_repositories_that_hold_something_else(hub, root):
    for content in (b'{"architecture": "resnet50"}', b"[]", b"<html>", b"{}"):
        commit = hub.add("org/name", {"config.json": content})
        with pytest.raises(ConfigError, match="org/name holds .*, not cim_vit_tiny: choose another repository"):
            publish(ID, repo="org/name", root=root)
        assert hub.repositories["org/name"].branches["main"] == commit
    hub.add("org/public", {"README.md": b"#"})
    with pytest.raises(ConfigError, match="org/public is public already"):
        publish(ID, repo="org/public", private=True, root=root)
    hub.repositories["org/public"].tags["one"] = hub.repositories["org/public"].branches["main"]
    with pytest.raises(ConfigError, match="the tag one is another release, and tags do not move"):
        publish(ID, repo="org/public", root=root)
    assert recorded(root) == ("repository",)


def test_names_and_tokens_that_cannot_be(hub, root, monkeypatch):
    with pytest.raises(WeightsError, match="org/na--me"):
        publish(ID, repo="org/na--me", root=root)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(WeightsError, match="401, Invalid credentials"):
        publish(ID, repo="org/name", root=root)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(WeightsError, match="hf auth login"):
        publish(ID, repo="org/name", root=root)
    assert not hub.repositories


def test_the_manifest_changed_meanwhile(hub, root, release):
    """Somebody released it again while it was uploaded: what is on the Hub is not what the entry says."""

    def change() -> None:
        text = (root / "weights_manifest.json").read_text()
        (root / "weights_manifest.json").write_text(text.replace("A release for tests.", "Another one."))

    hub.fault("POST .*/tag/", first=change)
    with pytest.raises(ConfigError, match="has changed in the manifest meanwhile"):
        publish(ID, repo="org/name", root=root)
    assert recorded(root) == ("repository",)


def test_resolve_knows_what_was_published(hub, root, tmp_path):
    publish(ID, repo="org/name", root=root)
    found = resolve(f"{ID}@one", manifest=load_manifest(root), access=Access(cache_dir=tmp_path / "new"))
    assert found.entry is not None and found.entry.id == ID
