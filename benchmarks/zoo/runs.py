"""Trains the runs of a table one after the other: the zoo's encoders, a search, ablations.

    timeout -s TERM 570 python benchmarks/zoo/runs.py benchmarks/zoo/models.yaml TRAIN --out runs/models

A table (models.yaml and others beside this) names runs and how each differs from recipes/whole.yaml.
A run `small` first sees easy exemplars in runs/models/start/small (recipes/start.yaml), then all of them in
runs/models/small; `init: ID` in a table starts it from released weights. What is done is not done again, and what a
signal ended goes on, so a long table is a matter of calling this again until it says that all is done.

A budget in minutes becomes a number of images, by the pace that the first steps of a run have; `OUT/images.json` keeps
it. `--rehearse` takes a few small steps of everything instead, on any machine.
"""

import argparse
import contextlib
import functools
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml

from cim_models.errors import CimModelsError, ConfigError
from cim_models.evaluation import splits
from cim_models.files import replacing
from cim_models.hub.weights import read_header
from cim_models.pretraining import pretrain
from cim_models.pretraining.config import PretrainConfig, from_dict
from cim_models.pretraining.diagnostics import hold_out
from cim_models.pretraining.readers import open_records

RECIPES = Path(__file__).parent / "recipes"
PACE = 60
"""Steps that tell how fast a run is: the last third of them counts."""
REHEARSAL = {
    "log_every": 2,
    "data": {"workers": 0},
    "diagnostics": {"held_out": 8, "every": 8},
    "optimiser": {"batch_size": 4},
}
"""What a rehearsal does otherwise, in 40 images."""


@dataclass
class Table:
    """Runs, and what each may cost."""

    runs: dict
    """Name → how the run differs from recipes/whole.yaml, in the words of a recipe."""
    settings: dict = field(default_factory=dict)
    """How all of them do."""
    minutes: float | None = None
    """Of training, for each run."""
    images: int | None = None
    """That each run sees, in place of minutes."""
    same_images: bool = False
    """All runs see as many images as the first one in its minutes."""
    start_images: int = 100_000
    """Of them, at most a tenth, those that a run sees first, as recipes/start.yaml has them; 0 leaves that out."""
    held_out: float = 0.0
    """Share of the images of each class that nothing is trained on: OUT/held-out/{train,val}.csv measure with them."""


def read_table(path: Path, minutes: float | None = None) -> Table:
    """Reads a table.

    Args:
        path: YAML.
        minutes: Of training, for each run, in place of what the table says.

    Raises:
        ConfigError: If it cannot be read, or holds what a table does not.
    """
    table = from_dict(Table, _read_yaml(path), str(path))
    if (table.minutes is None) == (table.images is None):
        raise ConfigError(f"{path}: give either minutes or images")
    if minutes is not None:
        table.minutes, table.images = minutes, None
    if table.minutes is not None and not 0 < table.minutes < math.inf:
        raise ConfigError(f"{path}: minutes is {table.minutes}; it must be greater than 0")
    if not table.runs:
        raise ConfigError(f"{path}: there are no runs in it")
    return table


def configuration(
    table: Table, name: str, data: Path, out: Path, images: int, start: bool = False, rehearse: bool = False
) -> PretrainConfig:
    """One of the two parts of a run.

    Args:
        table: That has it.
        name: Of the run.
        data: To train on.
        out: Folder of all runs.
        images: That this part sees.
        start: It is the first part.
        rehearse: As `REHEARSAL` says.
    """
    layers = [_read_yaml(RECIPES / "whole.yaml"), _read_yaml(RECIPES / "start.yaml") if start else {}]
    layers += [table.settings, table.runs[name] or {}, REHEARSAL if rehearse else {}]
    config: PretrainConfig = from_dict(PretrainConfig, merged(*layers), name)
    config.data.path, config.out = str(data), str(out / "start" / name if start else out / name)
    config.resume = "auto"
    stretch(config, images)
    return config


