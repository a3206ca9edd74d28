"""Seconds from starting `cim pretrain` to its first step, on 100,000 pictures in a folder, a zip archive, tar shards.

    python benchmarks/start.py

The process is a real one; what is timed ends with the first line of its log, after forward and backward pass of a small
batch. The first row, of few pictures, is what does not depend on their number. The pictures are 16 small JPEG files by
many names; the rows alternate.
"""

import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from decode import generate
from table import Table, parser, take_turns

FEW, SHARDS, FILES = 256, 10, 16
BAR = 20
"""Seconds."""
SETTINGS = "--model cim_vit_tiny --recipe cpu-demo --log-every 1 --optimiser.batch-size 8 --diagnostics.held-out 0"


def folder(files: list[Path], out: Path, pictures: int) -> Path:
    """A folder of so many pictures, a thousand in each of its own; links to the files, so that they are made fast."""
    for number in range(pictures):
        (part := out / f"{number // 1000:04}").mkdir(parents=True, exist_ok=True)
        (part / f"{number:07}.jpg").hardlink_to(files[number % len(files)])
    return out


def archive(files: list[Path], out: Path, pictures: int) -> Path:
    """A zip archive of as many."""
    contents = [file.read_bytes() for file in files]
    with zipfile.ZipFile(out, "w") as made:
        for number in range(pictures):
            made.writestr(f"{number:07}.jpg", contents[number % len(contents)])
    return out


def shards(files: list[Path], out: Path, pictures: int) -> Path:
    """A folder of tar shards."""
    out.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(out / f"{shard:03}.tar", "w", dereference=True) as made:
            for number in range(shard * pictures // SHARDS, (shard + 1) * pictures // SHARDS):
                made.add(files[number % len(files)], f"{number:07}.jpg")
    return out


def first_step(data: Path) -> None:
    """Runs `cim pretrain` until its log has a line."""
    with tempfile.TemporaryDirectory() as run:
        log = Path(run) / "run" / "log.jsonl"
        command = [sys.executable, "-m", "cim_models.cli", "pretrain", str(data), *SETTINGS.split()]
        process = subprocess.Popen([*command, "--out", str(log.parent)], stderr=subprocess.PIPE, text=True)
        try:
            while process.poll() is None and not (log.exists() and log.stat().st_size):
                time.sleep(0.01)
            if process.poll() is not None and not log.exists():
                raise SystemExit(f"cim pretrain ended:\n{process.communicate()[1]}")
        finally:
            process.kill()
            process.communicate()


def main() -> None:
    """Prints the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--pictures", type=int, default=100_000)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        here, count = Path(name), options.pictures
        (here / "files").mkdir()
        files = generate(here / "files", FILES, (64, 64))
        kinds = {
            f"folder of {FEW:,}": folder(files, here / "few", FEW),
            f"folder of {count:,}": folder(files, here / "folder", count),
            f"zip archive of {count:,}": archive(files, here / "pictures.zip", count),
            f"{SHARDS} tar shards of {count:,}": shards(files, here / "shards", count),
        }
        rows: dict[str, Callable[[], object]] = {
            kind: lambda data=data: first_step(data) for kind, data in kinds.items()
        }
        times = take_turns(rows, options.rounds)
    first, *_ = times.values()
    columns = {"s": ".1f", "beyond few, s": ".1f", "bar, s": ".0f"}
    table = Table("To the first step", columns, [f"`cim pretrain … {SETTINGS}`, {options.rounds} rounds"])
    for row, took in times.items():
        more = None if took is first else statistics.median(a - b for a, b in zip(took, first, strict=True))
        table.rows[row] = [statistics.median(took), more, None if took is first else BAR]
    table.finish(options.out)


if __name__ == "__main__":
    main()
