"""cim_models.pretraining.initial: the weights that a run starts from, compared with the files that hold them."""

import json
import logging
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from cim_models.backbones import build as build_encoder
from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.load import create_model
from cim_models.hub.manifest import load_manifest
from cim_models.hub.provenance import seen_by
from cim_models.hub.release import release
from cim_models.pretext.model import CIM
from cim_models.pretraining.build import build
from cim_models.pretraining.checkpoint import export
from cim_models.pretraining.config import PretrainConfig, load_recipe
from cim_models.pretraining.initial import located, start_from
from cim_models.pretraining.log import Log
from cim_models.pretraining.loop import pretrain

RELEASED = load_manifest().default("cim_vit_tiny", "pretext")
OF_THE_RELEASE = {f"pretext__{name}": RELEASED.pretext.config[name] for name in ("head_width", "head_heads")}


def started(config) -> CIM:
    """The model of a run before its first step."""
    cim = build(config, -1.0)
    start_from(config, cim)
    return cim


def files_of(part: str) -> dict[str, torch.Tensor]:
    """The tensors of the embedded release."""
    paths = [load_manifest().root / file.path for file in RELEASED.files if file.part == part]
    return {key: value.float() for path in paths for key, value in load_file(path).items()}


@pytest.fixture(scope="module")
def exported(configure, tmp_path_factory):
    """What a run leaves of a model with three different parts, and the model."""
    folder, config = tmp_path_factory.mktemp("exported"), configure("data", "out")
    cim = build(config, -1.0)
    with torch.no_grad():
        for parameter in cim.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    export(folder, cim.state_dict(), config, 1, 2)
    return folder, cim


