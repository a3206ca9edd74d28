"""A name or a path → files whose bytes are known to be right. Needs no torch.

A released file is taken from the first place that holds it whole: the folder CIM_MODELS_MIRROR, the repository or the
installed package, the cache of downloads; then on the network CIM_MODELS_MIRROR, where it is an address, and the
entry's sources. Size and sha256 are compared with the manifest at every load.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.access import Access
from cim_models.hub.entry import Entry, Part, WeightFile
from cim_models.hub.integrity import check_file, side_by_side
from cim_models.hub.manifest import MIRROR, Manifest, known_manifest, load_manifest, mirror
from cim_models.hub.names import Name, parse_name
from cim_models.hub.weights import READ, Weights, by_part, from_config, from_path, parsed

logger = logging.getLogger(__name__)


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
    sources = [f"{place}/weights/{entry.id}"] if isinstance(place, str) else []
    sources += [source for source in entry.sources if source != "repository"]
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
    return tuple(map(str, parsed(content, f"config.json of {entry.id}").get("label_names") or ()))


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
    config = parsed(small_file(source, "config.json", cache, patience), f"config.json of {source.name}")

    def obtain(files: Sequence[WeightFile]) -> list[Path]:
        try:
            files = [file if file.size else described(source, file.path, cache, patience) for file in files]
        except Missing as error:
            raise WeightsError(f"{error}: {READ}") from error
        return list(downloads.obtain(files).values())

    return from_config(config, source.name, obtain, ours=True)
