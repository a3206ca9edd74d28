"""What is loaded computes what stock timm does with the same tensors; what does not fit is refused, in one error."""

import dataclasses
import hashlib
import json
import logging
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config
from timm.models._features import FeatureGetterNet, FeatureListNet

from cim_models.backbones import ARCHITECTURES, build
from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.entry import WeightFile
from cim_models.hub.load import create_model, create_pretext, create_transform, list_models
from cim_models.hub.manifest import load_manifest
from cim_models.hub.verify import verify
from cim_models.images import read_image

STOCK = {
    "cim_vit_tiny": ("vit_tiny_patch16_224", dict(global_pool="avg", fc_norm=False, dynamic_img_size=True)),
    "cim_resnet18": ("resnet18", {}),
}
"""The stock timm model of the same shape."""
TOLERANCE = dict(rtol=1e-4, atol=1e-5)


def stock(entry, tensors, **kwargs):
    """The stock timm model with these tensors, loaded by torch alone."""
    name, args = STOCK[entry.architecture]
    model = timm.create_model(name, **{"num_classes": entry.num_classes, **args, **entry.model_args, **kwargs})
    if entry.architecture.startswith("cim_vit"):
        for block in (model, *model.modules()):
            if isinstance(block, torch.nn.LayerNorm):
                assert block.eps == 1e-6
    model.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    )
    return model.eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tensors_of(manifest, entry, part: str = "backbone"):
    return load_file(next(manifest.root / file.path for file in entry.files if file.part == part))


@pytest.fixture(params=list(STOCK))
def released(request, release):
    """One release of each family."""
    return release(f"{request.param}.one")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_outputs_equal_those_of_stock_timm(release, dtype):
    for architecture in STOCK:
        manifest, entry = release(f"{architecture}.one", dtype=dtype)
        model = create_model(entry.id, pretrained=True, manifest=manifest)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.training
        expected = stock(entry, tensors_of(manifest, entry))
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(images(2, 3, 64, 64)), expected(images(2, 3, 64, 64)), **TOLERANCE)


