"""`hf-hub:org/name[@revision]`, `arch.tag@revision` and `revision=`, over real HTTP."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import close_session
from loopback import FOREVER, TOKEN, Reply
from safetensors.torch import load_file, save_file

from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.access import Access
from cim_models.hub.load import create_model, create_pretext
from cim_models.hub.store import resolve

NAME = "hf-hub:org/name"


@pytest.fixture
def commit(published) -> str:
    """Of the release on the Hub."""
    return published[1].sources[0].partition("@")[2]


@pytest.fixture
def later(hub, published, commit) -> str:
    """Another commit on top, with another README."""
    hub.repositories["org/name"].tags["v1"] = commit
    return hub.add("org/name", hub.repositories["org/name"].commits[commit] | {"README.md": b"new"})


def test_a_repository_becomes_a_model(published, hub, commit):
    manifest, entry, _ = published
    for name in (NAME, f"{NAME}@main", f"{NAME}@{commit}"):
        model = create_model(name)
        tensors = load_file(resolve(name).files["backbone"][0])
        assert torch.equal(model.blocks[0].attn.qkv.weight, tensors["blocks.0.attn.qkv.weight"])
        assert model.pretrained_cfg["mean"] == (0.4, 0.5, 0.6) and model.pretrained_cfg["tag"] == entry.tag
    assert not resolve(NAME).files["backbone"][0].is_relative_to(manifest.root)
    model = create_model("cim_vit_tiny", weights=NAME, num_classes=3)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    pretext = create_pretext(NAME)
    assert pretext.locate(torch.zeros(1, 3, 64, 64), torch.zeros(1, 2, 3, 32, 32)).shape == (1, 2, 64, 64)
    overlay = {"hf_hub_id": f"org/name@{commit}"}
    theirs = timm.create_model("cim_vit_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(theirs.cls_token, create_model(NAME).cls_token)
    with pytest.raises(WeightsError, match="holds weights of cim_vit_tiny, not of cim_resnet18"):
        create_model("cim_resnet18", weights=NAME)


def test_a_revision_is_what_was_asked_for(published, hub, commit, later):
    manifest, entry, _ = published
    assert resolve(NAME).name == f"{NAME}@{later}"
    for name, revision in ((f"{NAME}@v1", None), (NAME, "v1"), (f"{NAME}@{commit}", None), (f"{NAME}@v1", "v1")):
        assert resolve(name, access=Access(revision=revision)).name == f"{NAME}@{commit}"
    assert resolve(f"{entry.id}@main", manifest=manifest).name == f"{NAME}@{later}"
    assert resolve(f"cim_vit_tiny@{later}", manifest=manifest).name == f"{NAME}@{later}"
    assert resolve(f"{entry.id}@{commit}", manifest=manifest) == resolve(entry.id, manifest=manifest)
    assert resolve("cim_vit_tiny", NAME, access=Access(revision="v1")).name == f"{NAME}@{commit}"
    model = create_model(entry.id, True, revision="v1", manifest=manifest)
    assert create_model(entry.id, True, manifest=manifest).pretrained_cfg["hf_hub_id"] == f"org/name@{commit}"
    assert Path(model.pretrained_cfg["file"]).stem == entry.files[0].sha256
    with pytest.raises(ConfigError, match="revision='v2': say one of the two"):
        resolve(f"{NAME}@v1", access=Access(revision="v2"))
    with pytest.raises(ConfigError, match="is a path, which has no revision 'v1'"):
        resolve(f"local-dir:{manifest.root}", access=Access(revision="v1"))
    with pytest.raises(WeightsError, match=r"no such revision \(404\): give a branch"):
        resolve(f"{NAME}@v2")
    local = dataclasses.replace(entry, sources=("repository",))
    with pytest.raises(WeightsError, match="is not on the Hub, so it has no revisions: leave it out"):
        resolve(f"{entry.id}@v1", manifest=manifest.with_entry(local))


def test_branches_with_slashes(published, hub, commit):
    hub.repositories["org/name"].branches["feat/x"] = commit
    assert resolve(f"{NAME}@feat/x").name == f"{NAME}@{commit}"
    assert hub.requests("feat%2Fx")
    hub.stop()
    assert resolve(f"{NAME}@feat/x").name == f"{NAME}@{commit}"


def test_a_commit_needs_no_request_when_it_is_here(published, hub, commit):
    first = resolve(f"{NAME}@{commit}")
    hub.log.clear()
    assert resolve(f"{NAME}@{commit}") == first and not hub.log
    hub.stop()
    assert resolve(f"{NAME}@{commit}", access=Access(local_files_only=True)) == first


def test_a_branch_when_the_hub_is_away(published, hub, commit, later, caplog, tmp_path):
    """The last known commit is used and named; a refusal is not taken for a server that is away."""
    first = resolve(NAME)
    hub.fault("revision/main", times=FOREVER, status=503)
    with caplog.at_level(logging.WARNING, "cim_models"):
        assert resolve(NAME) == first
    assert f"used commit {later}, which it was when it was last asked for" in caplog.text and "503" in caplog.text
    hub.faults.clear()
    assert resolve(NAME, access=Access(local_files_only=True)) == first
    with pytest.raises(WeightsError, match="name@v1 is not in .*requests are forbidden: load it once online"):
        resolve(f"{NAME}@v1", access=Access(local_files_only=True))
    hub.repositories["org/name"].private = True
    with pytest.raises(WeightsError, match=r"private \(401\): check the name, or give token=True"):
        resolve(NAME)
    assert resolve(f"{NAME}@{later}") == first, "whoever names a commit has what he asked for"
    hub.stop()
    with pytest.raises(WeightsError, match="hf-hub:org/name@main: the server cannot be reached.*cim fetch"):
        resolve(NAME, access=Access(cache_dir=tmp_path / "empty"))


def test_private_and_gated(published, hub, commit):
    repository = hub.repositories["org/name"]
    for kind, message in (("private", r"private \(401\)"), ("gated", r"gated \(403\): accept the terms")):
        setattr(repository, kind, True)
        with pytest.raises(WeightsError, match=message):
            resolve(f"{NAME}@{commit}")
        with pytest.raises(WeightsError, match="401.*Invalid credentials.*check the token"):
            resolve(f"{NAME}@{commit}", access=Access(token="wrong"))
        setattr(repository, kind, False)
    repository.private = repository.gated = True
    assert resolve(NAME, access=Access(token=TOKEN)).entry is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:org/none", r"no such repository, or it is private \(401\)"),
        ("hf-hub:org/na--me", "hf-hub:org/na--me@main: "),
        (f"hf-hub:org/na--me@{'0' * 40}", r"no such repository, or it is private \(401\)"),
        ("hf-hub:org/empty", r"config.json of hf-hub:org/empty@[0-9a-f]{40}: there is no such file \(404\)"),
        ("hf-hub:org/html", "config.json of hf-hub:org/html@[0-9a-f]{40}: cannot be read as JSON"),
        ("hf-hub:org/list", "config.json of hf-hub:org/list@[0-9a-f]{40}: not a JSON object"),
        ("hf-hub:org/odd", "cim_models: missing field"),
        ("hf-hub:org/stock", "holds weights of vit_tiny_patch16_224, which is not of this package"),
        ("hf-hub:org/bare", r"model.safetensors of hf-hub:org/bare@[0-9a-f]{40}: there is no such file"),
        ("hf-hub:org/shards", r"model.safetensors of hf-hub:org/shards@.*one model.safetensors.*weights=FILE"),
        ("hf-hub:org/other", "hf-hub:org/other@[0-9a-f]{40}: config.json names no architecture"),
    ],
)
def test_repositories_that_hold_something_else(published, hub, name, message):
    hub.add("org/empty", {"README.md": b"#"})
    hub.add("org/html", {"config.json": b"<html>"})
    hub.add("org/list", {"config.json": b"[]"})
    hub.add("org/odd", {"config.json": b'{"cim_models": {"id": "x"}}'})
    hub.add("org/stock", {"config.json": b'{"architecture": "vit_tiny_patch16_224"}', "model.safetensors": b"x"})
    hub.add("org/bare", {"config.json": b'{"architecture": "cim_vit_tiny"}'})
    shard, index = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
    files = {shard: b"x", index: b'{"weight_map": {"x": "%s"}}' % shard.encode()}
    hub.add("org/shards", {"config.json": b'{"architecture": "cim_vit_tiny"}', **files})
    hub.add("org/other", {"config.json": b'{"model_type": "vit"}', "model.safetensors": b"x"})
    with pytest.raises(WeightsError, match=message):
        create_model(name)


CONFIGS = {
    '{"architecture": "cim_resnet18", "model_args": null, "label_names": null, "pretrained_cfg": null}': "is missing",
    '{"architecture": "cim_resnet18", "model_args": [1]}': "config.json: model_args: .1. is not dict",
    '{"architecture": "cim_resnet18", "label_names": 3}': "config.json: label_names: 3 is not list",
    '{"architecture": "cim_resnet18", "pretrained_cfg": {"mean": "x", "std": 1, "input_size": 3, "crop_pct": 1, '
    '"interpolation": "bicubic", "crop_mode": "center"}}': "config.json: field pretrained_cfg.input_size: 3 is not",
    '{"architecture": "cim_resnet18", "model_args": {"foo": 1}}': "cim_resnet18 takes no such arguments: .*'foo'",
}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_that_says_what_cannot_be(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=f"{tmp_path}.*{CONFIGS[config]}"):
        create_model(tmp_path)


def test_an_answer_of_somebody_else_is_not_kept(published, hub, commit):
    """Of a page to log in to a network, for instance, which says that all is well."""
    hub.fault(".*config.json", times=2, status=200)
    with pytest.raises(WeightsError, match="config.json of .*: what answers is not the Hub: check .* HF_ENDPOINT"):
        resolve(f"{NAME}@{commit}")
    hub.faults.clear()
    assert resolve(f"{NAME}@{commit}").entry is not None


def test_networks_and_machines_that_are_not_set_up(published, hub, commit, monkeypatch):
    """No token to give, a proxy that nothing here can speak to, a redirection that leads to itself: no tracebacks."""
    name = f"{NAME}@{commit}"
    with pytest.raises(WeightsError, match="config.json of .*hf auth login"):
        resolve(name, access=Access(token=True))
    with monkeypatch.context() as context:
        context.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
        close_session()
        with pytest.raises(WeightsError, match="config.json of .*(SOCKS|cannot be reached)"):
            resolve(name)
    close_session()
    back = ("HEAD GET", ".*", lambda hub, request, query: Reply(302, Location=request.path))
    monkeypatch.setattr("loopback.ROUTES", [back])
    with pytest.raises(WeightsError, match="config.json of .*redirects"):
        resolve(name)


@pytest.mark.parametrize("fault", [dict(flip=True), dict(short=20), dict(cut=20), dict(status=503)])
def test_a_damaged_config_is_asked_for_again(published, hub, fault):
    hub.fault("GET .*config.json", **fault)
    assert resolve(NAME).entry == dataclasses.replace(published[1], sources=("repository",))
    assert not hub.faults


def test_a_config_that_is_always_damaged(published, hub):
    hub.fault("GET .*config.json", times=FOREVER, flip=True)
    with pytest.raises(WeightsError, match="config.json of .*what arrived is not what the Hub announced"):
        resolve(NAME)


def test_a_config_in_the_cache_of_the_hubs_client(published, hub, commit, tmp_path):
    """Used offline if it is whole, and only then."""
    cache = tmp_path / "cache"
    for name in ("config.json", "model.safetensors", "pretext.safetensors"):
        path = hf_hub_download("org/name", name, endpoint=hub.endpoint, cache_dir=cache)
        if name == "config.json":
            config = Path(path)
    offline = Access(local_files_only=True)
    assert resolve(NAME, access=offline).name == f"{NAME}@{commit}", "by the client's own note of the branch"
    text = config.read_text()
    config.write_text(text.replace("cim_vit_tiny", "cim_vit_tinz"))
    with pytest.raises(WeightsError, match="config.json of .*requests are forbidden"):
        resolve(NAME, access=offline)
    assert resolve(NAME).architecture == "cim_vit_tiny"


def test_a_folder_that_timm_pushed(published, hub):
    """No entry of ours: the Hub's word for size and sha256 is what is verified."""
    manifest, entry, contents = published
    cfg = dict(mean=[0.1, 0.2, 0.3], std=[1, 1, 1], input_size=[3, 64, 64], interpolation="bicubic")
    config = {"architecture": "cim_vit_tiny", "model_args": entry.model_args, "num_classes": 0}
    config["pretrained_cfg"] = cfg | {"crop_pct": 0.9, "crop_mode": "center"}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": contents["model.safetensors"]}
    hub.add("org/timm", files)
    model = create_model("hf-hub:org/timm")
    assert tuple(model.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
    hub.log.clear()
    assert resolve("hf-hub:org/timm", access=Access(local_files_only=True)).ours and not hub.log
    theirs = timm.create_model("cim_vit_tiny", pretrained=True, pretrained_cfg_overlay={"hf_hub_id": "org/timm"})
    assert torch.equal(theirs.cls_token, model.cls_token)
    hub.fault("HEAD .*model.safetensors", status=200)  # an answer that says nothing of the file
    with pytest.raises(WeightsError, match="does not know its sha256, so it cannot be verified"):
        resolve("hf-hub:org/timm", access=Access(cache_dir=manifest.root / "empty"))


def test_no_pickle_in_place_of_what_cannot_be_had(published, hub):
    """timm waits for 25 seconds and then loads pytorch_model.bin without a word."""
    manifest, entry, contents = published
    config = json.dumps({"architecture": "cim_vit_tiny", "model_args": entry.model_args}).encode()
    files = {"config.json": config, "pytorch_model.bin": b"pickle"}
    for repository in ("org/both", "org/bin"):
        hub.add(repository, files | ({"model.safetensors": b"x"} if repository == "org/both" else {}))
        hub.fault("org/both.*model.safetensors", times=FOREVER, status=503)
        with pytest.raises(WeightsError, match="model.safetensors of .*(503|there is no such file)"):
            create_model(f"hf-hub:{repository}")
    assert not hub.requests("bin$")


def test_timm_waits_no_longer_than_we_do(published, hub):
    """For a registered model timm asks a dead endpoint for 47 seconds, and speaks of the last file that it tried."""
    hub.stop()
    overlay = {"hf_hub_id": "org/name"}
    with pytest.raises(WeightsError, match="hf-hub:org/name@main: the server cannot be reached"):
        timm.create_model("cim_vit_tiny", pretrained=True, pretrained_cfg_overlay=overlay)


def test_arguments_that_say_how_to_fetch(published, hub, tmp_path):
    manifest, entry, _ = published
    place = {"cache_dir": tmp_path / "mine", "endpoint": hub.endpoint, "token": False, "manifest": manifest}
    create_model(entry.id, True, **place)
    assert len(list((tmp_path / "mine").rglob("*.safetensors"))) == 2
    assert create_model(entry.id, True, local_files_only=True, **place) is not None
    assert create_pretext(entry.id, local_files_only=True, **place) is not None
    with pytest.raises(WeightsError, match="requests are forbidden"):
        create_model(entry.id, True, local_files_only=True, manifest=manifest)
    with pytest.raises(ConfigError, match="create_pretext takes no cash_dir"):
        create_pretext(entry.id, cash_dir=tmp_path)
