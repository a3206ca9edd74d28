"""What a training step costs per image: floating-point operations, and bytes that the backward pass needs.

Both are counted from shapes, by a formula of the method; operations also by torch, from the step itself. With N context
patches, M exemplar patches, K exemplars, encoder width D and depth L, head width W, and 2 operations for a
multiplication and an addition, a vision transformer's encoder makes of n tokens

    E(n) = L (24 n D² + 4 n² D) operations, and keeps L (16 n D) numbers for the backward pass

(input, normed, q k v, attended, input, normed, hidden 4 D, activated 4 D); a ResNet the sums over its convolutions. The
online encoder runs K times and costs three forward passes, the target runs once and keeps nothing.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cim_models.backbones import VisionTransformer, build
from cim_models.pretext.model import CIM, PretextConfig
from cim_models.pretext.views import ViewConfig


class Shapes(NamedTuple):
    """Of the released recipe, unless told otherwise."""

    context: int = 160
    exemplar: int = 64
    count: int = 6


def shapes_for(model: str) -> Shapes:
    """Those of the released recipe, rounded up to whole patches of 14 for `huge`."""
    return Shapes(168, 70) if model == "cim_vit_huge" else Shapes(ViewConfig().context_size)


def on_meta(model: str, pretext: PretextConfig | None = None) -> CIM:
    """The method's model without memory for its numbers."""
    with torch.device("meta"):
        return CIM(build(model), pretext)


def counted_flops(model: str, shapes: Shapes | None = None, pretext: PretextConfig | None = None) -> float:
    """Operations per image of forward and backward pass, as torch counts them; nothing is computed."""
    size, side, count = shapes or shapes_for(model)
    cim = on_meta(model, pretext)
    batch = 2
    inputs = [torch.empty(batch, *shape, device="meta") for shape in ((3, size, size), (count, 3, side, side))]
    with FlopCounterMode(display=False) as counter:
        cim(*inputs, torch.empty(batch, count, size, size, device="meta")).loss.backward()
    return counter.get_total_flops() / batch


def formula_flops(model: str, shapes: Shapes | None = None) -> float:
    """The same by the formula."""
    shapes = shapes or shapes_for(model)
    cim = on_meta(model)
    target, _ = _encoder_flops(cim.online, shapes.context)
    online, first = _encoder_flops(cim.online, shapes.exemplar)
    # The first layer's input takes no gradient, and a frozen patch projection none at all.
    trained = 3 * online - (2 if isinstance(cim.online, VisionTransformer) else 1) * first
    return target + shapes.count * trained + _head_flops(cim, shapes)


def saved_bytes(model: str, shapes: Shapes | None = None, number: int = 4, checkpointing: bool = False) -> float:
    """Bytes per image that the backward pass needs, at least.

    Args:
        model: One of our backbones.
        shapes: Of contexts and exemplars.
        number: Bytes of an activation: 4, or 2 under autocast, which keeps the inputs of LayerNorms in 4.
        checkpointing: Keep each block's input alone, and the rest of one block at a time; vision transformers only.
    """
    shapes = shapes or shapes_for(model)
    cim = on_meta(model)
    context, exemplar, count = shapes
    n, m, d, w = *_tokens(cim, shapes), cim.online.num_features, cim.head.embed.out_features
    if isinstance(cim.online, VisionTransformer):
        block = count * m * d * (2 * 4 + 14 * number)
        depth = len(cim.online.blocks)
        encoder = depth * count * m * d * 4 + block if checkpointing else depth * block
    else:
        encoder = count * number * _conv_numbers(cim.online, exemplar)
    keys = count * m * (number * (d + w + 2 * w) + 4 * w)
    queries = n * (number * (d + w + w) + 4 * w)
    answers = count * n * w * (11 * number + 2 * 4)
    inputs = 4 * 3 * (context**2 + count * exemplar**2) + count * context**2
    maps = count * context**2 * (4 + 4)
    return encoder + keys + queries + answers + inputs + maps


def _tokens(cim: CIM, shapes: Shapes) -> tuple[int, int]:
    """Patches of a context, and all tokens of an exemplar."""
    if isinstance(cim.online, VisionTransformer):
        patch = cim.online.patch_embed.patch_size[0]
        return (shapes.context // patch) ** 2, (shapes.exemplar // patch) ** 2 + 1
    return (shapes.context // 32) ** 2, (shapes.exemplar // 32) ** 2


def _head_flops(cim: CIM, shapes: Shapes) -> float:
    n, m, k, d, w = *_tokens(cim, shapes), shapes.count, cim.online.num_features, cim.head.embed.out_features
    size, side = shapes.context, math.isqrt(n)
    embed = 2 * (2 * n * d * w) + 3 * (2 * k * m * d * w)  # contexts take no gradient
    attention = 3 * (2 * n * w * w + 4 * k * m * w * w + 4 * k * n * m * w + 2 * k * n * w * w)
    upsampling = 2 * (2 * k * side * size * (side + size))  # its weights take no gradient
    return embed + attention + 3 * (16 * k * n * w * w + 2 * k * n * w) + upsampling


def _encoder_flops(encoder: nn.Module, size: int) -> tuple[float, float]:
    """Of a forward pass, and of its first layer alone."""
    if isinstance(encoder, VisionTransformer):
        patch, d, depth = encoder.patch_embed.patch_size[0], encoder.embed_dim, len(encoder.blocks)
        patches = (size // patch) ** 2
        n = patches + 1
        first = 2 * 3 * patch * patch * d * patches
        return first + depth * (24 * n * d * d + 4 * n * n * d), first
    layers = [2 * conv.weight.numel() * out.shape[2] * out.shape[3] for conv, _, out in _convolutions(encoder, size)]
    return sum(layers), layers[0]


def _conv_numbers(encoder: nn.Module, size: int) -> float:
    """Each convolution's input once, and its output, which its BatchNorm needs."""
    calls = _convolutions(encoder, size)
    inputs = {id(x): x.numel() for _, x, _ in calls}
    return sum(inputs.values()) + sum(out.numel() for *_, out in calls)


def _convolutions(encoder: nn.Module, size: int) -> list[tuple[nn.Conv2d, Tensor, Tensor]]:
    """Each with its input and its output for one image."""
    calls: list[tuple[nn.Conv2d, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, out: calls.append((module, inputs[0], out)))
        for module in encoder.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        encoder.forward_features(torch.empty(1, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    return calls
