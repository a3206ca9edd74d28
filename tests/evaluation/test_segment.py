"""Segmentation: counts as torchmetrics counts, learns scenes of any shape, and says what is wrong with label maps."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchmetrics.functional.classification import multiclass_jaccard_index
from torchvision import tv_tensors
from torchvision.transforms.functional import to_tensor

from cim_models.errors import CheckpointError, ConfigError, DataError, WeightsError
from cim_models.evaluation.decoders import LinearSegmenter, enlarge, pad
from cim_models.evaluation.encoders import find_weights, open_encoder
from cim_models.evaluation.label_maps import IGNORED, Maps, augmentation, preparation, read_map, read_maps, read_palette
from cim_models.evaluation.segment import (
    DEFAULT,
    SegmentConfig,
    confusion_matrix,
    evaluate,
    intersection_over_union,
    mean_iou,
    parameter_groups,
    pixel_loss,
    segment,
)
from cim_models.evaluation.segmenters import build_segmenter, design_of, load_segmenter

QUICK = SegmentConfig(epochs=8, warmup_epochs=1, lr=4e-3, workers=0, precision="fp32", layer_decay=1.0, width=32)
CLASSES = "3\tGround\n0\tSky\n# comment\n\n7\tBall\n9\tUnlabelled\n"
NUMBERS = {"sky": 0, "ground": 3, "ball": 7, "unlabelled": 9}


def scene(index: int, size: tuple[int, int] = (72, 96)) -> tuple[Image.Image, Image.Image]:
    """A blue sky over green ground, a red ball on it, and a frame that nobody labelled."""
    rng = np.random.default_rng(index)
    height, width = size
    y, x = np.mgrid[:height, :width]
    labels = np.where(y > height * rng.uniform(0.35, 0.65), NUMBERS["ground"], NUMBERS["sky"]).astype(np.uint8)
    ball = np.hypot(y - height * rng.uniform(0.3, 0.7), x - width * rng.uniform(0.2, 0.8)) < height * 0.25
    labels[ball] = NUMBERS["ball"]
    colours = np.zeros((10, 3))
    colours[[0, 3, 7]] = [90, 140, 220], [60, 160, 60], [220, 60, 60]
    picture = colours[labels] + rng.normal(0, 12, (height, width, 3))
    labels[:3] = labels[-3:] = NUMBERS["unlabelled"]
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)), Image.fromarray(labels)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """20 and 6 scenes, wide and tall ones, with label maps and the names of their classes."""
    root = tmp_path_factory.mktemp("scenes")
    (root / "classes.txt").write_text(CLASSES)
    for split, numbers in (("train", range(20)), ("val", range(100, 106))):
        (root / split).mkdir()
        (root / f"{split}annot").mkdir()
        for number in numbers:
            picture, labels = scene(number, (72, 96) if number % 3 else (90, 61))
            picture.save(root / split / f"{number}.jpg", quality=95)
            labels.save(root / f"{split}annot" / f"{number}.png")
    return root


def test_mean_iou_agrees_with_torchmetrics():
    torch.manual_seed(0)
    labels, predicted = torch.randint(6, (4, 30, 40)), torch.randint(6, (4, 30, 40))
    labels[labels == 4], predicted[predicted == 4] = 3, 3  # a class that is nowhere
    labels[torch.rand(labels.shape) < 0.2] = IGNORED
    counted = labels != IGNORED
    confusion = confusion_matrix(labels[counted], predicted[counted], 6)
    expected = multiclass_jaccard_index(predicted, labels, 6, average="macro", ignore_index=IGNORED)
    assert mean_iou(confusion) == pytest.approx(expected.item(), abs=1e-6) and confusion.sum() == counted.sum()


class Guess(nn.Module):
    """Scores that depend on each pixel's colour alone."""

    def forward(self, images):
        return nn.functional.conv2d(images, torch.linspace(-1, 1, 9).view(3, 3, 1, 1))


