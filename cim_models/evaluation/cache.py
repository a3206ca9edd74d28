"""Features on disk: extracted once for the same weights, images, transform, pooling and precision."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cim_models.evaluation.features import DEFAULT_WORKERS, NONE, Features, Pooling, Precision, extract, extract_all
from cim_models.evaluation.rows import RowWriter
from cim_models.evaluation.splits import Split
from cim_models.files import replacing
from cim_models.hub.digest import sha256
from cim_models.processes import ALONE, Processes

CHECKED = 8
"""Images whose features are computed again before a cache is used."""
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Relative difference of a row that rounding explains."""

logger = logging.getLogger(__name__)


def split_features(
    encoder: nn.Module,
    split: Split,
    about: Mapping[str, Any],
    pooling: Pooling = "patches",
    *,
    cache: Path | None = None,
    batch_size: int = 64,
    workers: int = DEFAULT_WORKERS,
    precision: Precision = "fp32",
    progress: str | None = None,
    processes: Processes = ALONE,
) -> Features:
    """Extracts the features of a split, or takes them from a cache.

    A cached file is used only if its checksum is right and the features of a few images, computed again, are what it
    says; otherwise it is made anew. It is written row by row, and mapped when it is read.

    Args:
        encoder: As for `features.extract`, like all that is not named here.
        split: Its images.
        about: `encoders.describe` of the encoder.
        cache: A folder, made if there is none; by default nothing is kept.

    Returns:
        The features; none in processes that are not the first.

    Raises:
        DataError: As `features.extract`.
        ConfigError: As `features.extract`, and if the cache cannot be written.
    """
    options: dict[str, Any] = dict(
        batch_size=batch_size, workers=workers, precision=precision, progress=progress, processes=processes
    )  # fmt: skip
    if cache is None:
        return extract_all(encoder, split.paths, pooling, **options)
    key = {
        "weights_sha256": about["weights_sha256"],
        "transform": about["transform"],
        "images_sha256": _digest(split),
        "pooling": pooling,
        "precision": precision,
    }
    key = json.loads(json.dumps(key))
    folder = Path(cache).expanduser() / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    stored = _read(folder, key, encoder, split) if processes.first else None
    if processes.by_first(lambda: stored is not None):
        return stored or NONE
    if not processes.first:
        return extract_all(encoder, split.paths, pooling, **options)
    unreadable: dict[int, str] = {}
    file = folder / "features.safetensors"
    with replacing(file) as temporary, temporary.open("wb") as stream:
        rows = RowWriter(stream, len(split.paths), {})
        for batch in extract(encoder, split.paths, pooling, **options):
            unreadable.update(batch.unreadable)
            if len(batch.indices):
                rows.write(batch.features)
        rows.finish()
    with replacing(folder / "about.json") as temporary:
        record = {**key, "images": len(split.paths), "unreadable": unreadable, "sha256": sha256(file, again=True)}
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return Features(_map(file), _readable(len(split.paths), unreadable), unreadable)


def _read(folder: Path, key: Mapping[str, Any], encoder: nn.Module, split: Split) -> Features | None:
    """The features in a folder of the cache; None if there are none, or not whole and true ones of this key."""
    file, about = folder / "features.safetensors", folder / "about.json"
    if not about.is_file():
        return None
    try:
        record = json.loads(about.read_text(encoding="utf-8"))
        unreadable = {int(index): reason for index, reason in record["unreadable"].items()}
        expected = {**key, "sha256": sha256(file, again=True)}
        whole = all(record[name] == value for name, value in expected.items())
        stored = Features(_map(file), _readable(record["images"], unreadable), unreadable) if whole else None
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError):
        stored = None
    if stored is None:
        logger.warning("%s: damaged; extracted again", folder)
    elif not _still_true(encoder, split, stored, key["pooling"], key["precision"]):
        logger.warning("%s: images or encoder give other features than cached; extracted again", folder)
        return None
    return stored


def _still_true(encoder: nn.Module, split: Split, stored: Features, pooling: Pooling, precision: Precision) -> bool:
    """Whether a few images, spread over the split, have the features that are stored."""
    count = min(CHECKED, len(stored.indices))
    rows = torch.linspace(0, len(stored.indices) - 1, count).long().unique()
    paths = [split.paths[index] for index in stored.indices[rows].tolist()]
    found = extract_all(encoder, paths, pooling, workers=0, precision=precision)
    if len(found.indices) != len(rows) or found.features.shape[1:] != stored.features.shape[1:]:
        return False
    expected, again = stored.features[rows].flatten(1), found.features.flatten(1)
    difference = (again - expected).norm(dim=1) / again.norm(dim=1).clamp_min(1e-12)
    return bool((difference <= TOLERANCE[precision]).all())


def _digest(split: Split) -> str:
    """Over the split's fingerprint, the order of its images and their times of change."""
    digest = hashlib.sha256(split.fingerprint()["sha256"].encode())
    for path in split.paths:
        digest.update(f"{path.name}\t{path.stat().st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _map(file: Path) -> Tensor:
    with safe_open(file, framework="pt") as content:
        return content.get_tensor("features")


def _readable(images: int, unreadable: Mapping[int, str]) -> Tensor:
    return torch.tensor([index for index in range(images) if index not in unreadable], dtype=torch.long)
