"""A name or a path → files whose bytes are known to be right. Needs no torch.

A released file is taken from the first place that holds it whole: the folder CIM_MODELS_MIRROR, then the repository or
the installed package. Size and sha256 are compared with the manifest at every load.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.entry import Entry, Part, Preprocessing, Pretext, WeightFile, read_entry
from cim_models.hub.manifest import Manifest, load_manifest, read_json
from cim_models.hub.names import parse_name

MIRROR = "CIM_MODELS_MIRROR"
"""Environment variable: a folder laid out like the repository, or a release folder."""

logger = logging.getLogger(__name__)


class Header(NamedTuple):
    """What a safetensors file says of itself."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    """In safetensors' words: F32, F16, BF16, I64, …"""


@dataclass(frozen=True)
class Weights:
    """Local files, and the model that they are the weights of."""

    name: str
    """For messages: an id or a path."""
    architecture: str
    files: Mapping[str, tuple[Path, ...]]
    """By what they hold: `backbone` (an encoder), `target` (the other encoder), `head` (the correlation head) and
    `pretext` (those under the names that they have in a `CIM`)."""
    model_args: Mapping[str, Any] | None = None
    """Constructor arguments beside the architecture's; None if the file does not say."""
    preprocessing: Preprocessing | None = None
    pretext: Pretext | None = None
    entry: Entry | None = None
    """What was released, if they were."""
    ours: bool = False
    """Verified files of the package or a mirror, which may be mapped; anybody may write to others at any time."""


def resolve(
    name: str | Path,
    weights: str | Path | None = None,
    manifest: Manifest | None = None,
    part: Part = "backbone",
) -> Weights:
    """Finds and verifies the files of a name.

    Args:
        name: Anything that `parse_name` reads; with `weights` an architecture.
        weights: Where from, instead of the manifest: a release folder, a run directory, a safetensors file, or a name.
        manifest: Another manifest than the package's.
        part: An architecture means its newest weights that hold this.

    Raises:
        ConfigError: If the name is none, or name and weights contradict each other.
        WeightsError: If there are no such weights, a file is missing or damaged, or is of another architecture.
    """
    manifest = manifest or load_manifest()
    known = [*manifest.entries, *(entry.architecture for entry in manifest.entries.values())]
    asked = parse_name(name, known)
    given = asked
    if weights is not None:
        if asked.source != "registry" or asked.tag or asked.revision:
            raise ConfigError(f"with weights={str(weights)!r} the name is an architecture, not {str(name)!r}")
        given = parse_name(Path(weights) if Path(weights).exists() else weights, known)
    if given.source == "hf-hub":
        raise WeightsError(
            f"{weights or name}: the Hugging Face Hub is not available in this version yet: "
            "download the repository and give its folder, weights='FOLDER' or local-dir:FOLDER"
        )
    if given.source == "path":
        found = from_path(Path(given.location).expanduser(), asked.architecture)
    elif given.revision:
        raise WeightsError(f"{given.id}@{given.revision}: this version has no revisions yet: leave it out")
    else:
        entry = manifest.find(given.id, part)
        found = _from_entry(entry, released_files(entry, manifest.root), ours=True)
    if asked.architecture and found.architecture != asked.architecture:
        raise WeightsError(f"{found.name} holds weights of {found.architecture}, not of {asked.architecture}")
    return found


def released_files(entry: Entry, root: Path) -> dict[str, tuple[Path, ...]]:
    """The verified files of an entry by part, from the first source that holds each of them whole.

    Raises:
        WeightsError: Naming every copy that was found and what is wrong with it.
    """
    mirror = os.environ.get(MIRROR)
    if mirror and not Path(mirror).is_dir():
        raise WeightsError(f"{MIRROR}={mirror} is not a folder: correct the variable or unset it")
    files: dict[str, tuple[Path, ...]] = {}
    for file in entry.files:
        name = Path(file.path).name
        places = [Path(mirror, place) for place in (file.path, f"{entry.id}/{name}", name)] if mirror else []
        files[file.part] = (*files.get(file.part, ()), _first_good([*places, root / file.path], file, entry.id))
    return files


def _first_good(places: list[Path], file: WeightFile, id: str) -> Path:
    complaints = []
    for path in places:
        if not path.is_file():
            continue
        try:
            check_file(path, file)
        except WeightsError as error:
            complaints.append(str(error))
            continue
        for complaint in complaints:
            logger.warning("%s; used %s", complaint, path)
        return path
    found = "; ".join(complaints) or f"there is no {' nor '.join(map(str, places))}"
    raise WeightsError(f"{id}: {found}; install cim-models again, or set {MIRROR} to a folder that holds good copies")


