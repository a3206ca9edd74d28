"""What importing costs: `import cim_models`, `cim --help` and `cim list`, beside an empty Python process.

    python benchmarks/imports.py

All in one run: the rows alternate, so that a busy machine slows them alike. The last row is the import alone, as
`python -X importtime` counts it, without the start of the interpreter.
"""

import re
import statistics
import subprocess
import sys
import time

from table import Table, parser

RUNS = 10
CLI = "import sys; sys.argv = ['cim', '{}']; from cim_models.cli import main; sys.exit(main())"
EMPTY, IMPORT = "python -c pass", "import cim_models"
PROCESSES = {EMPTY: "pass", IMPORT: IMPORT, "cim --help": CLI.format("--help"), "cim list": CLI.format("list")}
ALONE = "the import alone"
BARS = {"cim --help": 0.4, "cim list": 0.4, ALONE: 0.05}
"""Seconds that it may take."""


def process_seconds(code: str) -> float:
    """Seconds from the start to the end of a Python process that runs `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def import_seconds() -> float:
    """Seconds of `import cim_models` and all that it imports, in a fresh process."""
    command = [sys.executable, "-X", "importtime", "-c", IMPORT]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    (microseconds,) = re.findall(r"\|\s*(\d+) \| cim_models$", report, flags=re.MULTILINE)
    return int(microseconds) / 1e6


def main() -> None:
    """Prints the table."""
    options = parser(__doc__).parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in (*PROCESSES, ALONE)}
    for _ in range(RUNS + 1):
        for name, code in PROCESSES.items():
            seconds[name].append(process_seconds(code))
        seconds[ALONE].append(import_seconds())
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first fills the caches
    table = Table("Imports", {"ms": ".1f", "ratio": ".2f", "bar, ms": ".0f"}, [f"medians of {RUNS} processes each"])
    for name, median in medians.items():
        table.rows[name] = [1e3 * median, median / medians[EMPTY], 1e3 * BARS[name] if name in BARS else None]
    code = f"{IMPORT}, sys; print('loads' if 'torch' in sys.modules else 'does not load')"
    loads = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    table.notes.append(f"{IMPORT} {loads} torch")
    table.finish(options.out)


if __name__ == "__main__":
    main()
