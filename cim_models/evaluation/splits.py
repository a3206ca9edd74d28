"""Labelled images, as folders of classes or as a file of labels, and parts of them."""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cim_models.errors import DataError, some
from cim_models.images import EXTENSIONS, find_images, read_list

logger = logging.getLogger(__name__)


@dataclass
class Split:
    """Labelled images, such as those to train on."""

    source: Path
    """The folder, or the file of labels."""
    classes: list[str]
    """Names of the classes, sorted."""
    paths: list[Path]
    labels: Tensor
    """(N,) int64: index into `classes` of each path."""

    def fingerprint(self) -> dict[str, Any]:
        """Says which images these are: how many, and a sha256 over their sorted relative paths, classes and sizes."""
        classes = [self.classes[label] for label in self.labels.tolist()]
        return {**fingerprint(self.paths, self.source, classes), "classes": len(self.classes)}


def fingerprint(paths: Sequence[Path], source: Path, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """Says which images these are: how many, and a sha256 over their sorted relative paths, classes and sizes.

    Args:
        paths: Of the images.
        source: The folder or file that they come from.
        classes: Of each image, where they have some.
    """
    root = source if source.is_dir() else source.parent
    columns = [[_relative(path, root) for path in paths], *([] if classes is None else [classes]), map(_size, paths)]
    lines = sorted("\t".join(map(str, line)) for line in zip(*columns, strict=True))
    digest = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    return {"path": str(source), "images": len(paths), "sha256": digest}


def read_split(source: str | Path, limit_per_class: int | None = None) -> Split:
    """Lists labelled images.

    Args:
        source: A folder that holds one folder per class, whose images may lie at any depth; or a text file with a line
            `path<TAB>class` or `path,class` for each image, where paths are relative to that file's folder, and blank
            lines and lines that start with # are skipped.
        limit_per_class: Only so many images of each class: the first in order of their paths, or of their lines.

    Raises:
        DataError: If there are fewer than two classes, a class is empty, an image has no class or more than one, or
            a listed image does not exist; the message names the path.
    """
    source = Path(source).expanduser()
    if limit_per_class is not None and limit_per_class < 1:
        raise DataError(f"{source}: limit_per_class={limit_per_class} leaves no image; give 1 or more")
    if source.is_dir():
        found = _class_folders(source)
    elif source.is_file() and source.suffix.lower() not in EXTENSIONS:
        found = _labels_file(source)
    else:
        what = "an image, not labelled ones" if source.is_file() else "no such folder"
        raise DataError(
            f"{source}: {what}; give a folder that holds one folder of images per class, "
            "or a text file with a line `path,class` for each image"
        )
    if len(found) < 2:
        raise DataError(f"{source}: {len(found)} class; accuracy needs at least two")
    classes = sorted(found)
    chosen = [(path, label) for label, name in enumerate(classes) for path in found[name][:limit_per_class]]
    paths, labels = zip(*chosen, strict=True)
    return Split(source, classes, list(paths), torch.tensor(labels))


def check_same_classes(train: Split, val: Split) -> None:
    """Raises DataError, naming the sources, if two splits hold different classes."""
    for split, other in ((train, val), (val, train)):
        extra = sorted(set(split.classes) - set(other.classes))
        if extra:
            raise DataError(f"{split.source} has classes that {other.source} has not: {some(extra)}")


def warn_if_shared(train: Split, val: Split) -> None:
    """Warns of images that are in both splits: accuracy on them says nothing of others."""
    seen = set(map(os.path.abspath, train.paths))
    shared = [path for path in val.paths if os.path.abspath(path) in seen]
    if shared:
        logger.warning("%s: %d images are in %s, too, such as %s", val.source, len(shared), train.source, shared[0])


def draw_per_class(labels: Tensor, count: int | float, seed: int, keep: int = 0) -> Tensor:
    """Draws examples of every class.

    Args:
        labels: (N,) int64.
        count: How many of each class (int); or which share of each class, in (0, 1), rounded, at least one (float).
        seed: Of the draw.
        keep: Examples of each class that are left over, if it has more than these.

    Returns:
        Sorted indices of what was drawn. A class that has fewer gives all but `keep`.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        wanted = count if isinstance(count, int) else max(1, round(count * len(members)))
        order = members[torch.randperm(len(members), generator=generator)]
        drawn.append(order[: max(0, min(wanted, len(members) - keep))])
    return torch.cat(drawn).sort().values


def hold_out(labels: Tensor, share: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Splits training examples in two, to choose a setting without looking at the test set.

    Args:
        labels: (N,) int64.
        share: Of each class that is held out, at least one example where the class has two or more; 0 holds none out.
        seed: Of the draw.

    Returns:
        Sorted indices of the examples to train on, and of those to choose with.

    Raises:
        DataError: If every class has one example only.
    """
    held = draw_per_class(labels, float(share), seed, keep=1) if share else labels[:0]
    if share and not len(held):
        raise DataError("each class has one training image, so none can be held out; give at least two per class")
    kept = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, held, False)
    return kept.nonzero()[:, 0], held


def _class_folders(root: Path) -> dict[str, list[Path]]:
    """{class: images} of a folder of class folders."""
    found: dict[str, list[Path]] = {
        folder.name: [] for folder in sorted(root.iterdir()) if folder.is_dir() and not folder.name.startswith(".")
    }
    for path in find_images(root):
        name = path.relative_to(root).parts[0]
        if name not in found:
            raise DataError(f"{path}: this image is in no class folder; move it into one below {root}")
        found[name].append(path)
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        raise DataError(f"{root / empty[0]}: this class folder holds no image; fill it or remove it")
    return found


def _labels_file(source: Path) -> dict[str, list[Path]]:
    """{class: images} of a file of labels."""
    found: dict[str, list[Path]] = {}
    labels: dict[Path, str] = {}
    for number, line in read_list(source):
        name, separator, label = line.rpartition("\t" if "\t" in line else ",")
        name, label, where = name.strip(), label.strip(), f"{source}, line {number}"
        if not separator or not name or not label:
            raise DataError(f"{where}: {line!r} is not `path<TAB>class` or `path,class`")
        path = source.parent / name
        if not path.is_file():
            raise DataError(f"{where}: there is no image {path}; paths are relative to the folder of the file")
        if path in labels:
            raise DataError(f"{where}: {path} is listed before, as {labels[path]!r}; list each image once")
        labels[path] = label
        found.setdefault(label, []).append(path)
    if not found:
        raise DataError(f"{source}: this file lists no image; write a line `path,class` for each")
    return found


def _relative(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
