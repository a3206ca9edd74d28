"""Weighted k-nearest-neighbour accuracy of frozen features: what an encoder knows without any training on top."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cim_models.errors import ConfigError, DataError
from cim_models.evaluation.frozen import DEFAULT, FrozenConfig, frozen_features
from cim_models.evaluation.protocol import Report, command_of, variant

PROTOCOL = "knn-1"
KS = (10, 20, 50, 100, 200)
HEADLINE = 20
TEMPERATURE = 0.07


class Neighbours(NamedTuple):
    """The nearest gallery rows of some queries, nearest first."""

    similarities: Tensor
    """(B, k) cosine similarities, float32."""
    indices: Tensor
    """(B, k) rows of the gallery."""


def nearest(queries: Tensor, gallery: Tensor, k: int, chunk: int = 16384) -> Iterator[Neighbours]:
    """Finds nearest neighbours by cosine similarity, a block of the similarity matrix at a time.

    Whatever the sizes, no more than `chunk` gallery rows and 1024 × chunk similarities exist at once beside the
    arguments, which may be on another device than the one computed on (that of the queries) and mapped from a file.

    Args:
        queries: (M, D) float.
        gallery: (N, D) float.
        k: Neighbours of each query, at most N.
        chunk: Gallery rows at a time.

    Yields:
        `Neighbours` of up to 1024 queries, in order.
    """
    for block in queries.split(1024):
        block = F.normalize(block.float(), dim=1)
        similarities = block.new_empty(len(block), 0)
        indices = torch.empty_like(similarities, dtype=torch.long)
        for start in range(0, len(gallery), chunk):
            rows = F.normalize(gallery[start : start + chunk].to(block.device, torch.float32), dim=1)
            best = (block @ rows.T).topk(min(k, len(rows)), dim=1)
            similarities = torch.cat([similarities, best.values], dim=1)
            indices = torch.cat([indices, best.indices + start], dim=1)
            similarities, order = similarities.sort(dim=1, descending=True, stable=True)
            similarities, indices = similarities[:, :k], indices.gather(1, order[:, :k])
        yield Neighbours(similarities, indices)


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    chunk: int = 16384,
) -> Iterator[dict[int, Tensor]]:
    """Lets the k nearest training images vote, each with the weight exp(cosine similarity / temperature).

    Args:
        train_features: (N, D) float.
        train_labels: (N,) int64 in [0, C).
        test_features: (M, D) float; the computation runs on their device.
        ks: Numbers of voters, each in 1 … N.
        temperature: Above 0; small values trust the nearest image.
        chunk: Training rows at a time.

    Yields:
        For up to 1024 test images at a time, in order: {k: (B,) predicted labels}; of equal votes the lower label.

    Raises:
        ConfigError: If a k or the temperature is out of range.
    """
    if not ks or min(ks) < 1 or max(ks) > len(train_features):
        raise ConfigError(f"ks={tuple(ks)}: each must be between 1 and the {len(train_features)} training images")
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature}: must be above 0")
    classes = int(train_labels.max()) + 1
    train_labels = train_labels.to(test_features.device)
    for similarities, indices in nearest(test_features, train_features, max(ks), chunk):
        weights = ((similarities - similarities[:, :1]) / temperature).exp()
        voted = train_labels[indices]
        predictions = {}
        for k in ks:
            votes = weights.new_zeros(len(weights), classes).scatter_add_(1, voted[:, :k], weights[:, :k])
            predictions[k] = votes.argmax(dim=1)
        yield predictions


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    chunk: int = 16384,
) -> dict[int, float]:
    """Measures the accuracy of `knn_predict`, with the same arguments and errors.

    Args:
        test_labels: (M,) int64.

    Returns:
        {k: share of test images with the right label, in [0, 1]}.
    """
    hits = dict.fromkeys(ks, 0)
    labels = iter(test_labels.to(test_features.device).split(1024))
    for predictions in knn_predict(train_features, train_labels, test_features, ks, temperature, chunk):
        right = next(labels)
        for k, predicted in predictions.items():
            hits[k] += int((predicted == right).sum())
    return {k: count / len(test_features) for k, count in hits.items()}


def knn(
    model: str,
    train: Path,
    val: Path,
    /,
    out: Path = Path("knn.json"),
    *,
    weights: str | None = None,
    random_init: bool = False,
    ks: tuple[int, ...] = KS,
    temperature: float = TEMPERATURE,
    image_size: int | None = None,
    limit_per_class: int | None = None,
    config: FrozenConfig = DEFAULT,
) -> Report:
    """Measures the weighted kNN accuracy of a frozen encoder on labelled images.

    Args:
        model: Name of a model or of released weights, a release folder, a run directory, a weights file, or any model
            of timm.
        train: The images that vote: a folder of class folders, or a file with a line `path,class` for each.
        val: The images to classify, of the same classes, in the same form.
        out: JSON file for the whole protocol and the result.
        weights: A checkpoint file for the architecture that `model` names, of whatever method. `FILE#PREFIX` chooses
            among several encoders in it.
        random_init: Random weights in the same architecture, with the same transform: the baseline to compare with.
        ks: Numbers of voters; those above the number of training images are left out. The headline is 20.
        temperature: Of the weights exp(cosine similarity / temperature).
        image_size: Pixels of the side of what the encoder sees; by default what its weights say.
        limit_per_class: Only the first images of each class, in order of their names, of both splits.
        config: How the encoder is looked at.

    Raises:
        DataError: As `frozen_features`, or if too few images vote for any k.
        ConfigError: If a setting cannot work.
        WeightsError: If there are no such weights, or they do not fit.
    """
    command = command_of("evaluate knn", knn, locals())
    if not ks or min(ks) < 1 or not temperature > 0:
        raise ConfigError(f"ks={ks}, temperature={temperature}: both must be above 0, and one k given")
    frozen = frozen_features(
        model, train, val, out, config, weights=weights, random_init=random_init, image_size=image_size,
        limit_per_class=limit_per_class,
    )  # fmt: skip

    def measure() -> Report:
        features, labels = frozen.train.features, frozen.train.labels
        usable = tuple(k for k in ks if k <= len(features))
        if not usable:
            raise DataError(f"{train}: {len(features)} images are too few for k={min(ks)}; give a smaller k")
        queries = frozen.val.features.to(frozen.device)
        accuracies = knn_accuracy(features, labels, queries, frozen.val.labels, usable, temperature)
        return frozen.report(
            out,
            command,
            variant(PROTOCOL, {"temperature": TEMPERATURE}, {"temperature": temperature}),
            settings={"similarity": "cosine", "temperature": temperature},
            result={
                "metric": "top-1",
                "scores": {f"k={k}": accuracy for k, accuracy in accuracies.items()},
                "headline": accuracies.get(HEADLINE),
            },
        )

    return frozen.processes.by_first(measure)