@pytest.mark.parametrize("source", ["", "local-dir:"])
def test_another_run(source, exported, configure):
    folder, before = exported
    ours, theirs = started(configure("data", "out", init=f"{source}{folder}")).state_dict(), before.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not torch.equal(ours["online.blocks.0.mlp.fc1.weight"], ours["target.blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("side", [64, 128])
def test_a_release_serves_both_sides_and_keeps_the_positions_of_the_run(side, configure):
    config = configure("data", "out", init=RELEASED.id, backbone__img_size=side, **OF_THE_RELEASE)
    cim, fresh = started(config), build_encoder("cim_vit_tiny", img_size=side)
    for key, value in files_of("backbone").items():
        expected = fresh.pos_embed if key == "pos_embed" and side == 64 else value
        for encoder in (cim.online, cim.target):
            assert torch.equal(encoder.state_dict()[key], expected), key
    assert all(torch.equal(cim.state_dict()[key], value) for key, value in files_of("pretext").items())
    assert not cim.online.pos_embed.requires_grad and not any(p.requires_grad for p in cim.target.parameters())
    assert cim.online.blocks[0].norm1.weight.data_ptr() != cim.target.blocks[0].norm1.weight.data_ptr()


def test_an_encoder_alone(configure, tmp_path, caplog):
    """Of stock timm, learned position embeddings and classifier included: those of another size are refused."""
    caplog.set_level(logging.INFO, "cim_models")
    stock = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10)
    torch.nn.init.normal_(stock.pos_embed)
    save_file(stock.state_dict(), tmp_path / "stock.safetensors")
    cim = started(configure("data", "out", init=str(tmp_path / "stock.safetensors")))
    for encoder in (cim.online, cim.target):
        state = encoder.state_dict()
        assert all(torch.equal(state[key], value) for key, value in stock.state_dict().items() if "head" not in key)
    assert "stock.safetensors has no correlation head: the run begins with a new one" in caplog.text
    save_for_hf(stock, tmp_path / "hub", safe_serialization=True)
    again = started(configure("data", "out", init=str(tmp_path / "hub" / "model.safetensors"))).online.state_dict()
    assert all(torch.equal(again[key], value) for key, value in cim.online.state_dict().items())
    for place in (tmp_path / "hub" / "model.safetensors", tmp_path / "hub"):
        loaded = create_model("cim_vit_tiny", weights=place, img_size=64)
        assert loaded.pretrained_cfg["mean"] == stock.pretrained_cfg["mean"] != RELEASED.preprocessing.mean
    save_file(stock.state_dict(), tmp_path / "told.safetensors", {"model_args": '{"img_size": 64}'})
    for name, error in (
        ("stock", "pos_embed has shape .*, as of another img_size"),
        ("told", "learned position .*: set backbone.img_size to their 64"),
    ):
        with pytest.raises((ConfigError, WeightsError), match=error):
            started(configure("data", "out", init=str(tmp_path / f"{name}.safetensors"), backbone__img_size=96))


def test_a_classifier_that_was_fine_tuned(configure, tmp_path):
    """Its norm lies behind the pooling: that of tokens is a new one."""
    config = {"architecture": "cim_vit_tiny", "model_args": {"img_size": 64, "global_pool": "avg", "fc_norm": True}}
    tuned = build_encoder("cim_vit_tiny", num_classes=5, **config["model_args"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tuned.state_dict(), tmp_path / "model.safetensors")
    cim = started(configure("data", "out", init=str(tmp_path)))
    for encoder in (cim.online, cim.target):
        state = encoder.state_dict()
        assert all(torch.equal(state.pop(key), value) for key, value in tuned.state_dict().items() if key in state)
        assert state.keys() == {"norm.weight", "norm.bias"}
        assert state["norm.weight"].eq(1).all() and state["norm.bias"].eq(0).all()


@pytest.mark.parametrize("spelling", ["first", "./first/", "local-dir:first", "~/first", "link", "link/x.safetensors"])
def test_a_path_is_remembered_in_full(spelling, tmp_path, monkeypatch):
    """A release may be made in another working directory, and what it started from has a licence.

    Files of the Hub's own cache are links: config.json lies beside the link.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "first").mkdir()
    (tmp_path / "link").symlink_to("first")
    (tmp_path / "blob").touch()
    (tmp_path / "first" / "x.safetensors").symlink_to("../blob")
    Log(tmp_path / "out", PretrainConfig(init=spelling), 0, enabled=True)
    expected = tmp_path.resolve() / "first" / ("x.safetensors" if "x" in spelling else "")
    assert load_recipe(tmp_path / "out" / "config.yaml").init == str(expected)


@pytest.mark.parametrize("name", ["", RELEASED.id, "hf-hub:org/name@v1", "org/name", "no name"])
def test_a_name_is_remembered_as_it_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert located(name) == name


def test_a_run_does_not_start_from_itself(exported, configure):
    """Nor is it called like what it starts from, which would be a name of the run from then on."""
    run = str(exported[0])
    for init, out in ((run, run), (f"{run}/target.safetensors", run), (RELEASED.id, RELEASED.id)):
        with pytest.raises(ConfigError, match="which is where the run writes: give another --out"):
            started(configure("data", out, init=init))


def test_a_resnet(configure, tmp_path):
    encoder = build_encoder("cim_resnet18")
    save_file(encoder.state_dict(), tmp_path / "resnet.safetensors", {"architecture": "cim_resnet18"})
    config = configure("data", "out", model="cim_resnet18", init=str(tmp_path / "resnet.safetensors"))
    cim = started(config)
    assert all(torch.equal(cim.target.state_dict()[key], value) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"init": "cim_vit_tiny"}, ConfigError, f"may mean other weights another day: give {RELEASED.id}"),
        ({"init": "cim_vit_tiny.absent"}, WeightsError, "init: no weights are released as 'cim_vit_tiny.absent'"),
        ({"init": "./absent"}, WeightsError, "init: there is no absent"),
        ({"init": "~nobody-here/run"}, WeightsError, "init: there is no ~nobody-here/run"),
        ({"model": "cim_vit_small"}, WeightsError, "holds weights of cim_vit_tiny, not of cim_vit_small"),
        ({"pretext__head_heads": 3}, ConfigError, f"has pretext.head_heads {OF_THE_RELEASE['pretext__head_heads']}:"),
        ({"pretext__head": "cosine"}, ConfigError, "has pretext.head cross_attention, pretext.head_width"),
    ],
)
def test_what_a_run_cannot_start_from(changes, error, message, configure):
    with pytest.raises(error, match=message):
        started(configure("data", "out", **{"init": RELEASED.id, **OF_THE_RELEASE, **changes}))


@pytest.mark.parametrize(("args", "what"), [({"depth": 2}, "blocks"), ({"num_heads": 6}, "attention heads")])
def test_an_encoder_of_another_build(args, what, configure, tmp_path):
    encoder = build_encoder("cim_vit_tiny", img_size=64, **args)
    (tmp_path / "config.json").write_text(
        f'{{"architecture": "cim_vit_tiny", "model_args": {{"img_size": 64, "{[*args][0]}": {[*args.values()][0]}}}}}'
    )
    save_file(encoder.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=f"does not fit the run's encoder: other .*{what}"):
        started(configure("data", "out", init=str(tmp_path)))


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_a_damaged_run(damage, exported, configure, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "damaged")
    content = (folder / "target.safetensors").read_bytes()
    (folder / "target.safetensors").write_bytes(content[:-100] if damage == "cut" else b"")
    with pytest.raises(WeightsError, match=r"target.safetensors is not a whole safetensors file"):
        started(configure("data", "out", init=str(folder)))


def test_a_run_from_a_release_to_a_release(photographs, configure, out, tmp_path):
    """It learns from the released weights on, and its release says where it came from, what that saw included."""
    changes = {"init": RELEASED.id, "optimiser__epochs": 0.5, "optimiser__lr": 1e-30, **OF_THE_RELEASE}
    pretrain(configure(photographs(8, 64), out, **changes))
    trained = load_file(out / "online.safetensors")
    assert all(
        torch.allclose(trained[key], value, atol=1e-7)
        for key, value in files_of("backbone").items()
        if key != "pos_embed"
    )
    root = load_manifest().root
    before = seen_by(root / "weights" / RELEASED.id / "model.safetensors")["images_seen"]
    assert seen_by(out / "online.safetensors")["images_seen"] == before + 4

    folder = release(out, id="cim_vit_tiny.mine", data="photographs", terms="mine", encoder="online", root=tmp_path)
    entry = load_manifest(tmp_path).entries["cim_vit_tiny.mine"]
    assert entry.licence == RELEASED.licence
    assert [data.name for data in entry.data] == [*(data.name for data in RELEASED.data), "photographs"]
    card = (folder / "README.md").read_text()
    assert f"- Started from: {RELEASED.id}" in card and f"4 images that followed {RELEASED.id}" in card
    assert f"cim pretrain DATA --recipe recipe.yaml --out RUN --init {RELEASED.id}" in card
    assert seen_by(folder / "model.safetensors") == seen_by(out / "online.safetensors")
    create_model("cim_vit_tiny", weights=folder)
