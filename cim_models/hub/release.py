"""A run directory → a release folder with its card, and an entry in the manifest.

A folder is made under a hidden name and renamed when it is whole; the manifest, which alone makes it a release, is
written after that. What was interrupted can be run again.
"""

import dataclasses
import json
import re
from datetime import date
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cim_models.errors import CheckpointError, ConfigError, WeightsError
from cim_models.hub.card import LOG, NOT_STATED, RECIPE, update_readme
from cim_models.hub.entry import Data, Entry, Pretext
from cim_models.hub.folder import BLANK, Dtype, Tensors, preprocessing, staging, write_folder
from cim_models.hub.manifest import load_manifest, write_manifest
from cim_models.hub.metrics import read_metrics
from cim_models.hub.store import Header, read_header
from cim_models.pretext.model import PretextConfig

LOCAL = ("out", "resume", "init", "log_every", "save_every", "tensorboard")
"""Settings of a run that say nothing about its result; folders of the machine, among others."""


def release(
    run: Path,
    /,
    *,
    id: str,
    encoder: Literal["target", "online"] = "target",
    dtype: Dtype = "float16",
    summary: str = "",
    data: str = NOT_STATED,
    terms: str = NOT_STATED,
    licence: str = NOT_STATED,
    metrics: tuple[Path, ...] = (),
    hardware: str = NOT_STATED,
    crop_pct: float = 0.9,
    replace: bool = False,
    root: Path | None = None,
) -> Path:
    """Makes a release of a run: `weights/ID` with encoder, correlation head, config.json, card, log and recipe.

    Args:
        run: Run directory of `cim pretrain`.
        id: `architecture.tag`, such as cim_vit_tiny.tin200_e3.
        encoder: Which of the two becomes the backbone; it also serves both sides of `locate`.
        dtype: Of the tensors in the files.
        summary: One line.
        data: Name of the data set that the run saw.
        terms: Of that data set.
        licence: Of the weights, such as Apache-2.0.
        metrics: JSON files that `cim evaluate` wrote, of which those that differ in their seeds become one mean, or
            lists of objects {"name", "value", "data", "command"}. Names end in .online, .target or .random (the
            untrained backbone) where a number is of one of them; those with `top` in them are shares in [0, 1].
        hardware: That the run took.
        crop_pct: Side of the evaluation crop, as a fraction of the picture's short side.
        replace: Write over a release of this id.
        root: Folder that holds weights_manifest.json and weights/; by default the package's.

    Returns:
        The release folder.

    Raises:
        ConfigError: If the id is taken or not of the run's architecture, metrics are not as they should be, or nothing
            can be written there.
        CheckpointError: If the run directory lacks a file, or one is damaged.
    """
    manifest = load_manifest(root)
    if id in manifest.entries and not replace:
        raise ConfigError(f"{id} is released already: choose another tag, or give replace")
    header, config = _read_run(run, encoder)
    architecture, model_args = header.metadata["architecture"], json.loads(header.metadata["model_args"])
    if not re.fullmatch(rf"{architecture}\.[\w.-]*\w", id):
        raise ConfigError(f"the id of a release of this run is {architecture}.TAG, not {id!r}")
    # A release holds no heads of the global loss, and one encoder.
    pretext = dataclasses.replace(PretextConfig(**json.loads(header.metadata["pretext"])), global_weight=0.0)
    size = model_args.get("img_size", config["data"]["size"])
    images = int(header.metadata["images_seen"])
    entry = Entry(
        id=id,
        architecture=architecture,
        model_args=model_args,
        num_classes=0,
        kind="backbone",
        encoder=encoder,
        sources=("repository",),
        preprocessing=preprocessing(size, crop_pct),
        pretext=Pretext(
            dataclasses.asdict(pretext), config["views"]["context_size"], config["views"]["exemplars"]["size"]
        ),
        dtype=dtype,
        licence=licence,
        data=(Data(data, terms),),
        metrics=read_metrics(metrics),
        summary=summary or f"The {encoder} encoder of {architecture} after {images:,} images.",
        released=date.today().isoformat(),
        **BLANK,
    )
    tensors: Tensors = {
        "backbone": _read_tensors(run, encoder),
        "pretext": {f"head.{key}": value for key, value in _read_tensors(run, "head").items()},
    }
    log = _published_log(run / LOG)
    texts = {RECIPE: _published_recipe(entry, config, images, log, hardware), LOG: log}
    folder = manifest.root / "weights" / id
    with staging(folder) as (temporary, install):
        manifest = manifest.with_entry(write_folder(temporary, entry, tensors, texts))
        install(lambda: write_manifest(manifest))
    update_readme(manifest)
    return folder


def _read_run(run: Path, encoder: str) -> tuple[Header, dict[str, Any]]:
    """What an encoder's file says of itself, and the run's configuration."""
    names = (f"{encoder}.safetensors", "head.safetensors", "config.yaml", LOG)
    missing = [name for name in names if not (run / name).is_file()]
    if missing:
        raise CheckpointError(f"{run} is not a whole run directory: it lacks {', '.join(missing)}")
    try:
        header = read_header(run / names[0])
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (WeightsError, yaml.YAMLError, OSError, ValueError) as error:
        raise CheckpointError(f"{run}: {error}") from error
    lacking = {"architecture", "model_args", "pretext", "images_seen"} - header.metadata.keys()
    if lacking:
        raise CheckpointError(f"{run} is not a run directory: {names[0]} does not say its {', '.join(sorted(lacking))}")
    try:
        config["data"]["size"], config["views"]["context_size"], config["views"]["exemplars"]["size"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{run} is not a run directory: config.yaml is not that of a run: {error}") from error
    return header, config


def _read_tensors(run: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(run / f"{name}.safetensors")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{run / name}.safetensors cannot be read: {error}") from error


def _published_log(path: Path) -> str:
    """The log without the names of the run's own images, those that were skipped."""
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        return "".join(f"{line}\n" for line in lines if "skipped" not in json.loads(line))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _published_recipe(entry: Entry, config: dict[str, Any], images: int, log: str, hardware: str) -> str:
    """The run's configuration as a recipe, without folders, under a header that says what it took."""
    recipe = {key: value for key, value in config.items() if key not in LOCAL}
    recipe["data"] = {key: value for key, value in config["data"].items() if key not in ("path", "workers")}
    hours, seen = 0.0, 0
    for record in map(json.loads, log.splitlines()):
        if record.get("images_per_second"):
            hours += (record["images_seen"] - seen) / record["images_per_second"] / 3600
            seen = record["images_seen"]
    head = {
        "Command": f"cim pretrain DATA --recipe {RECIPE} --out RUN",
        "Data": entry.data[0].name,
        "Hardware": hardware,
        "Time": f"{hours:.1f} hours",
        "Images": f"{images:,} seen",
        **({"Start": f"the encoders of another run, {Path(config['init']).name}"} if config.get("init") else {}),
    }
    comments = "".join(f"# {key + ':':10}{value}\n" for key, value in head.items())
    return comments + yaml.safe_dump(recipe, sort_keys=False)
