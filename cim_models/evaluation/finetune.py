"""Fine-tuning of a whole encoder on labelled images; the result is a release folder that classifies."""

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.data import Mixup, resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import VisionTransformer, save_for_hf
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cim_models.errors import ConfigError, DataError
from cim_models.evaluation.batches import Example, collate, image_seed
from cim_models.evaluation.encoders import describe, find_weights, open_encoder, rebuilt
from cim_models.evaluation.features import middle
from cim_models.evaluation.protocol import Report, command_of, variant
from cim_models.evaluation.recipe import TrainConfig, make_plan
from cim_models.evaluation.splits import Split, check_same_classes, hold_out, read_split, warn_if_shared
from cim_models.evaluation.training import Task, Trained, check_new, fit, layer_groups, settings_of
from cim_models.hub.card import NOT_STATED
from cim_models.hub.entry import Data, Entry, Metric, Preprocessing
from cim_models.hub.folder import BLANK, staging, write_folder
from cim_models.hub.load import create_transform
from cim_models.hub.provenance import called, released
from cim_models.hub.weights import Weights
from cim_models.images import read_image
from cim_models.processes import without_gpus
from cim_models.workers import usable_workers

PROTOCOL = "finetune-1"
RESULT = "finetune.json"
FROZEN = ("lr", "layer_decay", "weight_decay", "drop_path", "mixup", "cutmix", "smoothing", "erasing", "auto_augment")
"""Settings of a recipe that are part of the protocol's name where they are others; the budget is not."""


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """The released recipe for fine-tuning: all of `TrainConfig`, and how images are augmented."""

    drop_path: float = 0.1
    """Greatest stochastic depth."""
    mixup: float = 0.8
    """Alpha of mixing two images; 0 never does."""
    cutmix: float = 1.0
    """Alpha of pasting a part of an image into another; 0 never does."""
    smoothing: float = 0.1
    """Of the labels."""
    erasing: float = 0.25
    """Probability of erasing a rectangle."""
    auto_augment: str = "rand-m9-mstd0.5-mmax9-inc1"
    """RandAugment in timm's words; none has none. The released magnitude of 9 is also the greatest: at 10, timm asks
    Pillow to keep no bit of a colour, which Pillow refuses."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Least and greatest area of the crop, as a fraction of the picture's."""


DEFAULT = FinetuneConfig()


def finetune(
    model: str,
    train: Path,
    val: Path,
    /,
    out: Path,
    *,
    weights: str | None = None,
    random_init: bool = False,
    from_scratch: bool = False,
    image_size: int | None = None,
    limit_per_class: int | None = None,
    config: FinetuneConfig = DEFAULT,
    tag: str | None = None,
    resume: bool = False,
) -> Report:
    """Trains a whole encoder with a classifier on labelled images, and measures it once on others.

    A tenth of the training images chooses the epoch whose weights are kept; the validation images are read at the end.
    Runs unchanged on one CPU, one GPU, or under `accelerate launch` on many.

    Args:
        model: Name of a model or of released weights, a release folder, a run directory, or any model of timm.
        train: Folder of class folders, or a file with a line `path,class` for each image.
        val: The same, with the same classes.
        out: Run directory. It becomes a release folder of the best weights, which create_model and timm load; `last`
            in it is one of the last weights, finetune.json the result with its whole protocol.
        weights: Start from these instead: for a model of timm a checkpoint file of any method.
        random_init: Start from random weights in the same architecture, with the same recipe.
        from_scratch: The same with one learning rate for all layers, as random weights need it.
        image_size: Pixels of the side of what the encoder sees; by default what its weights say.
        limit_per_class: Only the first images of each class, in order of their names, of both splits.
        config: The recipe.
        tag: Of the release, whose id is ARCHITECTURE.TAG; by default the name of `out`.
        resume: Go on with the run in `out`, which ends as if it had never stopped.

    Raises:
        DataError: If the classes are fewer than two, differ between the splits, or one is empty.
        ConfigError: If a setting cannot work, or the loss stops being finite.
        CheckpointError: If `out` holds a run that is not to be resumed, or what it holds is of another run.
        WeightsError: If there are no such weights, or they do not fit.
    """
    command = command_of("evaluate finetune", finetune, {**locals(), "resume": False})
    protocol = variant(PROTOCOL, {name: getattr(DEFAULT, name) for name in FROZEN}, asdict(config))
    config.check()
    out = Path(out)
    tag = tag or re.sub(r"\W+", "_", out.resolve().name).strip("_") or "finetuned"
    if not re.fullmatch(r"[\w.-]*\w", tag):
        raise ConfigError(f"tag={tag!r}: give letters, digits, dots, hyphens and underscores")
    check_new(out, resume)
    if from_scratch:
        config = dataclasses.replace(config, layer_decay=1.0)
    random_init = random_init or from_scratch
    splits = {"train": read_split(train, limit_per_class), "val": read_split(val, limit_per_class)}
    check_same_classes(*splits.values())
    used, held = _hold_out(splits["train"], config)
    classes = splits["train"].classes

    accelerator = Accelerator(cpu=without_gpus(), mixed_precision="no")
    if accelerator.is_main_process:
        warn_if_shared(**splits)
    plan = make_plan(config, len(used), accelerator.num_processes, even=bool(config.mixup or config.cutmix))
    found = find_weights(model, weights)
    encoder: Any = open_encoder(
        model, weights=weights, random_init=random_init, seed=config.seed, image_size=image_size, device="cpu"
    )
    described = describe(encoder, model, random_init, weights=weights, seed=config.seed)
    classifier = build_classifier(encoder, (found and found.model_args) or {}, len(classes), config)
    del encoder
    data = {name: {**split.fingerprint(), "limit_per_class": limit_per_class} for name, split in splits.items()}
    run = {"protocol": PROTOCOL, "weights_sha256": described["weights_sha256"], "train": data["train"]["sha256"]}
    run["transform"] = described["transform"]
    task = _task(classifier.to(accelerator.device), splits["train"], used, held, config, accelerator)
    trained = fit(task, config, plan, accelerator, out, run, resume)

    classifier.load_state_dict(trained.best or trained.last)
    pictures = Pictures(splits["val"], range(len(splits["val"].paths)), create_transform(classifier))
    accuracy, unreadable = evaluate(classifier.eval(), pictures, accelerator, config)
    data["train"]["unreadable"], data["val"]["unreadable"] = trained.unreadable, unreadable
    scores = {name: accuracy[name] for name in ("top-1", "top-5") if name != "top-5" or len(classes) > 5}
    report = Report(
        protocol=protocol,
        model=described,
        data=data,
        settings={
            **settings_of(config, plan, len(used), len(held)),
            "from_scratch": from_scratch,
            "warmup_steps": plan.warmup,
        },
        result={
            "metric": "accuracy",
            "scores": scores,
            "headline": scores["top-1"],
            "chance": 1 / len(classes),
            "loss": accuracy["loss"],
            **trained.course(plan, "top-1"),
        },
        command=command,
    )
    if accelerator.is_main_process:
        _release(out, classifier, found, trained, report, classes, tag)
        report.save(out / RESULT)
    accelerator.wait_for_everyone()
    return report


