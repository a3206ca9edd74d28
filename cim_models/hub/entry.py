"""What is known of one released weight, typed and validated. Needs no torch."""

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import PurePosixPath
from typing import Any, Literal, TypeAlias, cast

from cim_models.errors import ConfigError

Part: TypeAlias = Literal["backbone", "pretext", "index"]
"""What a file holds: an encoder under timm's names; a `CIM` or its head alone under `CIM`'s; the index of shards."""


@dataclass(frozen=True)
class WeightFile:
    """One file of an entry."""

    path: str
    """Relative to `data_root()`, with forward slashes; in a release folder the last part of it."""
    part: Part
    size: int
    """Bytes."""
    sha256: str
    """64 hexadecimal digits."""


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the encoder's input, in timm's words."""

    input_size: tuple[int, int, int]
    """Channels, height, width."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    crop_pct: float
    crop_mode: Literal["center", "squash", "border"]


@dataclass(frozen=True)
class Pretext:
    """What `locate` needs beside the encoder."""

    config: dict[str, Any]
    """`PretextConfig` as a dict."""
    context_size: int
    """Side of a context in pixels (S)."""
    exemplar_size: int
    """Side of an exemplar in pixels (T)."""


@dataclass(frozen=True)
class Data:
    """A data set that the weights were trained on."""

    name: str
    terms: str


@dataclass(frozen=True)
class Metric:
    """One measured number."""

    name: str
    value: float
    data: str
    command: str


@dataclass(frozen=True)
class Golden:
    """What the model says of a computed input (`load.golden_output`)."""

    part: Literal["backbone", "pretext"]
    recipe: str
    output: tuple[float, ...]
    atol: float


@dataclass(frozen=True)
class Entry:
    """One released weight."""

    id: str
    """`architecture.tag`."""
    architecture: str
    model_args: dict[str, Any]
    """Constructor arguments beside the architecture's, without `num_classes`."""
    num_classes: int
    """Of the classifier; 0 without one."""
    kind: Literal["backbone", "pretext", "finetuned"]
    """An encoder (with or without a head file), a whole `CIM` in one, or a classifier."""
    encoder: Literal["online", "target"] | None
    """Which of the two was released as the backbone."""
    files: tuple[WeightFile, ...]
    sources: tuple[str, ...]
    """Where the files are: `repository`, `hf-hub:org/name@<40-hex commit>`, the address of a folder, `https://…`."""
    preprocessing: Preprocessing
    pretext: Pretext | None
    """None where there is no correlation head."""
    dtype: Literal["float16", "bfloat16", "float32"]
    """Of the tensors in the files."""
    parameters: int
    """Of the encoder, classifier included; of the whole `CIM` for kind `pretext`."""
    tensors: int
    """In the files of that model."""
    key_digest: str
    """`key_digest` of those tensors."""
    licence: str
    data: tuple[Data, ...]
    metrics: tuple[Metric, ...]
    golden: tuple[Golden, ...]
    summary: str
    """One line."""
    released: str
    """YYYY-MM-DD."""

    @property
    def tag(self) -> str:
        """What follows the architecture in the id."""
        return self.id.partition(".")[2]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.size for file in self.files)

    @property
    def parts(self) -> tuple[str, ...]:
        """What its files hold."""
        return tuple(dict.fromkeys(file.part for file in self.files))


def read_entry(data: Any, where: str) -> Entry:
    """An entry's JSON → `Entry`; ConfigError naming `where` and the field."""
    entry = cast(Entry, read(Entry, data, where))
    hexadecimal = re.compile("[0-9a-f]{64}")
    faults = {
        "id": not re.fullmatch(rf"{re.escape(entry.architecture)}\.[\w.-]*\w", entry.id),
        "model_args": "num_classes" in entry.model_args,
        "num_classes": entry.num_classes < 0,
        "files": not entry.files,
        "preprocessing.input_size": min(entry.preprocessing.input_size) < 1,
        "key_digest": not hexadecimal.fullmatch(entry.key_digest),
        "licence": not entry.licence,
        "released": not _is_date(entry.released),
    }
    for i, file in enumerate(entry.files):
        path = PurePosixPath(file.path)
        faults[f"files[{i}].path"] = path.is_absolute() or ".." in path.parts or "\\" in file.path or not path.name
        faults[f"files[{i}].size"] = file.size < 1
        faults[f"files[{i}].sha256"] = not hexadecimal.fullmatch(file.sha256)
    for i, source in enumerate(entry.sources):
        known = r"repository|hf-hub:[\w.-]+/[\w.-]+@[0-9a-f]{40}|https?://\S+"
        faults[f"sources[{i}]"] = not re.fullmatch(known, source)
    for field, wrong in faults.items():
        if wrong:
            value: Any = entry
            for step in re.findall(r"\w+", field):
                value = value[int(step)] if step.isdigit() else getattr(value, step)
            raise ConfigError(f"{where}: field {field}: {value!r} cannot be")
    return entry


def to_dict(entry: Entry) -> dict[str, Any]:
    """The JSON of an entry."""
    return cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(entry))))


def key_digest(shapes: Mapping[str, Sequence[int]]) -> str:
    """sha256 of the sorted lines `key [d0, d1, …]`: the same for two files that one model can load."""
    lines = sorted(f"{key} {list(shape)}" for key, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def read(kind: Any, value: Any, where: str, field: str = "") -> Any:
    """Plain data → the type that a field is declared with, strictly."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (kind,) = (option for option in options if option is not type(None))
        return None if value is None else read(kind, value, where, field)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        prefix = f"{field}." if field else ""
        for fault, names in (("unknown", value.keys() - hints), ("missing", hints.keys() - value)):
            if names:
                raise ConfigError(f"{where}: {fault} field {', '.join(prefix + name for name in sorted(names))}")
        values = {name: read(hint, value[name], where, prefix + name) for name, hint in hints.items()}
        return cast(type, kind)(**values)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = (options[0],) * len(value) if options[-1] is Ellipsis else options
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(read(option, item, where, f"{field}[{i}]") for i, (option, item) in pairs)
    if origin is Literal and value in options or origin is dict and isinstance(value, dict):
        return value
    if kind is float and type(value) in (int, float):
        return float(value)
    if type(value) is kind:
        return value
    what = f"field {field}" if field else "it"
    raise ConfigError(f"{where}: {what}: {value!r} is not {kind.__name__ if isinstance(kind, type) else kind}")
