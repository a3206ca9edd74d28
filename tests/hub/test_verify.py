"""A release that is not what its entry says is found out."""

import dataclasses

import pytest
import torch

from cim_models.backbones import build
from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.manifest import load_manifest
from cim_models.hub.verify import golden_output, verify


def test_verify(release):
    for kwargs in ({"pretext": "head", "dtype": torch.float16}, {"pretext": "whole"}, {"num_classes": 3}):
        manifest, entry = release(f"cim_vit_tiny.{len(kwargs)}{kwargs.get('pretext', '')}", **kwargs)
        computed = verify(entry.id, manifest)
        assert computed["key_digest"] == entry.key_digest and computed["parameters"] == entry.parameters
        assert len(computed["files"]) == len(entry.files) and computed["golden"][0].recipe == "waves"
    wrong = dataclasses.replace(
        entry,
        parameters=entry.parameters + 1,
        tensors=3,
        key_digest="0" * 64,
        dtype="float16",
        golden=(dataclasses.replace(entry.golden[0], output=tuple(x + 0.01 for x in entry.golden[0].output)),),
    )
    with pytest.raises(WeightsError) as caught:
        verify(entry.id, manifest.with_entry(wrong))
    for field in ("parameters", "tensors", "key_digest", "dtype", "golden output"):
        assert field in str(caught.value)


def test_golden_outputs_follow_the_weights():
    model = build("cim_vit_tiny", depth=1, img_size=32)
    model.pretrained_cfg["input_size"] = (3, 32, 32)
    first, second = golden_output(model), golden_output(model)
    assert first == second and len(first) == 16 and model.training
    model.blocks[0].mlp.fc2.bias.data += 0.1
    assert golden_output(model) != first
    with pytest.raises(ConfigError, match="'ripples'"):
        golden_output(model, "ripples")


@pytest.mark.parametrize("id", list(load_manifest().entries) or [None])
def test_every_release_is_what_its_entry_says(id):
    if id is None:
        pytest.skip("nothing is released yet")
    verify(id)
