"""The configuration of a run: one dataclass per concern, every default written once; recipes override."""

import contextlib
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from cim_models.errors import ConfigError
from cim_models.pretext.model import PretextConfig
from cim_models.pretext.views import ViewConfig

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class DataConfig:
    """What is read, and how sources are cropped from it."""

    path: str = ""
    """Folder of images, text file of paths, zip archive, tar shards, Parquet files or a saved Hugging Face dataset."""
    size: int = 224
    """Side of a source in pixels."""
    crop_area: tuple[float, float] = (0.5, 1.0)
    """Least and greatest area of the crop, as a fraction of the picture's."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest width / height of the crop."""
    flip: float = 0.5
    """Probability of a horizontal flip of the source."""
    workers: int = 4
    """Reading processes; 0 reads in the training process."""
    cache: Literal["none", "ram", "device"] = "none"
    """ram: each picture is decoded once, the batches stay the same; device: all pictures are kept on the training
    device as squares, and cropped there."""
    cache_side: int = 0
    """Side of the squares of the device cache; 0: the least that no crop is enlarged from."""


@dataclass
class DiagnosticsConfig:
    """What is found out about a run while it goes on."""

    held_out: int = 512
    """Images that are not trained on but diagnosed, at most a twentieth of all; none if that is fewer than 8."""
    every: int = 500
    """Steps between diagnoses."""


@dataclass
class BackboneConfig:
    """The encoder, beside its name."""

    img_size: int = 224
    """Side of the images whose grid the position embedding is made for; ignored by ResNets."""
    drop_path: float = 0.0
    """Greatest stochastic depth of the online encoder."""
    grad_checkpointing: bool = False
    """Compute activations twice to keep fewer."""


