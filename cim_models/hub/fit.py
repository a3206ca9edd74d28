"""The tensors of files → a model on the meta device, which takes them for its own.

Names, shapes and kinds of numbers are compared first, from the files' headers; every mismatch is in one error.
"""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from cim_models.backbones import VisionTransformer
from cim_models.errors import WeightsError
from cim_models.hub.weights import Weights, read_header

Specs: TypeAlias = dict[str, tuple[tuple[int, ...], bool]]
"""Shape of each tensor, and whether its numbers are floating-point."""


def specs_in(found: Weights, part: str) -> Specs:
    """What the headers of a part's files say, all files together."""
    specs: Specs = {}
    for path in found.files[part]:
        header = read_header(path)
        specs |= {key: (shape, header.dtypes[key].startswith(("F", "BF"))) for key, shape in header.shapes.items()}
    return specs


def specs_of(tensors: Mapping[str, Tensor]) -> Specs:
    """The same of a state dict."""
    return {key: (tuple(value.shape), value.is_floating_point()) for key, value in tensors.items()}


def compare(found: Weights, held: Specs, expected: Specs) -> None:
    """Raises one WeightsError with every tensor that is missing, too much, or of another shape or kind of number."""
    kinds = ("integers", "floating-point numbers")
    faults = [f"{key} is missing" for key in expected if key not in held]
    faults += [f"{key} has no place in the model" for key in held if key not in expected]
    for key in (key for key in expected if key in held):
        (shape, floating), (wanted, wanted_floating) = held[key], expected[key]
        if shape != wanted:
            size = ", as of another img_size" if key == "pos_embed" else ""
            faults.append(f"{key} has shape {shape}, not {wanted}{size}")
        if floating != wanted_floating:
            faults.append(f"{key} holds {kinds[floating]}, not {kinds[wanted_floating]}")
    if faults:
        raise WeightsError(f"{found.name} does not fit {found.architecture}: {'; '.join(faults)}")


def read(found: Weights, part: str) -> dict[str, Tensor]:
    """The tensors of a part; mapped where nobody but us writes, else in memory of their own."""
    tensors: dict[str, Tensor] = {}
    for path in found.files[part]:
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{path} cannot be read: {error}") from error
    return tensors if found.ours else {key: value.clone() for key, value in tensors.items()}


def adapt(found: Weights, tensors: dict[str, Tensor], model: nn.Module, stem: str) -> dict[str, Tensor]:
    """Other grids, patch sizes and numbers of input channels than the file's, by timm's rules.

    Args:
        found: Where the tensors are from.
        tensors: Of an encoder, by timm's names.
        model: The encoder that they are for; may be on the meta device.
        stem: Name of its first convolution.

    Returns:
        New tensors where they had to change, floating-point ones in float32.

    Raises:
        WeightsError: If something else differs, too.
    """
    expected, kernel = specs_of(model.state_dict()), f"{stem}.weight"
    held = specs_of(tensors)
    compare(found, held, expected | {key: held[key] for key in (kernel, "pos_embed") if key in expected.keys() & held})
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    if isinstance(model, VisionTransformer):
        tensors = checkpoint_filter_fn(tensors, model)
    channels = model.get_parameter(kernel).shape[1]
    tensors[kernel] = adapt_input_conv(channels, tensors[kernel], base_chans=tensors[kernel].shape[1])
    compare(found, specs_of(tensors), expected)
    return tensors


def initialise(module: nn.Module) -> dict[str, Tensor]:
    """Materialises a module that no file holds, with small weights and no bias; returns its state dict."""
    module.to_empty(device="cpu")
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()
    return module.state_dict()


def assign(model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Gives a model on the meta device its tensors, cast to one dtype; which of them train stays as it was."""
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    model.load_state_dict(cast, assign=True)
    left = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if left:
        raise WeightsError(f"no file holds {', '.join(left)}: give these arguments to a model without weights")