def build_classifier(encoder: Any, model_args: Any, classes: int, config: FinetuneConfig) -> Any:
    """An encoder with a new linear classifier: after mean pooling and a LayerNorm where it is a vision transformer."""
    changes: dict[str, Any] = {"num_classes": classes}
    if isinstance(encoder, VisionTransformer):
        changes |= {"global_pool": "avg", "fc_norm": True}
    if config.drop_path:
        changes["drop_path_rate"] = config.drop_path
    classifier = rebuilt(encoder, model_args, config.seed, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        linear = classifier.get_classifier()
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return classifier


def training_transform(classifier: nn.Module, config: FinetuneConfig) -> Callable[[Any], Tensor]:
    """timm's random augmentation: RGB picture → (3, H, W) float32, normalised; ConfigError if it does not know one."""
    try:
        return create_transform(
            classifier,
            is_training=True,
            scale=config.crop_area,
            auto_augment=None if config.auto_augment in ("", "none") else config.auto_augment,
            color_jitter=None,
            re_prob=config.erasing,
            re_mode="pixel",
        )
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"auto_augment={config.auto_augment!r} is not in timm's words: {error}") from error


class Pictures(Dataset[Example]):
    """(picture (3, H, W), label, reasons) of keys (epoch, index).

    Args:
        split: Labelled images.
        chosen: Which of them there are.
        transform: RGB picture → tensor.
        seed: Of the augmentation. With it, an image that cannot be read is replaced by the next one; without, it is
            left out.
    """

    def __init__(
        self, split: Split, chosen: Sequence[int], transform: Callable[[Any], Tensor], seed: int | None = None
    ) -> None:
        self.paths = [split.paths[index] for index in chosen]
        self.labels = split.labels[torch.tensor(list(chosen)).long()]
        self.transform, self.seed, self.source = transform, seed, split.source

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        epoch, index = key
        failed: list[str] = []
        for place in range(index, index + (1 if self.seed is None else len(self))):
            place %= len(self)
            try:
                picture = middle(read_image(self.paths[place]))
            except DataError as error:
                failed.append(str(error))
                continue
            with contextlib.nullcontext() if self.seed is None else image_seed(self.seed, epoch, index):
                return self.transform(picture), self.labels[place], failed
        if self.seed is None:
            return None, None, failed
        raise DataError(f"{self.source}: none of {len(self)} training images can be read; the first: {failed[0]}")


