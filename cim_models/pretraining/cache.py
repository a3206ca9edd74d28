"""Pictures that are decoded once: in memory that the readers share, or on the training device."""

import multiprocessing
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import roi_align
from tqdm import tqdm

from cim_models.errors import ConfigError, DataError
from cim_models.images import decoded_size
from cim_models.pretraining.config import DataConfig
from cim_models.pretraining.data import Pictures, start_worker
from cim_models.pretraining.memory import free_memory, room
from cim_models.pretraining.readers import Records, read_record
from cim_models.pretraining.shared import machine, shared_memory
from cim_models.processes import ALONE, Processes, launched

SPARE = 0.1
"""Share of the free memory that a cache leaves."""
CHUNK = 64
"""Pictures that a reader sends at once: one by one, their way would take longer than decoding small ones."""


def cached(pictures: Pictures, data: DataConfig, workers: int, device: torch.device) -> Pictures:
    """The pictures of a run, out of the cache that it asks for.

    Raises:
        ConfigError: If they will not fit there, or processes cannot share memory here.
    """
    if data.cache == "ram":
        SharedMemory.of(pictures, workers, launched())
    elif data.cache == "device":
        return OnDevice(pictures, data.cache_side or pictures.min_size, workers, device)
    return pictures


class SharedMemory:
    """Decoded pictures in memory that reading processes share, each there from its first reading on.

    Args:
        records: Pictures.
        min_size: At which they are decoded, see `cim_models.images.read_image`.
        workers: Processes that read the headers, for the sizes.
        processes: That train; those on one machine share one memory, where the system lets them.

    Raises:
        ConfigError: If they will not fit, or processes cannot share memory here.
    """

    def __init__(self, records: Records, min_size: int, workers: int = 0, processes: Processes = ALONE) -> None:
        if "fork" not in multiprocessing.get_all_start_methods() and workers:
            raise ConfigError("data.cache is ram, which needs forked readers here; give data.workers 0")
        sizes = _chunks(_Sizes(records, min_size), workers, "sizes")
        self.ends = np.cumsum([0, *(3 * width * height for chunk in sizes for width, height in chunk)])
        total = int(self.ends[-1])
        copies = 1 if machine() else processes.count
        check_room(total * copies, free_memory(), f"data.cache is ram: {len(records)} decoded pictures")
        self.records, self.min_size, sizes_end = records, min_size, 8 * len(records)
        memory, self.lock = shared_memory(sizes_end + total, processes)
        self.pixels = np.frombuffer(memory, np.uint8, offset=sizes_end)
        self.shapes = np.frombuffer(memory, np.int32, 2 * len(records)).reshape(-1, 2)
        """Height and width of each picture that is there, 0 of the others."""

    @classmethod
    def of(cls, pictures: Pictures, workers: int, processes: Processes = ALONE) -> None:
        """Lets pictures be read from a cache."""
        pictures.cache = cls(pictures.records, pictures.min_size, workers, processes)
        pictures.start_method = "fork"

    def __call__(self, index: int) -> Image.Image:
        """The picture, as `read_record` gives it.

        Raises:
            DataError: If it cannot be read.
        """
        place = self.pixels[self.ends[index] : self.ends[index + 1]]
        with self.lock:
            height, width = self.shapes[index].tolist()
        if height:
            return Image.fromarray(place.reshape(height, width, 3))
        picture = read_record(self.records, index, self.min_size)
        if picture.width * picture.height * 3 == len(place):
            place[:] = np.asarray(picture).reshape(-1)
            with self.lock:  # after the pixels, on any processor
                self.shapes[index] = picture.height, picture.width
        return picture


class _Place(NamedTuple):
    """Where a picture is stored, and its own size."""

    row: int
    width: int
    height: int


