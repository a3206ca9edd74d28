"""Semantic segmentation: what the features of an encoder say of each pixel."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cim_models.errors import ConfigError, DataError
from cim_models.evaluation.batches import collate
from cim_models.evaluation.decoders import PyramidSegmenter, resize
from cim_models.evaluation.encoders import describe, find_weights, open_encoder
from cim_models.evaluation.label_maps import IGNORED, Maps, MapSplit, augmentation, preparation, read_map, read_maps
from cim_models.evaluation.protocol import Report, command_of, variant
from cim_models.evaluation.recipe import TrainConfig, make_plan
from cim_models.evaluation.segmenters import Head, build_segmenter, design_of, save_segmenter
from cim_models.evaluation.splits import hold_out
from cim_models.evaluation.training import Task, check_new, fit, layer_groups, settings_of
from cim_models.processes import without_gpus
from cim_models.workers import usable_workers

RESULT, BATCH = "segment.json", 16
FROZEN = ("lr", "head_lr", "layer_decay", "weight_decay", "drop_path", "scale", "colour", "width", "short_side")
"""Settings of a recipe that are part of the protocol's name where they are others; the budget is not."""


@dataclass(frozen=True)
class SegmentConfig(TrainConfig):
    """A recipe for segmentation."""

    epochs: float = 50.0
    warmup_epochs: float = 2.0
    batch_size: int | None = None
    """Pictures of an optimiser step, over all processes; by default 16, on small data fewer: an epoch has 16 steps."""
    device_batch: int = 8
    head_lr: float = 10.0
    """Learning rate of the head or decoder, as a multiple of the encoder's."""
    drop_path: float = 0.1
    """Greatest stochastic depth of an encoder that is trained."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Least and greatest random size, as multiples of the picture that just fits into the crop."""
    colour: float = 0.4
    """Strength of random changes in brightness, contrast and saturation."""
    width: int = 128
    """Channels of the decoder."""
    crop: tuple[int, int] | None = None
    """Height and width of what is trained on, in pixels; by default those of the first picture."""
    short_side: int | None = None
    """Pixels of the shorter side of what is measured; by default that of each picture, whatever the crop."""


DEFAULT = SegmentConfig()


def segment(
    model: str,
    data: Path,
    /,
    out: Path,
    *,
    head: Head = "linear",
    weights: str | None = None,
    random_init: bool = False,
    config: SegmentConfig = DEFAULT,
    resume: bool = False,
) -> Report:
    """Measures the mean IoU of an encoder that labels every pixel.

    Unlabelled pixels count for nothing. Pictures are measured whole, whatever their sizes. A tenth of the training
    pictures chooses the epoch whose weights are measured.

    Args:
        model: Name of a model or of released weights, a release folder, a run directory, or any model of timm.
        data: Folder with `train` and `val`, the label maps of both in `trainannot` and `valannot`, and `classes.txt`,
            a line `number<TAB>name` for each class.
        out: Run directory, for the checkpoint, the log, segment.json, and the best weights for `load_segmenter`.
        head: `linear` on the frozen encoder, or `pyramid`, a simple decoder on several of its levels, with all trained.
        weights: Take these instead: for a model of timm a checkpoint file of any method.
        random_init: Random weights in the same architecture.
        config: The recipe.
        resume: Go on with the run in `out`, which ends as if it had never stopped.

    Raises:
        DataError: If a picture or a label map is missing or not what it should be; the message names the path.
        ConfigError: If a setting cannot work, or the loss stops being finite.
        CheckpointError: If `out` holds a run that is not to be resumed, or what it holds is of another run.
        WeightsError: If there are no such weights, or they do not fit.
    """
    command = command_of("evaluate segment", segment, {**locals(), "resume": False})
    config.check()
    data, out = Path(data), Path(out)
    check_new(out, resume)
    splits = {name: read_maps(data, name) for name in ("train", "val")}
    used, held = _hold_out(splits["train"], config)

    accelerator = Accelerator(cpu=without_gpus(), mixed_precision="no")
    plan = make_plan(config, len(used), accelerator.num_processes, most=BATCH)
    found = find_weights(model, weights)
    encoder: Any = open_encoder(model, weights=weights, random_init=random_init, seed=config.seed, device="cpu")
    described = describe(encoder, model, random_init, weights=weights, seed=config.seed)
    model_args, classes = (found and found.model_args) or {}, splits["train"].palette.classes
    design = design_of(encoder, model_args, head, classes, config.width, config.short_side)
    segmenter = build_segmenter(encoder, design, config.drop_path, config.seed)
    crop = config.crop or _size(splits["train"])
    whole = partial(Maps, transform=preparation(config.short_side, design.mean, design.std))
    augment = augmentation(crop, config.scale, config.colour, design.mean, design.std)
    choosing, testing = whole(splits["train"], held), whole(splits["val"], range(len(splits["val"].pictures)))
    task = Task(
        segmenter.to(accelerator.device),
        parameter_groups(segmenter, config),
        Maps(splits["train"], used, augment, config.seed),
        len(used),
        pixel_loss,
        (lambda model: (_score(*evaluate(model, choosing, accelerator, config)), [])) if held else None,
    )
    picture: Any = testing[0, 0][0]
    for height, width in (crop, picture.shape[1:]):
        _check_takes(segmenter, height, width, accelerator.device)

    sources = {name: split.describe() for name, split in splits.items()}
    protocol = variant(f"segment-{head}-2", {name: getattr(DEFAULT, name) for name in FROZEN}, asdict(config))
    run = {"protocol": protocol, "weights_sha256": described["weights_sha256"], "train": sources["train"]["sha256"]}
    run["transform"] = described["transform"]
    trained = fit(task, config, plan, accelerator, out, run, resume)
    best = trained.best or trained.last
    segmenter.load_state_dict(best)
    confusion, loss = evaluate(segmenter.eval(), testing, accelerator, config)
    ious = intersection_over_union(confusion)
    report = Report(
        protocol=protocol,
        model=described,
        data=sources,
        settings={
            **settings_of(config, plan, len(used), len(held)),
            "crop": list(crop),
            "head": head,
        },
        result={
            "metric": "mIoU",
            "scores": {"mIoU": mean_iou(confusion)},
            "headline": mean_iou(confusion),
            "chance": None,
            "pixel_accuracy": float(confusion.diagonal().sum() / confusion.sum()),
            "iou": {name: None if iou.isnan() else float(iou) for name, iou in zip(classes, ious, strict=True)},
            "loss": loss,
            **trained.course(plan, "mIoU"),
        },
        command=command,
    )
    if accelerator.is_main_process:
        save_segmenter(out, best, design)
        report.save(out / RESULT)
    accelerator.wait_for_everyone()
    return report