def evaluate(
    model: nn.Module, pictures: Pictures, accelerator: Accelerator, config: TrainConfig
) -> tuple[dict[str, float], list[str]]:
    """Measures a classifier.

    Args:
        model: In evaluation mode, on its device.
        pictures: Of all processes together.
        accelerator: Of this process.
        config: Says how many images at a time.

    Returns:
        top-1 and top-5 accuracy in [0, 1] and the mean cross-entropy `loss` of the readable images, and
        `path: reason` of the others.

    Raises:
        DataError: If none can be read.
    """
    mine = [(0, index) for index in range(accelerator.process_index, len(pictures), accelerator.num_processes)]
    sums = torch.zeros(4, dtype=torch.float64)
    failed: list[str] = []
    for images, labels, reasons in DataLoader(
        pictures, config.device_batch, sampler=mine, num_workers=usable_workers(config.workers), collate_fn=collate,
        generator=torch.Generator(),
    ):  # fmt: skip
        failed += reasons
        if images is not None:
            with torch.no_grad():
                sums += batch_sums(model(images.to(accelerator.device)).float().cpu(), labels)
    right, right5, loss, count = accelerator.reduce(sums.float().to(accelerator.device)).tolist()
    unreadable = sorted(gather_object(failed))
    if not count:
        raise DataError(f"{pictures.source}: none of {len(pictures)} images can be read; the first: {unreadable[0]}")
    return {"top-1": right / count, "top-5": right5 / count, "loss": loss / count}, unreadable


def batch_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """(4,) float64: how many labels (B,) are the greatest of the logits (B, C), how many of the five greatest, the sum
    of the cross-entropies, and B."""
    right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([right[:, 0].sum(), right.sum(), loss, torch.tensor(len(labels))]).double()


def _hold_out(split: Split, config: FinetuneConfig) -> tuple[list[int], list[int]]:
    """Which images to train on, and which to choose the best weights by."""
    try:
        used, held = hold_out(split.labels, config.held_out, config.seed)
    except DataError as error:
        raise DataError(f"{split.source}: {error}, or held_out 0") from error
    return used.tolist(), held.tolist()


def _task(
    classifier: Any, split: Split, used: list[int], held: list[int], config: FinetuneConfig, accelerator: Accelerator
) -> Task:
    """What the loop trains and measures."""
    choosing = Pictures(split, held, create_transform(classifier))
    task = Task(
        classifier,
        layer_groups(classifier, config.weight_decay, config.layer_decay),
        Pictures(split, used, training_transform(classifier, config), config.seed),
        len(used),
        LabelSmoothingCrossEntropy(config.smoothing),
        (lambda model: evaluate(model, choosing, accelerator, config)) if held else None,
    )
    if config.mixup or config.cutmix:
        task.loss = SoftTargetCrossEntropy()
        task.augment = Mixup(
            config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classifier.num_classes
        )
    return task


def _release(
    out: Path, model: Any, found: Weights | None, trained: Trained, report: Report, classes: list[str], tag: str
) -> None:
    """Makes a release folder of the best weights of `out`, and one of the last weights of `out/last`."""
    for folder, tensors, which in ((out / "last", trained.last, "last"), (out, trained.best or trained.last, "best")):
        with staging(out / "release") as (temporary, _):
            if found is None:
                model.load_state_dict(tensors)
                save_for_hf(model, str(temporary), {"label_names": classes}, safe_serialization=True)
            else:
                entry = _entry(model, found, report, f"{tag}_last" if which == "last" else tag, which)
                write_folder(temporary, entry, {"backbone": tensors}, {}, classes)
            folder.mkdir(exist_ok=True)
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
                shutil.move(file, folder / file.name)


def _entry(model: Any, found: Weights, report: Report, tag: str, which: str) -> Entry:
    """What is known of the release without its tensors."""
    random = report.model["random_init"]
    source = None if random else released(found)
    config = resolve_model_data_config(model)
    size = tuple(config["input_size"])
    train_name, val_name = (Path(report.data[name]["path"]).name for name in ("train", "val"))
    start = "random weights" if random else called(found)
    args = {key: value for key, value in (found.model_args or {}).items() if key != "num_classes"}
    if isinstance(model, VisionTransformer):
        args |= {"global_pool": "avg", "fc_norm": True}
    return Entry(
        id=f"{found.architecture}.{tag}",
        architecture=found.architecture,
        model_args=args,
        num_classes=model.num_classes,
        kind="finetuned",
        encoder=None,
        sources=(),
        preprocessing=Preprocessing(
            size, config["mean"], config["std"], config["interpolation"], config["crop_pct"], config["crop_mode"]
        ),  # fmt: skip
        pretext=None,
        dtype="float32",
        licence=source.licence if source else NOT_STATED,
        data=(*(source.data if source else ()), Data(train_name, NOT_STATED)),
        metrics=(Metric("finetune_top1", report.result["headline"], val_name, report.command),) * (which == "best"),
        summary=f"{found.architecture} from {start}, fine-tuned on {model.num_classes} classes "
        f"for {report.result['epochs']:g} epochs: its {which} weights.",
        released=date.today().isoformat(),
        **BLANK,
    )
