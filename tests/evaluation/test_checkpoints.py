"""Checkpoints in the forms of other methods: the encoder is found whole, or the error says what is missing."""

import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file

from cim_models.errors import ConfigError, WeightsError
from cim_models.evaluation.checkpoints import load_checkpoint
from cim_models.evaluation.encoders import describe, open_encoder

NAME = "test_vit"


def fresh(name=NAME, **options):
    return timm.create_model(name, num_classes=0, **options).eval()


@pytest.fixture
def source():
    """An encoder whose weights are looked for."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return fresh()


def under(prefix, tensors):
    return {prefix + key: value for key, value in tensors.items()}


def forms(tensors):
    """Checkpoints as MAE, DINO, MoCo v3 and timm write them."""
    other = {key: value + 1 for key, value in tensors.items()}
    decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_blocks.0.norm1.weight": torch.ones(8)}
    return {
        "plain": tensors,
        "mae": {"model": {**tensors, **decoder}, "epoch": 3, "args": argparse.Namespace(lr=1.0)},
        "dino": {
            "student": under("module.backbone.", other),
            "teacher": {**under("backbone.", tensors), "head.mlp.0.weight": torch.ones(4, 4)},
            "epoch": 3,
        },
        "moco": {"state_dict": {**under("module.base_encoder.", tensors), **under("module.momentum_encoder.", other)}},
        "classifier": {"state_dict": {**tensors, "head.weight": torch.ones(5, 64), "head.bias": torch.ones(5)}},
        "lightning": {"state_dict": under("model.backbone.", tensors), "hyper_parameters": {"lr": 1.0}},
    }


@pytest.mark.parametrize(
    ("form", "prefix"),
    [("plain", ""), ("mae", ""), ("dino", "#teacher"), ("moco", "#state_dict.module.base_encoder."), ("classifier", ""),
     ("lightning", "")],
)  # fmt: skip
def test_the_encoder_is_found(tmp_path, source, form, prefix):
    torch.save(forms(source.state_dict())[form], tmp_path / "c.pth")
    model = fresh()
    load_checkpoint(model, f"{tmp_path / 'c.pth'}{prefix}", NAME)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_which_of_several_encoders_is_asked(tmp_path, source):
    for form, places in (("dino", "student.module.backbone or teacher.backbone"), ("moco", "base_encoder")):
        torch.save(forms(source.state_dict())[form], tmp_path / "c.pth")
        with pytest.raises(WeightsError, match="several encoders: give one of .*c.pth#") as caught:
            load_checkpoint(fresh(), tmp_path / "c.pth", NAME)
        assert all(place in str(caught.value) for place in places.split(" or "))
        with pytest.raises(WeightsError, match="holds no test_vit below 'nothing.'"):
            load_checkpoint(fresh(), f"{tmp_path / 'c.pth'}#nothing", NAME)


def test_residual_networks_and_safetensors(tmp_path):
    source = fresh("test_resnet")
    tensors = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    save_file(under("encoder_q.", tensors), tmp_path / "c.safetensors")
    model = fresh("test_resnet")
    load_checkpoint(model, tmp_path / "c.safetensors", "test_resnet")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(images), source(images))


def test_position_embeddings_are_resampled_as_timm_does(tmp_path, source):
    torch.save({"model": source.state_dict()}, tmp_path / "c.pth")
    model = fresh(img_size=96)
    load_checkpoint(model, tmp_path / "c.pth", NAME)
    overlay = {"file": str(tmp_path / "c.pth"), "num_classes": 0}
    expected = fresh(img_size=96, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_what_does_not_fit_is_said(tmp_path, source):
    def refused(match, content=None, name=NAME):
        path = tmp_path / "c.pth"
        if content is not None:
            torch.save(content, path)
        with pytest.raises(WeightsError, match=match):
            load_checkpoint(fresh(name), path, name)

    refused("there is no weights file .*c.pth")
    tensors = source.state_dict()
    refused("it lacks norm.weight, norm.bias", {key: value for key, value in tensors.items() if key[:5] != "norm."})
    refused("holds no test_resnet: check", tensors, "test_resnet")
    changed = {**tensors, "norm.weight": torch.ones(7)}
    refused("c.pth does not fit test_vit: size mismatch, norm.weight is .7,., not", changed)
    refused("asks to run .*fractions.Fraction", {"model": tensors, "x": __import__("fractions").Fraction(1, 2)})
    torch.save(tensors, tmp_path / "c.pth")
    content = bytearray((tmp_path / "c.pth").read_bytes())
    content[content.index(tensors["norm.weight"].numpy().tobytes())] ^= 1
    (tmp_path / "c.pth").write_bytes(content)
    refused("c.pth cannot be read: wrong checksum of .*data/")
    for content in (b"no weights at all", b""):
        (tmp_path / "c.pth").write_bytes(content)
        refused("c.pth cannot be read: not a file that torch.save wrote")


def test_a_larger_encoder_is_not_taken_for_a_smaller_one(tmp_path):
    """All that the smaller one asks for is there, with the right shapes: only what would be left out tells."""
    small = {"embed_dim": 64, "num_heads": 2, "depth": 2, "img_size": 64}
    for name, options, changed, message in (
        ("test_resnet", {}, {"layers": (1, 1, 2, 1)}, r"more than test_resnet has, layer3.1.conv1.weight,.*: check"),
        ("vit_tiny_patch16_224", small, {"depth": 3}, "more than .* has, blocks.2.norm1.weight"),
        ("vit_tiny_patch16_224", small, {"init_values": 1.0}, "blocks.0.ls1.gamma, blocks.0.ls2.gamma, blocks.1"),
        ("vit_tiny_patch16_224", small, {"patch_size": 8}, r"weight is for patches of \(8, 8\), not \(16, 16\)"),
    ):
        larger = fresh(name, **{**options, **changed})
        model = fresh(name, **options)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        for file in ({"model": larger.state_dict()}, under("module.encoder.", larger.state_dict())):
            torch.save(file, tmp_path / "c.pth")
            with pytest.raises(WeightsError, match=message):
                load_checkpoint(model, tmp_path / "c.pth", name)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_a_whole_classifier_holds_its_encoder(tmp_path, name):
    source = timm.create_model(name, num_classes=9)
    torch.save(source.state_dict(), tmp_path / "c.pth")
    model = fresh(name)
    load_checkpoint(model, tmp_path / "c.pth", name)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_an_encoder_is_opened_with_them(tmp_path, source, run):
    torch.save(forms(source.state_dict())["mae"], tmp_path / "c.pth")
    file = str(tmp_path / "c.pth")
    encoder = open_encoder(NAME, weights=file)
    about = describe(encoder, NAME, weights=file)
    assert about["weights"] == file and about["weights_sha256"] == describe(source, NAME)["weights_sha256"]
    ours = open_encoder("cim_vit_tiny", weights=str(run))
    assert describe(ours, "x")["weights_sha256"] == describe(open_encoder(str(run)), "x")["weights_sha256"]
    with pytest.raises(ConfigError, match="contradict each other"):
        open_encoder(NAME, weights=file, random_init=True)
