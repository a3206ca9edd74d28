"""Networks that label every pixel: built on an encoder, written to a file, read again."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.models import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms import v2

from cim_models.backbones import ARCHITECTURES, build
from cim_models.errors import CheckpointError, ConfigError, WeightsError
from cim_models.evaluation.decoders import LinearSegmenter, PyramidSegmenter, levels_of
from cim_models.evaluation.encoders import rebuilt
from cim_models.evaluation.label_maps import preparation
from cim_models.files import replacing
from cim_models.hub.weights import read_header

FILE, KIND = "model.safetensors", "segmenter"
TEXTS = ("architecture", "head")
"""Of the metadata; the rest is JSON."""

Head: TypeAlias = Literal["linear", "pyramid"]


@dataclass(frozen=True)
class Design:
    """What a segmenter is, beside its tensors: enough to build it again, and to prepare pictures for it."""

    architecture: str
    """Of the encoder, in timm's words."""
    model_args: dict[str, Any]
    """How the encoder differs from it."""
    head: Head
    classes: list[str]
    """Their names, in the order of the scores."""
    width: int
    """Channels of the decoder."""
    short_side: int | None
    """Pixels of the shorter side of what the network sees; None leaves pictures as they are."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Of the normalisation of pixels in [0, 1]."""


class Segmenter(NamedTuple):
    """A network that labels pixels, and what is needed to use it."""

    network: nn.Module
    """Normalised pictures (B, 3, H, W) → scores (B, classes, H, W); in evaluation mode, on the CPU."""
    classes: list[str]
    """Names, in the order of the scores."""
    transform: Callable[[Image.Image], Tensor]
    """RGB picture → (3, H, W): whole, as the network was measured on."""


def design_of(
    encoder: Any, model_args: Mapping[str, Any], head: Head, classes: list[str], width: int, short_side: int | None
) -> Design:
    """The design of a segmenter on an encoder from `open_encoder`; other arguments are its fields."""
    patches: Any = getattr(encoder, "patch_embed", None)
    size = {"img_size": patches.img_size} if hasattr(patches, "img_size") else {}
    seen = resolve_model_data_config(encoder)
    architecture = encoder.pretrained_cfg["architecture"]
    return Design(
        architecture, {**model_args, **size}, head, classes, width, short_side, seen["mean"], seen["std"]
    )  # fmt: skip


def build_segmenter(encoder: Any, design: Design, drop_path: float = 0.0, seed: int = 0) -> nn.Module:
    """Puts a new head on an encoder, which stays as it is, or a decoder, with which the encoder is trained.

    Args:
        encoder: With the weights to start from.
        design: See `design_of`.
        drop_path: Greatest stochastic depth of an encoder that is trained.
        seed: Of what is new.
    """
    changes: dict[str, Any] = {"dynamic_img_size": True} if isinstance(encoder, VisionTransformer) else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if design.head == "linear":
            return LinearSegmenter(rebuilt(encoder, design.model_args, **changes, num_classes=0), len(design.classes))
        changes |= {"drop_path_rate": drop_path} if drop_path else {}
        changes |= {"features_only": True, "feature_cls": "getter", "out_indices": levels_of(encoder)}
        return PyramidSegmenter(rebuilt(encoder, design.model_args, **changes), len(design.classes), design.width)


def save_segmenter(folder: Path, tensors: Mapping[str, Tensor], design: Design) -> None:
    """Writes `model.safetensors`, with the design in its metadata.

    Raises:
        CheckpointError: If it cannot be written.
    """
    about = {key: value if isinstance(value, str) else json.dumps(value) for key, value in asdict(design).items()}
    with replacing(folder / FILE, CheckpointError) as file:
        save_file({key: value.contiguous() for key, value in tensors.items()}, file, {"kind": KIND, **about})


def load_segmenter(folder: str | Path) -> Segmenter:
    """Loads the best weights of `cim evaluate segment`.

    Args:
        folder: The run directory, or its `model.safetensors`.

    Raises:
        WeightsError: If there is no such file, or it is damaged or something else.
    """
    path = Path(folder).expanduser()
    path = path if path.is_file() else path / FILE
    about = read_header(path).metadata
    if about.get("kind") != KIND:
        raise WeightsError(f"{path} labels no pixels; give a folder that `cim evaluate segment` has written")
    try:
        values: dict[str, Any] = {field.name: about[field.name] for field in fields(Design)}
        design = Design(**{key: text if key in TEXTS else json.loads(text) for key, text in values.items()})
        name, args = design.architecture, design.model_args
        encoder = build(name, **args) if name in ARCHITECTURES else timm.create_model(name, num_classes=0, **args)
        network = build_segmenter(encoder, design)
        network.load_state_dict(load_file(path))
    except (KeyError, ValueError, TypeError, RuntimeError, ConfigError) as error:
        raise WeightsError(f"{path} is not what it says of itself: {error}") from error
    prepare = preparation(design.short_side, design.mean, design.std)
    image = v2.functional.to_image
    return Segmenter(
        network.eval(), design.classes, lambda picture: prepare(image(picture), None)[0].as_subclass(Tensor)
    )
