"""The recipes: each loads, says what it costs and gives, and those of the paper hold the paper's values."""

import dataclasses
import math

import pytest
import torch

from cim_models.pretext.model import PretextConfig
from cim_models.pretraining.build import build
from cim_models.pretraining.config import RECIPES, PretrainConfig, load_recipe, recipes, to_dict

NAMES = [
    "cpu-demo",
    "imagenet-1k",
    "imagenet-1k-as-released",
    "imagenette-128",
    "tiny-imagenet-64",
    "tiny-imagenet-64-start",
]


def test_the_recipes_that_there_are():
    assert recipes() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_what_to_expect(name):
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    header = " ".join(line.lstrip("# ") for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")])
    assert [word for word in ("Command:", "Hardware:", "Time:", "Expected:") if word not in header] == []
    assert "pretrain" in header and f"--recipe {name}" in header and "--out" in header


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_can_be_run(name):
    config = load_recipe(name)
    config.data.path, config.out = "photos", "run"
    config.check()
    assert config.optimiser.warmup_epochs < config.optimiser.epochs
    with torch.device("meta"):
        cim = build(config, -1.0)
    context = torch.empty(2, 3, config.views.context_size, config.views.context_size, device="meta")
    side, count = config.views.exemplars.size, config.views.exemplars.count
    exemplars, maps = (torch.empty(2, count, *shape, device="meta") for shape in ((3, side, side), context.shape[-2:]))
    assert cim(context, exemplars, maps).logits.shape == maps.shape


def test_as_released_is_as_released():
    config = load_recipe("imagenet-1k-as-released")
    optim, exemplars, colour = config.optimiser, config.views.exemplars, config.views.colour
    assert config.model == "cim_vit_base" and config.precision == "fp32"
    assert (config.data.size, config.views.context_size) == (224, 160)
    assert (config.data.crop_area, config.data.crop_ratio, config.data.flip) == ((0.5, 1), (3 / 4, 4 / 3), 0.5)
    assert (exemplars.count, exemplars.size, exemplars.flip) == (6, 64, 0.5)
    assert (exemplars.area, exemplars.ratio, exemplars.angle) == ((0.05, 0.48), (1 / 3, 3), (-45, 45))
    assert (colour.jitter, colour.grey, colour.blur, colour.solarise) == (0.8, 0.2, 0.5, 0.2)
    assert (colour.brightness, colour.contrast, colour.saturation, colour.hue) == (0.4, 0.4, 0.2, 0.1)
    assert colour.sigma == (0.1, 2.0)
    assert config.pretext == PretextConfig(
        head="cross_attention", head_width=512, head_heads=16, reduction="sum", correlation_weight=1, global_weight=0,
        moving_average=True, freeze_patch_embed=True, share_class_token=True,
    )  # fmt: skip
    assert optim.clip is None and optim.betas == (0.9, 0.95) and optim.weight_decay == 0.05
    assert (optim.epochs, optim.warmup_epochs, optim.min_lr, optim.momentum) == (300, 40, 0, 0.99)
    assert optim.batch_size * optim.accumulation * 8 == 4096 and optim.accumulation == 2
    peak = optim.lr * optim.batch_size * optim.accumulation * 8 / 256
    assert math.isclose(peak, 1.5e-4 * 16)


def test_ours_differs_from_the_released_where_it_says():
    released, ours = load_recipe("imagenet-1k-as-released"), load_recipe("imagenet-1k")
    released.precision, released.optimiser.clip = ours.precision, ours.optimiser.clip
    released.pretext = dataclasses.replace(released.pretext, reduction="mean", share_class_token=False)
    assert to_dict(ours) == to_dict(released)
    assert (ours.precision, ours.optimiser.clip) == ("auto", 1.0)


def test_the_defaults_are_the_released_values():
    ours, default = to_dict(load_recipe("imagenet-1k")), to_dict(PretrainConfig())
    for values in (ours, default):
        del values["log_every"], values["save_every"], values["data"]["workers"], values["optimiser"]["accumulation"]
    assert ours == default
