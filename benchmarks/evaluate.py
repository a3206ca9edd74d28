"""Measures encoders and random weights with the same settings, and leaves one JSON for each measurement.

    python benchmarks/evaluate.py cim_vit_tiny --data TRAIN VAL --seeds 3 --cache features
    cim evaluate report benchmarks --out docs/results.md --plots docs/results

Runs what `cim evaluate knn`, `linear` and `lowshot` run, or what `--protocols` names, with the weights and with random
ones of each seed (`--kinds weights` without). What is there already is not measured again, so an interrupted call goes
on. Settings after `--` are those of the commands: `… -- --limit-per-class 25 --image-size 64`. Protocols that train an
encoder need a folder for their runs, and segmentation takes one folder of data: `… --data CAMVID --protocols segment
--runs runs`. Start it where the paths that the results name are relative.
"""

import argparse
import ast
import dataclasses
import inspect
import logging
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cim_models import evaluation
from cim_models.errors import CimModelsError, ConfigError
from cim_models.evaluation.training import STATE

FROZEN = ("knn", "linear", "lowshot")
"""Protocols that can share a cache of features."""
TRAINED = ("finetune", "segment")
"""Protocols whose `out` is a run directory, which holds the result."""
KINDS: dict[str, dict[str, bool]] = {"weights": {}, "random": {"random_init": True}, "scratch": {"from_scratch": True}}
"""Rows, and what makes them; the last one is one of fine-tuning alone."""


def measurements(options: argparse.Namespace) -> Iterator[tuple[Path, str, str, dict[str, Any]]]:
    """Each result's file, and the protocol, the model and the settings that it comes from."""
    for model in options.models:
        name = re.sub(r"[^\w.-]+", "-", model.removesuffix(".safetensors")).strip("-.")
        for protocol in options.protocols:
            for kind in (kind for kind in options.kinds if kind != "scratch" or protocol == "finetune"):
                # Nothing is random in kNN but random weights.
                for seed in range(1 if (protocol, kind) == ("knn", "weights") else options.seeds):
                    settings = {"seed": seed, **KINDS[kind]}
                    if protocol in FROZEN and options.cache:
                        settings["cache"] = options.cache
                    yield options.out / f"{protocol}-{name}-{kind}-{seed}.json", protocol, model, settings


def measure(
    file: Path, protocol: str, model: str, data: list[Path], settings: dict[str, Any], runs: Path | None
) -> str:
    """Measures one encoder so that the result is in the file; its table.

    Raises:
        ConfigError: If there is no such setting, or no folder for runs where one is needed.
    """
    function, out = getattr(evaluation, protocol), file
    parameters = inspect.signature(function).parameters
    if protocol in TRAINED:
        if runs is None:
            raise ConfigError(f"{protocol} trains an encoder: give --runs, a folder for its runs")
        out = runs / file.stem
        settings = {**settings, "resume": (out / STATE).exists()}
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    recipe = defaults.pop("config", None)
    defaults |= {} if recipe is None else vars(recipe)
    if unknown := settings.keys() - defaults:
        raise ConfigError(f"{protocol} has no setting {', '.join(sorted(unknown))}; there are {', '.join(defaults)}")
    settings = {name: _like(defaults[name], value) for name, value in settings.items()}
    arguments = {name: value for name, value in settings.items() if name in parameters}
    if recipe is not None:
        changed = {name: value for name, value in settings.items() if name not in parameters}
        arguments["config"] = dataclasses.replace(recipe, **changed)
    file.parent.mkdir(parents=True, exist_ok=True)
    report = function(model, *data, out=out, **arguments)
    if out != file:
        shutil.copy(out / f"{protocol}.json", file)
    return str(report)


def _like(default: Any, value: Any) -> Any:
    """A value as the default is: one of several alone, too."""
    return (value,) if isinstance(default, tuple) and not isinstance(value, tuple) else value


def read_settings(words: list[str]) -> dict[str, Any]:
    """`--limit-per-class 25 --ks 10 20 --random-init` → their names and values."""
    found: dict[str, list[Any]] = {}
    for word in words:
        if word.startswith("--"):
            values = found[word.removeprefix("--").replace("-", "_")] = []
        else:
            values.append(_value(word))
    return {name: values[0] if len(values) == 1 else tuple(values) or True for name, values in found.items()}


def _value(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (SyntaxError, ValueError):
        return word


def main() -> int:
    """Measures all that is not there; the exit code."""
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="anything that the commands take")
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="TRAIN VAL, or what the protocols take")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--cache", type=Path, help="folder for features, which knn, linear and lowshot share")
    parser.add_argument("--runs", type=Path, help="folder for runs of protocols that train an encoder")
    parser.add_argument("--protocols", nargs="+", default=FROZEN, choices=FROZEN + TRAINED)
    options = parser.parse_args(sys.argv[1:at])
    more = read_settings(sys.argv[at + 1 :])
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for file, protocol, model, settings in measurements(options):
        if file.exists():
            print(f"# {file} is there")
            continue
        print(f"# {file}", flush=True)
        try:
            print(measure(file, protocol, model, options.data, {**settings, **more}, options.runs), flush=True)
        except CimModelsError as error:
            print(f"{file}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
