"""Released weights → an ONNX file that says what PyTorch says."""

import importlib.util
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cim_models.backbones import VisionTransformer
from cim_models.backbones.tokens import encode
from cim_models.errors import ConfigError, WeightsError
from cim_models.files import check_writable, replacing
from cim_models.hub.load import create_model

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OLDEST = "2.14"
"""PyTorch's version: the exporter of 2.6 fails on ResNets and on images of any size."""
OPSET = 18
"""The first whose Resize is antialiased, as timm's resampling of position embeddings is."""
LIMIT = 2**31 - 2**24
"""Bytes of tensors that one ONNX file can hold, with some room for the graph."""
ATOL = 1e-4
"""How far ONNX Runtime may be from PyTorch."""


@dataclass(frozen=True)
class Exported:
    """An ONNX file that was compared with its model."""

    path: Path
    images: tuple[str | int, ...]
    """Shape of its input; a name stands for any number."""
    output: str
    shape: tuple[str | int, ...]
    """Shape of its output."""
    difference: float
    """Largest one from PyTorch's output that was seen."""

    def __str__(self) -> str:
        images, shape = (f"({', '.join(map(str, shape))})" for shape in (self.images, self.shape))
        return f"{self.path}: images {images} → {self.output} {shape}, within {self.difference:.1g} of PyTorch"


def export(
    model: str,
    /,
    *,
    to: Path,
    size: tuple[int, ...] = (),
    any_size: bool = False,
    batch: int = 0,
    output: Literal["features", "map"] = "features",
) -> Exported:
    """Writes an encoder as ONNX, and compares what ONNX Runtime makes of it with PyTorch.

    The input `images` is normalised float32, as `create_transform` makes it; mean, deviation, interpolation and crop
    are in the file's metadata. Position embeddings are resampled in the graph as timm does, antialiased and bicubic.

    Args:
        model: Released weights, an architecture for its newest ones, a release folder, run directory or file.
        to: The file, model.onnx.
        size: Side of the images in pixels, or height and width; by default that of the weights.
        any_size: Take images of any height and width. Those of a vision transformer should be multiples of its patch
            (`size_multiple` in the metadata): what is beyond, at the right and below, ONNX Runtime does not see.
        batch: Images at once; 0: any number.
        output: `features`, as calling the encoder gives them (B, D), or class scores if it is a classifier; `map`, the
            features of each place (B, D, h, w).

    Raises:
        ConfigError: If a package is missing or PyTorch too old, a size or batch is not possible, or the file cannot be
            written.
        WeightsError: If there are no such weights, or the result differs from PyTorch.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"ONNX export needs {', '.join(missing)}: pip install 'cim-models[onnx]'")
    if torch.__version__ < OLDEST:  # no plain string: 2.6 comes before 2.14
        raise ConfigError(f"ONNX export needs PyTorch {OLDEST}, not {torch.__version__}: upgrade torch and torchvision")
    if any_size and size:
        raise ConfigError(f"size {' '.join(map(str, size))} and any_size contradict each other: give one of them")
    if batch < 0:
        raise ConfigError(f"batch is a number of images, or 0 for any: {batch} cannot be")
    check_writable(to)
    encoder: Any = create_model(model, pretrained=True).eval()
    channels, *native = encoder.pretrained_cfg["input_size"]
    height, width = _checked_size(encoder, size or native, any_size)
    if sum(tensor.nbytes for tensor in encoder.state_dict().values()) > LIMIT:
        raise ConfigError(f"{model} in float32 is larger than the 2 GB that one ONNX file can hold: take a smaller one")

    name = "scores" if output == "features" and encoder.num_classes else output
    names = {0: "batch"} if not batch else {}
    names |= {2: "height", 3: "width"} if any_size else {}
    module = _Maps(encoder).eval() if output == "map" else encoder
    program = torch.onnx.export(
        module,
        (torch.zeros(batch or 2, channels, height, width),),  # one image would make the batch 1 for ever
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["images"],
        output_names=[name],
        dynamic_shapes=(names,),
    )
    assert program is not None
    program.model.metadata_props.update(_metadata(encoder))
    with replacing(to) as file:
        program.save(file, external_data=False)
        rows, columns = _multiple(encoder)
        sizes = [(height, width)]
        sizes += [(height + rows, width + 2 * columns), (rows, width)] if any_size else []
        numbers = [batch] if batch else [1, 3]
        shapes = [(number, channels, *sides) for number, sides in itertools.product(numbers, sizes)]
        difference = _difference(module, file, shapes)
        if not difference <= ATOL:
            raise WeightsError(f"{model} as ONNX differs from PyTorch by {difference:g}: {to} was not written")
    shape = program.model.graph.outputs[0].shape or ()
    images = tuple(names.get(axis, n) for axis, n in enumerate((batch, channels, height, width)))
    return Exported(to, images, name, tuple(n if isinstance(n, int) else str(n) for n in shape), difference)


class _Maps(nn.Module):
    """Images → features of each place (B, D, h, w)."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        tokens = encode(self.encoder, images)
        return tokens.patches.transpose(1, 2).unflatten(2, tokens.grid)


def _multiple(encoder: nn.Module) -> tuple[int, int]:
    """What height and width must be multiples of."""
    return encoder.patch_embed.patch_size if isinstance(encoder, VisionTransformer) else (1, 1)


def _checked_size(encoder: nn.Module, size: Sequence[int], any_size: bool) -> tuple[int, int]:
    """Height and width that the encoder can take."""
    if len(size) not in (1, 2) or min(size) < 1:
        raise ConfigError(f"size is one side in pixels, or height and width: {' '.join(map(str, size))} cannot be")
    height, width = size[0], size[-1]
    rows, columns = _multiple(encoder)
    if height % rows or width % columns:
        raise ConfigError(f"size {height} × {width} is not a multiple of the encoder's patches, {rows} × {columns}")
    if isinstance(encoder, VisionTransformer) and not encoder.dynamic_img_size:
        native = tuple(encoder.patch_embed.img_size)
        if any_size or (height, width) != native:
            raise ConfigError(
                f"this encoder has dynamic_img_size=False: it takes {native[0]} × {native[1]} pixels only"
            )
    return height, width


def _metadata(encoder: nn.Module) -> dict[str, str]:
    """What a user of the file must know; all values are JSON."""
    cfg: Any = encoder.pretrained_cfg
    keys = ("architecture", "tag", "mean", "std", "interpolation", "crop_pct", "crop_mode", "license")
    known = {key: cfg[key] for key in keys if cfg.get(key)} | {"size_multiple": _multiple(encoder)}
    return {key: json.dumps(value) for key, value in known.items()}


@torch.no_grad()
def _difference(module: nn.Module, path: Path, shapes: Sequence[tuple[int, ...]]) -> float:
    """The largest between ONNX Runtime and PyTorch over images of these shapes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    random = torch.Generator().manual_seed(0)
    difference = 0.0
    for shape in shapes:
        images = torch.randn(shape, generator=random)
        (found,) = session.run(None, {"images": images.numpy()})
        difference = max(difference, (torch.from_numpy(found) - module(images)).abs().max().item())
    return difference
