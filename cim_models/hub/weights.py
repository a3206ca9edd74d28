"""What files are the weights of, as they say themselves: a release folder, a run directory, a file. Needs no torch."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.entry import Entry, Preprocessing, Pretext, WeightFile, read, read_entry
from cim_models.hub.integrity import check_file, side_by_side

MODEL = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
"""Names of an encoder's files in a release folder; any of them stands for all."""

TRANSFORMERS = "timm_wrapper"
"""Model type in a config.json that transformers saved: it keeps our entry there, beside tensors that are others."""

READ = (
    "without an entry of this package in config.json, weights are read from one model.safetensors beside it, as timm "
    "writes them: make one of several files or of another format with safetensors.torch.save_file, and give it as "
    "weights=FILE"
)


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
    labels: tuple[str, ...] = ()
    """Names of a classifier's classes, where a folder says them."""
    ours: bool = False
    """Verified files of the package or a mirror, which may be mapped; anybody may write to others at any time."""

    @classmethod
    def of(
        cls, entry: Entry, files: Mapping[str, tuple[Path, ...]] | None = None, *, name: str = "", ours: bool = False
    ) -> "Weights":
        """What is released as an entry, with those of its files that are here; other arguments as the fields."""
        return cls(
            name=name or entry.id,
            architecture=entry.architecture,
            files=files or {},
            model_args=entry.model_args,
            preprocessing=entry.preprocessing,
            pretext=entry.pretext,
            entry=entry,
            ours=ours,
        )


def from_path(path: Path, architecture: str = "") -> Weights:
    """What a release folder, a run directory or a safetensors file holds.

    Args:
        path: The folder or file.
        architecture: Of a file that does not say itself, or of what says timm's name of it.

    Raises:
        WeightsError: If there is nothing of the kind, or it is damaged.
    """
    if not path.exists():
        raise WeightsError(f"there is no {path}")
    if path.is_file() and re.fullmatch(MODEL, path.name) and (path.parent / "config.json").is_file():
        path = path.parent
    if path.is_file():
        if path.suffix != ".safetensors":
            raise WeightsError(
                f"{path} is not a safetensors file: save the tensors with safetensors.torch.save_file "
                "(a checkpoint of the authors: `cim import-official`; "
                "of another method: `cim evaluate` with the name of a model of timm)"
            )
        return _from_file(path, architecture)
    if (path / "config.json").is_file():
        found = _from_folder(path)
        if not found.entry and architecture and found.architecture.startswith(architecture.removeprefix("cim_")):
            return replace(found, architecture=architecture, model_args=found.model_args or None)  # of stock timm
        return found
    if (path / "online.safetensors").is_file():
        found = _from_file(path / "online.safetensors", architecture)
        others = {part: path / f"{part}.safetensors" for part in ("target", "head")}
        files = {**found.files, **{part: (file,) for part, file in others.items() if file.is_file()}}
        return replace(found, name=str(path), files=files)
    raise WeightsError(
        f"{path} is neither a release folder (config.json, model.safetensors) nor a run directory (online.safetensors)"
    )


def from_config(
    config: dict[str, Any],
    name: str,
    obtain: Callable[[Sequence[WeightFile]], list[Path]],
    ours: bool,
) -> Weights:
    """What a config.json describes: by our entry in it, or as timm and transformers write it.

    Args:
        config: Parsed.
        name: Of the place, for messages.
        obtain: Gives the verified files; one of size 0 is known by its name only.
        ours: Whether nobody else writes to the files.
    """
    where = os.path.join(name, "config.json")
    kinds = {"model_args": dict, "pretrained_cfg": dict, "label_names": list}
    model_args, cfg, labels = (_said(config, key, kind, where) for key, kind in kinds.items())
    cfg = {field.name: cfg[field.name] for field in fields(Preprocessing) if field.name in cfg}
    try:
        entry = read_entry(config["cim_models"], f"{where}: cim_models") if "cim_models" in config else None
        whole = len(cfg) == len(fields(Preprocessing))
        preprocessing = read(Preprocessing, cfg, where, "pretrained_cfg") if whole else None
    except ConfigError as error:
        raise WeightsError(str(error)) from error
    if entry is not None and config.get("model_type") != TRANSFORMERS:
        files = by_part(entry, dict(zip(entry.files, obtain(entry.files), strict=True)))
        return replace(Weights.of(entry, files, name=name, ours=ours), labels=tuple(map(str, labels)))
    if entry is None and "architecture" not in config:
        raise WeightsError(f"{name}: config.json names no architecture, as this package and timm do")
    return Weights(
        name=name,
        architecture=entry.architecture if entry else str(config["architecture"]),
        files={"backbone": tuple(obtain([WeightFile("model.safetensors", "backbone", 0, "")]))},
        model_args={key: value for key, value in model_args.items() if key != "num_classes"},
        preprocessing=preprocessing,
        labels=tuple(map(str, labels)),
        ours=ours,
    )


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


def by_part(entry: Entry, paths: Mapping[WeightFile, Path]) -> dict[str, tuple[Path, ...]]:
    """The files of an entry by what they hold, in its order."""
    return {part: tuple(paths[file] for file in entry.files if file.part == part) for part in entry.parts}


def parsed(content: bytes, where: str | Path) -> dict[str, Any]:
    """The object in a config.json; WeightsError if there is none."""
    try:
        config = json.loads(content)
    except ValueError as error:
        raise WeightsError(f"{where}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{where}: not a JSON object")
    return config


def _from_folder(folder: Path) -> Weights:
    """A release folder of ours, or one that timm wrote for one of our architectures."""
    path = folder / "config.json"
    try:
        config = parsed(path.read_bytes(), path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error

    def look(file: WeightFile) -> Path:
        path = folder / Path(file.path).name
        if file.size:
            check_file(path, file)
        elif not path.is_file():
            raise WeightsError(f"there is no {path}: {READ}")
        return path

    def obtain(files: Sequence[WeightFile]) -> list[Path]:
        return side_by_side(look, files)

    return from_config(config, str(folder), obtain, ours=False)


def _said(config: dict[str, Any], key: str, kind: type[Any], where: str) -> Any:
    """What a config.json says, empty where it says nothing; WeightsError if it is of another kind."""
    if isinstance(value := config.get(key) or kind(), kind):
        return value
    raise WeightsError(f"{where}: {key}: {value!r} is not {kind.__name__}")


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