def test_tensors_are_those_of_the_file_and_the_model_is_whole(released):
    manifest, entry = released
    model = create_model(entry.id, pretrained=True, manifest=manifest)
    expected = tensors_of(manifest, entry)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    reference = build(entry.architecture, **entry.model_args)
    flags = {name: parameter.requires_grad for name, parameter in reference.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert "pos_embed" not in flags or not flags["pos_embed"]
    again = create_model(entry.id, pretrained=True, manifest=manifest)
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert pointers.isdisjoint(parameter.data_ptr() for parameter in again.parameters())


def test_training_a_loaded_model_leaves_the_file_alone(released):
    manifest, entry = released
    before = (manifest.root / entry.files[0].path).read_bytes()
    model = create_model(entry.id, pretrained=True, num_classes=3, manifest=manifest)
    optimiser = torch.optim.SGD((parameter for parameter in model.parameters() if parameter.requires_grad), lr=1.0)
    model(images(2, 3, 64, 64)).square().mean().backward()
    optimiser.step()
    assert (manifest.root / entry.files[0].path).read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_device(released, dtype):
    manifest, entry = released
    for pretrained in (True, False):
        model = create_model(entry.id, pretrained, dtype=dtype, device="cpu", manifest=manifest)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert next(model.parameters()).device.type == "cpu"
    on_meta = create_model(entry.id, pretrained=True, device="meta", manifest=manifest)
    assert all(parameter.is_meta for parameter in on_meta.parameters())


def test_another_head_is_new_and_the_rest_is_kept(released, caplog):
    manifest, entry = released
    root = "head" if "vit" in entry.architecture else "fc"
    with caplog.at_level(logging.INFO, "cim_models"):
        model = create_model(entry.id, pretrained=True, num_classes=10, manifest=manifest)
    assert f"{root} is new" in caplog.text and "licence Apache-2.0" in caplog.text
    expected = tensors_of(manifest, entry)
    state = model.state_dict()
    assert state.keys() - expected.keys() == {f"{root}.weight", f"{root}.bias"}
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert 0.01 < state[f"{root}.weight"].std() < 0.03 and not state[f"{root}.bias"].any()
    assert model.num_classes == 10 and model(images(2, 3, 64, 64)).shape == (2, 10)
    model.get_classifier().weight.sum().backward()


def test_a_classifier_is_kept_replaced_or_left_out(release):
    manifest, entry = release("cim_vit_tiny.classes", num_classes=5)
    expected = tensors_of(manifest, entry)
    kept = create_model(entry.id, pretrained=True, manifest=manifest)
    same = create_model(entry.id, pretrained=True, num_classes=5, manifest=manifest)
    for model in (kept, same):
        assert model.num_classes == 5 and torch.equal(model.head.weight, expected["head.weight"])
    replaced = create_model(entry.id, pretrained=True, num_classes=7, manifest=manifest)
    assert replaced.head.weight.shape == (7, 192)
    bare = create_model(entry.id, pretrained=True, num_classes=0, manifest=manifest)
    assert not any(key.startswith("head.") for key in bare.state_dict())
    pooled = create_model(entry.id, pretrained=True, num_classes=7, fc_norm=True, manifest=manifest)
    assert {"fc_norm.weight", "head.weight"} <= pooled.state_dict().keys()
    assert torch.equal(pooled.fc_norm.weight, torch.ones(192))
    assert torch.equal(pooled.blocks[1].mlp.fc2.weight, expected["blocks.1.mlp.fc2.weight"])


def test_features_only(release):
    manifest, entry = release("cim_vit_tiny.classes", num_classes=5)
    model = create_model(entry.id, pretrained=True, features_only=True, out_indices=(0, 1), manifest=manifest).eval()
    assert isinstance(model, FeatureGetterNet)
    whole = stock(entry, tensors_of(manifest, entry))
    expected = whole.forward_intermediates(images(1, 3, 64, 64), indices=(0, 1), intermediates_only=True, norm=False)
    for got, wanted in zip(model(images(1, 3, 64, 64)), expected, strict=True):
        torch.testing.assert_close(got, wanted, **TOLERANCE)
    assert (
        len(create_model(entry.id, True, features_only=True, out_indices=(0,), manifest=manifest)(images(1, 3, 64, 64)))
        == 1
    )

    manifest, entry = release("cim_resnet18.one")
    model = create_model(entry.id, pretrained=True, features_only=True, out_indices=(1, 3), manifest=manifest).eval()
    assert isinstance(model, FeatureListNet)
    name, args = STOCK[entry.architecture]
    expected = timm.create_model(name, features_only=True, out_indices=(1, 3)).eval()
    expected.load_state_dict({k: v for k, v in tensors_of(manifest, entry).items() if k in expected.state_dict()})
    for got, wanted in zip(model(images(1, 3, 64, 64)), expected(images(1, 3, 64, 64)), strict=True):
        torch.testing.assert_close(got, wanted, **TOLERANCE)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"in_chans": 1},
        {"in_chans": 5},
        {"img_size": 96},
        {"img_size": (32, 80)},
        {"img_size": 48, "in_chans": 4, "num_classes": 3},
        {"patch_size": 8},
        {"features_only": True, "img_size": 96, "in_chans": 2, "out_indices": (1,)},
        {"in_chans": 2, "dtype": torch.float64},
    ],
    ids=str,
)
def test_other_inputs_are_adapted_as_timm_does(release, tmp_path, kwargs):
    """Against `timm.create_model` itself, given the same file."""
    for architecture in STOCK:
        if architecture == "cim_resnet18" and kwargs.keys() & {"img_size", "patch_size"}:
            continue
        manifest, entry = release(f"{architecture}.one")
        model = create_model(entry.id, pretrained=True, manifest=manifest, **kwargs).eval()
        name, args = STOCK[architecture]
        size = entry.preprocessing.input_size
        overlay = dict(file=str(manifest.root / entry.files[0].path), num_classes=0, input_size=size)
        dtype = kwargs.get("dtype", torch.float32)
        args = args | {"pretrained_model_args": entry.model_args} | entry.model_args
        args |= {key: value for key, value in kwargs.items() if key != "dtype"}
        if "num_classes" not in kwargs and "features_only" not in kwargs:
            args["num_classes"] = 0
        expected = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **args).eval().to(dtype)
        state, wanted = model.state_dict(), expected.state_dict()
        assert state.keys() == wanted.keys()
        heads = {"head.weight", "head.bias"}
        for key in state.keys() - heads:
            torch.testing.assert_close(state[key], wanted[key], **TOLERANCE)
        side = model.pretrained_cfg["input_size"][1:]
        if "img_size" in kwargs:
            wanted_side = kwargs["img_size"]
            assert side == ((wanted_side, wanted_side) if isinstance(wanted_side, int) else wanted_side)
        picture = images(1, kwargs.get("in_chans", 3), *side).to(dtype)
        if "num_classes" not in kwargs:
            got, want = model(picture), expected(picture)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, **TOLERANCE)


