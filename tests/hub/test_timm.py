"""`timm.create_model('cim_…')` is `cim_models.create_model`, with timm's own ways of asking."""

import dataclasses
import importlib
import warnings

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import is_model_in_modules, model_entrypoint, save_for_hf

import cim_models.hub.cim as registry
from cim_models.backbones import ARCHITECTURES
from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.load import create_from_timm, create_model
from cim_models.hub.manifest import load_manifest


def test_every_architecture_is_registered_with_its_tags():
    assert sorted(timm.list_models("cim_*")) == sorted(timm.list_models(module="cim")) == sorted(ARCHITECTURES)
    entries = load_manifest().entries
    tagged = [id for id, entry in entries.items() if "backbone" in entry.parts]
    assert sorted(timm.list_models("cim_*", pretrained=True)) == sorted(tagged)
    for name in ARCHITECTURES:
        assert is_model_in_modules(name, ["cim"])
        entrypoint = model_entrypoint(name)
        assert entrypoint.__name__ == name and entrypoint.__module__ == "cim_models.hub.cim" and entrypoint.__doc__
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.architecture == name and cfg.first_conv and cfg.classifier and cfg.num_classes == 0
    for id in tagged:
        cfg = timm.get_pretrained_cfg(id)
        assert cfg.tag == entries[id].tag and cfg.license == entries[id].licence
        assert cfg.input_size == entries[id].preprocessing.input_size


def test_registering_again_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.import_module("cim_models.hub.cim")
        importlib.reload(registry)
    assert sorted(timm.list_models("cim_*")) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("name", ["cim_vit_tiny", "cim_resnet18"])
def test_without_weights_it_is_the_same_model(name):
    kwargs = dict(num_classes=3, in_chans=4, drop_path_rate=0.1)
    torch.manual_seed(0)
    ours = create_model(name, **kwargs)
    torch.manual_seed(0)
    theirs = timm.create_model(name, **kwargs)
    assert type(ours) is type(theirs) and ours.pretrained_cfg == theirs.pretrained_cfg
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    features = timm.create_model(name, features_only=True, out_indices=(1, 2))
    assert len(features(torch.zeros(1, 3, 64, 64))) == 2
    assert timm.create_model(name, pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3)}).pretrained_cfg["mean"] == (
        0.1,
        0.2,
        0.3,
    )


def test_released_weights_by_every_way_of_asking(plain_copy, python):
    """In a process whose package carries releases: by name, by tag, with a head, features, an overlay."""
    code = """
import timm, torch, cim_models
from safetensors.torch import load_file
from pathlib import Path
root = Path(cim_models.__file__).parents[1]
names = [f"cim_vit_tiny.{tag}" for tag in ("classes", "one", "two")]
assert timm.list_models("cim_*", pretrained=True) == ["cim_resnet18.one", *sorted(names)]
assert timm.get_pretrained_cfg("cim_vit_tiny").tag == "two"
x = torch.randn(1, 3, 64, 64)
def same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())
    assert a.pretrained_cfg == b.pretrained_cfg, (a.pretrained_cfg, b.pretrained_cfg)
for name in ("cim_vit_tiny", *names, "cim_resnet18", "cim_resnet18.one"):
    model = timm.create_model(name, pretrained=True)
    same(model, cim_models.create_model(name, pretrained=True))
    config = timm.data.resolve_data_config(model=model)
    assert config["mean"] == (0.4, 0.5, 0.6) and config["input_size"] == (3, 64, 64), config
    assert model(x).shape == (1, 5 if "classes" in name else model.num_features)
two = timm.create_model("cim_vit_tiny", pretrained=True)
tensors = load_file(root / "weights/cim_vit_tiny.two/model.safetensors")
assert all(torch.equal(value, tensors[key]) for key, value in two.state_dict().items())
one = timm.create_model("cim_vit_tiny", pretrained=True, pretrained_cfg="one")
same(one, timm.create_model("cim_vit_tiny.one", pretrained=True))
cfg = timm.get_pretrained_cfg("cim_vit_tiny.two")
same(two, timm.create_model("cim_vit_tiny", pretrained=True, pretrained_cfg=cfg))
classifier = timm.create_model("cim_vit_tiny.one", pretrained=True, num_classes=9)
assert classifier(x).shape == (1, 9) and torch.equal(classifier.cls_token, one.cls_token)
features = timm.create_model("cim_vit_tiny.one", pretrained=True, features_only=True, out_indices=(0, 1))
assert torch.equal(features.model.cls_token, one.cls_token) and len(features(x)) == 2
wide = timm.create_model("cim_vit_tiny.one", pretrained=True, in_chans=1, img_size=96)
assert wide(torch.zeros(1, 1, 96, 96)).shape == (1, 192)
overlay = timm.create_model("cim_vit_tiny.one", pretrained=True, pretrained_cfg_overlay=dict(crop_pct=0.5))
assert overlay.pretrained_cfg["crop_pct"] == 0.5 and torch.equal(overlay.cls_token, one.cls_token)
fresh = timm.create_model("cim_vit_tiny.one")
assert len(fresh.blocks) == 2 and not torch.equal(fresh.cls_token, one.cls_token)
for name, message in (("cim_vit_tiny.three", "did you mean"), ("cim_vit_base", "there are")):
    try:
        timm.create_model(name, pretrained=True)
    except cim_models.WeightsError as error:
        assert message in str(error), error
    else:
        raise AssertionError(name)
print("done")
"""
    assert python(code, plain_copy).endswith("done\n")


def test_a_damaged_release_is_refused_by_timm_too(release):
    manifest, entry = release()
    path = manifest.root / entry.files[0].path
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(WeightsError, match="is damaged"):
        timm.create_model("cim_vit_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(path)})


def test_files_of_the_user(release, tmp_path):
    manifest, entry = release()
    path = manifest.root / entry.files[0].path
    expected = load_file(path)
    overlay = {"file": str(path)}
    model = timm.create_model("cim_vit_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.cls_token, expected["cls_token"]) and model.pretrained_cfg["mean"] == (0.4, 0.5, 0.6)
    save_file(expected, tmp_path / "plain.safetensors")
    cfg = dataclasses.replace(timm.get_pretrained_cfg("cim_vit_tiny"), file=str(tmp_path / "plain.safetensors"))
    model = timm.create_model("cim_vit_tiny", pretrained=True, pretrained_cfg=cfg, **entry.model_args)
    assert torch.equal(model.cls_token, expected["cls_token"])
    for source in ({"url": "https://example.org/x.pth"}, {"state_dict": expected}):
        with pytest.raises(WeightsError, match="give a file"):
            create_from_timm("cim_vit_tiny", True, pretrained_cfg_overlay=source)
    with pytest.raises(ConfigError, match="did you mean cim_vit_tiny"):
        create_from_timm("cim_vit_tinny", True)


def test_a_folder_that_timm_saved_comes_back(release, tmp_path):
    """Fine-tuned here, saved by timm, read by timm and by us."""
    manifest, entry = release()
    model = create_model(entry.id, pretrained=True, num_classes=4, manifest=manifest).eval()
    args = {key: value for key, value in entry.model_args.items() if key != "img_size"}
    save_for_hf(model, tmp_path, model_args=args, safe_serialization=True)
    picture = torch.randn(1, 3, 64, 64)
    for again in (
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True),
        create_model("cim_vit_tiny", weights=tmp_path),
        create_model(tmp_path),
    ):
        assert torch.equal(again.eval()(picture), model(picture))
        assert tuple(again.pretrained_cfg["mean"]) == (0.4, 0.5, 0.6)
