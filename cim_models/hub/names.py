"""How weights are called: one parser of names, whose error offers the spellings that were probably meant."""

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cim_models.errors import ConfigError


@dataclass(frozen=True)
class Name:
    """A name of weights, taken apart."""

    source: Literal["registry", "hf-hub", "path"]
    location: str
    """`org/name` or a path; empty for the registry."""
    architecture: str = ""
    tag: str = ""
    revision: str = ""

    @property
    def id(self) -> str:
        """`architecture.tag`, or the architecture alone."""
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture


def parse_name(name: str | Path, known: Iterable[str] = ()) -> Name:
    """Takes a name apart.

    Args:
        name: `arch`, `arch.tag`, `arch.tag@revision`, `hf-hub:org/name[@revision]`, `local-dir:PATH`, or a path: a
            `Path`, or text that begins with `.`, `~` or `/`, ends in `.safetensors`, or has slashes and exists.
        known: Names to offer.

    Raises:
        ConfigError: If it is none of these.
    """
    text, known = os.fspath(name), list(known)
    scheme, colon, rest = text.partition(":")
    if colon and re.fullmatch(r"[A-Za-z][\w+-]+", scheme) and not isinstance(name, Path):
        if scheme == "local-dir" and rest:
            return Name("path", rest)
        hub = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", rest)
        if scheme == "hf-hub" and hub:
            return Name("hf-hub", hub[1], revision=hub[2] or "")
        if scheme in ("hf-hub", "local-dir"):
            form = "hf-hub:org/name[@revision]" if scheme == "hf-hub" else "local-dir:PATH"
            hint = f": did you mean {rest}?" if rest.partition(".")[0] in known else ""
            raise ConfigError(f"{text!r} is not of the form {form}{hint}")
        raise ConfigError(f"{text!r} begins with an unknown source {scheme!r}: {_meant(scheme, rest, known)}")
    slashed = "/" in text or "\\" in text
    if isinstance(name, Path) or text.startswith((".", "~", "/", "\\")) or text.endswith(".safetensors"):
        return Name("path", text)
    if slashed and (Path(text).exists() or re.match(r"[A-Za-z]:", text)):
        return Name("path", text)
    registry = re.fullmatch(r"(\w+)(?:\.([\w.-]*\w))?(?:@([\w./-]+))?", text)
    if slashed and not registry:
        raise ConfigError(f"{text!r} is not a path that exists: did you mean hf-hub:{text} or local-dir:{text}?")
    if not registry:
        hint = f": did you mean ./{text}, which exists?" if text and Path(text).exists() else close_to(text, known)
        raise ConfigError(f"{text!r} is not a name like arch, arch.tag or arch.tag@revision{hint}")
    return Name("registry", "", registry[1], registry[2] or "", registry[3] or "")


def _meant(scheme: str, rest: str, known: Iterable[str]) -> str:
    """What was probably meant by a name with a colon."""
    page = re.fullmatch(r"//(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)(?:/(?:tree|commit|blob)/([^/]+).*)?/?", rest)
    if page:
        return f"did you mean hf-hub:{page[1]}{f'@{page[2]}' if page[2] else ''}?"
    if scheme in known:
        return f"did you mean {scheme}.{rest}?"
    close = difflib.get_close_matches(scheme.lower(), ("hf-hub", "local-dir"), n=1, cutoff=0.5)
    return f"did you mean {close[0]}:{rest}?" if close else "there are hf-hub:org/name and local-dir:PATH"


def folder_or_close_to(asked: Name, known: Iterable[str], others: Iterable[str] = ()) -> str:
    """The end of a message about an unknown model: the folder that is called so, or what `close_to` finds."""
    if Path(asked.id).exists():
        return f": did you mean ./{asked.id}, which exists?"
    return close_to(asked.architecture, known, others)


def close_to(text: str, known: Iterable[str], others: Iterable[str] = ()) -> str:
    """The end of a message about an unknown name: what was probably meant, or all that there is but too many others."""
    known = list(known)
    close = difflib.get_close_matches(re.sub(r"[- ]", "_", text.lower()), [*known, *others], n=3, cutoff=0.75)
    if close:
        return f": did you mean {' or '.join(close)}?"
    return f": there are {', '.join(known)}" if known else ": there are none yet"
