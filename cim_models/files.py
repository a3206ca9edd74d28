"""Files that appear only when they are complete."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from cim_models.errors import CimModelsError, ConfigError


@contextlib.contextmanager
def replacing(path: Path, kind: type[CimModelsError] = ConfigError) -> Iterator[Path]:
    """Gives a path beside `path` to write to; at the end what is there is flushed to disk and takes its place.

    After an error, or a kill, `path` is what it was before.

    Args:
        path: The file; its folder is made.
        kind: Of the error below.

    Raises:
        CimModelsError: Of that kind, if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        filename = getattr(error, "filename", None)
        if filename is not None and Path(filename) not in (temporary, *temporary.parents):
            raise
        raise kind(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