@dataclass
class OptimiserConfig:
    """AdamW and its schedules; the defaults are those of the released recipe."""

    batch_size: int | Literal["auto"] = 256
    """Images per process and backward pass; auto: the most that fit the memory, which is measured first."""
    accumulation: int = 1
    """Backward passes per optimiser step."""
    epochs: float = 300.0
    """Length of the run in passes over the images; fractions are fine."""
    warmup_epochs: float = 40.0
    """Linear warm-up of the learning rate."""
    lr: float = 1.5e-4
    """Peak learning rate per 256 images of a global batch."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine, scaled like `lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: float = 0.05
    """On matrices, kernels and the class token; not on biases and norms."""
    clip: float | None = 1.0
    """Greatest 2-norm of the gradient; None leaves it alone."""
    momentum: float = 0.99
    """Of the target encoder at the start; a half cosine takes it to 1."""


@dataclass
class PretrainConfig:
    """A whole run."""

    out: str = ""
    """Run directory: checkpoint, encoders, log, samples."""
    model: str = "cim_vit_base"
    """cim_vit_tiny, cim_vit_small, cim_vit_base, cim_vit_large, cim_vit_huge, cim_resnet18, cim_resnet34, cim_resnet50
    or cim_resnet101."""
    seed: int = 0
    """Of everything random."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 where the hardware multiplies it natively (GPUs, CPUs with AVX512-BF16)."""
    compile: bool = False
    """torch.compile of the encoders and the correlation head: some minutes at the start, then faster steps."""
    shard: bool = False
    """Each process keeps a part of the model and of the optimiser's state (FSDP2), for models that fill a device."""
    resume: bool | Literal["auto"] = False
    """Go on from the run directory's last checkpoint; auto: if there is one, else start."""
    init: str = ""
    """What this run starts from: another run's directory (easy exemplars first, for one), a release's name or folder,
    or a safetensors file of one encoder."""
    log_every: int = 20
    """Steps between lines of log.jsonl."""
    save_every: int = 1000
    """Steps between checkpoints."""
    save_minutes: float | None = 15.0
    """Minutes after which a checkpoint is written in any case; None counts steps only."""
    keep: int = 1
    """Checkpoints that are kept: `last.pt`, and with more than one also the last ones as `step-….pt`."""
    tensorboard: bool = False
    """Also write the log as TensorBoard events."""
    data: DataConfig = field(default_factory=DataConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    pretext: PretextConfig = field(default_factory=PretextConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)

    def check(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        from_dict(PretrainConfig, to_dict(self), "configuration")
        for meaning, fits, names in LIMITS:
            for name in names.split():
                value: Any = functools.reduce(getattr, name.split("."), self)
                if not all(map(fits, value if isinstance(value, (list, tuple)) else (value,))):
                    raise ConfigError(f"{name} is {value}; it must be {meaning}")
        for name in RISING.split():
            value = functools.reduce(getattr, name.split("."), self)
            if not value[0] <= value[1]:
                raise ConfigError(f"{name} is {value}; it must not fall")
        if self.shard and self.optimiser.batch_size == "auto":
            raise ConfigError("optimiser.batch_size is auto, which is not measured with shard; give a number")
        if not self.data.path:
            raise ConfigError("data.path is empty; give a folder of images, a list of paths, an archive or a dataset")
        if not self.out:
            raise ConfigError("out is empty; give a run directory (--out DIR)")


LIMITS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "greater than 0",
        lambda x: 0 < x < math.inf,
        "data.size data.crop_area data.crop_ratio backbone.img_size views.context_size views.exemplars.count "
        "views.exemplars.size views.exemplars.area views.exemplars.ratio views.colour.sigma pretext.head_width "
        "pretext.head_heads pretext.global_hidden pretext.global_temperature optimiser.accumulation optimiser.epochs "
        "optimiser.lr log_every save_every keep diagnostics.every",
    ),
    (
        "0 or more",
        lambda x: 0 <= x < math.inf,
        "data.workers data.cache_side diagnostics.held_out views.colour.brightness views.colour.contrast "
        "views.colour.saturation pretext.correlation_weight pretext.global_weight optimiser.warmup_epochs "
        "optimiser.min_lr optimiser.weight_decay",
    ),
    (
        "from 0 to 1",
        lambda x: 0 <= x <= 1,
        "data.crop_area data.flip views.exemplars.area views.exemplars.flip views.colour.jitter views.colour.grey "
        "views.colour.blur views.colour.solarise optimiser.momentum",
    ),
    ("from 0 to less than 1", lambda x: 0 <= x < 1, "backbone.drop_path optimiser.betas"),
    ("from -360 to 360 degrees", lambda x: abs(x) <= 360, "views.exemplars.angle"),
    ("from 0 to half a turn", lambda x: 0 <= x <= 0.5, "views.colour.hue"),
    ("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32, "seed"),
    ("greater than 0, or None", lambda x: x is None or 0 < x < math.inf, "optimiser.clip save_minutes"),
    ("2 or more, or auto: images are compared", lambda x: x == "auto" or x >= 2, "optimiser.batch_size"),
)
"""What each number of a configuration may be."""
RISING = (
    "data.crop_area data.crop_ratio views.exemplars.area views.exemplars.ratio views.exemplars.angle views.colour.sigma"
)
"""Pairs of a least and a greatest value."""


def load_recipe(name: str | Path) -> PretrainConfig:
    """Reads a recipe: what differs from the defaults.

    Args:
        name: One of the package's recipes, without suffix, or a YAML file (a run's `config.yaml` is one).

    Raises:
        ConfigError: If there is no such recipe, or it names a field that does not exist or cannot hold its value.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"no recipe {str(name)!r}: there are {', '.join(recipes())}; or give a YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {error}") from error
    return from_dict(PretrainConfig, values, str(path))


def recipes() -> list[str]:
    """Names of the package's recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain data, tuples as lists."""

    def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in items}

    return dataclasses.asdict(config, dict_factory=plain)


def from_dict(kind: type, values: Any, where: str) -> Any:
    """Plain data → a configuration dataclass, every field checked.

    Raises:
        ConfigError: Naming `where` and the field.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected fields of {kind.__name__}, found {values!r}")
    types = typing.get_type_hints(kind)
    for name in values:
        if name not in types:
            raise ConfigError(f"{where}: no field {name!r}; there are {', '.join(types)}")
    return kind(**{name: _convert(types[name], value, f"{where}: {name}") for name, value in values.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Plain data → the type that a field is declared with."""
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where)
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal and value in options:
        return value
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(options):
        return tuple(_convert(option, item, where) for option, item in zip(options, value, strict=True))
    if type(None) in options:
        return None if value is None else _convert(options[0], value, where)
    if origin in (typing.Union, types.UnionType):
        for option in options:
            with contextlib.suppress(ConfigError):
                return _convert(option, value, where)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # YAML reads 1e-3 as a string
            return float(value)
    if type(value) is kind:
        return value
    raise ConfigError(f"{where}: {value!r} is not {_name(kind)}")


def _name(kind: Any) -> str:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(options)}" if len(options) > 1 else options[0]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_name, options))
    return str(kind) if options else kind.__name__
