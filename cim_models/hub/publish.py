"""A release folder → a repository on the Hub, verified by downloading it, recorded in the manifest. Needs no torch.

Everything is uploaded in one commit on top of the head that was looked at, read back, and tagged with the release's
tag, which never moves; the manifest is written after that. Whatever was interrupted can be run again: what is on the
Hub already is found there.
"""

import contextlib
import dataclasses
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cim_models.errors import CimModelsError, ConfigError, WeightsError
from cim_models.hub.access import Access, alone
from cim_models.hub.card import update_readme
from cim_models.hub.digest import sha256
from cim_models.hub.download import Downloads
from cim_models.hub.entry import Entry, WeightFile, read_entry
from cim_models.hub.integrity import check_file
from cim_models.hub.manifest import NAME, Manifest, load_manifest, read_json, write_manifest
from cim_models.hub.remote import Source, digest_is, small_text
from cim_models.hub.waiting import IDLE, STEP, Patience, explain, persist

OF_A_RELEASE = r".*\.safetensors(\.index\.json)?|recipe(-\d+)?\.yaml|log(-\d+)?\.jsonl"
"""Names of files that a later release in the same repository does not keep: its own are others, or it has none."""
ACCESS = Access(token=True)
"""As whoever is logged in."""
ANSWER = 60.0
"""Seconds that an upload waits for an answer to what it has sent: a commit takes the Hub a while."""


def publish(
    id: str,
    /,
    *,
    repo: str,
    private: bool = False,
    dry_run: bool = False,
    root: Path | None = None,
) -> str:
    """Uploads a release to the Hugging Face Hub, verifies what arrived, tags it and records its commit.

    Log in first: `hf auth login`, or the environment variable HF_TOKEN.

    Args:
        id: Of a release, such as cim_vit_tiny.tin200_e3.
        repo: Repository, org/name; it is made if there is none.
        private: Make it one that only its members see.
        dry_run: Say what would be uploaded, and make no request.
        root: Folder that holds weights_manifest.json and weights/; by default the package's.

    Returns:
        What was done.

    Raises:
        ConfigError: If there is no such release, its folder differs from the manifest, or the repository holds
            something else.
        WeightsError: If the Hub refuses or cannot be reached, or what arrived is not what was sent. Nothing is
            recorded then.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ConfigError(f"--repo {repo} is not of the form org/name")
    manifest = load_manifest(root)
    if id not in manifest.entries:
        raise ConfigError(f"there is no release {id!r}: `cim list` shows what there is, `cim release` makes one")
    entry = manifest.entries[id]
    with tempfile.TemporaryDirectory() as temporary:
        files = _files(manifest, entry, repo, Path(temporary))
        listing = [f"  {name}  {path.stat().st_size / 1e6:.2f} MB" for name, path in files.items()]
        if dry_run:
            said = f"{id} would become one commit of {repo}, tagged {entry.tag}:"
            return "\n".join([said, *listing, "Nothing was sent."])
        with _errors(f"{id} to {repo}"):
            commit = _upload(entry, repo, private, files)
            _verify(repo, commit, files)
            _tag(repo, entry.tag, commit)
    with alone(manifest.root / NAME):
        _record(manifest.root, entry, f"hf-hub:{repo}@{commit}")
    return "\n".join([f"{id} is commit {commit} of {repo}, tagged {entry.tag}:", *listing])


def _files(manifest: Manifest, entry: Entry, repo: str, temporary: Path) -> dict[str, Path]:
    """The files of a release folder by name, which are those of its entry, and an encoder in several files as one, too.

    Plain timm reads no other: the Hub takes files of any size, a repository of code does not. The card's code names the
    repository, which everybody can load, where that of the folder names an id of this manifest.
    """
    folder = manifest.root / "weights" / entry.id
    config = read_json(folder / "config.json")
    described = read_entry(config.get("cim_models"), f"{folder / 'config.json'}: cim_models")
    if dataclasses.replace(described, sources=entry.sources) != entry:
        raise ConfigError(f"{folder / 'config.json'} differs from the manifest's entry: release it again")
    for file in entry.files:
        check_file(folder / Path(file.path).name, file)
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")}
    if "README.md" in files:
        here, there = f'("{entry.id}"', f'("hf-hub:{repo}@{entry.tag}"'
        card = files["README.md"].read_bytes().replace(here.encode(), there.encode())
        files["README.md"] = temporary / "README.md"
        files["README.md"].write_bytes(card)
    shards = [folder / Path(file.path).name for file in entry.files if file.part == "backbone"]
    if len(shards) > 1:
        from cim_models.hub.folder import WHOLE, join

        join(shards, temporary / WHOLE)
        files[WHOLE] = temporary / WHOLE
    return files


def _upload(entry: Entry, repo: str, private: bool, files: Mapping[str, Path]) -> str:
    """Makes the repository and the commit if they are not there yet; the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError

    api = _api()
    try:
        persist(repo, lambda timeout: api.model_info(repo, timeout=timeout), Patience())
    except WeightsError as error:
        if not isinstance(error.__cause__, RepositoryNotFoundError):
            raise
        api.create_repo(repo, private=private, exist_ok=True)
    head = api.model_info(repo, files_metadata=True, timeout=ANSWER)
    if private and head.private is False:
        raise ConfigError(f"{repo} is public already: make it private in its settings, or leave --private out")
    tagged = _tags(repo).get(entry.tag)
    if tagged is not None:
        there = api.model_info(repo, revision=tagged, files_metadata=True, timeout=ANSWER)
        if _differing(there, files):
            raise ConfigError(f"{repo}: the tag {entry.tag} is another release, and tags do not move: choose a new id")
        return tagged
    changed = _differing(head, files)
    if not changed:
        return str(head.sha)
    names = [file.rfilename for file in head.siblings or ()]
    if "config.json" in names:
        _refuse_foreign(repo, str(head.sha), entry)
    old = [name for name in names if name not in files and re.fullmatch(OF_A_RELEASE, name)]
    operations: list[Any] = [CommitOperationDelete(name) for name in old]
    with contextlib.ExitStack() as stack:
        for name in changed:  # as streams, which the client uploads by plain HTTP instead of Xet
            operations.append(CommitOperationAdd(name, stack.enter_context(files[name].open("rb"))))
        made = api.create_commit(repo, operations, commit_message=f"Release {entry.id}", parent_commit=head.sha)
    return str(made.oid)