def spoil(tensors):
    """A missing, an extra, a misshapen and a mistyped tensor at once."""
    tensors = dict(tensors)
    del tensors["blocks.0.norm1.weight"]
    tensors["mask_token"] = torch.zeros(1, 1, 192)
    tensors["blocks.1.mlp.fc1.bias"] = torch.zeros(7)
    tensors["norm.bias"] = torch.zeros(192, dtype=torch.int64)
    return tensors


@pytest.mark.parametrize("num_classes", [None, 4])
def test_every_mismatch_is_in_one_error(release, tmp_path, num_classes):
    manifest, entry = release()
    path = tmp_path / "spoilt.safetensors"
    metadata = {"architecture": "cim_vit_tiny", "model_args": json.dumps(entry.model_args)}
    save_file(spoil(tensors_of(manifest, entry)), path, metadata)
    with pytest.raises(WeightsError) as caught:
        create_model("cim_vit_tiny", weights=path, num_classes=num_classes)
    for text in (
        str(path),
        "blocks.0.norm1.weight is missing",
        "mask_token has no place in the model",
        "blocks.1.mlp.fc1.bias has shape (7,), not (768,)",
        "norm.bias holds integers, not floating-point numbers",
    ):
        assert text in str(caught.value)
    assert str(caught.value).count(";") == 3


@pytest.mark.parametrize(
    "kwargs", [{"depth": 3}, {"depth": 1}, {"embed_dim": 96}, {"class_token": False}, {"reg_tokens": 4}]
)
def test_only_head_keys_may_differ(release, kwargs):
    manifest, entry = release()
    with pytest.raises(WeightsError, match="does not fit cim_vit_tiny"):
        create_model(entry.id, pretrained=True, num_classes=4, manifest=manifest, **kwargs)


def test_weights_of_another_architecture(released, tmp_path):
    manifest, entry = released
    path = tmp_path / "plain.safetensors"
    save_file(tensors_of(manifest, entry), path)
    other = "cim_vit_small" if "vit" in entry.architecture else "cim_resnet34"
    with pytest.raises(WeightsError, match=f"plain.safetensors does not fit {other}"):
        create_model(other, weights=path)
    with pytest.raises(WeightsError, match=f"holds weights of {entry.architecture}, not of {other}"):
        create_model(other, weights=manifest.root / "weights" / entry.id)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"architecture": "resnet50"}')
    (tmp_path / "foreign" / "model.safetensors").touch()
    with pytest.raises(WeightsError, match="holds weights of resnet50, which is not of this package"):
        create_model(f"local-dir:{tmp_path / 'foreign'}")


