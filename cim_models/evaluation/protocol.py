"""What makes a number repeatable: class folders with a fingerprint, and a report of what was measured and how."""

import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from platform import python_version
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor

from cim_models import __version__
from cim_models.errors import DataError
from cim_models.files import replacing
from cim_models.images import find_images


@dataclass
class ClassFolders:
    """The images of a split: one folder per class."""

    root: Path
    classes: list[str]
    """Names of the folders, sorted."""
    paths: list[Path]
    labels: Tensor
    """(N,) int64: index into `classes` of each path."""

    def fingerprint(self) -> dict[str, Any]:
        """Says which images these are, of how many classes."""
        return {**fingerprint(self.paths, self.root), "classes": len(self.classes)}


def fingerprint(paths: Sequence[Path], root: Path) -> dict[str, Any]:
    """Says which images these are: how many, and a sha256 over their sorted paths below `root` and their sizes."""
    names = (path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name for path in paths)
    lines = sorted(f"{name}\t{path.stat().st_size}" for name, path in zip(names, paths, strict=True))
    digest = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    return {"path": str(root), "images": len(paths), "sha256": digest}


def class_folders(root: str | Path, limit_per_class: int | None = None) -> ClassFolders:
    """Lists a folder of class folders, whose images may lie at any depth.

    Args:
        root: The folder.
        limit_per_class: Only so many images of each class, the first in order of their paths.

    Raises:
        DataError: If there are fewer than two classes, one is empty, or an image lies in none.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give a folder that holds one folder of images per class")
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
    if len(found) < 2:
        raise DataError(f"{root}: {len(found)} class folder; accuracy needs at least two")
    chosen = [(path, label) for label, name in enumerate(found) for path in found[name][:limit_per_class]]
    paths, labels = zip(*chosen, strict=True)
    return ClassFolders(root, list(found), list(paths), torch.tensor(labels))


def check_same_classes(train: ClassFolders, val: ClassFolders) -> None:
    """Raises DataError, naming the folders, if two splits hold different classes."""
    for split, other in ((train, val), (val, train)):
        extra = sorted(set(split.classes) - set(other.classes))
        if extra:
            names = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
            raise DataError(f"{split.root} has class folders that {other.root} has not: {names}")


@dataclass
class Report:
    """A measurement and how it was made; `str` gives its table, `save` writes all of it."""

    protocol: str
    """Name and version: results of different versions are not compared."""
    model: dict[str, Any]
    """`encoders.describe`: name, transform, sha256 of the weights."""
    data: dict[str, dict[str, Any]]
    """For each split its fingerprint."""
    settings: dict[str, Any]
    result: dict[str, Any]
    table: Sequence[Sequence[str]]
    """Rows to print, the heading first."""
    command: str = field(default_factory=lambda: shlex.join(sys.argv))
    versions: dict[str, str] = field(
        default_factory=lambda: {
            "cim_models": __version__,
            "python": python_version(),
            **{package.__name__: str(package.__version__) for package in (torch, torchvision, timm)},
        }
    )

    def save(self, path: Path) -> None:
        """Writes everything but the table as JSON.

        Raises:
            ConfigError: If it cannot be written.
        """
        fields = {name: value for name, value in asdict(self).items() if name != "table"}
        with replacing(path) as file:
            file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.table, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in self.table
        )