@pytest.mark.parametrize("short_side", [None, 40])
def test_pictures_of_any_size_are_measured_at_the_size_of_their_maps(scenes, short_side):
    split = read_maps(scenes, "val")
    transform = preparation(short_side, (0.5,) * 3, (0.25,) * 3)
    maps = Maps(split, range(6), transform)
    confusion, loss = evaluate(Guess(), maps, Accelerator(), QUICK)
    scores, labels = [], []
    for index in range(6):
        image, target, _ = maps[0, index]
        assert target.shape == read_map(split.maps[index], split.palette).shape
        assert min(image.shape[1:]) == (short_side or min(target.shape))
        scores.append(nn.functional.interpolate(Guess()(image[None]), target.shape, mode="bilinear")[0].flatten(1).T)
        labels.append(target.flatten())
    scores, labels = torch.cat(scores), torch.cat(labels)
    expected = multiclass_jaccard_index(scores.argmax(1), labels, 3, average="macro", ignore_index=IGNORED)
    assert mean_iou(confusion) == pytest.approx(expected.item(), abs=1e-6)
    assert loss == pytest.approx(nn.functional.cross_entropy(scores, labels, ignore_index=IGNORED).item(), rel=1e-4)


def test_unlabelled_pixels_count_for_nothing():
    torch.manual_seed(0)
    scores, labels = torch.randn(2, 4, 5, 6), torch.randint(4, (2, 5, 6))
    labels[:, 2] = IGNORED
    changed = scores.clone()
    changed[:, :, 2] = 99.0
    assert pixel_loss(scores, labels) == pixel_loss(changed, labels)
    kept = labels != IGNORED
    expected = nn.functional.cross_entropy(scores.permute(0, 2, 3, 1)[kept], labels[kept])
    torch.testing.assert_close(pixel_loss(scores, labels), expected)
    assert pixel_loss(scores, torch.full_like(labels, IGNORED)) == 0


def test_a_picture_and_its_labels_are_augmented_together(scenes):
    """Red stays ball, whatever the crop; outside of the picture nothing is labelled; a key always gives the same."""
    split = read_maps(scenes, "train")
    maps = Maps(split, range(20), augmentation((48, 80), (0.5, 2.0), 0.0, (0.0,) * 3, (1.0,) * 3), seed=3)
    ball = split.palette.classes.index("Ball")
    agree = []
    for index in range(20):
        image, labels, _ = maps[1, index]
        again, same, _ = maps[1, index]
        other, _, _ = maps[2, index]
        assert image.shape == (3, 48, 80) and labels.shape == (48, 80) and labels.dtype == torch.int64
        assert torch.equal(image, again) and torch.equal(labels, same) and not torch.equal(image, other)
        red = (image[0] > 0.5) & (image[2] < 0.5)
        agree.append((red == (labels == ball))[labels != IGNORED].float().mean().item())
        assert (labels[image.sum(0) == 0] == IGNORED).all()
    assert np.mean(agree) > 0.97


@pytest.mark.parametrize(
    ("crop", "size", "seen"),
    [((48, 96), (72, 144), (48, 96)), ((96, 48), (144, 72), (96, 48)), ((48, 96), (90, 60), (48, 32)),
     ((60, 60), (60, 90), (40, 60))],
)  # fmt: skip
def test_a_scale_of_one_just_fits_into_the_crop(crop, size, seen):
    augment = augmentation(crop, (1.0, 1.0), 0.0, (0.0,) * 3, (1.0,) * 3)
    picture = tv_tensors.Image(torch.full((3, *size), 200, dtype=torch.uint8))
    image, labels = augment(picture, tv_tensors.Mask(torch.zeros(size, dtype=torch.uint8)))
    inside = labels != IGNORED
    assert image.shape[1:] == labels.shape == crop
    assert (inside.any(dim=1).sum().item(), inside.any(dim=0).sum().item()) == pytest.approx(seen, abs=1)


