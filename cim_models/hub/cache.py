"""Downloaded files: whole, verified, named by their sha256, and written by one process at a time. Needs no torch.

HF_HUB_CACHE/cim_models/sha256/<64 digits>.safetensors    a file, whatever repository or address it came from
HF_HUB_CACHE/cim_models/sha256/.<64 digits>.….partial     what has arrived of one
HF_HUB_CACHE/cim_models/hub/org--name/…                   what is known of a repository: `remote`
"""

import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cim_models.errors import WeightsError
from cim_models.files import replacing
from cim_models.hub.access import Access, own_cache
from cim_models.hub.entry import WeightFile
from cim_models.hub.integrity import check_file
from cim_models.hub.waiting import Patience, Unreachable

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
"""What the system says of a place where nothing can be written, whoever frees space."""

logger = logging.getLogger(__name__)


class Damaged(WeightsError):
    """A download that is complete, but not what it should be."""


class Cache:
    """Folders of verified files: all are read, the first that can be written is written to."""

    def __init__(self, access: Access):
        folders = [access.hub_cache / "cim_models", own_cache()]
        last = Path(tempfile.gettempdir(), f"cim_models-{getattr(os, 'getuid', lambda: 'user')()}")
        if not _of_somebody_else(last):
            folders.append(last)
        self.folders = tuple(dict.fromkeys(folders))

    def find(self, file: WeightFile) -> Path | None:
        """A verified copy; damaged ones are named in a warning and passed over."""
        for folder in self.folders:
            path = _place(folder, file)
            if os.path.isfile(path):  # not where it may not be seen, which Path's would raise
                try:
                    check_file(path, file)
                except WeightsError as error:
                    logger.warning("%s; it is not used", error)
                    continue
                return path
        return None

    def read(self, name: str) -> bytes | None:
        """The content of a small file that `write` wrote."""
        for folder in self.folders:
            with suppress(OSError):
                return (folder / name).read_bytes()
        return None

    def write(self, name: str, content: bytes) -> None:
        """Keeps a small file, which appears whole; what cannot be kept is asked for again."""
        with suppress(WeightsError), replacing(self.writable() / name, WeightsError) as path:
            path.write_bytes(content)

    def lacks(self, what: str) -> WeightsError:
        """Says that a file is not here, and may not be asked for."""
        todo = "load it once online, or fetch it elsewhere (`cim fetch`) and set CIM_MODELS_MIRROR"
        return WeightsError(f"{what} is not in {self.folders[0]}, and requests are forbidden: {todo}")

    def writable(self) -> Path:
        """The folder to write to, which exists.

        Raises:
            WeightsError: If there is none.
        """
        for folder in self.folders:
            try:
                (folder / "sha256").mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder / "sha256"):
                    pass
            except OSError as error:
                if error.errno not in READ_ONLY:
                    raise WeightsError(_full(folder, error)) from error
                continue
            if folder != self.folders[0]:
                logger.warning("%s cannot be written to: downloads are kept in %s", self.folders[0], folder)
            return folder
        raise WeightsError(
            f"no folder for downloads can be written to: tried {', '.join(map(str, self.folders))}; "
            "set HF_HUB_CACHE or give cache_dir"
        )

    @contextmanager
    def adding(self, file: WeightFile, patience: Patience) -> Iterator[tuple[Path, Path]]:
        """The partial file to complete, and the path that it takes if it is the right one; for one process at a time.

        After an interruption what has arrived stays, to go on from. Another process may have added the file while this
        one waited: look again first.

        Raises:
            WeightsError: If there is no room, or the process that adds it gets nowhere.
            Damaged: If what is there at the end is not the file; it is removed.
        """
        from filelock import FileLock, Timeout

        folder = self.writable()
        path = _place(folder, file)
        partial, lock = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "lock"))
        held = FileLock(lock, mode=0o666)  # for the other users of a shared cache, too
        try:
            while True:
                with suppress(Timeout):
                    held.acquire(timeout=0.05)
                    break
                if not patience.look(partial.stat().st_size if partial.exists() else 0):
                    raise Unreachable(f"another process downloads it and receives nothing for {patience.seconds:.0f} s")
            yield partial, path
            if partial.exists():
                self._install(partial, path, file)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise WeightsError(_full(folder, error)) from error
        finally:
            held.release()

    def _install(self, partial: Path, path: Path, file: WeightFile) -> None:
        try:
            check_file(partial, file)
        except WeightsError as error:
            partial.unlink()
            raise Damaged(str(error).replace(str(partial), "what arrived")) from error
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)


def _place(folder: Path, file: WeightFile) -> Path:
    return folder / "sha256" / f"{file.sha256}{Path(file.path).suffix}"


def _of_somebody_else(folder: Path) -> bool:
    """Whether another user made a folder where everybody may, and could change what we verified in it."""
    try:
        return hasattr(os, "getuid") and folder.lstat().st_uid != os.getuid()
    except OSError:
        return False


def _full(folder: Path, error: OSError) -> str:
    return (
        f"{folder} cannot be written: {error.strerror or error}: make room there, "
        "or set HF_HUB_CACHE (or give cache_dir) to a folder elsewhere"
    )
