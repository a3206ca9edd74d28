"""States of training: tensors and plain data as one file, whole or not there, read with its checksums, and compared."""

import zipfile
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from cim_models.errors import CheckpointError
from cim_models.files import replacing


def save_state(state: dict[str, Any], path: Path) -> None:
    """Writes tensors and plain data as one file, whole or not at all.

    Raises:
        CheckpointError: If it cannot be written; what was there before is kept.
    """
    with replacing(path, CheckpointError) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"is the disk full? {error}") from error


def load_state(path: Path, of: str) -> dict[str, Any]:
    """Reads what `save_state` wrote, onto the CPU, as tensors and plain data only.

    Args:
        path: The file.
        of: What wrote it, for the messages, such as `a pretraining run`.

    Raises:
        CheckpointError: If there is none, or it is damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no checkpoint to resume; leave --resume out to start a run here")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums that it wrote
            if wrong := archive.testzip():
                raise ValueError(f"wrong checksum of {wrong}")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise CheckpointError(f"{path}: not a checkpoint of {of}, or damaged: {error}") from error


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Container[str] = ()) -> str:
    """What differs between the settings in a checkpoint and those of now, both as `flat` gives them; empty if nothing.

    Args:
        before: Of the checkpoint.
        now: Of the run that goes on.
        ignored: Names that may differ.
    """
    names = [name for name in sorted({*before, *now}) if name not in ignored and before.get(name) != now.get(name)]
    return "; ".join(f"{name}: {before.get(name)!r} in the checkpoint, {now.get(name)!r} asked for" for name in names)
