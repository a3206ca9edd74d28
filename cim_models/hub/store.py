"""A name or a path → files whose bytes are known to be right. Needs no torch.

A released file is taken from the first place that holds it whole: the folder CIM_MODELS_MIRROR, the repository or the
installed package, the cache of downloads; then on the network CIM_MODELS_MIRROR, where it is an address, and the
entry's sources. Size and sha256 are compared with the manifest at every load.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.access import Access
from cim_models.hub.entry import Entry, Part, Preprocessing, Pretext, WeightFile, read, read_entry
from cim_models.hub.integrity import check_file, side_by_side
from cim_models.hub.manifest import MIRROR, Manifest, known_manifest, load_manifest, mirror
from cim_models.hub.names import Name, parse_name

MODEL = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
"""Names of an encoder's files in a release folder; any of them stands for all."""

READ = (
    "without an entry of this package in config.json, weights are read from one model.safetensors beside it, as timm "
    "writes them: make one of several files or of another format with safetensors.torch.save_file, and give it as "
    "weights=FILE"
)

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


def resolve(
    name: str | Path,
    weights: str | Path | None = None,
    manifest: Manifest | None = None,
    part: Part = "backbone",
    access: Access | None = None,
) -> Weights:
    """Finds and verifies the files of a name.

    Args:
        name: Anything that `parse_name` reads; with `weights` an architecture.
        weights: Where from, instead of the manifest: a release folder, a run directory, a safetensors file, or a name.
        manifest: Where to look; by default the package's, then that of CIM_MODELS_MIRROR.
        part: An architecture means its newest weights that hold this.
        access: How files may be fetched; by default as the environment says.

    Raises:
        ConfigError: If the name is none, or name, weights and revision contradict each other.
        WeightsError: If there are no such weights, a file is missing, damaged or out of reach, or they are of another
            architecture.
    """
    access = access or Access()
    entries = (manifest or load_manifest()).entries
    known = [*entries, *(entry.architecture for entry in entries.values())]
    asked = parse_name(name, known)
    given = asked
    if weights is not None:
        if asked.source != "registry" or asked.tag or asked.revision:
            raise ConfigError(f"with weights={str(weights)!r} the name is an architecture, not {str(name)!r}")
        given = parse_name(Path(weights) if Path(weights).exists() else weights, known)
    if access.revision and given.revision not in ("", access.revision):
        raise ConfigError(f"{weights or name} with revision={access.revision!r}: say one of the two")
    given = replace(given, revision=given.revision or access.revision or "")
    if given.source == "hf-hub":
        found = _from_hub(given, access)
    elif given.source == "path":
        if given.revision:
            raise ConfigError(f"{weights or name} is a path, which has no revision {given.revision!r}: leave it out")
        found = from_path(Path(os.path.expanduser(given.location)), asked.architecture)
    else:
        manifest = manifest or known_manifest(given.id, part, access)
        found = _from_manifest(given, manifest.find(given.id, part), manifest.root, access)
    if asked.architecture and found.architecture != asked.architecture:
        raise WeightsError(f"{found.name} holds weights of {found.architecture}, not of {asked.architecture}")
    return found


def released_files(entry: Entry, root: Path, access: Access | None = None) -> dict[str, tuple[Path, ...]]:
    """The verified files of an entry by part, from the first source that holds each of them whole.

    Args:
        entry: Of the manifest.
        root: The folder that its files are relative to.
        access: How files may be fetched; by default as the environment says.

    Raises:
        WeightsError: Naming every copy that was found and what is wrong with it.
    """
    place = mirror()
    places = {file: _places(entry, file, root, place if isinstance(place, Path) else None) for file in entry.files}
    found = dict(zip(entry.files, side_by_side(lambda file: _first_good(places[file], file), entry.files), strict=True))
    paths = {file: path for file, (path, _) in found.items() if path is not None}
    missing = [file for file in entry.files if file not in paths]
    complaints = "; ".join(complaint for file in missing for complaint in found[file][1])
    sources = [*([f"{place}/weights/{entry.id}"] if isinstance(place, str) else []), *remote(entry)]
    if missing and sources:
        from cim_models.hub.download import Downloads

        try:
            paths |= Downloads(sources, access or Access()).obtain(missing)
        except WeightsError as error:
            raise WeightsError(f"{entry.id}: {complaints}{'; ' if complaints else ''}{error}") from error
    elif missing:
        said = complaints or f"there is no {' nor '.join(map(str, places[missing[0]]))}"
        todo = f"install cim-models again, or set {MIRROR} to a folder that holds good copies"
        raise WeightsError(f"{entry.id}: {said}; {todo}")
    for file, (_, wrong) in found.items():
        for complaint in wrong:
            logger.warning("%s; used %s", complaint, paths[file])
    return by_part(entry, paths)


def by_part(entry: Entry, paths: Mapping[WeightFile, Path]) -> dict[str, tuple[Path, ...]]:
    """The files of an entry by what they hold, in its order."""
    return {part: tuple(paths[file] for file in entry.files if file.part == part) for part in entry.parts}


