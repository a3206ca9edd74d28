"""weights_manifest.json: every released weight. Needs no torch.

The file is `{"version": 1, "entries": {id: entry}}`, an entry being `Entry` as JSON: all fields are there, no others.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from cim_models.errors import ConfigError, WeightsError
from cim_models.files import replacing
from cim_models.hub.access import Access
from cim_models.hub.entry import Entry, Part, read_entry, to_dict
from cim_models.hub.names import close_to, parse_name

NAME = "weights_manifest.json"
VERSION = 1
MIRROR = "CIM_MODELS_MIRROR"
"""Environment variable: a folder laid out like the repository, or a release folder; or the address of the former."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """The entries, and the folder that their files are relative to."""

    root: Path
    entries: Mapping[str, Entry]
    """By id, sorted."""

    def find(self, name: str, part: Part = "backbone") -> Entry:
        """The entry of an id, or the default one of an architecture; WeightsError with the nearest ids otherwise."""
        return self.entries[name] if name in self.entries else self.default(name, part)

    def default(self, architecture: str, part: Part = "backbone") -> Entry:
        """The newest entry of an architecture that holds this part; a classifier only where there is nothing else."""
        fitting = [e for e in self.entries.values() if e.architecture == architecture and part in e.parts]
        if not fitting:
            names = list(dict.fromkeys([*self.entries, *(entry.architecture for entry in self.entries.values())]))
            raise WeightsError(f"no weights are released as {architecture!r}{close_to(architecture, names)}")
        return max(fitting, key=lambda entry: (entry.kind != "finetuned", entry.released, entry.id))

    def with_entry(self, entry: Entry) -> "Manifest":
        """A manifest that has this entry in place of the one of the same id, if there was one."""
        return Manifest(self.root, dict(sorted({**self.entries, entry.id: entry}.items())))


def data_root() -> Path:
    """The folder that holds weights_manifest.json and weights/.

    It is `_data` in an installed package, and the folder of the package in a checkout or a plain copy of one.

    Raises:
        ConfigError: If neither holds a manifest.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_data", package.parent):
        if (folder / NAME).is_file():
            return folder
    raise ConfigError(f"no {NAME} in {package / '_data'} or {package.parent}: install cim-models again")


def load_manifest(root: str | Path | None = None) -> Manifest:
    """Reads and validates weights_manifest.json.

    Args:
        root: Folder that holds it; by default `data_root()`.

    Raises:
        ConfigError: Naming the entry and the field at fault.
    """
    root = data_root() if root is None else Path(root)
    return Manifest(root, _read_entries(read_json(root / NAME), root / NAME))


def _read_entries(data: Any, path: str | Path) -> dict[str, Entry]:
    """A parsed manifest → its entries; ConfigError naming the file at fault."""
    if not isinstance(data, dict) or set(data) != {"version", "entries"} or not isinstance(data["entries"], dict):
        raise ConfigError(f'{path}: not of the form {{"version": {VERSION}, "entries": {{…}}}}')
    if data["version"] != VERSION:
        raise ConfigError(f"{path}: version {data['version']!r}, this package reads {VERSION}: install one that fits")
    entries = {}
    for id, value in sorted(data["entries"].items()):
        entries[id] = read_entry(value, f"{path}: entry {id}")
        if entries[id].id != id:
            raise ConfigError(f"{path}: entry {id}: field id: {entries[id].id!r} is not the entry's name")
    return entries


def mirror() -> Path | str | None:
    """What CIM_MODELS_MIRROR says: a folder, an address without a slash at its end, or nothing.

    Raises:
        WeightsError: If it is neither a folder nor an address.
    """
    place = os.environ.get(MIRROR, "")
    if place.startswith(("http://", "https://")):
        return place.rstrip("/")
    if place and not Path(place).is_dir():
        raise WeightsError(f"{MIRROR}={place} is neither a folder nor an address: correct the variable or unset it")
    return Path(place) if place else None


