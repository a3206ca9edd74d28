"""Views: a function of sources and uniforms alone, normalised, whatever the batch they are made in."""

import pytest
import torch
import torchvision.transforms.functional as TF

from cim_models.pretext import exemplars, views
from cim_models.pretext.colour import ColourConfig
from cim_models.pretext.exemplars import ExemplarConfig
from cim_models.pretext.views import DRAWS, ViewConfig, denormalise, make_views, normalise

CONFIG = ViewConfig(96, ExemplarConfig(count=3, size=32))


def batch(n: int = 5, size: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sources = torch.randint(0, 256, (n, 3, size // 8, size // 8), dtype=torch.uint8, generator=generator)
    return sources.repeat_interleave(8, 2).repeat_interleave(8, 3), torch.rand(n, 3, DRAWS, generator=generator)


def test_shapes_and_types():
    made = make_views(*batch(), CONFIG)
    assert made.context.shape == (5, 3, 96, 96) and made.context.dtype == torch.float32
    assert made.exemplars.shape == (5, 3, 3, 32, 32) and made.exemplars.dtype == torch.float32
    assert made.maps.shape == (5, 3, 96, 96) and made.maps.dtype == torch.bool


@pytest.mark.parametrize("colour", [ColourConfig(), ColourConfig.off()])
def test_a_half_source_is_cut_at_the_places_of_a_whole_one(colour):
    sources, uniforms = batch()
    config, half = ViewConfig(96, CONFIG.exemplars, colour), (sources / 255).bfloat16()
    made = (make_views(source, uniforms, config) for source in (half, half.float()))
    for found, expected in zip(*made, strict=True):
        assert torch.equal(found, expected)


def test_normalisation_is_torchvisions():
    x = torch.rand(2, 4, 3, 8, 8)
    assert torch.allclose(normalise(x), TF.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), atol=1e-6)
    assert torch.allclose(denormalise(normalise(x)), x, atol=1e-6)


def test_the_context_is_the_source_resized_and_not_recoloured():
    sources, uniforms = batch()
    for size in (48, 80, 96):
        context = denormalise(make_views(sources, uniforms, ViewConfig(size, CONFIG.exemplars)).context)
        assert torch.allclose(context, TF.resize(sources.float() / 255, [size, size], antialias=True), atol=1e-5)


def test_exemplars_and_maps_are_of_the_same_rectangles():
    sources, uniforms = batch()
    made = make_views(sources, uniforms, ViewConfig(96, CONFIG.exemplars, ColourConfig.off()))
    rectangles = exemplars.draw_rectangles(uniforms[..., : exemplars.DRAWS], 80, 80, CONFIG.exemplars)
    expected = exemplars.crop(sources / 255, rectangles, 32)
    assert torch.allclose(denormalise(made.exemplars), expected, atol=1e-5)
    assert torch.equal(made.maps, exemplars.cover(rectangles, (80, 80), 96))


def test_uint8_and_float_sources_are_the_same():
    sources, uniforms = batch()
    before = sources.clone()
    for mine, other in zip(
        make_views(sources, uniforms, CONFIG), make_views(sources / 255, uniforms, CONFIG), strict=True
    ):
        assert torch.equal(mine, other)
    assert torch.equal(sources, before)


@pytest.mark.parametrize("n", [1, 2, 16, 17, 40])
def test_views_do_not_depend_on_the_batch_they_are_made_in(n):
    sources, uniforms = batch(40)
    config = ViewConfig(96, CONFIG.exemplars, ColourConfig(solarise=0))  # solarisation is not continuous
    whole, part = make_views(sources, uniforms, config), make_views(sources[-n:], uniforms[-n:], config)
    assert torch.equal(part.maps, whole.maps[-n:])
    assert torch.allclose(part.context, whole.context[-n:], atol=1e-5)
    assert torch.allclose(part.exemplars, whole.exemplars[-n:], atol=1e-4)
    assert all(map(torch.equal, whole, make_views(sources, uniforms, config)))


def test_sources_that_are_not_square():
    made = make_views(batch()[0][..., :56], batch()[1], CONFIG)
    assert made.context.shape == (5, 3, 96, 96) and made.maps.any(dim=(2, 3)).all()


def test_draws_are_those_of_both_parts():
    assert DRAWS == exemplars.DRAWS + views.colour.DRAWS
