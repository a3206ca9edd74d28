"""The model of a run and its optimiser."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from cim_models import backbones
from cim_models.errors import ConfigError
from cim_models.pretext.model import CIM
from cim_models.pretraining.compiling import compile_parts
from cim_models.pretraining.config import OptimiserConfig, PretrainConfig
from cim_models.pretraining.sharding import local, shard


def build(config: PretrainConfig, log_odds: float) -> CIM:
    """The untrained model of a run, its head answering with the prior's log-odds.

    Raises:
        ConfigError: If there is no such backbone, or its patches do not tile the images.
    """
    args: dict[str, Any] = {"drop_path_rate": config.backbone.drop_path}
    if not config.model.startswith("cim_resnet"):
        args["img_size"] = config.backbone.img_size
    online: Any = backbones.build(config.model, **args)
    cim = CIM(online, config.pretext)
    if isinstance(online, backbones.VisionTransformer):
        patch = online.patch_embed.patch_size[0]
        sizes = {
            "backbone.img_size": config.backbone.img_size,
            "views.context_size": config.views.context_size,
            "views.exemplars.size": config.views.exemplars.size,
        }
        for name, size in sizes.items():
            if size % patch:
                raise ConfigError(f"{name} is {size}; it must be a multiple of {config.model}'s patches of {patch}")
    else:
        cim.to(memory_format=torch.channels_last)  # which convolutions are fastest with
    for module in cim.target.modules() if cim.target is not None else ():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    online.set_grad_checkpointing(config.backbone.grad_checkpointing)
    head: Any = cim.head
    head.start_from(log_odds)
    return cim


def place(cim: CIM, config: PretrainConfig, device: torch.device, processes: int) -> CIM:
    """Brings the model of a run to its device, and readies it for its processes: compiled, in shards, as is asked for.

    Raises:
        ConfigError: If it is to be compiled and cannot be.
    """
    if processes > 1 and device.type == "cuda":
        cim = nn.SyncBatchNorm.convert_sync_batchnorm(cim)
    cim = cim.to(device)
    if config.compile:
        compile_parts(cim)
    if config.shard and processes > 1:
        shard(cim, processes)
    return cim


def adamw(cim: CIM, config: OptimiserConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over what is trained, fused where torch can; what is no vector decays."""
    groups = param_groups_weight_decay(cim, config.weight_decay)
    return torch.optim.AdamW(groups, betas=config.betas, fused=device.type in ("cpu", "cuda"))


def remember_positions(cim: CIM, config: PretrainConfig) -> None:
    """Lets the model compute its position embeddings for the sizes of a run, which it keeps, before it trains."""
    zeros = partial(torch.zeros, device=next(cim.parameters()).device)
    size, side = config.views.exemplars.size, config.views.context_size
    cim.locate(zeros(1, 3, side, side), zeros(1, 1, 3, size, size))


def state_bytes(trained: Sequence[Tensor]) -> int:
    """What AdamW keeps of these parameters here once it has made a step: two numbers for each."""
    return sum(2 * local(p).nbytes for p in trained)
