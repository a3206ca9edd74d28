"""ONNX Runtime, which knows nothing of us, computes what the encoder computes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cim_models.backbones import build
from cim_models.cli import main
from cim_models.errors import ConfigError, WeightsError
from cim_models.hub import export as module
from cim_models.hub.export import export
from cim_models.hub.load import create_model


@pytest.fixture
def runtime():
    """ONNX Runtime, where all that exporting needs is installed."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="needs the extra onnx")
    if torch.__version__ < module.OLDEST:
        pytest.skip(f"needs PyTorch {module.OLDEST}")
    return pytest.importorskip("onnxruntime", reason="needs the extra onnx")


@pytest.fixture
def encoder_file(tmp_path):
    """`encoder_file(architecture, …)` writes random weights whose position embedding is as rough as can be."""

    def make(architecture: str, **args) -> Path:
        torch.manual_seed(0)
        encoder = build(architecture, **args)
        for parameter in encoder.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        if "vit" in architecture:
            torch.nn.init.normal_(encoder.pos_embed)
        path = tmp_path / f"{architecture}.safetensors"
        save_file(encoder.state_dict(), path, {"architecture": architecture, "model_args": json.dumps(args)})
        return path

    return make


SMALL = {"cim_vit_tiny": dict(depth=2, img_size=(64, 96)), "cim_resnet18": {}}


@pytest.mark.parametrize("architecture", list(SMALL))
def test_images_of_one_size(runtime, encoder_file, architecture, tmp_path):
    path = encoder_file(architecture, **SMALL[architecture])
    made = export(str(path), to=tmp_path / "deep" / "model.onnx", size=(96, 64), batch=2)
    assert made.images == (2, 3, 96, 64) and made.output == "features" and made.difference < 1e-4
    session = runtime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    (given,), (said,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("images", [2, 3, 96, 64])
    encoder = create_model(path).eval()
    assert (said.name, said.shape) == ("features", [2, encoder.num_features])
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], encoder(images), rtol=0, atol=1e-4)
    for shape in ((1, 3, 96, 64), (2, 3, 64, 96)):
        with pytest.raises(runtime.capi.onnxruntime_pybind11_state.InvalidArgument, match="invalid dimensions"):
            session.run(None, {"images": np.zeros(shape, np.float32)})


