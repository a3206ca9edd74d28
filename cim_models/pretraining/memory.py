"""How much memory there is, how much a step takes, and the largest batch that fits."""

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from cim_models.errors import ConfigError

MARGIN = 0.1
"""Share of the memory that `largest_batch` leaves alone: batches differ, and allocators waste some."""


def free_memory() -> int:
    """Bytes that this process may still use: of the machine, or of the container that it runs in."""
    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such file, or it says "max"
            continue
    return max(free, 0)


def room(device: torch.device) -> int:
    """Bytes of a device that are free; a CPU's are the machine's, a GPU gets back what torch only keeps for later."""
    if device.type != "cuda":
        return free_memory()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


class Meter:
    """The most memory that this process holds from `start` to `stop`; neither waits for a GPU.

    Of a GPU it is what torch allocates, of a CPU the resident memory of the process, looked at every few milliseconds;
    what C's allocator keeps for later, as after an earlier run, goes back to the system first, where that is glibc.

    Args:
        device: Whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.before, self.peak = device, 0, 0
        self._end = threading.Event()
        self._watcher: threading.Thread | None = None

    def start(self) -> None:
        """Notes what is held now, `before`."""
        if self.device.type != "cuda":
            with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
                ctypes.CDLL(None).malloc_trim(0)
        self.before = self.peak = self._held()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()

    def stop(self, coming: int = 0) -> int:
        """Returns the peak in bytes.

        Args:
            coming: Bytes that will be held from now on, but were not yet: they count as if they had been there.
        """
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        self.close()
        self.before, self.peak = self.before + coming, self.peak + coming
        return self.peak

    def close(self) -> None:
        """Looks no more."""
        if self._watcher is not None:
            self._end.set()
            self._watcher.join()
            self._watcher = None

    def _held(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return int(psutil.Process().memory_info().rss)

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._end.wait(0.002):
            self.peak = max(self.peak, process.memory_info().rss)


def in_words(meter: Meter, images: int) -> str:
    """Of a step that was measured: `peak memory 3.1 GB of 80 GB, 14 MB an image`.

    Args:
        meter: Stopped after the step; what was held before it are weights and the state of the optimiser.
        images: Of a backward pass.
    """
    there = torch.cuda.mem_get_info(meter.device)[1] if meter.device.type == "cuda" else free_memory() + meter._held()
    each = (meter.peak - meter.before) / images
    return f"peak memory {meter.peak / 1e9:.3g} GB of {there / 1e9:.3g} GB, {each / 1e6:.3g} MB an image"


def largest_batch(
    step: Callable[[int], None], most: int, device: torch.device, sharing: int = 1, taken: int = 0
) -> int:
    """The most images whose step fits a device.

    On a GPU steps are tried. On a CPU, where one that is too large would end the process, two small ones are measured:
    memory grows with the images.

    Args:
        step: Makes a whole training step with so many images.
        most: More are not wanted.
        device: Where it is made.
        sharing: Processes that share the memory.
        taken: Bytes of it that something else will need.

    Returns:
        From 2 to `most`.

    Raises:
        ConfigError: If two images do not fit.
    """
    fits = (_tried if device.type == "cuda" else _predicted)(step, device, sharing, taken)
    if not fits(2):
        raise ConfigError(
            "optimiser.batch_size is auto, but not even 2 images fit the memory: give a smaller model or "
            "backbone.grad_checkpointing, or free some memory"
        )
    return search(fits, most)


def search(fits: Callable[[int], bool], most: int) -> int:
    """The greatest number that fits, to an eighth: powers of two until one does not, then between the last two.

    Args:
        fits: Whether a number does; 2 does, and all below one that does.
        most: Not more than this.
    """
    low, high = min(2, most), min(4, most)
    while high > low and fits(high):
        low, high = high, min(2 * high, most)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _tried(step: Callable[[int], None], device: torch.device, sharing: int, taken: int) -> Callable[[int], bool]:
    """Whether so many images fit, by a step with them."""
    limit = (1 - MARGIN) * (room(device) / sharing + torch.cuda.memory_reserved(device)) - taken

    def fits(images: int) -> bool:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            step(images)
        except torch.OutOfMemoryError:
            return False
        return torch.cuda.max_memory_reserved(device) <= limit

    return fits


def _predicted(step: Callable[[int], None], device: torch.device, sharing: int, taken: int) -> Callable[[int], bool]:
    """Whether so many images fit, as a straight line through two measured steps says."""
    few, more = 8, 24
    step(few)  # the first one also makes what stays
    limit = (1 - MARGIN) * (room(device) / sharing + int(psutil.Process().memory_info().rss)) - taken
    peaks = []
    for images in (few, more):
        meter = Meter(device)
        meter.start()
        step(images)
        peaks.append(meter.stop())
    each = max(1, peaks[1] - peaks[0]) / (more - few)
    return lambda images: peaks[1] + (images - more) * each <= limit