def test_a_file_without_metadata_is_what_the_caller_says(released, tmp_path):
    manifest, entry = released
    path = tmp_path / "plain.safetensors"
    save_file(tensors_of(manifest, entry), path)
    model = create_model(entry.architecture, weights=path, features_only=True, out_indices=(1,), **entry.model_args)
    assert len(model(images(1, 3, 64, 64))) == 1
    model = create_model(entry.architecture, weights=path, num_classes=2, **entry.model_args)
    assert model(images(2, 3, 64, 64)).shape == (2, 2)


def test_files_of_the_user_may_change_afterwards(released, tmp_path):
    """In-place edits of a mapped file would change live weights, and truncating it would kill the process."""
    manifest, entry = released
    folder = shutil.copytree(manifest.root / "weights" / entry.id, tmp_path / "copy")
    model = create_model(folder).eval()
    with torch.no_grad():
        before = model(images(1, 3, 64, 64))
        with open(folder / "model.safetensors", "r+b") as file:
            file.seek(-4096, 2)
            file.write(b"\xff" * 4096)
            file.truncate(100)
        assert torch.equal(model(images(1, 3, 64, 64)), before)


def test_a_damaged_file_is_never_loaded(released):
    manifest, entry = released
    path = manifest.root / entry.files[0].path
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)
    for name, weights in ((entry.id, None), (entry.architecture, path.parent), (f"local-dir:{path.parent}", None)):
        with pytest.raises(WeightsError, match=r"sha256 \w{64} expected, \w{64} found"):
            create_model(name, pretrained=True, weights=weights, manifest=manifest)


def test_without_weights_a_model_is_built_as_usual(released):
    manifest, entry = released
    for name, args in ((entry.architecture, {}), (entry.id, entry.model_args)):
        torch.manual_seed(3)
        model = create_model(name, num_classes=4, drop_path_rate=0.1, manifest=manifest)
        torch.manual_seed(3)
        expected = build(entry.architecture, num_classes=4, drop_path_rate=0.1, **args)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert model.pretrained_cfg["mean"] == (0.4, 0.5, 0.6)
    with pytest.raises(ConfigError, match="'cim_vit_tinny': did you mean cim_vit_tiny"):
        create_model("cim_vit_tinny")
    for create in (create_model, create_pretext):
        with pytest.raises(WeightsError, match="cim_vit_huge has no released .* there are .* without pretrained=True"):
            create("cim_vit_huge", pretrained=True, manifest=manifest)


def test_transform_belongs_to_the_weights(released):
    manifest, entry = released
    model = create_model(entry.id, pretrained=True, manifest=manifest)
    cfg = model.pretrained_cfg
    for field in dataclasses.fields(entry.preprocessing):
        assert cfg[field.name] == getattr(entry.preprocessing, field.name)
    assert cfg["license"] == entry.licence and cfg["tag"] == "one" and cfg["num_classes"] == 0
    picture = Image.effect_mandelbrot((200, 150), (-2, -1, 1, 1), 80).convert("RGB")
    expected = timm.data.create_transform(**resolve_data_config(model=model))(picture)
    assert torch.equal(create_transform(model)(picture), expected) and expected.shape == (3, 64, 64)
    assert create_transform(model, img_size=96)(picture).shape == (3, 96, 96)
    assert create_transform(model, input_size=(3, 32, 48), crop_pct=1.0)(picture).shape == (3, 32, 48)
    assert create_transform(model, is_training=True, hflip=0.0)(picture).shape == (3, 64, 64)
    features = create_model(entry.id, pretrained=True, features_only=True, out_indices=(1,), manifest=manifest)
    assert torch.equal(create_transform(features)(picture), expected)
    assert torch.equal(create_transform(torch.compile(model))(picture), expected)
    with pytest.raises(ConfigError, match="Sequential does not know its preprocessing: give the timm model in it"):
        create_transform(torch.nn.Sequential(model))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1", "F"])
