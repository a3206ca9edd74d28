"""A name → a release folder elsewhere, for machines without a network."""

import itertools
import logging
import shutil
from pathlib import Path

from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.access import Access
from cim_models.hub.cache import Cache
from cim_models.hub.card import LOG, RECIPE, render_card
from cim_models.hub.folder import WHOLE, join, staging, write_config
from cim_models.hub.integrity import check_file
from cim_models.hub.manifest import known_manifest, load_manifest
from cim_models.hub.names import parse_name
from cim_models.hub.provenance import provenance_files
from cim_models.hub.remote import Source, small_file
from cim_models.hub.store import resolve
from cim_models.hub.waiting import Missing, Patience

logger = logging.getLogger(__name__)


def fetch(name: str, /, *, to: Path, token: bool = False, whole: bool = False, root: Path | None = None) -> Path:
    """Makes a folder that any machine loads: CIM_MODELS_MIRROR=FOLDER for the id, or weights=FOLDER.

    Args:
        name: An id, an architecture for its newest weights, or hf-hub:org/name[@revision].
        to: The folder to make; one that holds this release already is made again.
        token: Show the Hub the token that is stored on this machine, for private repositories.
        whole: The encoder as one file, too, which plain timm reads: it knows no weights in several files.
        root: Folder that holds weights_manifest.json and weights/; by default the package's.

    Returns:
        The folder: every file verified after it was copied, config.json, the card, recipes and logs.

    Raises:
        ConfigError: If there is something else in that folder, or it cannot be written.
        WeightsError: If there are no such weights, or they cannot be had.
    """
    asked, to = parse_name(name), to.expanduser().absolute()
    manifest = known_manifest(asked.id) if root is None and asked.source == "registry" else load_manifest(root)
    access = Access(token=token)
    found = resolve(name, manifest=manifest, access=access)
    entry = found.entry
    if entry is None:
        raise WeightsError(f"{found.name} is no release of this package: copy it as it is")
    if to.exists() and (not to.is_dir() or any(to.iterdir()) and not _holds(to, entry.id)):
        raise ConfigError(f"{to} holds something else than {entry.id}: give a folder that is empty or not there")
    with staging(to) as (temporary, install):
        paths = {part: iter(paths) for part, paths in found.files.items()}
        for file in entry.files:
            path = temporary / Path(file.path).name
            shutil.copyfile(next(paths[file.part]), path)
            check_file(path, file)
        released = provenance_files(manifest.root / "weights" / entry.id) if entry.id in manifest.entries else []
        for text in released:
            shutil.copyfile(text, temporary / text.name)
        source = next((name for name in (found.name, *entry.sources) if name.startswith("hf-hub:")), "")
        if source and not released:
            for name, content in _provenance(Source(source, access)).items():
                (temporary / name).write_bytes(content)
        shards = found.files.get("backbone", ())
        if whole and len(shards) > 1:
            join(shards, temporary / WHOLE)
        write_config(temporary, entry, found.labels)
        (temporary / "README.md").write_text(render_card(entry, temporary), encoding="utf-8")
        install()
    return to


def _provenance(source: Source) -> dict[str, bytes]:
    """The recipes and logs beside a release on the Hub, by name: of its last run, and of those before it."""
    cache, patience, found = Cache(source.access), Patience(), {}
    try:
        for number in itertools.count():
            for name in (RECIPE, LOG):
                name = name.replace(".", f"-{number}." if number else ".")
                found[name] = small_file(source, name, cache, patience)
    except Missing:
        pass
    except WeightsError as error:
        logger.warning("how it was trained is not known: %s", error)
    return found


def _holds(folder: Path, id: str) -> bool:
    """Whether a folder is of this release, whole or not."""
    try:
        return f'"id": "{id}"' in (folder / "config.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
