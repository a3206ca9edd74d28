"""cim_models.pretraining.checkpoint: nothing is half written, and nothing is read that does not fit."""

import copy
import json
import os
import shutil
from dataclasses import asdict, replace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cim_models import backbones
from cim_models.errors import CheckpointError
from cim_models.pretext.model import CIM, PretextConfig
from cim_models.pretraining.checkpoint import Order, States, export, kept, load, save
from cim_models.pretraining.config import PretrainConfig, to_dict
from cim_models.state import save_state

ORDER = Order(64, 640)


def build(depth: int = 1, **pretext) -> tuple[CIM, torch.optim.Optimizer]:
    """A model 24 wide that took one step."""
    torch.manual_seed(depth)
    backbone = backbones.build("cim_vit_tiny", embed_dim=24, depth=depth, num_heads=2, img_size=32)
    cim = CIM(backbone, PretextConfig(head_width=16, head_heads=2, **pretext))
    optimiser = torch.optim.AdamW([p for p in cim.parameters() if p.requires_grad])
    torch.nn.init.normal_(cim.head.predict.weight)
    cim(torch.randn(2, 3, 32, 32), torch.randn(2, 1, 3, 16, 16), torch.ones(2, 1, 32, 32)).loss.backward()
    optimiser.step()
    return cim, optimiser


