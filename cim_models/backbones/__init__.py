"""What an encoder is: `cim_vit_*` and `cim_resnet*`, built from timm's own classes.

Registering the names in timm, with their released weights, is the hub's part (`cim_models.hub.cim`).
"""

import difflib
from typing import Any

from cim_models.backbones.resnet import RESNETS, build_resnet
from cim_models.backbones.vit import VITS, VisionTransformer, build_vit
from cim_models.errors import ConfigError

__all__ = ["ARCHITECTURES", "VisionTransformer", "build"]

ARCHITECTURES: tuple[str, ...] = (*VITS, *RESNETS)


def build(name: str, **kwargs: Any) -> Any:
    """Builds a backbone with random weights.

    Args:
        name: One of `ARCHITECTURES`.
        kwargs: Anything that timm's constructor or builder takes: `num_classes`, `in_chans`, `img_size`,
            `features_only`, `out_indices`, `pretrained_cfg`, …

    Returns:
        A timm `VisionTransformer` or `ResNet` (with `features_only` its feature wrapper). Without `num_classes` it has
        no classifier: calling it gives pooled features (B, D).

    Raises:
        ConfigError: If there is no such architecture.
    """
    if name in VITS:
        return build_vit(name, **kwargs)
    if name in RESNETS:
        return build_resnet(name, **kwargs)
    close = difflib.get_close_matches(name, ARCHITECTURES, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(ARCHITECTURES)}"
    raise ConfigError(f"no backbone is named {name!r}: {hint}")
