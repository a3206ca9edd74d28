"""The loop: images → a pretrained encoder."""

from cim_models.pretraining.config import PretrainConfig, load_recipe
from cim_models.pretraining.loop import pretrain

__all__ = ["PretrainConfig", "load_recipe", "pretrain"]
