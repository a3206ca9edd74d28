"""Measures an encoder and random weights with the same commands, and leaves one JSON for each.

    python benchmarks/evaluate.py MODEL TRAIN VAL --seeds 3 --out benchmarks/results
    cim evaluate report benchmarks/results --out docs/results.md --plots docs/results

Runs `cim evaluate knn`, `linear` and `lowshot` (`--protocols` for others), with the weights, then with random ones
of each seed. What is there already is not measured again, so an interrupted run goes on. Flags after `--` go to every
command: `… -- --limit-per-class 25 --image-size 64`. Run it where the paths that the commands will name are relative.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from cim_models.cli import COMMANDS, main

FROZEN = ("knn", "linear", "lowshot")
"""Protocols that can share a cache of features."""
WITHOUT_SEED = ("knn",)
"""Protocols in which nothing is random but random weights."""


def commands(options: argparse.Namespace, flags: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """Each result's file, and the command that writes it."""
    name = re.sub(r"[^\w.-]+", "-", options.model.rstrip("/")).strip("-.")
    for protocol in options.protocols:
        for random_init in (False, True):
            for seed in range(options.seeds if random_init or protocol not in WITHOUT_SEED else 1):
                kind = "random" if random_init else "weights"
                out = options.out / f"{protocol}-{name}-{kind}-{seed}.json"
                command = ["evaluate", protocol, options.model, str(options.train), str(options.val), "--out", str(out)]
                command += ["--random-init"] * random_init + ["--seed", str(seed)]
                if protocol in FROZEN and options.cache:
                    command += ["--cache", str(options.cache)]
                yield out, command + flags


def evaluate() -> int:
    """Runs the commands; the exit code of the first that fails, or 0."""
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, flags = sys.argv[1:at], sys.argv[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("val", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="folder for features, which these protocols share")
    known = [command.split()[1] for command in COMMANDS if command.startswith("evaluate ")]
    parser.add_argument("--protocols", nargs="+", default=FROZEN, choices=[name for name in known if name != "report"])
    options = parser.parse_args(own)
    for out, command in commands(options, flags):
        if out.exists():
            print(f"# {out} is there")
            continue
        print(f"$ {shlex.join(['cim', *command])}", flush=True)
        code = main(command)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(evaluate())
