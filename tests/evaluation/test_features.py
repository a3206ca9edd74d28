"""Features against timm's own forward passes; files of features against stock safetensors."""

import logging

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from cim_models.backbones import build
from cim_models.backbones.tokens import encode
from cim_models.errors import ConfigError, DataError
from cim_models.evaluation.features import extract, extract_all, pool
from cim_models.images import find_images, read_image

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return build("cim_vit_tiny", depth=2).eval()


@pytest.fixture(scope="module")
def transform(vit):
    return create_transform(**resolve_model_data_config(vit, {"input_size": (3, 64, 64)}))


@torch.no_grad()
def test_pooling_of_a_vision_transformer(vit):
    tokens = vit.forward_features(IMAGES)
    dense = tokens[:, 1:].unflatten(1, (4, 6)).permute(0, 3, 1, 2)
    torch.testing.assert_close(pool(vit, IMAGES), tokens[:, 1:].mean(dim=1))
    torch.testing.assert_close(pool(vit, IMAGES), vit(IMAGES))
    torch.testing.assert_close(pool(vit, IMAGES), encode(vit, IMAGES).patches.mean(dim=1))
    torch.testing.assert_close(pool(vit, IMAGES, "class"), tokens[:, 0])
    torch.testing.assert_close(pool(vit, IMAGES, "both"), torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))
    torch.testing.assert_close(pool(vit, IMAGES, "dense"), dense)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cim_resnet18", "cim_resnet50"])
