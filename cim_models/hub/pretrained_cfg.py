"""Weights of ours, as timm describes weights: where they are, preprocessing, classes, licence."""

from typing import Any

from timm.models import PretrainedCfg

from cim_models.backbones.resnet import RESNET_CFG, RESNETS
from cim_models.backbones.vit import VIT_CFG
from cim_models.hub.weights import Weights


def pretrained_cfg(weights: Weights) -> PretrainedCfg:
    """timm's description of some weights; of an architecture alone where they have neither entry nor files."""
    entry, (file, *_) = weights.entry, weights.files.get("backbone", ("",))
    cfg: dict[str, Any] = {"architecture": weights.architecture, "file": str(file) or None}
    cfg |= RESNET_CFG if weights.architecture in RESNETS else VIT_CFG
    if weights.preprocessing is not None:
        cfg |= vars(weights.preprocessing)
    elif weights.model_args and "img_size" in weights.model_args:
        size = weights.model_args["img_size"]
        cfg["input_size"] = (3, *((size, size) if isinstance(size, int) else size))
    if entry is not None:
        hub = next((s.removeprefix("hf-hub:") for s in entry.sources if s.startswith("hf-hub:")), None)
        cfg |= dict(tag=entry.tag, num_classes=entry.num_classes, license=entry.licence, description=entry.summary)
        cfg |= dict(hf_hub_id=hub)
    if weights.labels:
        cfg["label_names"] = weights.labels
    return PretrainedCfg(**cfg)