def remote(entry: Entry) -> list[str]:
    """The sources of an entry that are on the network."""
    return [source for source in entry.sources if source != "repository"]


def _places(entry: Entry, file: WeightFile, root: Path, mirror: Path | None) -> list[Path]:
    """Where a file may be on this machine: in the mirror, laid out in one of three ways, and in the repository."""
    name = Path(file.path).name
    places = [mirror / place for place in (file.path, f"{entry.id}/{name}", name)] if mirror else []
    return places if mirror and mirror.resolve() == root.resolve() else [*places, root / file.path]


def _first_good(places: list[Path], file: WeightFile) -> tuple[Path | None, list[str]]:
    """The first verified copy, and what is wrong with those before it."""
    complaints: list[str] = []
    for path in places:
        if path.is_file():
            try:
                check_file(path, file)
                return path, complaints
            except WeightsError as error:
                complaints.append(str(error))
    return None, complaints


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


def _from_manifest(given: Name, entry: Entry, root: Path, access: Access) -> Weights:
    """A released entry, or what another revision of its repository on the Hub holds."""
    source = next((source for source in entry.sources if source.startswith("hf-hub:")), "")
    repository, _, commit = source.removeprefix("hf-hub:").partition("@")
    if given.revision in ("", commit):
        files = released_files(entry, root, access)
        return replace(Weights.of(entry, files, ours=True), labels=_labels(entry, root, source, access))
    if not source:
        raise WeightsError(
            f"{given.id}@{given.revision}: {entry.id} is not on the Hub, so it has no revisions: leave it out"
        )
    found = _from_hub(Name("hf-hub", repository, revision=given.revision), access)
    if found.entry is None or found.entry.id != entry.id:
        raise WeightsError(f"{found.name} holds {found.entry.id if found.entry else 'something else'}, not {entry.id}")
    return found


def _labels(entry: Entry, root: Path, source: str, access: Access) -> tuple[str, ...]:
    """Names of a released classifier's classes, which its config.json says: that of the repository, or of the Hub."""
    path = root / "weights" / entry.id / "config.json"
    if not entry.num_classes or not (path.is_file() or source):
        return ()
    if path.is_file():
        content = path.read_bytes()
    else:
        from cim_models.hub.cache import Cache
        from cim_models.hub.remote import Source, small_file
        from cim_models.hub.waiting import Patience

        try:
            content = small_file(Source(source, access), "config.json", Cache(access), Patience())
        except WeightsError as error:
            logger.warning("%s: the names of its classes are not known: %s", entry.id, error)
            return ()
    return tuple(map(str, _parsed(content, f"config.json of {entry.id}").get("label_names") or ()))


def _from_hub(given: Name, access: Access) -> Weights:
    """A repository on the Hub at a revision: one of our releases, or what timm wrote for one of our architectures."""
    from cim_models.hub.download import Downloads
    from cim_models.hub.remote import Source, commit_of, described, small_file
    from cim_models.hub.waiting import Missing

    downloads = Downloads((), access)
    cache, patience = downloads.cache, downloads.patience
    commit = commit_of(given.location, given.revision, access, cache, patience)
    source = Source(f"hf-hub:{given.location}@{commit}", access)
    downloads.sources = [source]
    config = _parsed(small_file(source, "config.json", cache, patience), f"config.json of {source.name}")

    def obtain(files: Sequence[WeightFile]) -> list[Path]:
        try:
            files = [file if file.size else described(source, file.path, cache, patience) for file in files]
        except Missing as error:
            raise WeightsError(f"{error}: {READ}") from error
        return list(downloads.obtain(files).values())

    return _from_config(config, source.name, obtain, ours=True)


def _from_folder(folder: Path) -> Weights:
    """A release folder of ours, or one that timm wrote for one of our architectures."""
    path = folder / "config.json"
    try:
        config = _parsed(path.read_bytes(), path)
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

    return _from_config(config, str(folder), obtain, ours=False)


def _parsed(content: bytes, where: str | Path) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except ValueError as error:
        raise WeightsError(f"{where}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{where}: not a JSON object")
    return config


def _from_config(
    config: dict[str, Any],
    name: str,
    obtain: Callable[[Sequence[WeightFile]], list[Path]],
    ours: bool,
) -> Weights:
    """What a config.json describes: by our entry in it, or as timm writes it.

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
    if entry is not None:
        files = by_part(entry, dict(zip(entry.files, obtain(entry.files), strict=True)))
        return replace(Weights.of(entry, files, name=name, ours=ours), labels=tuple(map(str, labels)))
    if "architecture" not in config:
        raise WeightsError(f"{name}: config.json names no architecture, as this package and timm do")
    return Weights(
        name=name,
        architecture=str(config["architecture"]),
        files={"backbone": tuple(obtain([WeightFile("model.safetensors", "backbone", 0, "")]))},
        model_args={key: value for key, value in model_args.items() if key != "num_classes"},
        preprocessing=preprocessing,
        labels=tuple(map(str, labels)),
        ours=ours,
    )


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
