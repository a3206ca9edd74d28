"""Measures an encoder and random weights with the same commands, and leaves one JSON for each.

    python benchmarks/evaluate.py MODEL TRAIN VAL --seeds 3 --cache features
    cim evaluate report benchmarks/results --out docs/results.md --plots docs/results

Runs `cim evaluate knn`, `linear` and `lowshot`, or what `--protocols` names, with the weights and with random ones of
each seed. What is there already is not measured again, so an interrupted run goes on. Flags after `--` go to every
command: `… -- --limit-per-class 25 --image-size 64`. Protocols that train an encoder need a folder for their runs, and
segmentation takes one folder of data: `… MODEL CAMVID --protocols segment --runs runs`. Start it where the paths that
the commands name are relative.
"""

import argparse
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from cim_models.cli import COMMANDS, main

FROZEN = ("knn", "linear", "lowshot")
"""Protocols that can share a cache of features."""
TRAINED = ("finetune", "segment")
"""Protocols whose `--out` is a run directory, which holds the result."""
RANDOM = {"random": "--random-init", "scratch": "--from-scratch"}
"""Kinds of rows to compare with; the second is one of fine-tuning alone."""


def commands(options: argparse.Namespace, flags: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """Each result's file, and the command that writes it, without where."""
    name = re.sub(r"[^\w.-]+", "-", options.model).strip("-.")
    for protocol in options.protocols:
        for kind in ("weights", "random", *(["scratch"] if protocol == "finetune" else [])):
            # Nothing is random in kNN but random weights.
            for seed in range(1 if (protocol, kind) == ("knn", "weights") else options.seeds):
                command = ["evaluate", protocol, options.model, *options.data, "--seed", str(seed)]
                command += [RANDOM[kind]] if kind in RANDOM else []
                command += ["--cache", options.cache] if protocol in FROZEN and options.cache else []
                yield options.out / f"{protocol}-{name}-{kind}-{seed}.json", command + flags


def measure(file: Path, command: list[str], runs: Path | None) -> int:
    """Runs a command so that its result is in the file; its exit code."""
    protocol, out = command[1], file
    if protocol in TRAINED:
        if runs is None:
            raise SystemExit(f"{protocol} trains an encoder: give --runs, a folder for its runs")
        out = runs / file.stem
        command = [*command, *(["--resume"] if out.exists() else [])]
    command = [*command, "--out", str(out)]
    print(f"$ {shlex.join(['cim', *command])}", flush=True)
    code = main(command)
    if not code and out != file:
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / f"{protocol}.json", file)
    return code


def evaluate() -> int:
    """Runs all commands; the exit code of the first that fails, or 0."""
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    known = [command.split()[1] for command in COMMANDS if command.startswith("evaluate ")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="anything that the commands take")
    parser.add_argument("data", nargs="+", help="TRAIN VAL, or what else the protocols take")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", help="folder for features, which knn, linear and lowshot share")
    parser.add_argument("--runs", type=Path, help="folder for runs of protocols that train an encoder")
    parser.add_argument("--protocols", nargs="+", default=FROZEN, choices=[n for n in known if n in FROZEN + TRAINED])
    options = parser.parse_args(sys.argv[1:at])
    for file, command in commands(options, sys.argv[at + 1 :]):
        if file.exists():
            print(f"# {file} is there")
            continue
        code = measure(file, command, options.runs)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(evaluate())