def known_manifest(name: str = "", part: Part = "backbone", access: Access | None = None) -> Manifest:
    """The package's manifest, and where it does not know a name, with it the entries of the mirror's own.

    A mirror is asked for nothing that the package knows, so it cannot change what that means.

    Args:
        name: An id, or an architecture; by default all that is known.
        part: An architecture means weights that hold this.
        access: How the mirror may be asked; by default as the environment says.

    Raises:
        ConfigError: If a manifest is not as it should be.
        WeightsError: If the mirror is to be asked, and cannot.
    """
    ours = load_manifest()
    try:
        ours.find(name, part)
        return ours
    except WeightsError as error:
        unknown = error
    place = mirror()
    if place is None:
        return ours
    try:
        theirs = _of_mirror(place, access or Access())
    except WeightsError as error:
        if name:
            raise WeightsError(f"{error}; {unknown}") from error
        logger.warning("%s; what else is released there is not known", error)
        theirs = {}
    if not theirs and "." in name:
        raise WeightsError(f"{place} has no {NAME} with ids of its own: load its folders as weights=FOLDER; {unknown}")
    root = place if isinstance(place, Path) else ours.root
    return Manifest(root, dict(sorted({**theirs, **ours.entries}.items())))


def _of_mirror(place: Path | str, access: Access) -> Mapping[str, Entry]:
    """The entries of a mirror's own manifest, as it is now, or was when its address was last reached; none without."""
    if isinstance(place, Path):
        return load_manifest(place).entries if (place / NAME).is_file() else {}
    from cim_models.hub.cache import Cache
    from cim_models.hub.remote import Source, small_text
    from cim_models.hub.waiting import Missing, Patience, Unreachable

    def parsed(content: bytes) -> Mapping[str, Entry]:
        try:
            return _read_entries(json.loads(content), where)
        except ValueError as error:
            raise ConfigError(f"{where}: cannot be read as JSON: {error}") from error

    cache, kept, where = Cache(access), f"mirror/{quote(place, safe='')}/{NAME}", f"{place}/{NAME}"
    content = cache.read(kept)
    if not access.offline:
        try:
            new = small_text(Source(place, access), NAME, Patience())
            entries = parsed(new)
            cache.write(kept, new)
            return entries
        except Unreachable as error:
            if content is None:
                raise
            logger.warning("%s; used what it was when it was last asked for", error)
        except Missing:
            return {}
    if content is None:
        raise cache.lacks(where)
    return parsed(content)


def write_manifest(manifest: Manifest) -> Path:
    """Writes `manifest.root / weights_manifest.json` whole or not at all, ids sorted; returns its path.

    Raises:
        ConfigError: If an entry would not be read back; the old file is as it was.
    """
    path = manifest.root / NAME
    entries = {id: to_dict(entry) for id, entry in sorted(manifest.entries.items())}
    for id, value in entries.items():
        read_entry(value, f"{path}: entry {id}")
    text = json.dumps({"version": VERSION, "entries": entries}, indent=2, ensure_ascii=False)
    with replacing(path) as file:
        file.write_text(f"{text}\n", encoding="utf-8")
    return path


def read_json(path: Path) -> Any:
    """The content of a JSON file; ConfigError naming it otherwise."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error


def table() -> str:
    """The released weights, a line each."""
    rows = [
        (entry.id, f"{entry.parameters / 1e6:.1f} M", f"{entry.bytes / 1e6:.1f} MB", entry.licence, entry.summary)
        for entry in known_manifest().entries.values()
    ]
    rows.insert(0, ("name", "parameters", "files", "licence", "summary"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) if len(lines) > 1 else "None is released yet."


def info(name: str) -> str:
    """All that is known of one release, as YAML.

    Args:
        name: An id, or an architecture for its newest weights.
    """
    id = parse_name(name).id or name
    entry = known_manifest(id).find(id)
    return yaml.safe_dump(to_dict(entry), sort_keys=False, allow_unicode=True, width=120)
