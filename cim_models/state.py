"""Files of torch.save, read safely and with their checksums; states of training as such files, and compared."""

import argparse
import re
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


def read_tensors(path: Path, mapped: bool = False) -> Any:
    """Reads what `torch.save` wrote, compared with its checksums: tensors, plain data and flags of a command line.

    Args:
        path: The file.
        mapped: Map tensors instead of reading them, where the file's format allows.

    Raises:
        ValueError: Saying in words what is wrong: the file is something else, damaged, or asks to run code.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums that it wrote
                if wrong := archive.testzip():
                    raise ValueError(f"wrong checksum of {wrong}")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipped)
    except Exception as error:  # the reader of a file from anywhere fails in any way
        if unsafe := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"it asks to run {unsafe[1]}, which no weights need: save its tensors alone") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        foreign = "weights_only" in reason or isinstance(error, EOFError)
        raise ValueError("not a file that torch.save wrote" if foreign else reason) from error


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
        return dict(read_tensors(path))
    except (TypeError, ValueError) as error:
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
