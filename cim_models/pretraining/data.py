"""The reader: pictures to batches of uint8 sources and of the random numbers that the views are made from.

All randomness of a sample is a function of (seed, epoch, index) and the order of an epoch one of (seed, epoch): neither
depends on the number of workers or processes, and a run resumes at any step without reading what came before.
"""

import copy
import logging
import math
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from cim_models.errors import ConfigError, DataError
from cim_models.pretraining.readers import Records, read_record

REPLACEMENTS = 100
CROP_TRIES = 10
GRACE = 30
"""Seconds that a reader goes on after SIGTERM, which schedulers send to all processes: one of them has to save."""
_ORDER, _CROP, _VIEWS, _REPLACEMENT = range(4)

logger = logging.getLogger(__name__)


def generator(seed: int, epoch: int, stream: int, index: int = 0) -> np.random.Generator:
    """Returns the random numbers of one purpose: Philox with key (seed, epoch) and counter (stream, index)."""
    key: Any = _Key(seed, epoch)
    return np.random.Generator(np.random.Philox(key, counter=np.array([0, 0, stream, index], dtype=np.uint64)))


class _Key(ISeedSequence):
    """A Philox key as it is; given as `key`, numpy would fetch entropy from the system first and leave it unused."""

    def __init__(self, *words: int) -> None:
        self.words = np.array(words, dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return self.words


class Pictures(Dataset[dict[str, Any]]):
    """Samples of pictures: a random resized crop of each, and uniforms for its exemplars.

    Args:
        records: pictures.
        size: side of the sources, in pixels.
        crop_area: range of the crop's area as a fraction of the picture, drawn uniformly.
        crop_ratio: range of its width over its height, drawn log-uniformly.
        flip: probability of a horizontal flip.
        exemplars: exemplars per picture (K).
        draws: uniforms per exemplar.
        seed: non-negative; of the crops, the flips and the uniforms.
    """

    def __init__(
        self,
        records: Records,
        size: int,
        crop_area: tuple[float, float] = (0.5, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        *,
        exemplars: int,
        draws: int,
        seed: int,
    ):
        self.records = records
        self.cache: Callable[[int], Image.Image] | None = None
        """Gives decoded pictures, if there is one."""
        self.start_method: str | None = None
        """Of reading processes; None: the system's own."""
        self.size, self.crop_area, self.crop_ratio, self.flip = size, crop_area, crop_ratio, flip
        self.exemplars, self.draws, self.seed = exemplars, draws, seed
        self.min_size = math.ceil(size / math.sqrt(crop_area[0] * min(crop_ratio[0], 1 / crop_ratio[1])))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Returns the sample of `key` = (epoch, index).

        An unreadable image is replaced by another one, drawn at random, so that batches keep their size.

        Returns:
            source: uint8 (3, size, size).
            uniforms: float32 (K, draws) in [0, 1).
            index: the index that was asked for.
            failed: a string `path: reason` for each image that could not be read.

        Raises:
            DataError: none of 100 replacements could be read either.
        """
        epoch, index = key
        picture, failed = self._read(epoch, index)
        uniforms = generator(self.seed, epoch, _VIEWS, index).random((self.exemplars, self.draws), dtype=np.float32)
        return {
            **self.source(picture, generator(self.seed, epoch, _CROP, index).random(2 * CROP_TRIES + 3)),
            "uniforms": torch.from_numpy(uniforms),
            "index": index,
            "failed": failed,
        }

    def decode(self, index: int) -> Any:
        """A picture that `source` crops.

        Raises:
            DataError: If it cannot be read.
        """
        return self.cache(index) if self.cache else read_record(self.records, index, self.min_size)

    def _read(self, epoch: int, index: int) -> tuple[Any, list[str]]:
        failed: list[str] = []
        try:
            return self.decode(index), failed
        except DataError as error:
            failed.append(str(error))
        others = generator(self.seed, epoch, _REPLACEMENT, index).integers(len(self), size=REPLACEMENTS)
        for other in dict.fromkeys(others.tolist()):
            if other != index:
                try:
                    return self.decode(other), failed
                except DataError as error:
                    failed.append(str(error))
        raise DataError(
            f"none readable of {len(failed)} images tried (of {len(self)}); check the files. The first: {failed[0]}"
        )

    def source(self, picture: Any, uniforms: np.ndarray) -> dict[str, torch.Tensor]:
        """Resamples a random crop (bicubic, anti-aliased) to a source of uint8 (3, size, size)."""
        left, top, width, height = self.box(picture.width, picture.height, uniforms)
        box = (left, top, left + width, top + height)
        source = np.asarray(picture.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box))
        if uniforms[-1] < self.flip:
            source = source[:, ::-1]
        return {"source": torch.from_numpy(np.ascontiguousarray(source.transpose(2, 0, 1)))}

    def sources(self, batch: dict[str, Any], device: torch.device) -> torch.Tensor:
        """The sources of a batch on a device: uint8 (B, 3, size, size)."""
        return batch["source"].to(device, non_blocking=True)

    def box(self, width: int, height: int, uniforms: np.ndarray) -> tuple[int, int, int, int]:
        """Returns left, top, width, height of a crop: the first of 10 draws that fits, else the largest central one."""
        draws = uniforms.tolist()
        (least, most), (narrow, wide) = self.crop_area, self.crop_ratio
        for area, ratio in zip(draws[:CROP_TRIES], draws[CROP_TRIES : 2 * CROP_TRIES], strict=True):
            area = width * height * (least + area * (most - least))
            ratio = narrow * (wide / narrow) ** ratio
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 1 <= w <= width and 1 <= h <= height:
                return int(draws[-3] * (width - w + 1)), int(draws[-2] * (height - h + 1)), w, h
        w, h = min(width, max(1, round(height * wide))), min(height, max(1, round(width / narrow)))
        return (width - w) // 2, (height - h) // 2, w, h


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one process: its slice of every global batch, from step `start_step` on.

    A global batch is `processes` · `batch_size` consecutive images of the epoch's permutation, and process `rank` takes
    the rank-th slice, so what a step sees depends on their product alone. The last incomplete one is dropped.

    Args:
        length: number of images.
        batch_size: images per process and step.
        seed: non-negative; of the permutations.
        rank: this process, from 0.
        processes: how many there are.
        start_step: the first step to yield.
        total_steps: the step to stop before.

    Raises:
        ConfigError: a global batch needs more images than there are.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        start_step: int = 0,
        *,
        total_steps: int,
    ):
        self.length, self.batch_size, self.seed, self.rank, self.processes = length, batch_size, seed, rank, processes
        self.start_step, self.total_steps = start_step, total_steps
        self.steps_per_epoch = length // (batch_size * processes)
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"{length} images are fewer than one global batch of {batch_size * processes} "
                f"({batch_size} per process × {processes} processes); give a smaller batch size or more images"
            )

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        ordered = -1
        for step in range(self.start_step, self.total_steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != ordered:
                order, ordered = generator(self.seed, epoch, _ORDER).permutation(self.length), epoch
            first = (batch * self.processes + self.rank) * self.batch_size
            yield [(epoch, index) for index in order[first : first + self.batch_size].tolist()]


class Unreadable:
    """The images of a run that could not be read; too many of them are an error.

    Args:
        images: number of images in the set.
        limit: the largest fraction of them that may be unreadable.
    """

    def __init__(self, images: int, limit: float = 0.01):
        self.images, self.limit = images, limit
        self.failed: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self.failed)

    def add(self, failed: Sequence[str]) -> list[str]:
        """Takes strings `path: reason` and returns those not seen before.

        Raises:
            DataError: more than `limit` of the images are unreadable.
        """
        new = [failure for failure in dict.fromkeys(failed) if failure not in self.failed]
        self.failed.update(dict.fromkeys(new))
        if len(self.failed) > self.limit * self.images:
            first = "".join(f"\n  {failure}" for failure in list(self.failed)[:5])
            raise DataError(
                f"{len(self.failed)} of {self.images} images could not be read so far, more than "
                f"{self.limit:.0%}; repair them or leave them out. The first of them:{first}"
            )
        return new


class _Loader(DataLoader[dict[str, Any]]):
    """A DataLoader that raises a worker's DataError with its own message instead of the worker's traceback."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except DataError as error:
            traceback.clear_frames(error.__traceback__)  # or a cycle of them keeps the readers
            raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from error


def loader(pictures: Pictures, batches: GlobalBatches, workers: int) -> DataLoader[dict[str, Any]]:
    """Returns batches in order: source uint8 (B, 3, size, size), uniforms (B, K, draws), index int64 (B,), failed list.

    Args:
        pictures: the samples.
        batches: which of them, step by step.
        workers: reading processes; 0 reads in this one.
    """
    return _Loader(
        pictures,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=start_worker,
        multiprocessing_context=pictures.start_method if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


def batch_of(pictures: Pictures, batches: GlobalBatches, step: int) -> dict[str, Any]:
    """The batch of one step, read again, with its sources."""
    again = copy.copy(batches)
    again.start_step, again.total_steps = step, step + 1
    batch = next(iter(loader(pictures, again, 0)))
    return {**batch, "source": pictures.sources(batch, torch.device("cpu"))}


def in_order(pictures: Pictures, workers: int) -> Iterator[dict[str, Any]]:
    """Samples of epoch 0, one by one, in the order of the pictures; any number of them can be kept."""
    keys: Any = [(0, index) for index in range(len(pictures))]
    for sample in _Loader(
        pictures, sampler=keys, batch_size=None, num_workers=workers, worker_init_fn=start_worker,
        generator=torch.Generator(),
    ):  # fmt: skip
        yield copy.deepcopy(sample)  # what a reader sent keeps a file open, of which many systems allow 1,024


def start_worker(worker: int) -> None:
    """A reader leaves it to the training process to end it after a signal that both of them got."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks tensors, and joins the lists of what failed."""
    batch: dict[str, Any] = {
        name: torch.stack([sample[name] for sample in samples])
        for name, value in samples[0].items()
        if isinstance(value, torch.Tensor)
    }
    batch["index"] = torch.tensor([sample["index"] for sample in samples])
    batch["failed"] = [failure for sample in samples for failure in sample["failed"]]
    return batch