@pytest.mark.parametrize("head", ["linear", "pyramid"])
def test_scenes_are_learned(scenes, run, tmp_path, head):
    report = segment(str(run), scenes, tmp_path / "out", head=head, config=QUICK)
    saved = json.loads((tmp_path / "out" / "segment.json").read_text())
    assert saved["result"]["headline"] == report.result["headline"] > 0.5 and "mIoU" in str(report)
    assert list(saved["result"]["iou"]) == ["Ground", "Sky", "Ball"]
    assert saved["result"]["headline"] == pytest.approx(np.mean(list(saved["result"]["iou"].values())))
    assert saved["protocol"].startswith(f"segment-{head}-2, lr=0.004") and saved["settings"]["crop"] == [90, 61]
    assert saved["data"]["train"]["images"] == 20 and saved["data"]["train"]["classes"] == 3
    assert saved["settings"]["training_images"] == 18 and len(saved["result"]["history"]) == 8
    state = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["best"]
    weights = open_encoder(str(run)).state_dict()
    prefix = "encoder." if head == "linear" else "encoder.model."
    kept = [torch.equal(weights[key.removeprefix(prefix)], state[key]) for key in state if key.startswith(prefix)]
    assert len(kept) > 20 and (all(kept) if head == "linear" else sum(kept) <= 1)  # the position embedding is fixed

    network, classes, _ = load_segmenter(tmp_path / "out")
    assert_measures(network, classes, scenes, saved)


def assert_measures(network: nn.Module, classes: list[str], scenes: Path, saved: dict) -> None:
    """A loaded network has the numbers of the report, to the last pixel."""
    split, side = read_maps(scenes, "val"), saved["settings"]["short_side"]
    seen = saved["model"]["transform"]
    maps = Maps(split, range(6), preparation(side, seen["mean"], seen["std"]))
    confusion, loss = evaluate(network, maps, Accelerator(), QUICK)
    assert classes == split.palette.classes == list(saved["result"]["iou"]) and not network.training
    assert intersection_over_union(confusion).tolist() == list(saved["result"]["iou"].values())
    assert float(confusion.diagonal().sum() / confusion.sum()) == saved["result"]["pixel_accuracy"]
    assert loss == pytest.approx(saved["result"]["loss"], rel=1e-6)


@pytest.mark.parametrize(("name", "head"), [("test_vit", "pyramid"), ("test_convnext", "linear")])
def test_what_is_loaded_is_what_was_trained(scenes, tmp_path, name, head):
    """On encoders of timm, whole pictures of another size, given as pictures."""
    config = replace(QUICK, epochs=0.2, warmup_epochs=0.0, short_side=40)
    segment(name, scenes, tmp_path, head=head, random_init=True, config=config)
    network, classes, transform = load_segmenter(tmp_path / "model.safetensors")
    assert_measures(network, classes, scenes, json.loads((tmp_path / "segment.json").read_text()))
    state = torch.load(tmp_path / "last.pt", weights_only=True)["best"]
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    with Image.open(scenes / "val" / "101.jpg") as picture:
        seen = transform(picture)
    mean, std = (torch.tensor(getattr(timm.get_pretrained_cfg(name), key))[:, None, None] for key in ("mean", "std"))
    expected = torchvision.transforms.functional.resize(to_tensor(picture), [40], antialias=True)
    assert type(seen) is torch.Tensor and seen.shape == (3, 40, 53)
    torch.testing.assert_close(seen, (expected - mean) / std, atol=0.02, rtol=0)


def test_what_is_no_segmenter_is_said(scenes, run, tmp_path):
    with pytest.raises(WeightsError, match="nowhere.model.safetensors cannot be read"):
        load_segmenter(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="online.safetensors labels no pixels; give a folder"):
        load_segmenter(run / "online.safetensors")
    segment(str(run), scenes, tmp_path / "out", config=replace(QUICK, epochs=0.1, warmup_epochs=0.0))
    file = tmp_path / "out" / "model.safetensors"
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    assert metadata["architecture"] == "cim_vit_tiny" and metadata["head"] == "linear"
    assert json.loads(metadata["classes"]) == ["Ground", "Sky", "Ball"] and json.loads(metadata["short_side"]) is None
    for key, value in (("classes", '["one"]'), ("width", "wide"), ("architecture", "cim_vit_teeny"), ("mean", None)):
        changed = {name: text for name, text in {**metadata, key: value}.items() if text is not None}
        save_file(load_file(file), tmp_path / "changed.safetensors", changed)
        with pytest.raises(WeightsError, match="changed.safetensors is not what it says of itself"):
            load_segmenter(tmp_path / "changed.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load_segmenter(tmp_path / "out")


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("head", ["linear", "pyramid"])
def test_half_a_run_and_its_continuation_are_the_whole_run(scenes, run, tmp_path, head, monkeypatch):
    config, epochs = replace(QUICK, epochs=3, ema=0.9), []

    def stop(*arguments):
        epochs.append(1)
        if len(epochs) == 3:
            raise Interrupted
        return evaluate(*arguments)

    whole = segment(str(run), scenes, tmp_path / "whole", head=head, config=config)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[segment.__module__], "evaluate", stop)
        with pytest.raises(Interrupted):
            segment(str(run), scenes, tmp_path / "halves", head=head, config=config)
    assert sorted(path.name for path in (tmp_path / "halves").iterdir()) == ["last.pt", "training.jsonl"]
    with pytest.raises(CheckpointError, match="holds a run; give --resume"):
        segment(str(run), scenes, tmp_path / "halves", head=head, config=config)
    with pytest.raises(CheckpointError, match="config.width: 32 in the checkpoint, 64 asked for"):
        segment(str(run), scenes, tmp_path / "halves", head=head, config=replace(config, width=64), resume=True)
    both = segment(str(run), scenes, tmp_path / "halves", head=head, config=config, resume=True)
    assert both.result == whole.result and len(both.result["history"]) == 3
    assert both.command == whole.command.replace(str(tmp_path / "whole"), str(tmp_path / "halves"))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())
    logs = [(tmp_path / name / "training.jsonl").read_text() for name in ("whole", "halves")]
    assert logs[0] == logs[1]


