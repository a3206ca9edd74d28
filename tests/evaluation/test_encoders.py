"""What a name opens: the same model for the same words, and in words what it was."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from cim_models.backbones import build
from cim_models.errors import ConfigError, WeightsError
from cim_models.evaluation.encoders import describe, open_encoder, open_pretext
from cim_models.hub.load import create_model

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_a_run_directory_and_each_of_its_encoders(run):
    for path, name in ((run, "online"), (run / "online.safetensors", "online"), (run / "target.safetensors", "target")):
        encoder = open_encoder(str(path), device="cpu")
        expected = load_file(run / f"{name}.safetensors")
        assert not encoder.training and all(torch.equal(v, expected[k]) for k, v in encoder.state_dict().items())
        about = describe(encoder, str(path))
        assert about["transform"]["input_size"] == (3, 64, 64)
        assert about.get("encoder") == (name if path == run else None), "the name of a file says it itself"
    assert "encoder" not in describe(open_encoder(str(run), random_init=True), str(run), random_init=True)


@pytest.mark.parametrize("name", ["mine", "mine.first", "my first"])
@pytest.mark.parametrize("opens", [open_encoder, open_pretext, create_model])
def test_a_folder_that_is_called_like_a_model(run, tmp_path, monkeypatch, opens, name):
    """A name without slashes is no path; the error says how to write one, and that opens the folder."""
    (tmp_path / name).symlink_to(run)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"did you mean \./{name}, which exists\?"):
        opens(name)
    opens(f"./{name}")


def test_random_weights_have_the_same_form_and_transform(run):
    pretrained = open_encoder(str(run))
    state = torch.random.get_rng_state()
    random, again, other = (open_encoder(str(run), random_init=True, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    about, *others = (describe(encoder, "x", True) for encoder in (random, again, other))
    assert about == others[0] and about["weights_sha256"] != others[1]["weights_sha256"]
    assert describe(pretrained, "x", True) == {**about, "weights_sha256": describe(pretrained, "x")["weights_sha256"]}
    shapes = [{key: value.shape for key, value in encoder.state_dict().items()} for encoder in (pretrained, random)]
    assert shapes[0] == shapes[1]
    assert not torch.equal(random(IMAGES), pretrained(IMAGES))


def test_an_architecture_without_weights_has_random_ones():
    assert open_encoder("cim_resnet18", random_init=True)(IMAGES).shape == (2, 512)
    with pytest.raises(WeightsError, match="cim_resnet18"):
        open_encoder("cim_resnet18")


def test_models_of_timm(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = timm.create_model("test_vit", num_classes=0).eval()
    encoder = open_encoder("test_vit", random_init=True, seed=3, image_size=64)
    assert describe(encoder, "test_vit")["transform"]["input_size"] == (3, 64, 64)
    torch.testing.assert_close(open_encoder("test_vit", random_init=True, seed=3).state_dict(), expected.state_dict())
    assert encoder(IMAGES).shape == (2, 64)
    for name, size in (("swin_tiny_patch4_window7_224", 1), ("test_vit", 100), ("test_resnet", 0), ("test_vit", -16)):
        with pytest.raises(ConfigError, match=f"image_size={size} does not fit"):
            open_encoder(name, random_init=True, image_size=size)
    assert open_encoder("test_resnet", random_init=True, image_size=50, device="cpu")(IMAGES[..., :50, :50]).ndim == 2


def test_another_image_size(run):
    encoder, usual = open_encoder(str(run), image_size=96), open_encoder(str(run))
    assert describe(encoder, "x")["transform"]["input_size"] == (3, 96, 96)
    assert describe(encoder, "x")["weights_sha256"] == describe(usual, "x")["weights_sha256"]
    images = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(encoder(images), usual(images))


def test_the_fingerprint_is_one_of_the_tensors_not_of_the_file(tmp_path, run):
    tensors = load_file(run / "online.safetensors")
    metadata = {"architecture": "cim_vit_tiny", "model_args": '{"img_size": 64, "depth": 2}', "note": "another file"}
    save_file(dict(reversed(tensors.items())), tmp_path / "copy.safetensors", metadata)
    files = (run / "online.safetensors", tmp_path / "copy.safetensors")
    first, copy = (describe(open_encoder(str(path)), "online") for path in files)
    assert first == copy and json.dumps(first)
    tensors["cls_token"].view(-1)[0] += 1e-3
    save_file(tensors, tmp_path / "copy.safetensors", metadata)
    changed = describe(open_encoder(str(tmp_path / "copy.safetensors")), "x")
    assert changed["weights_sha256"] != first["weights_sha256"]


def test_half_precision_weights_can_be_described():
    assert len(describe(build("cim_vit_tiny", depth=1).bfloat16(), "x")["weights_sha256"]) == 64


def test_a_pretext_says_its_sizes(tmp_path, run):
    pretext, context_size, exemplar_size = open_pretext(str(run))
    assert not pretext.training and (context_size, exemplar_size) == (64, 32)
    with pytest.raises(WeightsError, match="no correlation head"):
        open_pretext(str(run / "online.safetensors"))


def test_a_misspelt_model_of_timm_is_offered():
    with pytest.raises(ConfigError, match="'vit_tiny_patch16_225': did you mean .*vit_tiny_patch16_224"):
        open_encoder("vit_tiny_patch16_225")


@pytest.mark.parametrize("name", ["cim_vit_tiny.no_such", "cim_vit_tinny", "no_such_model", "a/b", "./nowhere"])
def test_unknown_names(name):
    with pytest.raises((ConfigError, WeightsError), match="cim_|nowhere|a/b"):
        open_encoder(name)