def stretch(config: PretrainConfig, images: int) -> None:
    """Makes a run as long as it takes to see so many images, its warm-up in proportion."""
    optimiser = config.optimiser
    trained_on, _ = hold_out(images_in(config.data.path), config.diagnostics.held_out, config.seed)
    epochs = images / max(1, len(trained_on) // optimiser.batch_size * optimiser.batch_size)
    optimiser.epochs, optimiser.warmup_epochs = epochs, optimiser.warmup_epochs / optimiser.epochs * epochs


@functools.cache
def images_in(path: str) -> int:
    """How many there are, listed once: a GPU would wait for that."""
    return len(open_records(path))


def merged(*layers: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, of which later ones have the last word."""
    found: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = merged(found[key], value) if both else value
    return found


def train(table: Table, name: str, data: Path, out: Path, rehearse: bool = False) -> None:
    """Trains one run of a table, or goes on with it."""
    if finished(out / name):
        print(f"# {out / name} is there", flush=True)
        return
    images = 40 if rehearse else budget(table, name, data, out)
    first = min(table.start_images, images // 10)
    for start, part in [(True, first), (False, images - first)][not first :]:
        config = configuration(table, name, data, out, part, start, rehearse)
        if first and not start:
            config.init = str(out / "start" / name)
        if not finished(Path(config.out)):
            print(f"# {config.out}: {part:,} images", flush=True)
            with metered(Path(config.out)):
                pretrain(config)


def finished(folder: Path) -> bool:
    """Whether a run has come to its end."""
    if not (folder / "online.safetensors").is_file():
        return False
    steps = [record["steps"] for record in map(json.loads, _lines(folder / "log.jsonl")) if "steps" in record]
    return int(read_header(folder / "online.safetensors").metadata["step"]) == steps[-1]


def budget(table: Table, name: str, data: Path, out: Path) -> int:
    """Images that a run may see; those of minutes are found out once."""
    if table.images is not None or table.minutes is None:
        return table.images or 0
    name = next(iter(table.runs)) if table.same_images else name
    file = out / "images.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    if name not in known:
        known[name] = round(60 * table.minutes * pace(configuration(table, name, data, out, 1)))
        out.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(known, indent=2) + "\n")
    return known[name]


def pace(config: PretrainConfig) -> float:
    """Images per second that a run trains on, once it is under way."""
    with tempfile.TemporaryDirectory() as folder:
        config.out, config.log_every = f"{folder}/pace", PACE // 3
        stretch(config, PACE * config.optimiser.batch_size)
        pretrain(config)
        log = map(json.loads, _lines(Path(config.out) / "log.jsonl"))
        return [record["images_per_second"] for record in log if "images_per_second" in record][-1]


@contextlib.contextmanager
def metered(folder: Path) -> Iterator[None]:
    """Adds a line to the run's cost.jsonl: device, seconds, and the mean power where nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "--loop=5"]
    meter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True) if shutil.which(command[0]) else None
    start = time.monotonic()
    try:
        yield
    finally:
        seconds, watts = time.monotonic() - start, None
        if meter is not None:
            meter.terminate()
            said = [word for word in meter.communicate()[0].split() if word.replace(".", "", 1).isdigit()]
            watts = mean(map(float, said)) if said else None
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "cost.jsonl", "a") as file:
            file.write(json.dumps({"device": device, "seconds": round(seconds, 1), "watts": watts}) + "\n")


def hold_out_classes(source: Path, share: float, folder: Path) -> Path:
    """Lists a share of each class apart: `train.csv` and `val.csv` with labels, and `train.txt` to pretrain on."""
    split = splits.read_split(source)
    names = [os.path.relpath(path, folder) for path in split.paths]
    lines = [f"{name},{split.classes[label]}" for name, label in zip(names, split.labels.tolist(), strict=True)]
    kept, held = (chosen.tolist() for chosen in splits.hold_out(split.labels, share))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.csv").write_text("\n".join(lines[index] for index in kept))
    (folder / "val.csv").write_text("\n".join(lines[index] for index in held))
    (folder / "train.txt").write_text("\n".join(names[index] for index in kept))
    return folder / "train.txt"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {error}") from error


def main() -> int:
    """Trains what is not done; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("data", type=Path, help="images to train on; class folders where the table holds some out")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the table's runs, these")
    parser.add_argument("--minutes", type=float, help="of training, for each run, in place of the table's budget")
    parser.add_argument("--rehearse", action="store_true", help="a few small steps of everything, on any machine")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        table = read_table(options.table, options.minutes)
        if unknown := set(options.only or ()) - table.runs.keys():
            raise ConfigError(
                f"{options.table}: no run {', '.join(sorted(unknown))}; there are {', '.join(table.runs)}"
            )
        data = options.data
        if table.held_out:
            data = hold_out_classes(data, table.held_out, options.out / "held-out")
        for name in options.only or table.runs:
            train(table, name, data, options.out, options.rehearse)
    except CimModelsError as error:
        print(error, file=sys.stderr)
        return 1
    print("# all is done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
