"""The Hub of these tests says to the real client what the real Hub says, and misbehaves as it is told."""

import hashlib
import time
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from loopback import TOKEN, Loopback

LARGE = bytes(range(256)) * 4096  # 1 MiB
FILES = {"config.json": b'{"a": 1}', "model.safetensors": LARGE}


@pytest.fixture
def hub():
    with Loopback() as hub:
        yield hub


@pytest.mark.parametrize("redirect", [True, False])
def test_download(tmp_path, redirect):
    with Loopback(redirect) as hub:
        commit = hub.add("org/name", FILES)
        for name, content in FILES.items():
            path = hf_hub_download("org/name", name, cache_dir=tmp_path, endpoint=hub.endpoint, token=TOKEN)
            assert Path(path).read_bytes() == content and commit in path
        blobs = {path.name for path in (tmp_path / "models--org--name" / "blobs").iterdir()}
        assert hashlib.sha256(LARGE).hexdigest() in blobs
        methods = [request.method for request in hub.requests("/resolve/")]
        assert methods == (["HEAD", "GET", "HEAD"] if redirect else ["HEAD", "GET"] * 2)
        (body,) = hub.requests("GET /objects/" if redirect else "GET .*model.safetensors")
        assert ("authorization" in body.headers) is not redirect  # the other origin never sees the token
        folder = snapshot_download("org/name", cache_dir=tmp_path, endpoint=hub.endpoint, token=False)
        assert folder.endswith(commit)


def test_who_may_see_what(hub, tmp_path):
    place = {"cache_dir": tmp_path, "endpoint": hub.endpoint}
    hub.add("org/private", FILES, private=True)
    hub.add("org/gated", FILES, gated=True)
    for repository, kind in {"private": RepositoryNotFoundError, "gated": GatedRepoError, "none": Exception}.items():
        with pytest.raises(kind):
            hf_hub_download(f"org/{repository}", "config.json", **place, token=False)
    assert hf_hub_download("org/private", "config.json", **place, token=TOKEN)
    api = HfApi(hub.endpoint, token=False)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/gated", revision="v1")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/gated", "other", **place, token=TOKEN)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.model_info("org/gated", token="wrong")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # in the client's own upload
def test_publish(hub, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(LARGE)
    api = HfApi(hub.endpoint, token=TOKEN)
    for _ in range(2):
        api.create_repo("org/new", private=True, exist_ok=True)
    assert hub.repositories["org/new"].private
    head = api.model_info("org/new").sha
    with open(tmp_path / "model.safetensors", "rb") as file:  # a stream, so that Xet stays off
        operations = [CommitOperationAdd("model.safetensors", file), CommitOperationAdd("README.md", b"# Hi")]
        done = api.create_commit("org/new", operations, commit_message="all", parent_commit=head)
    tree = {node.path: node for node in api.list_repo_tree("org/new", revision=done.oid)}
    assert tree["model.safetensors"].lfs.sha256 == hashlib.sha256(LARGE).hexdigest() and tree["README.md"].size == 4
    infos = api.get_paths_info("org/new", ["model.safetensors", "nothing"], revision=done.oid)
    assert [info.path for info in infos] == ["model.safetensors"]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("org/new", [CommitOperationDelete("README.md")], commit_message="x", parent_commit=head)
    api.create_commit("org/new", [CommitOperationDelete("README.md")], commit_message="x", parent_commit=done.oid)
    api.create_tag("org/new", tag="v1", revision=done.oid)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("org/new", tag="v1", revision=done.oid)
    refs = api.list_repo_refs("org/new")
    assert refs.tags[0].target_commit == done.oid != refs.branches[0].target_commit
    siblings = api.model_info("org/new", revision="v1", files_metadata=True).siblings
    assert {file.rfilename: file.size for file in siblings}["model.safetensors"] == len(LARGE)


def test_faults(hub):
    """Seen by a plain HTTP client."""
    hub.add("org/name", FILES)
    url = f"{hub.endpoint}/org/name/resolve/main/model.safetensors"
    with httpx.Client(follow_redirects=True, timeout=30) as client:
        assert client.get(url).content == LARGE
        assert client.get(url, headers={"Range": "bytes=1000000-"}).content == LARGE[1000000:]
        hub.fault("GET .*/resolve/", status=503)
        assert client.get(url).status_code == 503
        hub.fault("GET /objects/", flip=True)
        flipped = client.get(url).content
        assert len(flipped) == len(LARGE) and sum(a != b for a, b in zip(flipped, LARGE, strict=True)) == 1
        hub.fault("GET /objects/", short=1000)
        assert client.get(url).content == LARGE[:1000]
        hub.fault("GET /objects/", compress=True)
        assert client.get(url).content == LARGE
        hub.fault("GET /objects/", ranges=False)
        assert client.get(url, headers={"Range": "bytes=1000000-"}).content == LARGE
        for kind in ("cut", "length"):
            hub.fault("GET /objects/", **{kind: 1000})
            with pytest.raises(httpx.RemoteProtocolError):
                client.get(url)
        hub.fault("GET /objects/", reset=1000)
        with pytest.raises(httpx.ReadError):
            client.get(url)
        hub.fault("GET", silent=True)
        with pytest.raises(httpx.ReadTimeout):
            client.get(url, timeout=0.3)
        hub.fault("GET /objects/", stall=1000)
        with pytest.raises(httpx.ReadTimeout):
            client.get(url, timeout=0.3)
        hub.fault("GET /objects/", pause=0.02)
        start = time.monotonic()
        assert client.get(url).content == LARGE and time.monotonic() - start >= 0.15
        hub.fault("GET", lost=True)
        with pytest.raises(httpx.RemoteProtocolError):
            client.get(url)
        assert not hub.faults and client.get(url).content == LARGE
        hub.stop()
        with pytest.raises(httpx.TransportError):
            client.get(url)