TWO = """
import sys, torch
from cim_models import cli
torch.set_num_threads(1)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_two_processes_share_the_pictures(scenes, run, tmp_path, launch):
    """Both measure what the first one writes, whose statistics of BatchNorm are its own."""
    flags = "--epochs 2 --warmup-epochs 0 --workers 0 --precision fp32 --batch-size 6 --lr 4e-3".split()
    done = launch(TWO, "evaluate", "segment", run, scenes, "--out", tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "out" / "segment.json").read_text())
    assert [line.split()[0] for line in done.stdout.splitlines()].count(
        "mIoU"
    ) == 2  # the head of the table and its row
    assert saved["settings"]["steps"] == 6 and saved["settings"]["images_per_step"] == 6
    network, classes, _ = load_segmenter(tmp_path / "out")
    assert_measures(network, classes, scenes, saved)
    names = ["last.pt", "model.safetensors", "segment.json", "training.jsonl"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


@pytest.mark.parametrize("name", ["cim_vit_tiny", "cim_resnet18", "test_vit", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("head", ["linear", "pyramid"])
def test_every_parameter_that_trains_is_in_one_group(name, head):
    encoder = open_encoder(name, random_init=True, device="cpu")
    found = find_weights(name)
    design = design_of(encoder, (found and found.model_args) or {}, head, ["a", "b", "c"], 32, None)
    segmenter = build_segmenter(encoder, design, drop_path=0.1)
    groups = parameter_groups(segmenter, DEFAULT)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    trained = {id(parameter) for parameter in segmenter.parameters() if parameter.requires_grad}
    assert len(held) == len(set(held)) and set(held) == trained
    assert segmenter.eval()(torch.randn(2, 3, 50, 75)).shape == (2, 3, 50, 75)
    scales = {group["lr_scale"] for group in groups}
    assert max(scales) == 10 and (len(scales) == 1 if head == "linear" else min(scales) < 0.5)


def test_an_encoder_for_one_size_is_refused_where_pictures_have_another(scenes, tmp_path):
    """Before it is trained: on crops of its size it would have been."""
    for crop, refused in ((None, "90 × 61"), ((224, 224), "72 × 96")):
        with pytest.raises(ConfigError, match=f"the encoder does not take pictures of {refused} pixels"):
            segment("mixer_s32_224", scenes, tmp_path / "out", random_init=True, config=replace(QUICK, crop=crop))
    assert not (tmp_path / "out").exists()


def test_a_frozen_encoder_keeps_its_statistics():
    torch.manual_seed(0)
    encoder = open_encoder("cim_resnet18", random_init=True, device="cpu")
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    segmenter = LinearSegmenter(encoder, 3).train()
    segmenter(torch.randn(2, 3, 64, 96)).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert segmenter.head[0].num_batches_tracked == 1 and all(p.grad is None for p in encoder.parameters())


def test_padding_leaves_no_trace():
    images = torch.randn(1, 3, 50, 75)
    padded = pad(images, 32)
    assert padded.shape == (1, 3, 64, 96) and torch.equal(padded[:, :, :50, :75], images)
    assert torch.equal(enlarge(padded, padded, images), images)
    assert pad(padded, 32).shape == padded.shape


def write(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)


def test_what_is_wrong_with_label_maps_is_said(scenes, run, tmp_path):
    def start():
        segment(str(run), tmp_path / "data", tmp_path / "out", config=QUICK)

    shutil.copytree(scenes, tmp_path / "data")
    annotation = tmp_path / "data" / "trainannot" / "4.png"
    good = np.asarray(Image.open(annotation))
    wrong = good.copy()
    wrong[5, 5:8] = 12
    for content, mode, message in (
        (wrong, None, "4.png: 3 pixels have the number 12, which classes.txt does not hold"),
        (good[:-1], None, "4.png: 96 × 71 pixels, but its picture .*4.jpg has 96 × 72"),
        (good, "RGB", "4.png: a picture of mode RGB; a label map has one number"),
    ):
        write(annotation, content, mode)
        with pytest.raises(DataError, match=message):
            start()
    annotation.write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="4.png: not a label map that can be read"):
        start()
    annotation.unlink()
    with pytest.raises(DataError, match="trainannot.4.png: no such file; it is the label map of .*train.4.jpg"):
        start()
    write(annotation, good)
    shutil.copytree(tmp_path / "data" / "valannot", tmp_path / "kept")
    for path in (tmp_path / "data" / "valannot").iterdir():
        write(path, np.full_like(np.asarray(Image.open(path)), NUMBERS["unlabelled"]))
    with pytest.raises(DataError, match="valannot: no pixel of these label maps is labelled"):
        start()
    shutil.copytree(tmp_path / "kept", tmp_path / "data" / "valannot", dirs_exist_ok=True)
    (tmp_path / "data" / "val" / "102.jpg").write_text("no picture")
    with pytest.raises(DataError, match="102.jpg: not an image"):
        start()
    for path in (tmp_path / "data" / "train").iterdir():
        if path.stem != "4":
            path.unlink()
    shutil.copy(scenes / "val" / "102.jpg", tmp_path / "data" / "val" / "102.jpg")
    with pytest.raises(DataError, match="train: one picture; give more, or held_out 0"):
        start()
    (tmp_path / "data" / "train" / "4.jpg").unlink()
    with pytest.raises(DataError, match="train: no images in this folder"):
        start()
    shutil.rmtree(tmp_path / "data" / "train")
    with pytest.raises(DataError, match="train: no such file or folder"):
        start()
    with pytest.raises(ConfigError, match="width is 0; it must be greater than 0"):
        segment(str(run), scenes, tmp_path / "out", config=replace(QUICK, width=0))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\tsky\n0\tground\n", "line 2: the number 0 stands in line 1 already"),
        ("0 sky\n", "line 1: '0 sky' is not `number<TAB>name`"),
        ("300\tsky\n", "line 1: '300"),
        ("0\tsky\n1\tvoid\n", "1 class to tell apart"),
    ],
)
def test_what_is_wrong_with_the_names_of_classes_is_said(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=f"classes.txt.*{message}"):
        read_palette(tmp_path / "classes.txt")
    with pytest.raises(DataError, match="nothing.txt: no such file"):
        read_palette(tmp_path / "nothing.txt")


def test_names_of_classes_as_windows_writes_them(tmp_path):
    (tmp_path / "classes.txt").write_bytes("\ufeff0\tSky\r\n\r\n3\tStraße\r\n".encode())
    palette = read_palette(tmp_path / "classes.txt")
    assert palette.classes == ["Sky", "Straße"] and palette.table[[0, 3]].tolist() == [0, 1]


def test_camvid_is_read_as_it_is(shared, tmp_path):
    shutil.unpack_archive(shared / "data" / "camvid.zip", tmp_path)
    split = read_maps(tmp_path / "camvid", "val")
    assert len(split.pictures) == 40 and len(split.palette.classes) == 11 and split.palette.classes[8] == "Car"
    labels = read_map(split.maps[0], split.palette)
    numbers = np.asarray(Image.open(split.maps[0]))
    assert labels.shape == (360, 480) and (labels == np.where(numbers == 11, IGNORED, numbers)).all()
