"""Where files are on the network: a commit of a repository on the Hub, or a folder behind an address. Needs no torch.

Requests are made with the session, the headers and the errors of the Hub's own client, but not with its downloader,
which cannot be given a deadline, takes a file of the right length for the right file, and loses what had arrived.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cim_models.errors import WeightsError
from cim_models.hub.access import Access
from cim_models.hub.cache import Cache
from cim_models.hub.entry import WeightFile
from cim_models.hub.waiting import ENOUGH, Passing, Patience, Unreachable, persist

COMMIT = re.compile("[0-9a-f]{40}")
SMALL = 10_000_000
"""Bytes: more than any config.json or index has."""

AWAY = "check the network and HF_ENDPOINT, or fetch it elsewhere (`cim fetch`) and set CIM_MODELS_MIRROR"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A place on the network that has files of a release."""

    name: str
    """`hf-hub:org/name@commit`, or an address."""
    access: Access

    @property
    def repository(self) -> tuple[str, str] | None:
        """`org/name` and commit, of a place on the Hub."""
        repository, at, commit = self.name.removeprefix("hf-hub:").partition("@")
        return (repository, commit) if self.name.startswith("hf-hub:") and at else None

    def url(self, file: str) -> str:
        """Where a file is, on the Hub always by commit."""
        if self.repository is None:
            return f"{self.name.rstrip('/')}/{quote(file)}"
        repository, commit = self.repository
        return f"{self.access.hub}/{repository}/resolve/{commit}/{quote(file)}"

    def headers(self) -> dict[str, str]:
        """Of a request: nothing is compressed, and only the Hub may see a token."""
        from huggingface_hub.utils import build_hf_headers

        from cim_models import __version__

        token = self.access.token if self.repository else False
        named = build_hf_headers(token=token, library_name="cim_models", library_version=__version__)
        return named | {"Accept-Encoding": "identity"}

    def preflight(self, file: str, patience: Patience) -> Mapping[str, str]:
        """Asks for a file without its content; the answer's headers.

        Raises:
            Unreachable: If nobody answers in time.
            WeightsError: If the answer is no.
        """

        def ask(timeout: float) -> Mapping[str, str]:
            from huggingface_hub.utils import get_session, hf_raise_for_status

            session, url = get_session(), self.url(file)
            # A redirect leads to the store of large files; what is asked of the Hub is in its own answer.
            reply = session.head(url, headers=self.headers(), timeout=timeout, follow_redirects=False)
            if reply.is_redirect and "x-repo-commit" not in reply.headers:
                reply = session.head(url, headers=self.headers(), timeout=timeout, follow_redirects=True)
            if not reply.is_redirect:
                hf_raise_for_status(reply)
            return reply.headers

        return persist(f"{file} of {self.name}", ask, patience)

    def receive(self, file: WeightFile, partial: Path, patience: Patience) -> None:
        """Completes a partial file; what is there already is not asked for again.

        Raises:
            Unreachable: If the server falls silent.
            WeightsError: If it says no.
            OSError: If the file cannot be written.
        """
        from huggingface_hub.utils import get_session, hf_raise_for_status, tqdm

        name = Path(file.path).name

        def ask(timeout: float) -> None:
            have = partial.stat().st_size if partial.exists() else 0
            if have > file.size:
                partial.unlink()
                have = 0
            if have == file.size:
                return
            headers = self.headers() | ({"Range": f"bytes={have}-"} if have else {})
            with get_session().stream("GET", self.url(name), headers=headers, timeout=timeout) as reply:
                if reply.status_code == 416:
                    partial.unlink()
                    raise Passing("the server's file is shorter than it should be")
                if reply.status_code >= 400:
                    reply.read()
                hf_raise_for_status(reply)
                goes_on = reply.headers.get("Content-Range", "").startswith(f"bytes {have}-")
                size = have if goes_on else 0
                bar = tqdm(desc=name, total=file.size, initial=size, unit="B", unit_scale=True, disable=None)
                with partial.open("ab" if goes_on else "wb") as stream, bar:
                    for chunk in reply.iter_bytes():
                        size += stream.write(chunk)
                        bar.update(len(chunk))
                        if not patience.look(size) and size < file.size:
                            raise Passing(f"less than {ENOUGH:,} bytes arrived in {patience.seconds:.0f} s")
                        if size > file.size:
                            return  # it is not the file

        patience.size = 0
        persist(f"{name} of {self.name}", ask, patience, effects=True)


