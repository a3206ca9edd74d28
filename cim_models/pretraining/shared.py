"""Memory that the training processes of a machine share, and the readers that they fork."""

import contextlib
import mmap
import multiprocessing
import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

from cim_models.errors import ConfigError
from cim_models.processes import ALONE, Processes

MACHINE = Path("/proc/sys/kernel/random/boot_id")
PIDS = Path("/proc/self/ns/pid")


def machine() -> str:
    """Tells processes that can reach each other's memory from those that cannot; empty where none can."""
    try:
        return MACHINE.read_text() + os.readlink(PIDS) if hasattr(os, "memfd_create") else ""
    except OSError:
        return ""


def shared_memory(size: int, processes: Processes = ALONE) -> tuple[mmap.mmap, contextlib.AbstractContextManager[Any]]:
    """Zeros that all training processes of this machine see, or this one alone, and a lock of whoever sees them.

    They have no name, and are gone with the last process.

    Args:
        size: In bytes.
        processes: Those of the run, all of which call this; those on one machine get the same memory where they can.

    Raises:
        ConfigError: If the system does not let them.
    """
    here, size = machine(), max(size, 1)
    if processes.count > 1:
        file = os.memfd_create("cim_models") if here else -1
        offers = processes.gather_for_all((here, f"/proc/{os.getpid()}/fd/{file}"))
        if here:
            shared = _opened(next(place for there, place in offers if there == here))
            os.ftruncate(shared, size)
        processes.gather_for_all("it is open")
        if here:
            os.close(file)
            return mmap.mmap(shared, size), _FileLock(shared)
    return mmap.mmap(-1, size), multiprocessing.Lock()


def _opened(place: str) -> int:
    try:
        return os.open(place, os.O_RDWR)
    except OSError as error:
        raise ConfigError(
            f"data.cache is ram, but the processes of this machine may not share memory ({place}: {error.strerror}); "
            "give data.cache none"
        ) from error


class _FileLock:
    """One process at a time, of all that have opened a file, forked or not; the file is closed with the lock."""

    def __init__(self, file: int) -> None:
        self.file = file
        weakref.finalize(self, os.close, file)

    def __enter__(self) -> None:
        import fcntl

        fcntl.lockf(self.file, fcntl.LOCK_EX)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        import fcntl

        fcntl.lockf(self.file, fcntl.LOCK_UN)
