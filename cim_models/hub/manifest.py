"""weights_manifest.json: every released weight. Needs no torch.

The file is `{"version": 1, "entries": {id: entry}}`, an entry being `Entry` as JSON: all fields are there, no others.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cim_models.errors import ConfigError, WeightsError
from cim_models.files import replacing
from cim_models.hub.entry import Entry, Part, read_entry, to_dict
from cim_models.hub.names import close_to, parse_name

NAME = "weights_manifest.json"
VERSION = 1


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
    path = root / NAME
    data = read_json(path)
    if not isinstance(data, dict) or set(data) != {"version", "entries"} or not isinstance(data["entries"], dict):
        raise ConfigError(f'{path}: not of the form {{"version": {VERSION}, "entries": {{…}}}}')
    if data["version"] != VERSION:
        raise ConfigError(f"{path}: version {data['version']!r}, this package reads {VERSION}: install one that fits")
    entries = {}
    for id, value in sorted(data["entries"].items()):
        entries[id] = read_entry(value, f"{path}: entry {id}")
        if entries[id].id != id:
            raise ConfigError(f"{path}: entry {id}: field id: {entries[id].id!r} is not the entry's name")
    return Manifest(root, entries)


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
        for entry in load_manifest().entries.values()
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
    entry = load_manifest().find(parse_name(name).id or name)
    return yaml.safe_dump(to_dict(entry), sort_keys=False, allow_unicode=True, width=120)
