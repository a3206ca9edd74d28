"""A run directory → a release folder with its card, and an entry in the manifest.

A folder is made under a hidden name and renamed when it is whole; the manifest, which alone makes it a release, is
written after that. What was interrupted can be run again.
"""

import dataclasses
import json
import logging
import re
from datetime import date
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cim_models.errors import CheckpointError, ConfigError, WeightsError
from cim_models.hub.access import alone
from cim_models.hub.card import NOT_STATED, update_readme
from cim_models.hub.entry import Data, Entry, Pretext
from cim_models.hub.folder import BLANK, Dtype, Tensors, preprocessing, staging, write_folder
from cim_models.hub.manifest import NAME, Manifest, load_manifest, write_manifest
from cim_models.hub.metrics import read_metrics
from cim_models.hub.provenance import called, origin, read_stages, texts
from cim_models.hub.weights import read_header
from cim_models.pretext.model import PretextConfig

NON_COMMERCIAL = re.compile(r"\bNC\b|non-?commercial", re.IGNORECASE)
"""Of the names of licences."""

logger = logging.getLogger(__name__)


def release(
    run: Path,
    /,
    *,
    id: str,
    encoder: Literal["online", "target"] = "online",
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
        encoder: Which of the two becomes the backbone: the online one, as `create_model` loads of a run directory and
            `cim evaluate` measures, or the target, where that is better. It also serves both sides of `locate`.
        dtype: Of the tensors in the files.
        summary: One line.
        data: Name of the data set that the run saw; that of a release which it started from is added.
        terms: Of that data set.
        licence: Of the weights, such as Apache-2.0; by default that of a release which the run started from.
        metrics: JSON files that `cim evaluate` wrote, of which those that differ in their seeds become one mean, or
            lists of objects {"name", "value", "data", "command"}. Names end in .online, .target or .random (the
            untrained backbone) where a number is of one of them; those with `top` in them are shares in [0, 1].
        hardware: That the run took.
        crop_pct: Side of the evaluation crop, as a fraction of the picture's short side.
        replace: Write over a release of this id.
        root: Folder of weights_manifest.json and weights/, both made if they are not there; by default the package's.

    Returns:
        The release folder.

    Raises:
        ConfigError: If the id is taken or not of the run's architecture, metrics are not as they should be, or nothing
            can be written there.
        CheckpointError: If the run directory lacks a file, or one is damaged.
    """
    run, root = Path(run), root if root is None else Path(root)
    manifest = _manifest(root, id, replace)
    stages = read_stages(run, encoder)
    header, config = stages[-1].header, stages[-1].config
    architecture, model_args = header.metadata["architecture"], json.loads(header.metadata["model_args"])
    if not re.fullmatch(rf"{architecture}\.[\w.-]*\w", id):
        raise ConfigError(f"the id of a release of this run is {architecture}.TAG, not {id!r}")
    # A release holds no heads of the global loss, and one encoder.
    pretext = dataclasses.replace(PretextConfig(**json.loads(header.metadata["pretext"])), global_weight=0.0)
    size = model_args.get("img_size", max(config["data"]["size"], config["views"]["context_size"]))
    began = origin(stages)
    base = began.entry if began else None
    if began and base and licence != NOT_STATED:
        if NON_COMMERCIAL.search(base.licence) and not NON_COMMERCIAL.search(licence):
            said = "licence %s, but the run started from %s, which is %s, for non-commercial use: is it yours to give?"
            logger.warning(said, licence, called(began), base.licence)
    after = f"{sum(stage.images for stage in stages):,} images{f' that followed {called(began)}' if began else ''}"
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
        licence=base.licence if base and licence == NOT_STATED else licence,
        data=tuple(dict.fromkeys([*(base.data if base else ()), Data(data, terms)])),
        metrics=read_metrics(metrics),
        summary=summary or f"The {encoder} encoder of {architecture} after {after}.",
        released=date.today().isoformat(),
        **BLANK,
    )
    tensors: Tensors = {
        "backbone": _read_tensors(run, encoder, stages[-1].images),
        "pretext": {f"head.{key}": value for key, value in _read_tensors(run, "head", stages[-1].images).items()},
    }
    folder = manifest.root / "weights" / id
    with staging(folder) as (temporary, install):
        entry = write_folder(temporary, entry, tensors, texts(stages, began, data, hardware))
        with alone(manifest.root / NAME):
            manifest = _manifest(root, id, replace).with_entry(entry)  # others may have been released meanwhile
            install(lambda: write_manifest(manifest))
            update_readme(manifest)
    return folder


def _manifest(root: Path | None, id: str, replace: bool) -> Manifest:
    """The manifest as it is now, in which there is room for this id."""
    manifest = Manifest(root, {}) if root and not (root / NAME).exists() else load_manifest(root)
    if id in manifest.entries and not replace:
        raise ConfigError(f"{id} is released already: choose another tag, or give replace")
    return manifest


def _read_tensors(run: Path, name: str, images: int) -> dict[str, Tensor]:
    """The tensors of one of a run's files, which had seen so many images."""
    file = run / f"{name}.safetensors"
    try:
        seen, tensors = read_header(file).metadata.get("images_seen"), load_file(file)
    except (WeightsError, SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if seen != str(images):
        todo = "the run ended while it wrote its files: go on with it (--resume), which writes them again"
        raise CheckpointError(f"{file} is of {seen} images, not of {images} as the encoder is: {todo}")
    return tensors
