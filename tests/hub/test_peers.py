"""What goes wrong in other loaders of weights, and must not here."""

import dataclasses

import pytest
import torch
from loopback import FOREVER
from safetensors.torch import load_file, save_file

from cim_models.backbones import ARCHITECTURES, build
from cim_models.errors import WeightsError
from cim_models.hub.load import create_from_timm, create_model


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 4}, {"num_classes": 0}, {"features_only": True}], ids=str)
@pytest.mark.parametrize("fault", ["foreign", "a block is missing", "only a foreign one"])
@pytest.mark.parametrize("classes", [0, 3])
def test_another_head_excuses_nothing_else(release, tmp_path, kwargs, fault, classes):
    """timm loads such files without a word as soon as the number of classes is another one."""
    manifest, entry = release(num_classes=classes)
    tensors = load_file(manifest.root / entry.files[0].path)
    if fault == "a block is missing":
        tensors = {key: value for key, value in tensors.items() if not key.startswith("blocks.1.")}
    else:
        tensors = ({} if fault == "only a foreign one" else tensors) | {"foreign": torch.zeros(1)}
    save_file(tensors, tmp_path / "file.safetensors")
    complaint = "blocks.1.mlp.fc2.weight is missing" if "block" in fault else "foreign has no place in the model"
    for create in (create_model, create_from_timm):
        where = {"weights": tmp_path / "file.safetensors"} if create is create_model else {"pretrained": True}
        if create is create_from_timm:
            where["pretrained_cfg_overlay"] = {"file": str(tmp_path / "file.safetensors")}
        with pytest.raises(WeightsError, match=complaint):
            create("cim_vit_tiny", **where, **entry.model_args, **kwargs)


def test_weights_without_a_head_say_so(release):
    """Where the configuration of headless weights says 1000 classes, timm fails to load them."""
    manifest, entry = release()
    model = create_model(entry.id, pretrained=True, manifest=manifest)
    assert model.pretrained_cfg["num_classes"] == model.num_classes == 0 and isinstance(model.head, torch.nn.Identity)


def test_a_model_keeps_no_second_copy(release):
    """A dictionary given to timm stays in the model's configuration, beside its parameters."""
    manifest, entry = release()
    model = create_model(entry.id, pretrained=True, manifest=manifest)
    assert not [key for key, value in model.pretrained_cfg.items() if isinstance(value, (torch.Tensor, dict))]


@pytest.mark.parametrize("status", [503, 404])
def test_no_pickle_stands_in(hub, published, status):
    """timm takes pytorch_model.bin, of whatever content, once model.safetensors does not come."""
    manifest, entry, contents = published
    commit = hub.add("org/name", {**contents, "pytorch_model.bin": b"\x80\x02}q\x00."})
    entry = dataclasses.replace(entry, sources=(f"hf-hub:org/name@{commit}",))
    hub.fault("model.safetensors", FOREVER, status=status, code="EntryNotFound" if status == 404 else "")
    with pytest.raises(WeightsError, match="model.safetensors"):
        create_model(entry.id, pretrained=True, manifest=manifest.with_entry(entry))
    assert hub.requests("model.safetensors") and not hub.requests(r"\.(bin|pth|pt|ckpt)")


@pytest.mark.parametrize("architecture", ["cim_vit_tiny", "cim_resnet18"])
def test_nothing_is_initialised_that_a_file_holds(release, architecture):
    """timm spends most of the time of a load on random numbers that the file's replace; here none is drawn."""
    manifest, entry = release(f"{architecture}.one")
    before = torch.get_rng_state()
    create_model(entry.id, pretrained=True, manifest=manifest)
    assert torch.equal(torch.get_rng_state(), before)
    head = create_model(entry.id, pretrained=True, num_classes=3, manifest=manifest).get_classifier()
    torch.set_rng_state(before)
    torch.testing.assert_close(head.weight, torch.nn.init.trunc_normal_(torch.empty(head.weight.shape), std=0.02))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_is_in_the_state_dict(name):
    """transformers, which builds on the meta device, leaves garbage in any that is not."""
    with torch.device("meta"):
        model = build(name)
    for module in model.modules():
        assert not module._non_persistent_buffers_set
        assert not [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]


def test_a_torchvision_of_another_build(plain_copy, python, tmp_path):
    """It raises an error of its own, which says nothing of torch, when timm is imported."""
    (tmp_path / "path" / "torchvision").mkdir(parents=True)
    broken = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "path" / "torchvision" / "__init__.py").write_text(broken)
    code = """
import cim_models
from cim_models.cli import main
assert main(["list"]) == 0
try:
    cim_models.create_model("cim_vit_tiny", pretrained=True)
except cim_models.ConfigError as error:
    print(error)
import contextlib, io
with contextlib.redirect_stderr(io.StringIO()) as said:
    assert main(["verify"]) == 1
assert said.getvalue().startswith("cim: torchvision is not of the same build"), said.getvalue()
"""
    printed = python(code, tmp_path / "path", plain_copy)
    assert "torchvision is not of the same build as torch: install the two together, pip install" in printed
    assert "torchvision::nms does not exist" in printed
