"""Is a file what its record says? Needs no torch."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from cim_models.errors import WeightsError
from cim_models.hub.digest import sha256
from cim_models.hub.entry import WeightFile

THREADS = 8
"""Files that are read at a time: more than the cores of a small machine, which shares them out evenly."""

Result = TypeVar("Result")


def side_by_side(look: Callable[[WeightFile], Result], files: Iterable[WeightFile]) -> list[Result]:
    """Looks at files in threads: reading and checksums do not hold the interpreter."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(look, files))


def check_file(path: Path, file: WeightFile, again: bool = False) -> None:
    """Compares size and sha256 of a file with its record; WeightsError with what was expected and found.

    Args:
        path: The file.
        file: Its record.
        again: Read it even if it is known not to have changed since it was last read.
    """
    try:
        size = path.stat().st_size
        if size != file.size:
            raise WeightsError(f"{path} is damaged: {file.size} bytes expected, {size} found")
        found = sha256(path, again)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if found != file.sha256:
        raise WeightsError(f"{path} is damaged: sha256 {file.sha256} expected, {found} found")
