"""What starting costs: `import cim_models`, `cim --help` and `cim list`, beside an empty Python process.

    python benchmarks/startup.py

All in one run: the rows alternate, so that a busy machine slows them alike. The last row is the import alone, as
`python -X importtime` counts it, without the start of the interpreter.
"""

import re
import statistics
import subprocess
import sys
import time

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
    seconds: dict[str, list[float]] = {name: [] for name in (*PROCESSES, ALONE)}
    for _ in range(RUNS + 1):
        for name, code in PROCESSES.items():
            seconds[name].append(process_seconds(code))
        seconds[ALONE].append(import_seconds())
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first fills the caches
    print(f"{f'median of {RUNS}':20}{'ms':>8}{'ratio':>8}{'bar, ms':>10}")
    for name, median in medians.items():
        bar = f"{BARS[name] * 1e3:.0f}" if name in BARS else ""
        print(f"{name:20}{median * 1e3:8.1f}{median / medians[EMPTY]:8.2f}{bar:>10}")
    code = f"{IMPORT}, sys; print('loads' if 'torch' in sys.modules else 'does not load')"
    loads = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    print(f"{IMPORT} {loads} torch")


if __name__ == "__main__":
    main()
