"""Pictures with a label for each pixel: read, checked pair by pair, and augmented together."""

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from cim_models.errors import DataError
from cim_models.evaluation.batches import Example, image_seed
from cim_models.evaluation.splits import fingerprint
from cim_models.images import find_images, read_image, read_list

IGNORED = 255
"""The label of pixels that count for nothing."""
UNLABELLED = {"unlabelled", "unlabeled", "unlabelled pixels", "void", "ignore", "ignored"}
"""Names, in small letters, of classes that are none."""


@dataclass
class Palette:
    """What the numbers in label maps mean."""

    classes: list[str]
    """Those that count, in the order of their labels."""
    table: np.ndarray
    """(256,) int16: the label of each number in a file, IGNORED, or -1 for one that means nothing."""


@dataclass
class MapSplit:
    """The pictures of a split and their label maps, which have the same sizes."""

    root: Path
    pictures: list[Path]
    maps: list[Path]
    palette: Palette

    def describe(self) -> dict[str, Any]:
        """For a report: how many, and a sha256 over names and sizes of both."""
        both = fingerprint([*self.pictures, *self.maps], self.root)
        return {**both, "images": len(self.pictures), "classes": len(self.palette.classes), "unreadable": []}


def read_palette(path: Path) -> Palette:
    """Reads a file with a line `number<TAB>name` for each class; 255, and those named as in UNLABELLED, are ignored.

    Raises:
        DataError: Naming the file and the line.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; write a line `number<TAB>name` for each class")
    classes: list[str] = []
    table = np.full(256, -1, dtype=np.int16)
    table[IGNORED] = IGNORED
    known: dict[int, int] = {}
    for line, text in read_list(path):
        digits, _, name = (part.strip() for part in text.partition("\t"))
        if not name or not digits.isdecimal() or int(digits) > 255:
            raise DataError(f"{path}, line {line}: {text!r} is not `number<TAB>name` with a number from 0 to 255")
        number = int(digits)
        if number in known:
            raise DataError(f"{path}, line {line}: the number {number} stands in line {known[number]} already")
        known[number] = line
        if name.lower() in UNLABELLED:
            table[number] = IGNORED
        else:
            table[number] = len(classes)
            classes.append(name)
    if len(classes) < 2:
        raise DataError(f"{path}: {len(classes)} class to tell apart; give at least two")
    return Palette(classes, table)


def read_maps(root: Path, split: str) -> MapSplit:
    """Lists the pictures in `root/split`, each with its label map in `root/splitannot`, and opens every pair once.

    Label maps are PNG files of 8 bits, with the name of the picture.

    Raises:
        DataError: If there are none, a map is missing, of another size, not one, or holds a number that is no class,
            or no pixel of any is labelled; the message names the path.
    """
    palette, folder = read_palette(root / "classes.txt"), root / split
    pictures = find_images(folder)
    maps = [(root / f"{split}annot" / path.relative_to(folder)).with_suffix(".png") for path in pictures]
    missing = [(map_path, path) for map_path, path in zip(maps, pictures, strict=True) if not map_path.is_file()]
    if missing:
        raise DataError(f"{missing[0][0]}: no such file; it is the label map of {missing[0][1]}")

    def check(pair: tuple[Path, Path]) -> bool:
        picture, labels = read_image(pair[0]), read_map(pair[1], palette)
        if picture.size != labels.shape[::-1]:
            sizes = " × ".join(map(str, labels.shape[::-1])), " × ".join(map(str, picture.size))
            raise DataError(f"{pair[1]}: {sizes[0]} pixels, but its picture {pair[0]} has {sizes[1]}")
        return bool((labels != IGNORED).any())

    with ThreadPoolExecutor(2) as threads:
        labelled = list(threads.map(check, zip(pictures, maps, strict=True)))
    if not any(labelled):
        raise DataError(f"{root / f'{split}annot'}: no pixel of these label maps is labelled")
    return MapSplit(root, pictures, maps, palette)


def read_map(path: Path, palette: Palette) -> np.ndarray:
    """(H, W) uint8: a label of the palette or IGNORED for each pixel.

    Raises:
        DataError: If it is not a label map, naming the path.
    """
    try:
        with Image.open(path) as image:
            mode, numbers = image.mode, np.asarray(image)
    except Exception as error:
        raise DataError(f"{path}: not a label map that can be read: {error}") from error
    if mode not in ("L", "P"):
        raise DataError(f"{path}: a picture of mode {mode}; a label map has one number of 8 bits for each pixel")
    labels = palette.table[numbers]
    if (labels < 0).any():
        number, counts = np.unique(numbers[labels < 0], return_counts=True)
        raise DataError(
            f"{path}: {counts[0]} pixels have the number {number[0]}, which classes.txt does not hold; "
            f"it has {len(palette.classes)} classes"
        )
    return labels.astype(np.uint8)


class Maps(Dataset[Example]):
    """(picture (3, H, W) normalised, labels (H', W') int64, []) of keys (epoch, index).

    Args:
        split: Pictures and label maps.
        chosen: Which of them there are.
        transform: (picture, labels) → the same, together.
        seed: Of the transform, if it is random.
    """

    def __init__(
        self, split: MapSplit, chosen: Sequence[int], transform: Callable[..., Any], seed: int | None = None
    ) -> None:
        self.pairs = [(split.pictures[index], split.maps[index]) for index in chosen]
        self.palette, self.transform, self.seed = split.palette, transform, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        epoch, index = key
        picture, labels = self.pairs[index]
        image = v2.functional.to_image(read_image(picture))
        target = tv_tensors.Mask(torch.from_numpy(read_map(labels, self.palette)))
        with contextlib.nullcontext() if self.seed is None else image_seed(self.seed, epoch, index):
            image, target = self.transform(image, target)
        return image.as_subclass(Tensor), target.as_subclass(Tensor).long(), []


def augmentation(
    crop: tuple[int, int], scale: tuple[float, float], colour: float, mean: Sequence[float], std: Sequence[float]
) -> Callable[..., Any]:
    """Random scale, crop, flip and colours of a picture and, but for the colours, of its labels.

    Args:
        crop: Height and width in pixels; what lies outside of the picture is its mean colour, and ignored.
        scale: Least and greatest size, as multiples of the picture that just fits into the crop.
        colour: Strength of changes in brightness, contrast and saturation.
        mean: Of each channel.
        std: Of each channel.
    """
    return v2.Compose(
        [
            v2.ScaleJitter(crop[::-1], scale),  # takes width, height
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(colour, colour, colour),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(mean, std),
            v2.RandomCrop(crop, pad_if_needed=True, fill={tv_tensors.Image: 0.0, tv_tensors.Mask: IGNORED}),
        ]
    )


def preparation(short_side: int | None, mean: Sequence[float], std: Sequence[float]) -> Callable[..., Any]:
    """The whole picture, shrunk or enlarged to a shorter side if one is given; its labels as they are."""

    def prepare(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if short_side is not None:
            image = v2.functional.resize(image, [short_side], antialias=True)
        image = v2.functional.to_dtype(image, torch.float32, scale=True)
        return v2.functional.normalize(image, list(mean), list(std)), target

    return prepare