def parameter_groups(segmenter: Any, config: SegmentConfig) -> list[dict[str, Any]]:
    """Those of a segmenter that train: layers of the encoder with decay, the rest with `head_lr`."""
    groups: list[dict[str, Any]] = []
    new: nn.Module = segmenter.head
    if isinstance(segmenter, PyramidSegmenter):
        encoder: Any = segmenter.encoder
        groups = layer_groups(encoder.model, config.weight_decay, config.layer_decay)
        new = nn.ModuleList([segmenter.levels, segmenter.head])
    rest = param_groups_weight_decay(new, config.weight_decay)
    return [*groups, *({**group, "lr_scale": config.head_lr} for group in rest)]


def pixel_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the labelled pixels: scores (B, C, H, W), labels (B, H, W); 0 where none is labelled."""
    total = F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def evaluate(model: nn.Module, maps: Maps, accelerator: Accelerator, config: TrainConfig) -> tuple[Tensor, float]:
    """Labels whole pictures, one at a time, at the sizes of their label maps.

    Args:
        model: In evaluation mode, on its device.
        maps: Of all processes together.
        accelerator: Of this process.
        config: Says how many processes read.

    Returns:
        The confusion matrix (C, C) int64, true labels down and predicted ones across, of the labelled pixels, and
        their mean cross-entropy.
    """
    mine = [(0, index) for index in range(accelerator.process_index, len(maps), accelerator.num_processes)]
    classes = len(maps.palette.classes)
    confusion, loss = torch.zeros(classes, classes, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    for images, labels, _ in DataLoader(
        maps, sampler=mine, num_workers=usable_workers(config.workers), collate_fn=collate, generator=torch.Generator()
    ):  # fmt: skip
        with torch.no_grad():
            scores = resize(model(images.to(accelerator.device)), labels.shape[1:]).cpu()
        counted = labels != IGNORED
        confusion += confusion_matrix(labels[counted], scores.argmax(dim=1)[counted], classes)
        loss += F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum")
    device = accelerator.device
    confusion = accelerator.reduce(confusion.to(device)).cpu()
    return confusion, float(accelerator.reduce(loss.float().to(device))) / max(1, int(confusion.sum()))


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """(classes, classes) int64: pixels of each true label (down) that got each predicted one (across)."""
    return torch.bincount(labels.flatten() * classes + predicted.flatten(), minlength=classes**2).view(classes, classes)


def intersection_over_union(confusion: Tensor) -> Tensor:
    """(C,) float64: of each class; NaN of one that is neither in the labels nor predicted."""
    both = confusion.diagonal().double()
    return both / (confusion.sum(dim=0) + confusion.sum(dim=1) - both)


def mean_iou(confusion: Tensor) -> float:
    """Mean intersection over union of the classes that are in the labels or predicted."""
    return float(intersection_over_union(confusion).nanmean())


def _score(confusion: Tensor, loss: float) -> dict[str, float]:
    return {"mIoU": mean_iou(confusion), "loss": loss}


def _hold_out(split: MapSplit, config: SegmentConfig) -> tuple[list[int], list[int]]:
    """Which pictures to train on, and which to choose the best weights by."""
    if config.held_out and len(split.pictures) < 2:
        raise DataError(f"{split.root / 'train'}: one picture; give more, or held_out 0")
    used, held = hold_out(torch.zeros(len(split.pictures)).long(), config.held_out, config.seed)
    return used.tolist(), held.tolist()


def _size(split: MapSplit) -> tuple[int, int]:
    """Height and width of the first picture."""
    height, width = read_map(split.maps[0], split.palette).shape
    return height, width


def _check_takes(model: nn.Module, height: int, width: int, device: torch.device) -> None:
    """Raises ConfigError if the encoder does not work on pictures of this size."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, height, width, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(f"the encoder does not take pictures of {height} × {width} pixels: {error}") from error
