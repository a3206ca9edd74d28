"""What was measured, as docs/performance.md: the tables that the benchmarks wrote, and the commands that write them.

    python benchmarks/performance.py [--measure] [NAME ...]

`--measure` runs the commands first, all that this machine can run or those of the names; it should have nothing else to
do. Without it the document is written from the files in benchmarks/performance that are there. The table of
docs/scaling.md, which names one of these numbers, is written again, too.
"""

import argparse
import ast
import shlex
import subprocess
import sys
from pathlib import Path

import scaling
import torch
from table import Table

BENCHMARKS = Path(__file__).resolve().parent
DOCUMENT = BENCHMARKS.parent / "docs" / "performance.md"
COMMANDS = {
    "decode": "decode.py",
    "exemplars": "exemplars.py",
    "step": "step.py",
    "step-resnet50": "step.py --model cim_resnet50",
    "memory": "memory.py",
    "start": "start.py",
    "exemplars-gpu": "exemplars.py --device cuda",
    "throughput-gpu": "throughput.py --device cuda --profile",
    "memory-gpu": "memory.py --device cuda",
}
"""Each table's command, those for a GPU last."""
HEAD = """# How fast it is

Written by `python benchmarks/performance.py` from what the benchmarks left in benchmarks/performance; `--measure` runs
them. Ratios are measured side by side in one run whose rows take turns; the seconds beside them are this machine's.
A *bar* is what we ask of it.
"""


def markdown(folder: Path) -> str:
    """The document from the tables in a folder."""
    parts, missing, explained = [HEAD], [], set()
    for name, command in COMMANDS.items():
        file = folder / f"{name}.json"
        if file.exists():
            script = command.split()[0]
            parts.append(section(Table.read(file), "" if script in explained else explanation(BENCHMARKS / script)))
            explained.add(script)
        else:
            missing.append(f"- `python benchmarks/{command}`")
    if missing:
        parts.append("\n".join(["## Open\n", "Not measured so far, for want of a GPU or of time:\n", *missing]) + "\n")
    return "\n".join(parts)


def section(table: Table, explained: str) -> str:
    """One table, what it means, where that was not said before, and how it was made."""
    columns = [
        column for at, column in enumerate(table.columns) if any(row[at] is not None for row in table.rows.values())
    ]
    lines = [
        f"## {table.title}\n",
        f"`{table.command}`\n",
        *([explained] if explained else []),
        *(f"- {x}" for x in table.conditions),
        "",
    ]
    lines += [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, cells in table.cells():
        shown = dict(zip(table.columns, cells, strict=True))
        lines.append(f"| {name} | {' | '.join(shown[column] for column in columns)} |")
    return "\n".join([*lines, *(["", *table.notes] if table.notes else [])]) + "\n"


def explanation(script: Path) -> str:
    """What a script measures, from its own documentation, without its first line and the command."""
    doc = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    first, _, rest = doc.partition("\n\n")
    return "\n\n".join([first, *(part for part in rest.split("\n\n") if not part.startswith("    "))]) + "\n"


def measure(names: list[str]) -> None:
    """Runs commands of this machine, one after the other."""
    for name in names:
        command = COMMANDS[name]
        if "cuda" in command and not torch.cuda.is_available():
            print(f"# {name} needs a GPU")
            continue
        script, *arguments = shlex.split(command)
        out = BENCHMARKS / "performance" / f"{name}.json"
        print(f"$ python benchmarks/{command}", flush=True)
        subprocess.run([sys.executable, str(BENCHMARKS / script), *arguments, "--out", str(out)], check=True)


def main() -> None:
    """Writes the document."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMMANDS)}; by default all")
    arguments.add_argument("--measure", action="store_true")
    options = arguments.parse_args()
    if unknown := set(options.names) - set(COMMANDS):
        arguments.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(COMMANDS)}")
    if options.measure:
        measure(options.names or list(COMMANDS))
    DOCUMENT.write_text(markdown(BENCHMARKS / "performance"), encoding="utf-8")
    scaling.write(scaling.DOCUMENT)


if __name__ == "__main__":
    main()