def check_file(path: Path, file: WeightFile) -> None:
    """Compares size and sha256 of a file with its record; WeightsError with what was expected and found."""
    try:
        size = path.stat().st_size
        if size != file.size:
            raise WeightsError(f"{path} is damaged: {file.size} bytes expected, {size} found")
        digest = hashlib.sha256()
        with open(path, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if digest.hexdigest() != file.sha256:
        raise WeightsError(f"{path} is damaged: sha256 {file.sha256} expected, {digest.hexdigest()} found")


def read_header(path: Path) -> Header:
    """Metadata, shapes and dtypes of a safetensors file; WeightsError if it is none."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            shapes = {key: tuple(value.get_shape()) for key, value in slices.items()}
            return Header(file.metadata() or {}, shapes, {key: value.get_dtype() for key, value in slices.items()})
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from error


def from_path(path: Path, architecture: str = "") -> Weights:
    """What a release folder, a run directory or a safetensors file holds.

    Args:
        path: The folder or file.
        architecture: Of a file that does not say itself.

    Raises:
        WeightsError: If there is nothing of the kind, or it is damaged.
    """
    if not path.exists():
        raise WeightsError(f"there is no {path}")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise WeightsError(
                f"{path} is not a safetensors file: save the tensors with safetensors.torch.save_file "
                "(a checkpoint of the authors: `cim import-official`)"
            )
        if path.name == "model.safetensors" and (path.parent / "config.json").is_file():
            return _from_folder(path.parent)
        return _from_file(path, architecture)
    if (path / "config.json").is_file():
        return _from_folder(path)
    if (path / "online.safetensors").is_file():
        found = _from_file(path / "online.safetensors", architecture)
        others = {part: path / f"{part}.safetensors" for part in ("target", "head")}
        files = {**found.files, **{part: (file,) for part, file in others.items() if file.is_file()}}
        return replace(found, name=str(path), files=files)
    raise WeightsError(
        f"{path} is neither a release folder (config.json, model.safetensors) nor a run directory (online.safetensors)"
    )


def _from_entry(entry: Entry, files: Mapping[str, tuple[Path, ...]], ours: bool, name: str = "") -> Weights:
    return Weights(
        name=name or entry.id,
        architecture=entry.architecture,
        files=files,
        model_args=entry.model_args,
        preprocessing=entry.preprocessing,
        pretext=entry.pretext,
        entry=entry,
        ours=ours,
    )


def _from_folder(folder: Path) -> Weights:
    """A release folder of ours, with its entry in config.json, or one that timm wrote for one of our architectures."""
    path = folder / "config.json"
    try:
        config = read_json(path)
        if not isinstance(config, dict):
            raise ConfigError(f"{path}: not a JSON object")
        if "cim_models" in config:
            entry = read_entry(config["cim_models"], f"{path}: cim_models")
            files: dict[str, tuple[Path, ...]] = {}
            for file in entry.files:
                good = folder / Path(file.path).name
                check_file(good, file)
                files[file.part] = (*files.get(file.part, ()), good)
            return _from_entry(entry, files, ours=False, name=str(folder))
    except ConfigError as error:
        raise WeightsError(str(error)) from error
    model_args = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
    cfg, names = config.get("pretrained_cfg", {}), [field.name for field in fields(Preprocessing)]
    cfg = {name: tuple(cfg[name]) if isinstance(cfg[name], list) else cfg[name] for name in names if name in cfg}
    return Weights(
        name=str(folder),
        architecture=str(config.get("architecture")),
        files={"backbone": (folder / "model.safetensors",)},
        model_args=model_args,
        preprocessing=Preprocessing(**cfg) if len(cfg) == len(names) else None,
    )


def _from_file(path: Path, architecture: str) -> Weights:
    """One file: a run says in its metadata what it is, others are what the caller says."""
    metadata = read_header(path).metadata
    architecture = metadata.get("architecture", architecture)
    if not architecture:
        raise WeightsError(f"{path} does not say which architecture it is of: give its name, and this file as weights=")
    try:
        model_args = json.loads(metadata["model_args"]) if "model_args" in metadata else None
        config = json.loads(metadata["pretext"]) if "pretext" in metadata else None
        views = json.loads(metadata.get("views", "{}"))
    except ValueError as error:
        raise WeightsError(f"{path}: metadata that is not JSON: {error}") from error
    pretext = Pretext(config, views["context_size"], views["exemplars"]["size"]) if config and views else None
    return Weights(str(path), architecture, {"backbone": (path,)}, model_args, pretext=pretext)
