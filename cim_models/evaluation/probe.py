"""Nearest neighbours while a run goes on: a probe that `cim_models.pretrain` takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cim_models.errors import DataError
from cim_models.evaluation.features import DEFAULT_WORKERS, Pooling, extract_all
from cim_models.evaluation.knn import HEADLINE, TEMPERATURE, knn_accuracy
from cim_models.evaluation.splits import Split, check_same_classes, read_split
from cim_models.hub.load import create_transform
from cim_models.pretext.model import CIM


def knn_probe(
    train: str | Path,
    val: str | Path,
    *,
    k: int = HEADLINE,
    encoders: tuple[Literal["online", "target"], ...] = ("online", "target"),
    pooling: Pooling = "patches",
    image_size: int | None = None,
    limit_per_class: int | None = None,
    batch_size: int = 64,
    workers: int = DEFAULT_WORKERS,
) -> Callable[[CIM], dict[str, float]]:
    """Makes a probe: `pretrain(config, probe=knn_probe("train", "val"))`; the splits are read and checked at once.

    The numbers are those of `knn` for the same settings, in fp32.

    Args:
        train: The labelled images that vote; see `cim_models.evaluation.splits.read_split`.
        val: The images to classify, of the same classes.
        k: Voters.
        encoders: Which to measure; a run without a moving average has the online one alone.
        pooling: See `cim_models.evaluation.features.pool`.
        image_size: Pixels of the side of what an encoder sees; by default that of its position embedding.
        limit_per_class: Only the first images of each class, of both splits: a probe costs their forward passes.
        batch_size: Images at a time.
        workers: Processes that read images.

    Returns:
        A function of a `CIM` that gives {`knn_online`: accuracy in [0, 1], `knn_target`: …}.

    Raises:
        DataError: If a split has fewer than two classes, the two differ in them, or fewer than k images vote.
    """
    voters, queries = (read_split(source, limit_per_class) for source in (train, val))
    check_same_classes(voters, queries)
    if len(voters.paths) < k:
        raise DataError(f"{train}: {len(voters.paths)} images are too few for k={k}; give a smaller k")
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}

    def measured(encoder: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
        found = extract_all(
            encoder, split.paths, pooling, transform=create_transform(encoder, **size), batch_size=batch_size,
            workers=workers,
        )  # fmt: skip
        return found.features, split.labels[found.indices]

    def probe(cim: CIM) -> dict[str, float]:
        accuracies = {}
        for name in encoders:
            encoder: nn.Module | None = getattr(cim, name)
            if encoder is not None:
                with torch.autocast(next(encoder.parameters()).device.type, enabled=False):
                    seen, asked = measured(encoder, voters), measured(encoder, queries)
                accuracies[f"knn_{name}"] = knn_accuracy(*seen, *asked, (k,), TEMPERATURE)[k]
        return accuracies

    return probe