def test_transform_takes_pictures_of_any_mode(tmp_path, mode):
    """It sees what `cim embed` reads from a file; a tensor passes as it does through timm's."""
    grey = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 80)
    wide = Image.fromarray(np.asarray(grey) * np.uint16(257))
    picture = wide if mode == "I;16" else grey.convert("RGB").convert(mode)
    path = tmp_path / ("picture.tif" if mode in ("CMYK", "F") else "picture.png")
    picture.save(path)
    model = create_model("cim_vit_tiny", img_size=32)
    transform = create_transform(model)
    assert torch.equal(transform(picture), transform(read_image(path)))
    assert create_transform(model, is_training=True)(picture).shape == (3, 32, 32)
    assert transform(torch.rand(3, 30, 40)).shape == (3, 32, 32)


WAYS = {
    "id": lambda manifest, entry, **kwargs: create_model(entry.id, pretrained=True, manifest=manifest, **kwargs),
    "folder": lambda manifest, entry, **kwargs: create_model(manifest.root / "weights" / entry.id, **kwargs),
    "any file of it": lambda manifest, entry, **kwargs: create_model(manifest.root / entry.files[0].path, **kwargs),
    "head": lambda *args, **kwargs: WAYS["id"](*args, num_classes=4, **kwargs),
    "features": lambda *args, **kwargs: WAYS["id"](*args, features_only=True, out_indices=(1,), **kwargs),
    "timm": lambda manifest, entry, **kwargs: timm.create_model(
        entry.architecture,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(manifest.root / "weights" / entry.id)},
        **kwargs,
    ),
    "pretext": lambda manifest, entry: create_pretext(entry.id, manifest=manifest),
    "target": lambda manifest, entry: create_pretext(entry.id, manifest=manifest).target,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_model_carries_its_preprocessing(release, way):
    """timm's own reading of the model agrees with ours, and with what was released."""
    manifest, entry = release(pretext="head")
    model = WAYS[way](manifest, entry)
    encoder = getattr(model, "online", model)
    picture = Image.effect_mandelbrot((200, 150), (-2, -1, 1, 1), 80).convert("RGB")
    expected = timm.data.create_transform(**vars(entry.preprocessing))(picture)
    assert torch.equal(create_transform(model)(picture), expected)
    assert torch.equal(timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))(picture), expected)
    assert encoder.pretrained_cfg["license"] == entry.licence
    if way not in ("pretext", "target"):
        wide = WAYS[way](manifest, entry, img_size=96)
        assert create_transform(wide)(picture).shape == (3, 96, 96)
        assert timm.data.resolve_model_data_config(wide)["input_size"] == (3, 96, 96)


def test_list_models(release):
    release("cim_vit_tiny.one")
    manifest, _ = release("cim_resnet18.one")
    assert list_models() == list(ARCHITECTURES) and len(ARCHITECTURES) == 9
    assert list_models("*resnet*") == ["cim_resnet18", "cim_resnet34", "cim_resnet50", "cim_resnet101"]
    assert list_models(pretrained=True, manifest=manifest) == ["cim_resnet18.one", "cim_vit_tiny.one"]
    for pattern in ("cim_vit*", "cim_vit_tiny", "*.one", "cim_vit_tiny.o*"):
        assert "cim_vit_tiny.one" in list_models(pattern, pretrained=True, manifest=manifest)
    assert list_models("cim_vit_base", pretrained=True, manifest=manifest) == []
    assert list_models(pretrained=True) == list(load_manifest().entries)


def test_shards_make_one_model(release):
    manifest, entry = release()
    path = manifest.root / entry.files[0].path
    tensors = load_file(path)
    keys = sorted(tensors)
    files = []
    for number, names in enumerate((keys[:9], keys[9:]), 1):
        half = path.with_name(f"model-{number}.safetensors")
        save_file({key: tensors[key] for key in names}, half)
        content = half.read_bytes()
        name = half.relative_to(manifest.root).as_posix()
        files.append(WeightFile(name, "backbone", len(content), hashlib.sha256(content).hexdigest()))
    manifest = manifest.with_entry(dataclasses.replace(entry, files=tuple(files)))
    model = create_model(entry.id, pretrained=True, manifest=manifest)
    assert verify(entry.id, manifest)["tensors"] == len(keys)
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
