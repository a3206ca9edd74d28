"""Residual networks of CIM: timm's `ResNet`, as it is."""

from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

RESNETS: dict[str, dict[str, Any]] = {
    "cim_resnet18": dict(block=BasicBlock, layers=(2, 2, 2, 2)),
    "cim_resnet34": dict(block=BasicBlock, layers=(3, 4, 6, 3)),
    "cim_resnet50": dict(block=Bottleneck, layers=(3, 4, 6, 3)),
    "cim_resnet101": dict(block=Bottleneck, layers=(3, 4, 23, 3)),
}
RESNET_CFG: dict[str, Any] = dict(num_classes=0, crop_pct=0.9, first_conv="conv1", classifier="fc", pool_size=(7, 7))
"""What timm's `PretrainedCfg` says of the family."""


def build_resnet(name: str, **kwargs: Any) -> Any:
    """Builds one of `RESNETS`; see `cim_models.backbones.build`."""
    kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or PretrainedCfg(architecture=name, **RESNET_CFG)
    return build_model_with_cfg(ResNet, name, pretrained=False, **{**RESNETS[name], **kwargs})
