"""Encoders that label every pixel: a linear head on a frozen one, a simple decoder on one that is trained."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from cim_models.evaluation.features import pool


class LinearSegmenter(nn.Module):
    """Frozen dense features → BatchNorm → 1×1 convolution → bilinear upsampling: pictures of any size → class scores.

    Args:
        encoder: Any timm model; it stays as it is, in evaluation mode.
        classes: Number of classes.
    """

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        level = encoder.feature_info[-1]  # EfficientNets widen it before their pooling, to `num_features`
        self.encoder, self.stride = encoder.requires_grad_(False).eval(), level["reduction"]
        self.head = nn.Sequential(nn.BatchNorm2d(level["num_chs"]), nn.Conv2d(level["num_chs"], classes, 1))

    def train(self, mode: bool = True) -> "LinearSegmenter":
        """The head only."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, classes, H, W)."""
        padded = pad(images, self.stride)
        with torch.no_grad():
            features = pool(self.encoder, padded, "dense")
        return enlarge(self.head(features), padded, images)


class PyramidSegmenter(nn.Module):
    """Maps of several levels → LayerNorm and 1×1 convolution each, all at the finest size → 3×3 convolution → classes.

    Args:
        encoder: A timm model with `features_only`; all of it is trained.
        classes: Number of classes.
        width: Channels of the decoder.
    """

    def __init__(self, encoder: Any, classes: int, width: int) -> None:
        super().__init__()
        self.encoder, self.stride = encoder, max(encoder.feature_info.reduction())
        channels = encoder.feature_info.channels()
        self.levels = nn.ModuleList(nn.Sequential(LayerNorm2d(count), nn.Conv2d(count, width, 1)) for count in channels)
        self.head = nn.Sequential(
            nn.Conv2d(width * len(channels), width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, classes, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, classes, H, W)."""
        padded = pad(images, self.stride)
        maps = [level(features) for level, features in zip(self.levels, self.encoder(padded), strict=True)]
        size = maps[0].shape[2:]
        return enlarge(self.head(torch.cat([resize(features, size) for features in maps], dim=1)), padded, images)


def levels_of(encoder: Any, count: int = 4) -> tuple[int, ...]:
    """Which features of an encoder make a pyramid: its last stages, or blocks spread evenly over its depth."""
    reductions = [info["reduction"] for info in encoder.feature_info]
    if len(set(reductions)) == 1:
        depth, count = len(reductions), min(count, len(reductions))
        return tuple(depth * (level + 1) // count - 1 for level in range(count))
    return tuple(range(len(reductions)))[-count:]


def pad(images: Tensor, stride: int) -> Tensor:
    """Adds the mean colour at the right and below, until both sides are multiples of the stride."""
    height, width = images.shape[2:]
    return F.pad(images, (0, -width % stride, 0, -height % stride))


def resize(features: Tensor, size: Any) -> Tensor:
    """Bilinear, in fp32."""
    return F.interpolate(features.float(), tuple(size), mode="bilinear", align_corners=False)


def enlarge(scores: Tensor, padded: Tensor, images: Tensor) -> Tensor:
    """Scores of features → of the pixels of the images, without those that were added."""
    return resize(scores, padded.shape[2:])[:, :, : images.shape[2], : images.shape[3]]