def test_pooling_of_a_residual_network(name):
    model = build(name).eval()
    torch.testing.assert_close(pool(model, IMAGES), model(IMAGES))
    torch.testing.assert_close(pool(model, IMAGES, "dense"), model.forward_features(IMAGES))
    for pooling in ("class", "both"):
        with pytest.raises(ConfigError, match="no class token"):
            pool(model, IMAGES, pooling)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {"img_size": (64, 96)}),
        ("test_vit2", {"img_size": (64, 96)}),
        ("vit_tiny_patch16_224", {"img_size": (64, 96), "depth": 1, "reg_tokens": 4}),
        ("vit_tiny_patch16_224", {"img_size": (64, 96), "depth": 1, "class_token": False, "global_pool": "avg"}),
        ("test_resnet", {}),
        ("test_convnext", {}),
        ("test_efficientnet", {}),
        ("swin_tiny_patch4_window7_224", {"img_size": (64, 96), "depths": (1, 1, 1, 1)}),
        ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 1}),
    ],
)
def test_any_timm_model(name, options):
    model = timm.create_model(name, num_classes=0, **options).eval()
    images = IMAGES[..., :56, :56] if options.get("img_size") == 56 else IMAGES
    last = model.forward_features(images)
    if last.ndim == 3:
        prefix = model.num_prefix_tokens
        expected = last[:, prefix:].mean(dim=1)
    else:
        expected = last.mean(dim=(1, 2) if last.shape[-1] == model.num_features else (2, 3))
    found = pool(model, images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    dense = pool(model, images, "dense")
    assert dense.shape[2] * 3 == dense.shape[3] * 2 or images.shape[2] == images.shape[3]
    if name != "test_efficientnet":  # its last map comes before the convolution that widens it
        torch.testing.assert_close(dense.mean(dim=(2, 3)), found)
    if getattr(model, "cls_token", None) is not None:
        torch.testing.assert_close(pool(model, images, "class"), last[:, 0])


@pytest.mark.parametrize("name", ["coat_lite_tiny", "crossvit_9_240", "pit_ti_224", "volo_d1_224"])
def test_class_tokens_in_an_unknown_place_are_no_patches(name):
    """timm's forward passes of these have a class token among what they return, and do not say where."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0).eval()
        images = torch.zeros(1, *model.pretrained_cfg["input_size"])
    for pooling in ("patches", "class", "both"):
        with pytest.raises(ConfigError, match=f"pooling='{pooling}': .* does not say which of its tokens are patches"):
            pool(model, images, pooling)


@pytest.mark.parametrize("workers", [0, 2])
def test_extract_equals_one_pass_over_all(photographs, vit, transform, workers):
    paths = find_images(photographs(5, 80))
    batches = list(extract(vit, paths, transform=transform, batch_size=2, workers=workers))
    with torch.no_grad():
        expected = vit(torch.stack([transform(read_image(path)) for path in paths]))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    found = torch.cat([batch.features for batch in batches])
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, expected)
    pictures = extract_all(vit, [read_image(path) for path in paths], transform=transform, batch_size=3, workers=0)
    torch.testing.assert_close(pictures.features, expected)


def test_extract_leaves_the_model_and_the_random_numbers_as_they_were(photographs, vit, transform):
    vit.train()
    vit.blocks[0].eval()
    modes = [module.training for module in vit.modules()]
    state = torch.random.get_rng_state()
    batches = extract(vit, find_images(photographs(5, 80)), transform=transform, batch_size=2, workers=0)
    next(batches)
    batches.close()
    assert [module.training for module in vit.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    vit.eval()


def test_any_number_of_batches_comes_from_readers(photographs, vit, transform, few_files):
    paths = find_images(photographs(3, 80)) * 30
    assert extract_all(vit, paths, transform=transform, batch_size=1, workers=1).indices.tolist() == list(range(90))


def test_half_precision(photographs, vit, transform):
    paths = find_images(photographs(5, 80))
    full = extract_all(vit, paths, transform=transform, workers=0).features
    half = extract_all(vit, paths, transform=transform, workers=0, precision="bf16").features
    assert half.dtype == torch.float32 and not torch.equal(full, half)
    assert torch.nn.functional.cosine_similarity(full, half).min() > 0.999


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_and_counted(tmp_path, photographs, vit, transform, workers, caplog):
    good = find_images(photographs(5, 80))
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "cut.jpg").write_bytes(good[0].read_bytes()[:500])
    paths = [tmp_path / "text.jpg", tmp_path / "missing.png", good[0], tmp_path / "cut.jpg", good[1]]
    with caplog.at_level(logging.WARNING):
        found = extract_all(vit, paths, transform=transform, batch_size=2, workers=workers)
    assert found.indices.tolist() == [2, 4] and list(found.unreadable) == [0, 1, 3]
    assert all(reason.startswith(str(paths[index])) for index, reason in found.unreadable.items())
    assert [record.getMessage() for record in caplog.records] == [f"skipped {r}" for r in found.unreadable.values()]
    torch.testing.assert_close(found.features, extract_all(vit, good[:2], transform=transform).features)
    with pytest.raises(DataError, match="none of 2 images can be read; the first: .*text.jpg"):
        extract_all(vit, paths[:2], transform=transform, workers=0)
    with pytest.raises(DataError, match="none of 0"):
        extract_all(vit, [], transform=transform)
    for batch_size, workers in ((0, 0), (-1, 0), (1, -1)):
        with pytest.raises(ConfigError, match=f"batch_size={batch_size}, workers={workers}: must be"):
            extract_all(vit, good, transform=transform, batch_size=batch_size, workers=workers)


def test_very_long_pictures_take_no_memory(vit, transform):
    sizes = []

    def spy(image):
        sizes.append(image.size)
        return transform(image)

    long = [Image.new("RGB", size, "red") for size in ((20000, 4), (4, 20000), (1, 1), (160, 10))]
    found = extract_all(vit, long, transform=spy, workers=0)
    assert sizes == [(64, 4), (4, 64), (1, 1), (160, 10)]
    torch.testing.assert_close(found.features, found.features[:1].expand(4, -1))


def test_features_that_are_not_finite_name_the_image(photographs, transform):
    paths = find_images(photographs(5, 80))
    broken = build("cim_vit_tiny", depth=1)
    torch.nn.init.constant_(broken.norm.weight, float("inf"))
    with pytest.raises(DataError, match=f"{paths[0]}: .*not finite"):
        extract_all(broken, paths, transform=transform, workers=0)
