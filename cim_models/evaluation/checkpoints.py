"""A checkpoint file of any method → the weights of one timm encoder, all of them or an error."""

import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cim_models.errors import WeightsError, some
from cim_models.state import read_tensors

COUNTER = "num_batches_tracked"

logger = logging.getLogger(__name__)


def load_checkpoint(model: nn.Module, file: str | Path, name: str) -> None:
    """Fills a timm model without classifier from a checkpoint of a paper, a training run or timm.

    The encoder is looked for in whatever the file nests it in (`model`, `teacher.backbone`, `module.base_encoder`, …);
    decoders, projectors and classifiers beside it are left out. timm's own conversion of foreign checkpoints and
    resampling of position embeddings applies.

    Args:
        model: The encoder; its tensors are overwritten.
        file: safetensors, or anything that `torch.load` reads as tensors and plain data. Where it holds several
            encoders, `FILE#PREFIX` says which, such as `dino.pth#teacher.backbone`.
        name: Of the model, for messages.

    Raises:
        WeightsError: If the file is missing or damaged, holds no or several encoders of this architecture, or a tensor
            is missing, has another shape, or belongs to a part of the encoder that this architecture has without it.
    """
    path, asked = _location(file)
    tensors = dict(_flat(_read(path)))
    expected = model.state_dict()
    prefix = _find(tensors, expected, path, asked, name)
    found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    parts = {_part(key) for key in expected} - _classifiers(model)
    if expected.keys() <= found.keys():
        found = {key: value for key, value in found.items() if key in expected or _part(key) in parts}
    _check_patches(found, expected, path, name)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        found = found if convert is None else convert(found, model)
    except Exception as error:  # timm's conversion of a file of something else fails in any way
        raise WeightsError(f"{path} does not fit {name}: {' '.join(str(error).split())}") from error
    wrong = [key for key, value in found.items() if key in expected and value.shape != expected[key].shape]
    if wrong:
        shapes = [f"{key} is {tuple(found[key].shape)}, not {tuple(expected[key].shape)}" for key in wrong]
        raise WeightsError(f"{path} does not fit {name}: size mismatch, {some(shapes)}")
    more = [key for key in found if _part(key) in parts and key not in expected and not key.endswith(COUNTER)]
    if more:
        raise WeightsError(f"{path} holds an encoder with more than {name} has, {some(more)}: check the model's name")
    result = model.load_state_dict(found, strict=False)
    missing = [key for key in result.missing_keys if not key.endswith(COUNTER)]
    if missing:
        raise WeightsError(f"{path} does not fit {name}: it lacks {some(missing)}")
    unused = len(tensors) - (len(expected) - len(result.missing_keys))
    logger.info("%s: %d tensors of %r are the encoder, %d others are left out", path, len(expected), prefix, unused)


def _part(key: str) -> str:
    """What a tensor belongs to, such as `blocks` or `layer1`: decoders and classifiers have parts of their own."""
    return key.partition(".")[0]


def _classifiers(model: nn.Module) -> set[str]:
    """The parts of a timm model that hold its classifiers."""
    cfg: Any = getattr(model, "pretrained_cfg", {})
    names = cfg.get("classifier") or ()
    return {_part(name) for name in ([names] if isinstance(names, str) else names)}


def _check_patches(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Raises WeightsError if patches are of another size: timm would resample what embeds them."""
    for key in found.keys() & expected.keys():
        sizes = [tuple(tensors[key].shape[2:]) for tensors in (found, expected)]
        if key.startswith("patch_embed.") and len(sizes[0]) == 2 and sizes[0] != sizes[1]:
            raise WeightsError(f"{path} does not fit {name}: {key} is for patches of {sizes[0]}, not {sizes[1]} pixels")


def _location(file: str | Path) -> tuple[Path, str]:
    """The file, and the prefix that the user asked for, with a dot at its end."""
    path, _, asked = str(file).partition("#")
    if not asked or Path(file).exists():
        path, asked = str(file), ""
    return Path(path).expanduser(), f"{asked.rstrip('.')}." if asked else ""


def _read(path: Path) -> Any:
    if not path.is_file():
        raise WeightsError(f"there is no weights file {path}")
    try:
        return load_file(path) if path.suffix == ".safetensors" else read_tensors(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dictionaries, by their dotted names."""
    if isinstance(values, Tensor):
        yield prefix.removesuffix("."), values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(value, f"{prefix}{key}.")


def _find(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, asked: str, name: str) -> str:
    """The prefix under which most of the expected names stand, among those that begin as asked."""
    counts: Counter[str] = Counter()
    for key in tensors:
        starts = [0, *(match.end() for match in re.finditer(r"\.", key))]
        counts.update(key[:start] for start in starts if key[start:] in expected and key[:start].startswith(asked))
    most = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count == most]
    if most < len(expected) / 2:
        raise WeightsError(f"{path} holds no {name}{f' below {asked!r}' if asked else ''}: check the model's name")
    if len(best) > 1:
        places = ", ".join(f"{path}#{prefix.rstrip('.')}" for prefix in best)
        raise WeightsError(f"{path} holds several encoders: give one of {places}")
    return best[0]
