"""What every protocol on a frozen encoder starts from, the features and labels of two splits, and its report."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cim_models.errors import ConfigError, DataError
from cim_models.evaluation.cache import split_features
from cim_models.evaluation.encoders import describe, open_encoder
from cim_models.evaluation.features import DEFAULT_WORKERS, Pooling, Precision
from cim_models.evaluation.protocol import Report
from cim_models.evaluation.splits import check_same_classes, read_split, warn_if_shared
from cim_models.files import check_writable
from cim_models.processes import Processes, launched


@dataclass(frozen=True)
class FrozenConfig:
    """How a frozen encoder is measured, whatever the protocol."""

    pooling: Pooling = "patches"
    """What stands for an image: mean of the patch tokens, class token, or both."""
    seed: int = 0
    """Of everything random: weights, order, what is held out, draws."""
    cache: Path | None = None
    """Folder to keep features in, for other protocols to use; by default none are kept."""
    batch_size: int = 64
    """Images at a time."""
    workers: int = DEFAULT_WORKERS
    """Processes that read images."""
    device: str | None = None
    """Such as cuda or cpu; by default the GPU where there is one."""
    precision: Precision = "fp32"
    """Of the encoder; features are fp32."""


DEFAULT = FrozenConfig()


@dataclass
class Labelled:
    """Features of the readable images of a split."""

    features: Tensor
    """(N, D) float32 on the CPU, mapped from a file where there is a cache."""
    labels: Tensor
    """(N,) int64."""


@dataclass
class Frozen:
    """Two splits as an encoder sees them, and all that a report says of that.

    Under a launcher all processes have extracted them, and the first one has them.
    """

    train: Labelled
    val: Labelled
    classes: list[str]
    device: torch.device
    """Where the encoder is, and where to compute with its features."""
    model: dict[str, Any]
    data: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    processes: Processes
    """Of which the first one has the features."""

    def report(
        self, out: Path, command: str, protocol: str, settings: Mapping[str, Any], result: Mapping[str, Any]
    ) -> Report:
        """Makes and writes the report of a protocol, of its own settings and of what it found, chance apart."""
        made = Report(
            protocol=protocol,
            model=self.model,
            data=self.data,
            settings={**self.settings, **settings},
            result={**result, "chance": 1 / len(self.classes)},
            command=command,
        )
        made.save(out)
        return made


def frozen_features(
    model: str,
    train: Path,
    val: Path,
    out: Path,
    config: FrozenConfig,
    *,
    weights: str | None,
    random_init: bool,
    image_size: int | None,
    limit_per_class: int | None,
) -> Frozen:
    """Opens an encoder and extracts the features of both splits; arguments are those of `knn`.

    Unreadable images are left out and named in the report.

    Raises:
        DataError: If a split has fewer than two classes or an empty one, the two differ in their classes, a listed
            image does not exist, no image of a class can be read, or features are not finite; the message names the
            path.
        ConfigError: If a setting cannot work, or `out`, where the report shall lie, cannot be written.
        WeightsError: If there are no such weights, or they do not fit.
    """
    if config.pooling == "dense":
        raise ConfigError("pooling='dense' gives no vector per image: use patches, class or both")
    processes = launched()
    if processes.first:
        check_writable(out)
    splits = {"train": read_split(train, limit_per_class), "val": read_split(val, limit_per_class)}
    check_same_classes(*splits.values())
    if processes.first:
        warn_if_shared(**splits)
    encoder = open_encoder(
        model, weights=weights, random_init=random_init, seed=config.seed, image_size=image_size,
        device=config.device or processes.device,
    )  # fmt: skip
    about = describe(encoder, model, random_init, weights=weights, seed=config.seed)
    labelled, data = {}, {}
    for name, split in splits.items():
        processes.check_same([about, split.paths], f"{split.source} or {model}")
        found = split_features(
            encoder, split, about, config.pooling, cache=config.cache, batch_size=config.batch_size,
            workers=config.workers, precision=config.precision, progress=name, processes=processes,
        )  # fmt: skip
        labels = split.labels[found.indices]
        for label in set(range(len(split.classes))) - set(labels.tolist()) if processes.first else ():
            reason = found.unreadable[int((split.labels == label).nonzero()[0])]
            raise DataError(f"{reason}; no image of the class {split.classes[label]!r} in {split.source} can be read")
        labelled[name] = Labelled(found.features, labels)
        data[name] = {
            **split.fingerprint(),
            "limit_per_class": limit_per_class,
            "unreadable": list(found.unreadable.values()),
        }
    return Frozen(
        **labelled,
        classes=splits["train"].classes,
        device=next(encoder.parameters()).device,
        model=about,
        data=data,
        settings={
            "augmentation": None,
            "pooling": config.pooling,
            "precision": config.precision,
            "seed": config.seed,
        },
        processes=processes,
    )
