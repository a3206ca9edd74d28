"""The encoder pair and its head, from releases and from run directories."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cim_models.backbones import build
from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.load import create_model, create_pretext, create_transform
from cim_models.pretext.model import CIM, PretextConfig

TOLERANCE = dict(rtol=1e-4, atol=1e-5)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tensors_of(manifest, entry, part: str = "backbone"):
    return load_file(next(manifest.root / file.path for file in entry.files if file.part == part))


def test_pretext_with_one_encoder_on_both_sides(release):
    manifest, entry = release(pretext="head", dtype=torch.float16)
    pretext = create_pretext(entry.id, manifest=manifest).eval()
    assert pretext.config == PretextConfig(**entry.pretext.config)
    encoder = create_model(entry.id, pretrained=True, manifest=manifest)
    expected = CIM(encoder, pretext.config).eval()
    head = tensors_of(manifest, entry, "pretext")
    expected.head.load_state_dict({key.removeprefix("head."): value.float() for key, value in head.items()})
    context, exemplars = images(2, 3, 64, 64), images(2, 3, 3, 32, 32)
    probabilities = pretext.locate(context, exemplars)
    assert probabilities.shape == (2, 3, 64, 64) and probabilities.std() > 0
    torch.testing.assert_close(probabilities, expected.locate(context, exemplars), **TOLERANCE)
    assert {parameter.dtype for parameter in pretext.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in pretext.target.parameters())
    target = pretext.target.blocks[0].norm1.weight
    assert target.data_ptr() != pretext.online.blocks[0].norm1.weight.data_ptr()
    pretext.update_target(0.9)
    picture = Image.new("RGB", (80, 90))
    assert torch.equal(create_transform(pretext)(picture), create_transform(encoder)(picture))


def test_pretext_with_both_encoders(release):
    manifest, entry = release(pretext="whole")
    pretext = create_pretext("cim_vit_tiny", manifest=manifest)
    tensors = tensors_of(manifest, entry, "pretext")
    assert all(torch.equal(value, tensors[key]) for key, value in pretext.state_dict().items())
    assert not torch.equal(pretext.online.blocks[0].attn.qkv.weight, pretext.target.blocks[0].attn.qkv.weight)
    with pytest.raises(WeightsError, match=r"create_pretext\(…\).online"):
        create_model(entry.id, pretrained=True, manifest=manifest)
    manifest, _ = release("cim_vit_tiny.plain")
    with pytest.raises(WeightsError, match="no correlation head"):
        create_pretext("cim_vit_tiny.plain", manifest=manifest)
    with pytest.raises(WeightsError, match="no correlation head"):
        create_pretext("cim_vit_tiny", weights="cim_vit_tiny.plain", manifest=manifest)


@pytest.fixture(
    params=[{}, {"moving_average": False}, {"head": "cosine"}, {"global_weight": 0.5, "global_hidden": 32}], ids=str
)
def run(request, tmp_path):
    """A run directory as `cim pretrain` leaves it, and its model."""
    config = PretextConfig(**{"head_width": 64, "head_heads": 4, **request.param})
    cim = CIM(build("cim_vit_tiny", depth=2, img_size=64), config)
    for parameter in cim.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    metadata = {
        "architecture": "cim_vit_tiny",
        "model_args": json.dumps({"depth": 2, "img_size": 64}),
        "pretext": json.dumps(dataclasses.asdict(config)),
        "views": json.dumps({"context_size": 64, "exemplars": {"size": 32}}),
        "images_seen": "64",
    }
    for name in ("online", "target", "head"):
        if getattr(cim, name) is not None:
            save_file(getattr(cim, name).state_dict(), tmp_path / f"{name}.safetensors", metadata)
    return tmp_path, cim.eval()


def test_a_run_directory_is_loaded(run):
    folder, cim = run
    with torch.no_grad():
        expected = cim.online(images(1, 3, 64, 64))
        model = create_model("cim_vit_tiny", weights=folder).eval()
        torch.testing.assert_close(model(images(1, 3, 64, 64)), expected, **TOLERANCE)
        assert model.pretrained_cfg["input_size"] == (3, 64, 64)
        if cim.target is not None:
            model = create_model("cim_vit_tiny", weights=folder / "target.safetensors").eval()
            expected = cim.target(images(1, 3, 64, 64))
            torch.testing.assert_close(model(images(1, 3, 64, 64)), expected, **TOLERANCE)
    pretext = create_pretext("cim_vit_tiny", weights=folder).eval()
    context, exemplars = images(2, 3, 64, 64), images(2, 3, 3, 32, 32)
    torch.testing.assert_close(pretext.locate(context, exemplars), cim.locate(context, exemplars), **TOLERANCE)
    with pytest.raises(WeightsError, match="no correlation head: give a run directory"):
        create_pretext("cim_vit_tiny", weights=folder / "online.safetensors")
    (folder / "head.safetensors").unlink()
    with pytest.raises(WeightsError, match="no correlation head"):
        create_pretext("cim_vit_tiny", weights=folder)


def test_fresh_pretext_and_contradictions(release):
    assert isinstance(create_pretext("cim_vit_tiny", pretrained=False), CIM)
    manifest, entry = release(pretext="head")
    with pytest.raises(ConfigError, match="give the architecture, cim_vit_tiny"):
        create_pretext(entry.id, pretrained=False, manifest=manifest)
    changed = dataclasses.replace(entry, pretext=dataclasses.replace(entry.pretext, config={"heads": 3}))
    with pytest.raises(WeightsError, match="of another version: .*heads"):
        create_pretext(entry.id, manifest=manifest.with_entry(changed))
    narrow = entry.pretext.config | {"head_width": 32}
    changed = dataclasses.replace(entry, pretext=dataclasses.replace(entry.pretext, config=narrow))
    with pytest.raises(WeightsError, match=r"head.norm.weight has shape \(64,\), not \(32,\)"):
        create_pretext(entry.id, manifest=manifest.with_entry(changed))
