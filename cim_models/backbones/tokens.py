"""One interface over both families of encoder: images → (class or mean token, patch tokens, grid)."""

from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from timm.models.resnet import ResNet
from torch import Tensor, nn

from cim_models.backbones.vit import VisionTransformer

Encoder: TypeAlias = VisionTransformer | ResNet


class Tokens(NamedTuple):
    """What an encoder says of a batch of images."""

    summary: Tensor
    """(B, D): the class token, or the mean token of an encoder that has none."""
    patches: Tensor
    """(B, h·w, D), row by row."""
    grid: tuple[int, int]
    """Rows and columns (h, w) of the patches."""
    prefix: Tensor
    """(B, P, D): the tokens that precede the patches; P is 0 for a ResNet."""

    @property
    def sequence(self) -> Tensor:
        """(B, P + h·w, D): all tokens, the class token first where there is one."""
        return torch.cat([self.prefix, self.patches], dim=1)


def encode(encoder: Encoder, images: Tensor, pos_embed: Tensor | None = None) -> Tokens:
    """Runs an encoder to its final norm.

    Args:
        encoder: A backbone of this package.
        images: (B, 3, H, W), normalised.
        pos_embed: (1, 1 + h·w, D) in place of timm's resampling of the encoder's own; vision transformers only.
    """
    if not isinstance(encoder, VisionTransformer):
        features = encoder.forward_features(images)
        patches = features.flatten(2).transpose(1, 2)
        return Tokens(patches.mean(dim=1), patches, (features.shape[2], features.shape[3]), patches[:, :0])

    x = encoder.patch_embed(images)
    grid = (x.shape[1], x.shape[2]) if x.ndim == 4 else encoder.patch_embed.grid_size
    if pos_embed is None:
        x = encoder._pos_embed(x)
    else:
        x = x.reshape(len(x), -1, x.shape[-1])
        if encoder.cls_token is not None:
            x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = encoder.pos_drop(x + pos_embed)
    x = encoder.norm_pre(x)
    if encoder.grad_checkpointing and encoder.training:
        x = checkpoint_seq(encoder.blocks, x)
    else:
        x = encoder.blocks(x)
    x = encoder.norm(x)
    prefix, patches = x[:, : encoder.num_prefix_tokens], x[:, encoder.num_prefix_tokens :]
    return Tokens(prefix[:, 0] if prefix.shape[1] else patches.mean(dim=1), patches, grid, prefix)


def blocks(encoder: Encoder) -> list[nn.Module]:
    """The residual blocks of an encoder, in order: most of what it computes."""
    if isinstance(encoder, VisionTransformer):
        return list(encoder.blocks)
    stages: Any = (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)
    return [block for stage in stages for block in stage]


def resample_pos_embed(pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resamples a position embedding as the authors' released code does.

    Bicubic without antialiasing, at the scale (n + 0.1) / m itself rather than the one that the sizes imply: encoders
    that were pretrained so give other features otherwise. timm's own rule is antialiased.

    Args:
        pos_embed: (1, P + h·w, D) with P prefix rows, kept as they are.
        old_grid: Its (h, w).
        new_grid: The (h, w) wanted.

    Returns:
        (1, P + h'·w', D).
    """
    if new_grid == old_grid:
        return pos_embed
    prefix = pos_embed.shape[1] - old_grid[0] * old_grid[1]
    rows = pos_embed[:, prefix:].reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    scale = tuple((new + 0.1) / old for new, old in zip(new_grid, old_grid, strict=True))
    rows = F.interpolate(rows, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :prefix], rows.flatten(2).transpose(1, 2)], dim=1)
