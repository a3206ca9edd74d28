"""The model of a run and its optimiser, and how many images at once they have memory for."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import DropPath
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from cim_models import backbones
from cim_models.backbones.modes import evaluation_mode
from cim_models.errors import CheckpointError, ConfigError
from cim_models.pretext.model import CIM
from cim_models.pretext.views import DRAWS, make_views
from cim_models.pretraining.compiling import compile_parts
from cim_models.pretraining.config import OptimiserConfig, PretrainConfig, load_recipe
from cim_models.pretraining.data import Pictures
from cim_models.pretraining.diagnostics import diagnose
from cim_models.pretraining.memory import largest_batch
from cim_models.pretraining.sharding import local, shard
from cim_models.processes import launched


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
    """AdamW over what is trained, fused where torch can; matrices decay."""
    groups = param_groups_weight_decay(cim, config.weight_decay)
    return torch.optim.AdamW(groups, betas=config.betas, fused=device.type in ("cpu", "cuda"))


def remember_positions(cim: CIM, config: PretrainConfig) -> None:
    """Lets the model compute its position embeddings for the sizes of a run, which it keeps, before it trains."""
    zeros = partial(torch.zeros, device=next(cim.parameters()).device)
    size, side = config.views.exemplars.size, config.views.context_size
    with evaluation_mode(cim):
        cim.locate(zeros(1, 3, side, side), zeros(1, 1, 3, size, size))


def state_bytes(trained: Sequence[Tensor]) -> int:
    """What AdamW keeps of these parameters here once it has made a step: two numbers for each."""
    return sum(2 * local(p).nbytes for p in trained)


def found_before(directory: Path) -> int:
    """The batch size of a run that goes on, which `auto` stands for.

    Raises:
        CheckpointError: If the run does not say it.
    """
    path = directory / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{path}, which has the number that auto stands for, is gone; give optimiser.batch_size")
    return int(load_recipe(path).optimiser.batch_size)


def find_batch_size(
    config: PretrainConfig, pictures: Pictures, device: torch.device, autocast: torch.autocast, processes: int
) -> int:
    """The most images per process and backward pass whose step fits all devices of a run.

    Args:
        config: The run.
        pictures: That it is trained on; an epoch has a step at least, and a cache on the device its place.
        device: Of this process.
        autocast: As in the run.
        processes: Of the run.

    Raises:
        ConfigError: If there is no such model, or two images do not fit.
    """
    step = _trial(config, device, autocast, processes)
    most = max(2, len(pictures) // (processes * config.optimiser.accumulation))
    cached = len(pictures) * 3 * (config.data.cache_side or pictures.min_size) ** 2
    taken = cached if config.data.cache == "device" else 0
    found = largest_batch(step, most, device, 1 if device.type == "cuda" else processes, taken)
    return min(launched().gather_for_all(found))


def _trial(
    config: PretrainConfig, device: torch.device, autocast: torch.autocast, processes: int
) -> Callable[[int], None]:
    """A step with any number of images, for its memory alone: of a model and of images of its own."""
    cim = build(config, 0.0).to(device)
    optimiser = adamw(cim, config.optimiser, device)
    trained = [p for p in cim.parameters() if p.requires_grad]
    buckets = [torch.zeros_like(p) for p in trained] if processes > 1 else []  # what DDP sends of the gradient

    def step(images: int) -> None:
        size = config.data.size
        source = torch.zeros(images, 3, size, size, dtype=torch.uint8, device=device)
        uniforms = torch.rand(images, config.views.exemplars.count, DRAWS, device=device)
        try:
            views = make_views(source, uniforms, config.views)
            with autocast:
                output = cim(*views)
            output.loss.backward()
            for bucket, parameter in zip(buckets, trained, strict=False):
                bucket.copy_(parameter if parameter.grad is None else parameter.grad)
            with autocast:
                diagnose(cim, output, views)
            optimiser.step()
        finally:
            optimiser.zero_grad()

    return step
