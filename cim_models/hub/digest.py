"""The sha256 of a file, computed once for as long as the file stays as it is. Needs no torch.

What was computed is kept in the user's cache folder, XDG_CACHE_HOME/cim_models/digests, beside what the system said of
the file: device, inode, size, and when its content (mtime) and anything about it (ctime) last changed. ctime is the
system's own: no program sets it back, as those that copy or restore set mtime. If anything differs, the file is read
again. What the system does not notice, such as a disk that decays, `cim verify` finds: it reads always.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from cim_models.errors import CimModelsError
from cim_models.files import replacing
from cim_models.hub.access import own_cache

SETTLED = 2.0
"""Seconds since its last change before a file is remembered: a second change within the granularity of a file system's
clock could not be told from the first."""


def sha256(path: Path, again: bool = False) -> str:
    """The sha256 of a file in hexadecimal digits.

    Args:
        path: The file.
        again: Read it, whatever is remembered.

    Raises:
        OSError: If it cannot be read.
    """
    place = _place(path)
    if not again and (known := _recall(place, path)):
        return known
    digest, now = hashlib.sha256(), time.time_ns()
    with open(path, "rb") as stream:
        before = _state(os.fstat(stream.fileno()))
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
        after = _state(os.fstat(stream.fileno()))
    if before == after and now - max(before["mtime_ns"], before["ctime_ns"]) > SETTLED * 1e9:
        text = json.dumps({"path": os.path.abspath(path), "state": before, "sha256": digest.hexdigest()})
        with contextlib.suppress(CimModelsError), replacing(place) as file:  # a place to write to is not needed
            file.write_text(text)
    return digest.hexdigest()


def _place(path: Path) -> Path:
    return own_cache() / "digests" / f"{hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()}.json"


def _recall(place: Path, path: Path) -> str | None:
    """What is remembered, if the file is still the one that it was computed of."""
    try:
        known = json.loads(place.read_text())
        same = known["path"] == os.path.abspath(path) and known["state"] == _state(os.stat(path))
        return str(known["sha256"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _state(stat: os.stat_result) -> dict[str, int]:
    """Whatever changes when a file does."""
    return {name: getattr(stat, f"st_{name}") for name in ("dev", "ino", "size", "mtime_ns", "ctime_ns")}
