"""The weights that a run starts from: another run's, a release's, or those of an encoder alone."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cim_models.backbones.vit import VisionTransformer, sincos_pos_embed
from cim_models.errors import ConfigError, WeightsError
from cim_models.hub.load import create_model, create_pretext
from cim_models.hub.names import parse_name
from cim_models.hub.store import resolve
from cim_models.pretext.model import CIM
from cim_models.pretraining.config import PretrainConfig

HEAD = {"cross_attention": ("head", "head_width", "head_heads"), "cosine": ("head",)}
"""Settings of `pretext` that a correlation head is made of, by its kind."""

logger = logging.getLogger(__name__)


def located(init: str) -> str:
    """The name of weights as it is understood everywhere on this machine: a path in full, links to folders followed."""
    if not init:
        return init
    try:
        given = parse_name(Path(init) if Path(init).exists() else init)
        path = Path(os.path.expanduser(given.location))
        full = path.parent.resolve() / path.name if path.is_file() else path.resolve()  # what a file is, lies beside it
    except (ConfigError, PermissionError):
        return init
    return str(full) if given.source == "path" else init


def start_from(config: PretrainConfig, cim: CIM) -> None:
    """Gives the model of a run the weights that `config.init` names.

    One encoder serves as both; without a correlation head there, the run's own is a new one, as those of the global
    loss always are, and the final norm of a classifier that has it behind the pooling. Fixed position embeddings are
    those of the run's own image size.

    Args:
        config: The run.
        cim: Its untrained model.

    Raises:
        ConfigError: If `init` can mean other weights another day, or is the run itself, or they are of another head or
            image size.
        WeightsError: If there are no such weights, they are damaged, or of another architecture.
    """
    init, place, out = config.init, Path(located(config.init)).absolute(), Path(config.out).resolve()
    if place in (out, out / "online.safetensors", out / "target.safetensors"):
        raise ConfigError(f"init is {init}, which is where the run writes: give another --out")
    try:
        found = resolve(config.model, init)
    except (ConfigError, WeightsError) as error:
        raise type(error)(f"init: {error}") from error
    if not place.exists() and init != found.name:
        raise ConfigError(f"init is {init}, which may mean other weights another day: give {found.name}")
    if {"head", "pretext"} & found.files.keys():
        trained = create_pretext(config.model, weights=init)
        has, mine = ({name: getattr(c, name) for name in HEAD[c.head]} for c in (trained.config, config.pretext))
        if has != mine:
            settings = ", ".join(f"pretext.{name} {value}" for name, value in has.items() if mine.get(name) != value)
            raise ConfigError(f"{found.name}, which the run is to start from, has {settings}: set this here")
        cim.head.load_state_dict(trained.head.state_dict())
        encoders: tuple[nn.Module, nn.Module] = trained.online, trained.context_encoder
    else:
        args: dict[str, Any] = {}
        if isinstance(cim.online, VisionTransformer):
            size = config.backbone.img_size if found.model_args is None else None
            args = {"img_size": size, "global_pool": "avg", "fc_norm": False}
        encoders = (create_model(config.model, weights=init, num_classes=0, **args),) * 2
        logger.info("%s has no correlation head: the run begins with a new one", found.name)
    for ours, theirs in zip((cim.online, cim.target), encoders, strict=True):
        if ours is not None:
            _take(ours, theirs, found.name)


def _take(ours: nn.Module, theirs: nn.Module, name: str) -> None:
    """Gives an encoder another one's weights; if the sizes differ, its own fixed position embedding stays."""
    tensors, mine = theirs.state_dict(), ours.state_dict().get("pos_embed")
    if isinstance(theirs, VisionTransformer) and mine is not None and tensors["pos_embed"].shape != mine.shape:
        fixed = sincos_pos_embed(theirs.embed_dim, theirs.patch_embed.grid_size)
        if not torch.allclose(tensors["pos_embed"][0, theirs.num_prefix_tokens :], fixed, atol=1e-2):
            size = theirs.patch_embed.img_size[0]
            raise ConfigError(f"{name} has learned position embeddings: set backbone.img_size to their {size}")
        tensors["pos_embed"] = mine
    try:
        if _attention_heads(ours) != _attention_heads(theirs):
            raise RuntimeError("other attention heads or blocks")
        ours.load_state_dict(tensors)
    except RuntimeError as error:
        raise WeightsError(f"{name} does not fit the run's encoder: {error}") from error


def _attention_heads(encoder: nn.Module) -> list[Any]:
    """Of each layer, which no shape tells."""
    return [module.num_heads for module in encoder.modules() if hasattr(module, "num_heads")]
