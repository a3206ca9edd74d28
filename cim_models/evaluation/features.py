"""Features of any number of images from any timm model, a batch at a time."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cim_models.backbones.modes import evaluation_mode
from cim_models.errors import ConfigError, DataError
from cim_models.hub.load import create_transform
from cim_models.images import read_image
from cim_models.precision import autocast
from cim_models.processes import ALONE, Processes
from cim_models.workers import CORES, usable_workers

Pooling: TypeAlias = Literal["patches", "class", "both", "dense"]
Precision: TypeAlias = Literal["fp32", "bf16"]
Transform: TypeAlias = Callable[[Image.Image], Tensor]
Picture: TypeAlias = str | Path | Image.Image

DEFAULT_WORKERS = min(8, CORES)
LONGEST = 16
"""Of a picture longer than this many times its width only the middle is read: evaluation crops a square from it."""

logger = logging.getLogger(__name__)


class Features(NamedTuple):
    """What an encoder says of some images."""

    features: Tensor
    """(B, D) float32 on the CPU; (B, D, h, w) when dense."""
    indices: Tensor
    """(B,) int64: which of the given images each row is."""
    unreadable: dict[int, str]
    """Index of each image that could not be read, and why: it has no row."""


NONE = Features(torch.empty(0), torch.empty(0, dtype=torch.long), {})
"""Of no image."""


def pool(model: Any, images: Tensor, pooling: Pooling = "patches") -> Tensor:
    """Runs a timm model to its final norm and pools what comes out.

    A norm behind timm's own pooling (`fc_norm`: BEiT, what `finetune` writes) is part of its classifier, and left out.

    Args:
        model: Any timm model.
        images: (B, 3, H, W), normalised.
        pooling: `patches`, the mean of the patch tokens or of the last feature map (B, D); `class`, the class token
            (B, D); `both`, class token and mean beside each other (B, 2 D); `dense`, the map (B, D, h, w).

    Raises:
        ConfigError: If the class token is asked of a model that has none, or a model mixes one with its patches and
            does not say where.
    """
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is None and pooling != "dense" and any("cls_token" in name for name, _ in model.named_parameters()):
        raise ConfigError(
            f"pooling={pooling!r}: {type(model).__name__} does not say which of its tokens are patches, so it cannot "
            "be measured; give another model"
        )
    if pooling in ("class", "both") and (not prefix or getattr(model, "cls_token", None) is None):
        raise ConfigError(f"pooling={pooling!r}: {type(model).__name__} has no class token; use pooling='patches'")
    if pooling == "dense":
        return model.forward_intermediates(images, 1, norm=True, intermediates_only=True, output_fmt="NCHW")[0]
    tokens = model.forward_features(images)
    if tokens.ndim == 4:
        return tokens.mean(dim=(1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else (2, 3))
    parts = {"class": tokens[:, 0], "patches": tokens[:, prefix:].mean(dim=1)}
    return parts[pooling] if pooling in parts else torch.cat([*parts.values()], dim=1)


def extract(
    model: nn.Module,
    images: Sequence[Picture],
    pooling: Pooling = "patches",
    *,
    transform: Transform | None = None,
    batch_size: int = 64,
    workers: int = DEFAULT_WORKERS,
    precision: Precision = "fp32",
    progress: str | None = None,
    processes: Processes = ALONE,
) -> Iterator[Features]:
    """Streams features of images, in their order.

    An image that cannot be read is skipped, named in a warning of the log and in the result. Several processes take the
    batches in turn, each the same ones as a single process would make, and the first yields all of them.

    Args:
        model: Any timm model; it runs where it is, in evaluation mode, and is left as it was.
        images: Files, or pictures themselves.
        pooling: See `pool`.
        transform: RGB picture → (3, H, W); by default the one that belongs to the model's weights.
        batch_size: Images at a time.
        workers: Processes that read images; none are started for a single batch.
        precision: `bf16` runs the encoder in bfloat16; features are float32 in any case.
        progress: Shows a bar of this name on a terminal.
        processes: That share the work, each with the model, the same images and arguments; by default this one alone.

    Yields:
        `Features` of up to `batch_size` images; nothing in processes that are not the first.

    Raises:
        DataError: If no image can be read, or a feature is not finite (naming the image).
        ConfigError: If the model has no such pooling, or a number cannot work.
        CimModelsError: If another process has ended.
    """
    if batch_size < 1 or workers < 0:
        raise ConfigError(f"batch_size={batch_size}, workers={workers}: must be 1 or more, and 0 or more")
    batches = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    mine = batches[processes.rank :: processes.count]
    hidden = None if progress and processes.first else True
    readable = 0
    reasons: list[str] = []
    with evaluation_mode(model), tqdm(desc=progress, total=len(images), unit="image", disable=hidden) as bar:
        found = _features(model, images, mine, pooling, transform or create_transform(model), workers, precision)
        for _ in batches[:: processes.count]:
            for features in processes.gather(next(found, None)):
                if features is None:
                    continue
                for reason in features.unreadable.values():
                    logger.warning("skipped %s", reason)
                reasons += features.unreadable.values()
                readable += len(features.indices)
                yield features
                bar.update(len(features.indices) + len(features.unreadable))
    if processes.first and not readable:
        raise DataError(f"none of {len(images)} images can be read" + (f"; the first: {reasons[0]}" if reasons else ""))


def _features(
    model: nn.Module,
    images: Sequence[Picture],
    batches: list[range],
    pooling: Pooling,
    transform: Transform,
    workers: int,
    precision: Precision,
) -> Iterator[Features]:
    """The features of some batches, given by their indices, in this process."""
    loader = DataLoader(
        _Pictures(images, transform),
        batch_sampler=cast(Any, batches),
        num_workers=usable_workers(workers) if len(batches) > 1 else 0,
        collate_fn=_collate,
        generator=torch.Generator(),
    )
    parameter = next(model.parameters())
    for indices, batch, unreadable in loader:
        features = torch.empty(0)
        if batch is not None:
            with torch.no_grad(), autocast(parameter.device, precision):
                features = pool(model, batch.to(parameter.device, parameter.dtype), pooling).float().cpu()
            broken = ~features.flatten(1).isfinite().all(dim=1)
            if broken.any():
                image = images[int(indices[broken][0])]
                raise DataError(f"{image}: the encoder's features of this image are not finite; check the weights")
        yield Features(features, indices.clone(), unreadable)  # what a reader sent keeps a file open


def extract_all(model: nn.Module, images: Sequence[Picture], *args: Any, **options: Any) -> Features:
    """Collects `extract` in memory, with the same arguments and errors."""
    features, count, indices, unreadable = NONE.features, 0, [NONE.indices], {}
    for batch in extract(model, images, *args, **options):
        unreadable.update(batch.unreadable)
        if len(batch.indices):
            if not len(features):
                features = torch.empty(len(images), *batch.features.shape[1:])
            features[count : count + len(batch.indices)] = batch.features
            count += len(batch.indices)
            indices.append(batch.indices)
    return Features(features[:count], torch.cat(indices), unreadable)


class _Pictures(Dataset[tuple[int, Tensor | str]]):
    """(index, transformed picture), or (index, reason) of one that cannot be read."""

    def __init__(self, images: Sequence[Picture], transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        image = self.images[index]
        if not isinstance(image, Image.Image):
            try:
                image = read_image(image)
            except DataError as error:
                return index, str(error)
        return index, self.transform(middle(image))


def middle(image: Image.Image) -> Image.Image:
    """The middle of a very long picture, which would be huge once its short side is enlarged; others as they are."""
    width, height = (min(side, LONGEST * min(image.size)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)) if (width, height) != image.size else image


def _collate(samples: list[tuple[int, Tensor | str]]) -> tuple[Tensor, Tensor | None, dict[int, str]]:
    """Indices and pictures (B, 3, H, W) of the readable samples, reasons of the others."""
    unreadable = {index: value for index, value in samples if isinstance(value, str)}
    pictures = {index: value for index, value in samples if isinstance(value, Tensor)}
    return torch.tensor(list(pictures)).long(), torch.stack([*pictures.values()]) if pictures else None, unreadable
