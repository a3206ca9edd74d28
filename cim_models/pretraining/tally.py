"""What the steps since the last line of the log gave."""

import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor


class Tally:
    """Numbers of steps, which stay on their device until a line of the log asks for them."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begins with nothing, now."""
        self.losses: list[Tensor] = []
        """Of each backward pass."""
        self.norms: list[Tensor] = []
        """Of the gradient of each step."""
        self.failed: list[str] = []
        """What could not be read."""
        self.waited, self.began = 0.0, time.perf_counter()

    def next(self, stream: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """A batch, whose reading counts as waiting."""
        before = time.perf_counter()
        batch = next(stream)
        self.waited += time.perf_counter() - before
        self.failed += batch["failed"]
        return batch

    def speed(self, images: int) -> dict[str, float]:
        """How fast it went, in the words of the log.

        Args:
            images: Of a backward pass of all processes.
        """
        elapsed = time.perf_counter() - self.began
        return {"images_per_second": len(self.losses) * images / elapsed, "data_wait": self.waited / elapsed}
