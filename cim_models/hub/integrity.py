"""Is a file what its record says? Needs no torch."""

import hashlib
from pathlib import Path

from cim_models.errors import WeightsError
from cim_models.hub.entry import WeightFile


def check_file(path: Path, file: WeightFile) -> None:
    """Compares size and sha256 of a file with its record; WeightsError with what was expected and found."""
    try:
        size = path.stat().st_size
        if size != file.size:
            raise WeightsError(f"{path} is damaged: {file.size} bytes expected, {size} found")
        digest = hashlib.sha256()
        with open(path, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if digest.hexdigest() != file.sha256:
        raise WeightsError(f"{path} is damaged: sha256 {file.sha256} expected, {digest.hexdigest()} found")