def _differing(info: Any, files: Mapping[str, Path]) -> list[str]:
    """The files that a commit lacks or has with another content, by the Hub's word."""
    there = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or ()}
    return [name for name, path in files.items() if not digest_is(path.read_bytes(), str(there.get(name)))]


def _refuse_foreign(repo: str, commit: str, entry: Entry) -> None:
    """A repository holds releases of one architecture, each behind its tag: anything else is not written over."""
    content = small_text(Source(f"hf-hub:{repo}@{commit}", ACCESS), "config.json", Patience())
    try:
        config = json.loads(content)
        held = config.get("cim_models", {}).get("architecture") or config.get("architecture")
    except (ValueError, AttributeError):
        held = None
    if held != entry.architecture:
        raise ConfigError(
            f"{repo} holds {held or 'something else'}, not {entry.architecture}: choose another repository"
        )


def _verify(repo: str, commit: str, files: Mapping[str, Path]) -> None:
    """Downloads every file of the commit and compares it with what was sent."""
    with tempfile.TemporaryDirectory() as folder:
        downloads = Downloads([f"hf-hub:{repo}@{commit}"], dataclasses.replace(ACCESS, cache_dir=folder))
        downloads.cache.folders = (Path(folder),)
        for name, path in files.items():
            file = WeightFile(name, "backbone", path.stat().st_size, sha256(path))
            downloads.obtain([file])[file].unlink()


def _tag(repo: str, tag: str, commit: str) -> None:
    _api().create_tag(repo, tag=tag, revision=commit, exist_ok=True)
    found = _tags(repo).get(tag)
    if found != commit:
        raise WeightsError(f"the tag {tag} is {found}, not {commit}: somebody else has made it")


def _tags(repo: str) -> dict[str, str]:
    return {tag.name: tag.target_commit for tag in _api().list_repo_refs(repo).tags}


def _record(root: Path, entry: Entry, source: str) -> None:
    """Writes the source into the manifest as it is now; another commit of the same repository makes way."""
    manifest = load_manifest(root)
    now = manifest.entries.get(entry.id)
    if now is None or dataclasses.replace(now, sources=entry.sources) != entry:
        raise ConfigError(f"{entry.id} has changed in the manifest meanwhile: publish it again")
    repository = source.partition("@")[0]
    others = tuple(other for other in now.sources if other.partition("@")[0] != repository)
    manifest = manifest.with_entry(dataclasses.replace(now, sources=(*others, source)))
    write_manifest(manifest)
    update_readme(manifest)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(ACCESS.hub, token=True, library_name="cim_models")


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    """Turns all that the Hub's client raises into a WeightsError, and waits for no answer for ever."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session, httpx

    session, asked = get_session(), set()
    timeout, hooks = session.timeout, session.event_hooks

    def hasten(request: Any) -> None:
        """The client asks up to six times; whoever has been silent once gets less time to answer."""
        if request.method in ("POST", "PUT") and request.url in asked:
            request.extensions["timeout"]["read"] = STEP
        asked.add(request.url)

    session.timeout = httpx.Timeout(ANSWER, connect=STEP, write=IDLE)
    session.event_hooks = hooks | {"request": [*hooks["request"], hasten]}
    again = "nothing is recorded; run the command again"
    try:
        yield
    except CimModelsError as error:
        raise type(error)(f"{what}: {error}; {again}") from error
    except HfHubHTTPError as error:
        moved = error.response.status_code == 412
        said = "somebody else has made a commit meanwhile" if moved else explain(error)
        raise WeightsError(f"{what}: {said}; {again}") from error
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = f": {error.__cause__}" if error.__cause__ else ""
        raise WeightsError(f"{what}: {str(error) or type(error).__name__}{cause}; {again}") from error
    finally:
        session.timeout, session.event_hooks = timeout, hooks
