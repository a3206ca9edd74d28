"""A table of measurements: printed, and kept as JSON for docs/performance.md."""

import argparse
import dataclasses
import json
import platform
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "timm", "pillow")
"""Whose versions stand beside the numbers."""


@dataclass
class Table:
    """What one command measured."""

    title: str
    columns: dict[str, str]
    """Name of each column and the format of its numbers."""
    conditions: list[str]
    """On what and how it was measured, a line each; the machine and the versions come by themselves."""
    device: str = "cpu"
    rows: dict[str, list[float | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What was found beside the numbers."""
    command: str = ""

    def __str__(self) -> str:
        first = max(map(len, ["", *self.rows]))
        lines = [self.title, *self.conditions, " " * first + "".join(f"{name:>16}" for name in self.columns)]
        lines += [f"{name:{first}}" + "".join(f"{cell:>16}" for cell in cells) for name, cells in self.cells()]
        return "\n".join(lines + self.notes)

    def cells(self) -> list[tuple[str, list[str]]]:
        """The rows as text."""
        return [
            (name, ["" if x is None else format(x, how) for x, how in zip(row, self.columns.values(), strict=True)])
            for name, row in self.rows.items()
        ]

    def finish(self, out: Path | None) -> None:
        """Prints the table, and writes it if there is a file for it."""
        self.conditions.insert(0, f"{hardware(self.device)}; {versions()}")
        self.command = command(sys.argv)
        print(self)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> "Table":
        """What `finish` wrote."""
        return cls(**json.loads(file.read_text(encoding="utf-8")))


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Arguments that all benchmarks have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="JSON file for the table, for docs/performance.md")
    return made


def command(argv: list[str]) -> str:
    """How to measure again: the command line without the file that it was written to."""
    script, *arguments = argv
    if "--out" in arguments:
        at = arguments.index("--out")
        del arguments[at : at + 2]
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *arguments])


def take_turns(
    rows: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of each row, once a round and one after the other, so that a busy machine slows all alike.

    Args:
        rows: What is measured.
        rounds: That count.
        clock: Wall clock, or `time.process_time`.
        warm: Rounds before those, which do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for round_ in range(-warm, rounds):
        for name, function in rows.items():
            start = clock()
            function()
            if round_ >= 0:
                seconds[name].append(clock() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster: the median of each round's ratio."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had so far: of a GPU those that torch allocated, else resident ones."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def hardware(device: str = "cpu") -> str:
    """The name of the GPU, or of the processor where the system tells it, and how much of it works."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def versions() -> str:
    """Of Python and of the packages that the numbers depend on."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
