"""Files that appear only when they are complete."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from cim_models.errors import CimModelsError, ConfigError


def check_writable(path: str | Path, kind: type[CimModelsError] = ConfigError) -> None:
    """Says at once that a file cannot be written, before hours are spent on what shall be in it; makes nothing.

    Raises:
        CimModelsError: Of that kind, if it is a folder or a device, or lies in a folder that cannot be written to.
    """
    path = Path(path)
    folder = next((parent for parent in Path(os.path.realpath(path)).parents if parent.exists()), path)
    if path.is_dir():
        reason = "Is a directory"
    elif path.exists() and not path.is_file():
        reason = "it is a device or a pipe, which a file would replace"
    elif not folder.is_dir():
        reason = f"{folder} is no folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = f"no permission to write in {folder}, or it is read-only"
    else:
        return
    raise kind(f"{path}: cannot be written: {reason}")


@contextlib.contextmanager
def replacing(path: str | Path, kind: type[CimModelsError] = ConfigError) -> Iterator[Path]:
    """Gives a path to write to, in a hidden folder; at the end what is there is flushed to disk and becomes `path`.

    After an error, or a kill, `path` is what it was before. The folder is for those who write to files of their own
    first, as safetensors does: what a kill leaves in it is gone with the next writing.

    Args:
        path: The file, or a link to it, which stays one; its folder is made.
        kind: Of the error below.

    Raises:
        CimModelsError: Of that kind, if it cannot be written.
    """
    check_writable(path, kind)
    target = Path(os.path.realpath(path))
    folder = target.with_name(f".{target.name}.tmp")
    temporary = folder / target.name
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        filename = getattr(error, "filename", None)
        if filename is not None and Path(filename) not in (temporary, *temporary.parents):
            raise
        raise kind(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
