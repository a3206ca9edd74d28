"""How weights came about: a run and what it started from, as recipes and logs that travel with a release."""

import json
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cim_models.errors import CheckpointError, ConfigError, WeightsError
from cim_models.hub.access import Access
from cim_models.hub.card import LOG, RECIPE
from cim_models.hub.entry import Entry
from cim_models.hub.store import resolve
from cim_models.hub.weights import Header, Weights, read_header

CONFIG = "config.yaml"
"""Of a run directory."""
LOCAL = ("out", "resume", "init", "log_every", "save_every", "save_minutes", "keep", "tensorboard")
"""Settings of a run that say nothing about its result; folders of the machine, among others."""
SEEN = ("images_seen", "epoch", "minutes")
"""How long an encoder was pretrained."""
STARTED = "Started from"
"""What the recipe of a chain's first run says of weights that are of no run."""
BEFORE = "Before"
"""And of how long those were trained, as `seen_by` tells it, where it is known."""
METADATA = {"architecture", "model_args", "pretext", "images_seen"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One run of a chain, each of which started from what the one before it left."""

    header: Header
    """Of its encoder's file."""
    config: dict[str, Any]
    log: str
    """log.jsonl up to what the encoder saw, without the names of the run's own images."""

    @property
    def images(self) -> int:
        """Images that its encoder saw in this run."""
        return int(self.header.metadata["images_seen"])


def read_stages(run: Path, encoder: str) -> list[Stage]:
    """A run directory and those that it started from, the first of them first.

    Raises:
        CheckpointError: If one lacks a file, a file is damaged, or a run started from itself.
    """
    stages, known = [_read(run, encoder)], {run.resolve()}
    while before := _before(stages[0]):
        if before[0].resolve() in known:
            raise CheckpointError(f"{before[0]} was written over by a run that started from it: so did {run}")
        known.add(before[0].resolve())
        stages.insert(0, _read(*before))
    return stages


def _before(stage: Stage) -> tuple[Path, str] | None:
    """The run that another one started from, if it was a run, and with which encoder."""
    start = Path(stage.config.get("init") or "")
    if start.name in ("online.safetensors", "target.safetensors") and os.path.isfile(start.parent / CONFIG):
        return start.parent, start.stem
    if stage.config.get("init") and os.path.isdir(start) and os.access(start, os.X_OK):
        return None if (start / "config.json").is_file() else (start, "online")
    return None


def origin(stages: Sequence[Stage]) -> Weights | None:
    """The weights, released ones or a file's, that the first run of a chain started from; None where there are none.

    What is gone and not in the cache either, or may not be read any more, is said.
    """
    start = stages[0].config.get("init")
    if not start:
        return None
    try:
        return resolve(stages[0].header.metadata["architecture"], start, access=Access(local_files_only=True))
    except (ConfigError, WeightsError, PermissionError) as error:
        logger.warning("%s, which the run started from, is gone, so nothing is known of it: %s", start, error)
        return None


def released(weights: Weights) -> Entry | None:
    """The release that weights are, or that the run which left them started from, however many runs ago."""
    file = _file(weights)
    if weights.entry or not (file.parent / CONFIG).is_file():
        return weights.entry
    try:
        began = origin(read_stages(file.parent, file.stem))
    except CheckpointError as error:
        logger.warning("what %s started from is not known: %s", weights.name, error)
        return None
    return began.entry if began else None


def texts(stages: Sequence[Stage], began: Weights | None, data: str, hardware: str) -> dict[str, str]:
    """Recipes and logs by file name: recipe.yaml and log.jsonl of the last run, numbered ones of those before.

    Args:
        stages: The runs.
        began: Their `origin`.
        data: What they saw.
        hardware: What they took.
    """
    found: dict[str, str] = {}
    before = {STARTED: called(began)} if began else {}
    if began and (seen := seen_by(_file(began))):
        before[BEFORE] = "{images_seen} images, {epoch} epochs, {minutes} minutes".format(**seen)
    for number, stage in enumerate(stages, 1):
        suffix = "" if stage is stages[-1] else f"-{number}"
        recipe, log = (name.replace(".", f"{suffix}.") for name in (RECIPE, LOG))
        start = before.get(STARTED)
        if number > 1:
            init = Path(stage.config["init"])
            start = f"RUN-{number - 1}{f'/{init.name}' if init.suffix == '.safetensors' else ''}"
        command = f"cim pretrain DATA --recipe {recipe} --out RUN{suffix}{f' --init {start}' if start else ''}"
        head = {"Command": command, **before, "Data": data, "Hardware": hardware}
        found |= {recipe: _recipe(stage, head), log: stage.log}
        before = {}
    return found


def called(weights: Weights) -> str:
    """What weights are called elsewhere than on this machine."""
    if weights.name.startswith("hf-hub:"):
        return weights.name
    return weights.entry.id if weights.entry else Path(weights.name).name


def provenance_files(folder: Path) -> list[Path]:
    """The files of a release folder that `texts` made."""
    return sorted(path for name in (RECIPE, LOG) for path in folder.glob(name.replace(".", "*.")))


def seen_by(file: Path) -> dict[str, float]:
    """How long the encoder in a file was pretrained, by the logs beside it.

    Args:
        file: Of a run directory or a release folder.

    Returns:
        `images_seen`, `epoch` and `minutes`, of all runs that it came from together; nothing where not all are known.

    Raises:
        CheckpointError: If a log is damaged, or the directory of a run lacks a file.
    """
    folder = file.parent
    if file.suffix != ".safetensors" or not (folder / LOG).is_file():
        return {}
    before: dict[str, float] = dict.fromkeys(SEEN, 0.0)
    if (folder / CONFIG).is_file():
        stages = read_stages(folder, file.stem)
        logs = [stage.log for stage in stages]
        if stages[0].config.get("init"):
            began = origin(stages)
            before = seen_by(_file(began)) if began else {}
    else:
        files = provenance_files(folder)
        logs = [_log(path) for path in files if path.suffix == Path(LOG).suffix]
        if start := next((path for path in files if f"\n# {STARTED}:" in path.read_text(encoding="utf-8")), None):
            before = _told(start)
    seen = [{**end, "minutes": _minutes(log)} for log in logs if (end := _end(log))]
    if not seen or not before:
        return {}
    total = {key: before[key] + sum(part[key] for part in seen) for key in SEEN}
    return total | {"images_seen": int(total["images_seen"]), "minutes": round(total["minutes"], 1)}


def _told(recipe: Path) -> dict[str, float]:
    """What a recipe says of how long the weights that it started from were trained; nothing where it does not."""
    text = recipe.read_text(encoding="utf-8")
    if f"\n# {BEFORE}:" not in text:
        return {}
    found = re.search(rf"\n# {BEFORE}: +([\d.]+) images, ([\d.]+) epochs, ([\d.]+) minutes\n", text)
    if not found:
        raise CheckpointError(f"{recipe} is damaged: {BEFORE} is no images, epochs and minutes")
    return dict(zip(SEEN, map(float, found.groups()), strict=True))


def _file(weights: Weights) -> Path:
    """The first of their files."""
    return next(iter(weights.files.values()), (Path(),))[0]


def _end(log: str) -> dict[str, Any]:
    """The last line of a log that says how far the run was."""
    records = [record for record in map(json.loads, log.splitlines()) if {"images_seen", "epoch"} <= record.keys()]
    return records[-1] if records else {}


def _minutes(log: str) -> float:
    """What a run took, without its start and its saves."""
    seconds, seen = 0.0, 0
    for record in map(json.loads, log.splitlines()):
        if record.get("images_per_second"):
            seconds += (record["images_seen"] - seen) / record["images_per_second"]
            seen = record["images_seen"]
    return seconds / 60


def _read(run: Path, encoder: str) -> Stage:
    names = (f"{encoder}.safetensors", "head.safetensors", CONFIG, LOG)
    missing = [name for name in names if not (run / name).is_file()]
    if missing:
        hint = "; without a moving average there is only the online one" if missing == ["target.safetensors"] else ""
        raise CheckpointError(f"{run} is not a whole run directory: it lacks {', '.join(missing)}{hint}")
    try:
        header = read_header(run / names[0])
        config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    except (WeightsError, yaml.YAMLError, OSError, ValueError) as error:
        raise CheckpointError(f"{run}: {error}") from error
    lacking = METADATA - header.metadata.keys()
    if lacking:
        raise CheckpointError(f"{run} is not a run directory: {names[0]} does not say its {', '.join(sorted(lacking))}")
    try:
        config["data"]["size"], config["views"]["context_size"], config["views"]["exemplars"]["size"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{run} is not a run directory: config.yaml is not that of a run: {error}") from error
    return Stage(header, config, _log(run / LOG, int(header.metadata["images_seen"])))


def _log(path: Path, images: float = math.inf) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        records = [(line, json.loads(line)) for line in lines]
        kept = [line for line, record in records if "skipped" not in record and record.get("images_seen", 0) <= images]
    except (AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return "".join(f"{line}\n" for line in kept)


def _recipe(stage: Stage, head: dict[str, str]) -> str:
    """The run's configuration as a recipe, without folders, under a header that says what it took."""
    recipe = {key: value for key, value in stage.config.items() if key not in LOCAL}
    recipe["data"] = {key: value for key, value in stage.config["data"].items() if key not in ("path", "workers")}
    last = {"step": 0, "steps": 0}
    for record in map(json.loads, stage.log.splitlines()):
        if record.get("images_per_second"):
            last = {**last, **record}
    minutes = _minutes(stage.log)
    took = f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
    head = {**head, "Time": took, "Images": f"{stage.images:,} seen"}
    if last["step"] < last["steps"]:
        head["Stopped"] = f"after step {last['step']:,} of {last['steps']:,}"
    comments = "".join(f"# {f'{key}:':9} {' '.join(value.split())}\n" for key, value in head.items())
    return comments + yaml.safe_dump(recipe, sort_keys=False)