@pytest.mark.parametrize("architecture", list(SMALL))
def test_images_of_any_size_and_number(runtime, encoder_file, architecture, tmp_path):
    """Position embeddings enlarged, shrunk, as they are, and of another shape with as many places."""
    path = encoder_file(architecture, **SMALL[architecture])
    made = export(str(path), to=tmp_path / "model.onnx", any_size=True)
    assert made.images == ("batch", 3, "height", "width")
    session = runtime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    encoder = create_model(path).eval()
    for shape in ((2, 3, 64, 96), (1, 3, 96, 64), (3, 3, 160, 32), (1, 3, 128, 192), (2, 3, 16, 16), (1, 3, 224, 224)):
        images = torch.randn(shape)
        with torch.no_grad():
            (found,) = session.run(None, {"images": images.numpy()})
            np.testing.assert_allclose(found, encoder(images), rtol=0, atol=1e-4, err_msg=str(shape))
    if architecture == "cim_vit_tiny":  # what is beyond a multiple of the patch is not seen, as the docstring says
        (found,) = session.run(None, {"images": (images := torch.randn(1, 3, 79, 96)).numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, encoder(images[:, :, :64]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", list(SMALL))
def test_maps_of_images_of_any_size_and_number(runtime, encoder_file, architecture, tmp_path):
    path = encoder_file(architecture, **SMALL[architecture])
    made = export(str(path), to=tmp_path / "model.onnx", any_size=True, output="map")
    session = runtime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    encoder = create_model(path).eval()
    for shape in ((1, 3, 96, 64), (3, 3, 64, 160)):
        images = torch.randn(shape)
        with torch.no_grad():
            expected = encoder.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[-1]
            (found,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=str(shape))


def test_maps_of_a_release_and_its_preprocessing(runtime, release, tmp_path):
    manifest, entry = release()
    folder = manifest.root / "weights" / entry.id
    made = export(str(folder), to=tmp_path / "model.onnx", output="map", batch=3, any_size=True)
    session = runtime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [3, 3, "height", "width"] and session.get_outputs()[0].name == "map"
    encoder = create_model(folder).eval()
    images = torch.randn(3, 3, 48, 80)
    with torch.no_grad():
        expected = encoder.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[-1]
        np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected, rtol=0, atol=1e-4)
    said = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert said["mean"] == [0.4, 0.5, 0.6] and said["interpolation"] == "bilinear" and said["crop_pct"] == 0.8
    assert (said["architecture"], said["tag"], said["license"]) == ("cim_vit_tiny", "one", "Apache-2.0")
    assert said["size_multiple"] == [16, 16]


def test_the_command(runtime, release, tmp_path, capsys):
    manifest, entry = release("cim_vit_tiny.classes", num_classes=5)
    folder, to = manifest.root / "weights" / entry.id, tmp_path / "model.onnx"
    assert main(["export", str(folder), "--to", str(to), "--size", "32"]) == 0
    assert f"{to}: images (batch, 3, 32, 32) → scores (batch, 5), within " in capsys.readouterr().out
    before = to.read_bytes()
    assert main(["export", str(folder), "--to", str(to), "--size", "33"]) == 1
    assert "33 × 33 is not a multiple" in capsys.readouterr().err and to.read_bytes() == before


def test_what_differs_is_not_written(runtime, encoder_file, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ATOL", -1.0)
    path = encoder_file("cim_vit_tiny", depth=1, img_size=32)
    (tmp_path / "model.onnx").write_bytes(b"before")
    with pytest.raises(WeightsError, match="differs from PyTorch by .*model.onnx was not written"):
        export(str(path), to=tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == b"before" and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(size=(48, 40)), "size 48 × 40 is not a multiple of the encoder's patches, 16 × 16"),
        (dict(size=(0,)), "0 cannot be"),
        (dict(size=(32, 32, 32)), "height and width: 32 32 32 cannot be"),
        (dict(size=(32,), any_size=True), "size 32 and any_size contradict each other"),
        (dict(batch=-1), "batch is a number of images, or 0 for any: -1 cannot be"),
    ],
)
def test_what_cannot_be(encoder_file, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(module, "PACKAGES", ())
    monkeypatch.setattr(module, "OLDEST", "2")
    path = encoder_file("cim_vit_tiny", depth=1, img_size=32)
    with pytest.raises(ConfigError, match=message):
        export(str(path), to=tmp_path / "model.onnx", **arguments)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("arguments", [dict(any_size=True), dict(size=(64,))])
def test_an_encoder_of_one_size(encoder_file, tmp_path, monkeypatch, arguments):
    monkeypatch.setattr(module, "PACKAGES", ())
    monkeypatch.setattr(module, "OLDEST", "2")
    path = encoder_file("cim_vit_tiny", depth=1, img_size=32, dynamic_img_size=False)
    with pytest.raises(ConfigError, match="dynamic_img_size=False: it takes 32 × 32 pixels only"):
        export(str(path), to=tmp_path / "model.onnx", **arguments)


def test_what_is_missing_or_too_large(encoder_file, tmp_path, monkeypatch):
    path = encoder_file("cim_vit_tiny", depth=1, img_size=32)
    monkeypatch.setattr(module, "PACKAGES", ())
    monkeypatch.setattr(module, "OLDEST", "99.10")
    with pytest.raises(ConfigError, match=r"ONNX export needs PyTorch 99\.10, not "):
        export("cim_vit_tiny", to=tmp_path / "model.onnx")
    monkeypatch.setattr(module, "PACKAGES", ("json", "onnx_that_nobody_has"))
    with pytest.raises(ConfigError, match=r"needs onnx_that_nobody_has: pip install 'cim-models\[onnx\]'"):
        export(str(path), to=tmp_path / "model.onnx")
    monkeypatch.setattr(module, "PACKAGES", ())
    monkeypatch.setattr(module, "OLDEST", "2")
    monkeypatch.setattr(module, "LIMIT", 1000)
    with pytest.raises(ConfigError, match="larger than the 2 GB"):
        export(str(path), to=tmp_path / "model.onnx")
