"""How files may be fetched: offline or not, from where, as whom, and where they are kept. Needs no torch."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Access:
    """What a caller may say about fetching; environment variables are read when something is fetched, not once."""

    revision: str | None = None
    """Branch, tag or commit on the Hub: the same as `@revision` behind a name."""
    cache_dir: str | Path | None = None
    """Where downloads are kept; by default HF_HUB_CACHE."""
    local_files_only: bool = False
    """No request: only what is here. HF_HUB_OFFLINE=1 says the same of everything."""
    endpoint: str | None = None
    """Address of the Hub; by default HF_ENDPOINT."""
    token: bool | str = False
    """A token of the Hub, True for the one that is stored on this machine; by default nobody sees one."""

    @property
    def offline(self) -> bool:
        """Whether requests are forbidden."""
        from huggingface_hub import constants

        said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
        return self.local_files_only or constants.HF_HUB_OFFLINE or said.upper() in ("1", "ON", "YES", "TRUE")

    @property
    def hub(self) -> str:
        """The Hub's address, without a slash at its end."""
        from huggingface_hub import constants

        return (self.endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")

    @property
    def hub_cache(self) -> Path:
        """The folder where the Hub's client keeps files."""
        from huggingface_hub import constants

        home = os.environ.get("HF_HOME")
        said = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home and f"{home}/hub"
        return _folder(self.cache_dir or said or constants.HF_HUB_CACHE)


def own_cache() -> Path:
    """What this package keeps for its user: XDG_CACHE_HOME/cim_models."""
    return _folder(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cim_models"


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Waits for the user's other processes that write this file or folder; the lock lies in the cache, if it can."""
    from filelock import FileLock

    with ExitStack() as held:
        with suppress(OSError, NotImplementedError):
            name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
            held.enter_context(FileLock(own_cache() / "locks" / f"{name}.lock"))
        yield


def _folder(place: str | Path) -> Path:
    """A folder; one that nobody can make, where it is to be in the home of a user who has none."""
    path = os.path.expanduser(place)
    return Path(os.devnull, path) if path.startswith("~") else Path(path)