def tensors(value, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested dicts and lists, by the way to them."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: v for key, item in pairs for k, v in tensors(item, f"{name}/{key}").items()}


def assert_same(left, right):
    left, right = tensors(left), tensors(right)
    assert left.keys() == right.keys() and left
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_save_and_load(tmp_path):
    cim, optimiser = build()
    save(tmp_path, States.of(cim, optimiser), 7, 20, PretrainConfig(), ORDER)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (state["format"], state["step"], state["steps"]) == (1, 7, 20)
    assert state["config"] == to_dict(PretrainConfig())
    other, its_optimiser = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert load(tmp_path, other, its_optimiser, 20, PretrainConfig(), ORDER) == 7
    assert_same(other.state_dict(), cim.state_dict())
    assert_same(its_optimiser.state_dict(), optimiser.state_dict())
    assert os.listdir(tmp_path) == ["last.pt"]


def test_checkpoints_of_older_versions_do_not_know_the_length_of_their_run(tmp_path):
    cim, optimiser = build()
    save(tmp_path, States.of(cim, optimiser), 7, 20, PretrainConfig(), ORDER)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["steps"]
    torch.save(state, tmp_path / "last.pt")
    assert load(tmp_path, cim, optimiser, 30, PretrainConfig(), ORDER) == 7


def test_checkpoints_of_older_versions_lack_newer_fields(tmp_path):
    cim, optimiser = build()
    save(tmp_path, States.of(cim, optimiser), 7, 20, PretrainConfig(), ORDER)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["config"]["init"], state["config"]["views"]["exemplars"]["flip"]
    torch.save(state, tmp_path / "last.pt")
    assert load(tmp_path, cim, optimiser, 20, PretrainConfig(), ORDER) == 7
    with pytest.raises(CheckpointError, match="another configuration: init: '' in the checkpoint, 'run' asked for"):
        load(tmp_path, cim, optimiser, 20, PretrainConfig(init="run"), ORDER)


def test_another_configuration_is_refused_by_name(tmp_path):
    cim, optimiser = build()
    config = PretrainConfig()
    save(tmp_path, States.of(cim, optimiser), 7, 20, config, ORDER)
    other = copy.deepcopy(config)
    other.optimiser.lr, other.views.exemplars.area, other.seed = 0.5, (0.1, 0.2), 3
    before = copy.deepcopy(cim.state_dict())
    with pytest.raises(CheckpointError, match="last.pt is of another configuration") as error:
        load(tmp_path, cim, optimiser, 20, other, ORDER)
    assert "optimiser.lr: 0.00015 in the checkpoint, 0.5 asked for" in str(error.value)
    assert "views.exemplars.area: [0.05, 0.48] in the checkpoint, [0.1, 0.2] asked for" in str(error.value)
    assert "seed: 0 in the checkpoint, 3 asked for" in str(error.value)
    assert str(error.value).count("asked for") == 3
    assert_same(cim.state_dict(), before)


def test_what_may_change_between_a_run_and_its_continuation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").mkdir()
    cim, optimiser = build()
    config = PretrainConfig(init="first")
    save(tmp_path, States.of(cim, optimiser), 7, 20, config, ORDER)
    other = replace(config, out="elsewhere", resume=True, log_every=1, save_every=1, tensorboard=True)
    other.init = str(tmp_path / "first")
    other.data = replace(config.data, workers=0, path="moved")
    assert load(tmp_path, cim, optimiser, 20, other, ORDER) == 7


def test_another_number_of_steps_is_refused(tmp_path):
    cim, optimiser = build()
    save(tmp_path, States.of(cim, optimiser), 7, 20, PretrainConfig(), ORDER)
    with pytest.raises(CheckpointError, match="a run of 20 steps, now there would be 21: the images or the number of"):
        load(tmp_path, cim, optimiser, 21, PretrainConfig(), ORDER)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped", "other file", "no optimiser", "other model"])
def test_damaged_checkpoints(tmp_path, damage):
    cim, optimiser = build()
    path = tmp_path / "last.pt"
    save(tmp_path, States.of(cim, optimiser), 7, 20, PretrainConfig(), ORDER)
    content = path.read_bytes()
    if damage == "flipped":
        middle = len(content) // 2
        wrong = bytes(255 - byte for byte in content[middle : middle + 64])
        path.write_bytes(content[:middle] + wrong + content[middle + 64 :])
    elif damage == "other file":
        torch.save({"model": cim.state_dict()}, path)
    elif damage == "no optimiser":
        torch.save({key: value for key, value in torch.load(path).items() if key != "optimiser"}, path)
    elif damage == "other model":
        save(tmp_path, States.of(*build(depth=2)), 7, 20, PretrainConfig(), ORDER)
    else:
        path.write_bytes({"cut": content[:-1000], "empty": b"", "text": b"not a checkpoint"}[damage])
    with pytest.raises(CheckpointError, match="last.pt: (not a checkpoint of a pretraining run, or|does not fit)"):
        load(tmp_path, cim, optimiser, 20, PretrainConfig(), ORDER)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"config": Evil(), "step": 1}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load(tmp_path, *build(), 20, PretrainConfig(), ORDER)
    assert not (tmp_path / "harm").exists()


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="last.pt: no checkpoint to resume; leave --resume out"):
        load(tmp_path, *build(), 20, PretrainConfig(), ORDER)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, small_files):
    (tmp_path / "last.pt").write_bytes(b"old")
    with pytest.raises(CheckpointError, match="last.pt: cannot be written: is the disk full?"), small_files():
        save_state({"a": torch.zeros(100_000)}, tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["last.pt"]


def test_exported_encoders_are_timms(tmp_path):
    torch.manual_seed(0)
    config = PretrainConfig(model="cim_vit_tiny")
    config.backbone.img_size = 64
    config.pretext = PretextConfig(head_width=96, head_heads=3)
    cim = CIM(backbones.build("cim_vit_tiny", img_size=64), config.pretext)
    with torch.no_grad():
        for parameter in cim.target.parameters():
            parameter.add_(1)
    export(tmp_path, cim.state_dict(), config, 12, 3456)
    stock = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, global_pool="avg", fc_norm=False)
    for name, encoder in (("online", cim.online), ("target", cim.target)):
        saved = load_file(tmp_path / f"{name}.safetensors")
        assert saved.keys() == stock.state_dict().keys() and {t.dtype for t in saved.values()} == {torch.float32}
        stock.load_state_dict(saved, strict=True)
        assert_same(stock.state_dict(), encoder.state_dict())
    head = load_file(tmp_path / "head.safetensors")
    assert_same(head, cim.head.state_dict())
    for name in ("online", "target", "head"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["architecture"] == "cim_vit_tiny" and json.loads(metadata["model_args"]) == {"img_size": 64}
        assert PretextConfig(**json.loads(metadata["pretext"])) == cim.config
        assert json.loads(metadata["pretext"]) == asdict(cim.config)
        assert json.loads(metadata["views"])["context_size"] == 160
        assert (metadata["step"], metadata["images_seen"]) == ("12", "3456")


def test_an_exported_resnet_is_timms(tmp_path):
    torch.manual_seed(0)
    cim = CIM(backbones.build("cim_resnet18"), PretextConfig(head="cosine", moving_average=False))
    export(tmp_path, cim.state_dict(), PretrainConfig(model="cim_resnet18"), 1, 2)
    saved = load_file(tmp_path / "online.safetensors")
    stock = timm.create_model("resnet18", num_classes=0)
    stock.load_state_dict(saved, strict=True)
    assert_same(stock.state_dict(), saved)
    assert sorted(os.listdir(tmp_path)) == ["head.safetensors", "online.safetensors"]


def test_the_last_checkpoints_are_kept(tmp_path):
    cim, optimiser = build()
    config = PretrainConfig(keep=2)
    (tmp_path / "step-mine.pt").write_text("not a checkpoint of ours")
    for step in (5, 10, 15):
        save(tmp_path, States.of(cim, optimiser), step, 20, config, ORDER)
    assert [path.name for path in kept(tmp_path)] == ["step-00000010.pt", "step-00000015.pt"]
    assert torch.load(tmp_path / "step-00000010.pt", weights_only=True)["step"] == 10
    (tmp_path / "last.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="step-00000010.pt is older, copy it there"):
        load(tmp_path, cim, optimiser, 20, config, ORDER)
    shutil.copy(tmp_path / "step-00000010.pt", tmp_path / "last.pt")
    assert load(tmp_path, cim, optimiser, 20, config, ORDER) == 10
    save(tmp_path, States.of(cim, optimiser), 11, 20, config, ORDER)  # what lay ahead is not removed
    assert [path.name[-5:] for path in kept(tmp_path)] == ["10.pt", "11.pt", "15.pt"]


def test_checkpoints_are_kept_where_files_have_one_name(tmp_path, monkeypatch):
    def no_links(*arguments):
        raise PermissionError("not on this file system")

    monkeypatch.setattr(os, "link", no_links)
    cim, optimiser = build()
    save(tmp_path, States.of(cim, optimiser), 5, 20, PretrainConfig(keep=2), ORDER)
    assert (tmp_path / "step-00000005.pt").read_bytes() == (tmp_path / "last.pt").read_bytes()
    assert len(os.listdir(tmp_path)) == 2


def test_another_split_of_the_same_steps(tmp_path):
    cim, optimiser = build()
    config, other = PretrainConfig(), PretrainConfig()
    other.optimiser.batch_size, other.optimiser.accumulation = 64, 4
    save(tmp_path, States.of(cim, optimiser), 7, 20, config, Order(256, 5120))
    assert load(tmp_path, cim, optimiser, 20, other, Order(256, 5120)) == 7
    for order in (Order(256, 5056), Order(128, 5120)):
        with pytest.raises(CheckpointError, match="optimiser.accumulation: 1 in the checkpoint, 4 asked for"):
            load(tmp_path, cim, optimiser, 20, other, order)
    with pytest.raises(CheckpointError, match="256 images a step and 5120 an epoch, now there would be 128 and 5120"):
        load(tmp_path, cim, optimiser, 20, config, Order(128, 5120))