class OnDevice(Pictures):
    """Pictures that all lie on the device, stretched to squares; crop and flip are made there, a batch at a time.

    Crops are those of `Pictures`, bilinear averages from the squares. What is read is small: where to crop.

    Args:
        pictures: Whose samples these are.
        side: Of the squares.
        workers: Processes that decode.
        device: Where they are kept.

    Raises:
        ConfigError: If they will not fit there.
    """

    def __init__(self, pictures: Pictures, side: int, workers: int, device: torch.device) -> None:
        vars(self).update(vars(pictures))
        what = f"data.cache is device: {len(pictures)} pictures of {side} × {side}"
        check_room(3 * side * side * len(pictures), room(device), what)
        self.squares = torch.empty(len(pictures), 3, side, side, dtype=torch.uint8, device=device)
        self.sizes = np.zeros((len(pictures), 2), np.int64)
        self.unreadable: dict[int, str] = {}
        first, blank = 0, (np.zeros((3, side, side), np.uint8), (0, 0))
        for chunk in _chunks(_Squares(pictures, side), workers, "pictures to the device"):
            self.unreadable |= {first + row: found for row, found in enumerate(chunk) if isinstance(found, str)}
            squares, sizes = zip(*(blank if isinstance(found, str) else found for found in chunk), strict=True)
            rows = slice(first, first + len(chunk))
            self.squares[rows], self.sizes[rows] = torch.from_numpy(np.stack(squares)).to(device), sizes
            first = rows.stop

    def decode(self, index: int) -> Any:
        """Where the picture is, and its own size.

        Raises:
            DataError: If it could not be read.
        """
        if index in self.unreadable:
            raise DataError(self.unreadable[index])
        return _Place(index, *self.sizes[index].tolist())

    def source(self, picture: Any, uniforms: np.ndarray) -> dict[str, Tensor]:
        """Where to crop: `row` of the squares, `box` (4,) left, top, right, bottom in their pixels, `flip`."""
        left, top, width, height = self.box(picture.width, picture.height, uniforms)
        across, down = (self.squares.shape[-1] / side for side in (picture.width, picture.height))
        box = [left * across, top * down, (left + width) * across, (top + height) * down]
        return {
            "row": torch.tensor(picture.row),
            "box": torch.tensor(box, dtype=torch.float32),
            "flip": torch.tensor(bool(uniforms[-1] < self.flip)),
        }

    def sources(self, batch: dict[str, Any], device: torch.device) -> Tensor:
        """The crops of a batch: uint8 (B, 3, size, size) on the device."""
        row, box, flip = (batch[name].to(device, non_blocking=True) for name in ("row", "box", "flip"))
        number = torch.arange(len(row), device=device, dtype=box.dtype)[:, None]
        squares = self.squares[row].to(device).float()
        crops = roi_align(squares, torch.cat([number, box], dim=1), (self.size, self.size), aligned=True)
        crops = torch.where(flip[:, None, None, None], crops.flip(-1), crops)
        return crops.round_().clamp_(0, 255).to(torch.uint8)

    def __getstate__(self) -> dict[str, Any]:
        """Readers do without the pixels."""
        return {**vars(self), "squares": self.squares[:0].cpu()}


def check_room(needed: int, free: int, what: str) -> None:
    """Refuses a cache that will not fit.

    Raises:
        ConfigError: Saying how much it needs and how much there is.
    """
    if needed > (1 - SPARE) * free:
        raise ConfigError(
            f"{what} take {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free, of which a tenth is left alone; "
            "give data.cache none, or fewer images"
        )


def _chunks(dataset: Any, workers: int, name: str) -> Iterator[list[Any]]:
    """The items of a dataset in order, some at a time, made by so many processes."""
    loader = DataLoader(
        dataset, batch_size=CHUNK, num_workers=workers, worker_init_fn=start_worker, generator=torch.Generator(),
        collate_fn=_as_they_are,
    )  # fmt: skip
    with tqdm(desc=name, total=len(dataset), unit="image", disable=None, leave=False) as bar:
        for chunk in loader:
            yield chunk
            bar.update(len(chunk))


def _as_they_are(items: list[Any]) -> list[Any]:
    return items


class _Sizes(Dataset[tuple[int, int]]):
    """Width and height of each picture as it is decoded, from its header; (0, 0) of one that cannot be read."""

    def __init__(self, records: Records, min_size: int) -> None:
        self.records, self.min_size = records, min_size

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[int, int]:
        try:
            content = self.records.content(index)
            if isinstance(content, str):
                return decoded_size(content, self.min_size)
            return decoded_size(self.records.name(index), self.min_size, content)
        except DataError:
            return 0, 0


class _Squares(Dataset[Any]):
    """Each picture stretched to uint8 (3, side, side), with its width and height; or why it cannot be read.

    As NumPy arrays, which take a shorter way from process to process than small tensors do.
    """

    def __init__(self, pictures: Pictures, side: int) -> None:
        self.pictures, self.side = pictures, side

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        try:
            picture = self.pictures.decode(index)
        except DataError as error:
            return str(error)
        square = picture.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return np.asarray(square).transpose(2, 0, 1), picture.size
