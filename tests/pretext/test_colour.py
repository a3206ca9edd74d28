"""Colour transformations of exemplars against torchvision's functional forms."""

import pytest
import torch
import torchvision.transforms.functional as TF

from cim_models.pretext import colour
from cim_models.pretext.colour import ColourConfig, recolour

CASES = {
    "brightness": (colour.adjust_brightness, TF.adjust_brightness, (0.0, 2.0)),
    "contrast": (colour.adjust_contrast, TF.adjust_contrast, (0.0, 2.0)),
    "saturation": (colour.adjust_saturation, TF.adjust_saturation, (0.0, 2.0)),
    "hue": (colour.adjust_hue, TF.adjust_hue, (-0.5, 0.5)),
    "blur": (lambda x, s: colour.gaussian_blur(x, s, 2.0), lambda x, s: TF.gaussian_blur(x, 13, s), (0.1, 2.0)),
    "grey": (lambda x, _: colour.greyscale(x).expand_as(x), lambda x, _: TF.rgb_to_grayscale(x, 3), (0, 1)),
    "solarise": (lambda x, _: colour.solarise(x), lambda x, _: TF.solarize(x, 0.5), (0, 1)),
}


def pictures(n: int = 24, height: int = 64, width: int = 64) -> torch.Tensor:
    """Random pictures; the first are black, white, grey, pure colours, coarse steps, nearly black and nearly grey."""
    x = torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0))
    x[0], x[1], x[2] = 0, 1, x[2, :1]
    x[3], x[4] = x[3].round(), torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    x[5], x[6], x[7] = x[5].round(decimals=1), x[6] * 1e-6, x[7] * 1e-4 + 0.5
    return x


def uniforms(batch: int, count: int, seed: int = 1, **columns: float) -> torch.Tensor:
    """Uniform numbers with named columns set."""
    names = ["jitter", "brightness", "contrast", "saturation", "hue", "grey", "blur", "sigma", "solarise"]
    assert len(names) == colour.DRAWS
    numbers = torch.rand(batch, count, colour.DRAWS, generator=torch.Generator().manual_seed(seed))
    for name, value in columns.items():
        numbers[..., names.index(name)] = value
    return numbers


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(64, 64), (20, 33)])
def test_each_agrees_with_torchvision(name, shape):
    ours, theirs, (least, greatest) = CASES[name]
    x = pictures(24, *shape)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    strengths = torch.linspace(least, greatest, len(x))[order]
    expected = torch.stack([theirs(picture, strength.item()) for picture, strength in zip(x, strengths, strict=True)])
    actual = ours(x, strengths)
    assert torch.allclose(actual, expected, atol=1e-4)
    assert actual.min() >= 0 and actual.max() <= 1 + 1e-6


def test_a_blur_wider_than_the_picture_still_reads_inside():
    flat = torch.full((2, 3, 4, 5), 0.3)
    assert torch.allclose(colour.gaussian_blur(flat, torch.tensor([0.1, 2.0]), 2.0), flat, atol=1e-6)


def test_a_stronger_blur_reaches_further():
    config = ColourConfig(jitter=0, grey=0, blur=1, sigma=(5, 5), solarise=0)
    x = pictures(8)
    actual = recolour(x[None], uniforms(1, 8), config)[0]
    assert torch.allclose(actual, TF.gaussian_blur(x, 31, 5), atol=1e-4)


def test_all_of_them_in_the_order_of_the_recipe():
    config = ColourConfig(jitter=1, grey=0, blur=1, solarise=1)
    x = pictures().view(4, 6, 3, 64, 64)
    numbers = uniforms(4, 6)
    actual = recolour(x, numbers, config)
    for picture, draws, result in zip(x.flatten(0, 1), numbers.flatten(0, 1), actual.flatten(0, 1), strict=True):
        brightness, contrast, saturation, hue = (2 * draws[1:5] - 1).tolist()
        expected = TF.adjust_brightness(picture, 1 + 0.4 * brightness)
        expected = TF.adjust_contrast(expected, 1 + 0.4 * contrast)
        expected = TF.adjust_saturation(expected, 1 + 0.2 * saturation)
        expected = TF.adjust_hue(expected, 0.1 * hue)
        expected = TF.gaussian_blur(expected, 13, 0.1 + 1.9 * draws[7].item())
        sure = (expected - 0.5).abs() > 1e-4  # solarisation is not continuous
        assert torch.allclose(result[sure], TF.solarize(expected, 0.5)[sure], atol=1e-4)


def test_off_is_the_identity():
    x = pictures().view(4, 6, 3, 64, 64)
    assert torch.equal(recolour(x, uniforms(4, 6), ColourConfig.off()), x)


@pytest.mark.parametrize("name", ["jitter", "grey", "blur", "solarise"])
def test_each_is_applied_with_its_probability_and_alone(name):
    config = ColourConfig.off()
    setattr(config, name, 0.3)
    x = torch.rand(1000, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    changed = ((recolour(x, uniforms(1000, 1), config) - x).abs() > 1e-5).flatten(1).any(1)
    expected = uniforms(1000, 1)[:, 0, {"jitter": 0, "grey": 5, "blur": 6, "solarise": 8}[name]] < 0.3
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert not changed[~expected].any()
    assert changed[expected].float().mean() > 0.9  # the weakest blurs and turns change nothing


def test_the_released_probabilities():
    config = ColourConfig()
    assert (config.jitter, config.grey, config.blur, config.solarise) == (0.8, 0.2, 0.5, 0.2)
    assert (config.brightness, config.contrast, config.saturation, config.hue) == (0.4, 0.4, 0.2, 0.1)
    assert config.sigma == (0.1, 2.0)


def test_values_stay_in_range_and_the_input_is_left_alone():
    x = pictures().view(4, 6, 3, 64, 64)
    before = x.clone()
    for seed in range(20):
        result = recolour(x, uniforms(4, 6, seed), ColourConfig(brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5))
        assert result.min() >= 0 and result.max() <= 1
        assert result.shape == x.shape
    assert torch.equal(x, before)


def test_exemplars_do_not_depend_on_their_batch():
    x, numbers = pictures().view(4, 6, 3, 64, 64), uniforms(4, 6)
    whole = recolour(x, numbers, ColourConfig())
    alone = torch.cat([recolour(x[i : i + 1], numbers[i : i + 1], ColourConfig()) for i in range(4)])
    sure = (whole - alone).abs() < 1e-5
    assert sure.float().mean() > 0.9999  # but for values at solarisation's threshold
    assert torch.equal(recolour(x, numbers, ColourConfig()), whole)


def test_grey_stays_grey_and_colour_stays_colour():
    x = torch.rand(2, 3, 3, 16, 16)
    grey = recolour(x, uniforms(2, 3), ColourConfig(grey=1))
    assert torch.allclose(grey[:, :, 0], grey[:, :, 1], atol=1e-6)
    colourful = recolour(x, uniforms(2, 3, grey=0.9), ColourConfig())
    assert ((colourful[:, :, 0] - colourful[:, :, 1]).abs() > 1e-3).flatten(2).any(-1).all()