def commit_of(repository: str, revision: str, access: Access, cache: Cache, patience: Patience) -> str:
    """The commit that a branch or a tag means now, or meant when it was last asked for and the Hub is away.

    Raises:
        WeightsError: If there is no such repository or revision, or nobody knows.
    """
    if COMMIT.fullmatch(revision):
        return revision
    revision = revision or "main"
    where = f"hf-hub:{repository}@{revision}"
    known = f"hub/{repository.replace('/', '--')}/refs/{quote(revision, safe='')}"
    kept = cache.read(known)
    theirs = access.hub_cache / f"models--{repository.replace('/', '--')}" / "refs" / revision
    last = kept.decode() if kept else theirs.read_text().strip() if theirs.is_file() else ""
    if not access.offline:
        from huggingface_hub import HfApi

        api = HfApi(access.hub, token=access.token)
        try:
            info = persist(where, lambda t: api.model_info(repository, revision=revision, timeout=t), patience)
        except Unreachable as error:
            if not COMMIT.fullmatch(last):
                raise Unreachable(f"{error}; {AWAY}") from error
            logger.warning("%s; used commit %s, which it was when it was last asked for", error, last)
            return last
        cache.write(known, str(info.sha).encode())
        return str(info.sha)
    if not COMMIT.fullmatch(last):
        raise cache.lacks(where)
    return last


def small_text(source: Source, file: str, patience: Patience, digest: str = "") -> bytes:
    """A small file as it is now, compared with what the Hub says that it is.

    Raises:
        Unreachable: If nobody answers in time.
        WeightsError: If the answer is no, or too long.
    """

    def ask(timeout: float) -> bytes:
        from huggingface_hub.utils import get_session, hf_raise_for_status

        with get_session().stream("GET", source.url(file), headers=source.headers(), timeout=timeout) as reply:
            if reply.status_code >= 400:
                reply.read()
            hf_raise_for_status(reply)
            content = b""
            for chunk in reply.iter_bytes():
                content += chunk
                if len(content) > SMALL:
                    raise WeightsError(f"{file} of {source.name} is larger than {SMALL} bytes")
        if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest) and not digest_is(content, digest):
            raise Passing(f"what arrived is not what the Hub announced: another digest than {digest}")
        return content

    return persist(f"{file} of {source.name}", ask, patience)


def small_file(source: Source, file: str, cache: Cache, patience: Patience) -> bytes:
    """A text of a repository at a commit, from the cache if it is there.

    Raises:
        WeightsError: If there is none, or nobody knows.
    """
    known = _known(source, file)
    record = _record(cache.read(known))
    if record is not None:
        path = cache.find(record)
        if path is not None:
            return path.read_bytes()
    path = hub_file(source, file)
    if path is not None and digest_is(path.read_bytes(), path.resolve().name):
        return path.read_bytes()
    if source.access.offline:
        raise cache.lacks(f"{file} of {source.name}")

    headers = source.preflight(file, patience)
    if "x-repo-commit" not in headers:
        todo = f"check the network and HF_ENDPOINT, {source.access.hub}"
        raise WeightsError(f"{file} of {source.name}: what answers is not the Hub: {todo}")
    content = small_text(source, file, patience, _etag(headers))
    found = WeightFile(file, "index", len(content), hashlib.sha256(content).hexdigest())
    with cache.adding(found, patience) as (partial, _):
        partial.write_bytes(content)
    cache.write(known, json.dumps({"size": found.size, "sha256": found.sha256, "path": file}).encode())
    return content


def described(source: Source, file: str, cache: Cache, patience: Patience) -> WeightFile:
    """Size and sha256 of a large file, by the Hub's word: for repositories that have no manifest entry.

    Raises:
        WeightsError: If there is no such file, or the Hub does not know its sha256.
    """
    known = _known(source, file)
    record = _record(cache.read(known))
    if record is not None:
        return record
    if source.access.offline:
        raise cache.lacks(f"{file} of {source.name}")
    headers = source.preflight(file, patience)
    digest = _etag(headers)
    size = headers.get("x-linked-size") or headers.get("content-length") or ""
    if not re.fullmatch("[0-9a-f]{64}", digest) or not size.isdigit():
        raise WeightsError(f"{file} of {source.name}: the Hub does not know its sha256, so it cannot be verified")
    cache.write(known, json.dumps({"size": int(size), "sha256": digest, "path": file}).encode())
    return WeightFile(file, "backbone", int(size), digest)


def hub_file(source: Source, file: str) -> Path | None:
    """A file that the Hub's own client has downloaded, at this commit; not yet verified."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if source.repository is None:
        return None
    repository, commit = source.repository
    try:
        found = try_to_load_from_cache(repository, file, cache_dir=source.access.hub_cache, revision=commit)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) and Path(found).is_file() else None


def digest_is(content: bytes, digest: str) -> bool:
    """Whether a digest is git's or sha256 of a content."""
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return digest in (git, hashlib.sha256(content).hexdigest())


def _etag(headers: Mapping[str, str]) -> str:
    return (headers.get("x-linked-etag") or headers.get("etag") or "").removeprefix("W/").strip('"')


def _known(source: Source, file: str) -> str:
    """Where the cache keeps what is known of a file at a commit."""
    repository, commit = source.repository or ("", "")
    return f"hub/{repository.replace('/', '--')}/{commit}/{file}.json"


def _record(content: bytes | None) -> WeightFile | None:
    try:
        data: dict[str, Any] = json.loads(content or b"")
        return WeightFile(data["path"], "backbone", int(data["size"]), str(data["sha256"]))
    except (ValueError, KeyError, TypeError):
        return None
