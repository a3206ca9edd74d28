"""A name, a folder or a file → an encoder that is ready to be measured, and what it is in words."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import DropPath, PatchEmbed
from timm.models._features import FeatureGetterNet
from torch import nn

from cim_models.backbones import ARCHITECTURES, build
from cim_models.errors import ConfigError, WeightsError
from cim_models.evaluation.checkpoints import load_checkpoint
from cim_models.hub.load import create_model, create_pretext
from cim_models.hub.names import folder_or_close_to, parse_name
from cim_models.hub.pretrained_cfg import pretrained_cfg
from cim_models.hub.provenance import seen_by
from cim_models.hub.store import resolve
from cim_models.hub.weights import Weights
from cim_models.pretext.model import CIM

DEFAULT_MODEL = "cim_vit_tiny"
"""An architecture whose newest released weights travel with the package."""


def open_encoder(
    model: str,
    *,
    weights: str | None = None,
    random_init: bool = False,
    seed: int = 0,
    image_size: int | None = None,
    device: str | None = None,
) -> nn.Module:
    """Loads a pretrained encoder without classifier.

    Args:
        model: Name of released weights or of an architecture that has some; a release folder, a run directory or a
            safetensors file; or a model of timm.
        weights: Take these instead: for a model of timm a checkpoint file of any method, as `load_checkpoint` reads it;
            for one of ours what `create_model` takes.
        random_init: Random weights in the same architecture, with the same transform.
        seed: Of the random weights.
        image_size: Side of the images in pixels; by default what the weights say.
        device: By default the GPU where there is one.

    Returns:
        The encoder in evaluation mode, on its device.

    Raises:
        ConfigError: If there is no such architecture, device or size, or the arguments contradict each other.
        WeightsError: If there are no such weights, or they do not fit.
    """
    if weights is not None and random_init:
        raise ConfigError("weights and random_init contradict each other: give one of them")
    place = _device(device)
    of_timm = _is_of_timm(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if of_timm:
            encoder = _from_timm(model, pretrained=not random_init and weights is None)
            if weights is not None:
                load_checkpoint(encoder, weights, model)
        elif random_init:
            found = _described(model)
            args = {**(found.model_args or {}), "pretrained_cfg": pretrained_cfg(found)}
            encoder = create_model(found.architecture, num_classes=0, **args)
        else:
            encoder = create_model(model, pretrained=True, weights=weights, num_classes=0)
    if image_size is not None:
        _resize(encoder, image_size)
    return encoder.to(place).eval()


def open_pretext(model: str, device: str | None = None) -> tuple[CIM, int, int]:
    """Loads an encoder pair with its correlation head, in evaluation mode, on its device.

    Returns:
        The model, and the sides in pixels of the contexts and of the exemplars that it was trained on.

    Raises:
        WeightsError: If there are no such weights, or they have no correlation head.
    """
    place = _device(device)
    pretext = create_pretext(model)
    sizes: Any = resolve(model, part="pretext").pretext
    return pretext.to(place).eval(), sizes.context_size, sizes.exemplar_size


def describe(
    encoder: Any, name: str, random_init: bool = False, *, weights: str | None = None, seed: int | None = None
) -> dict[str, Any]:
    """What was measured: enough to make the same encoder and its inputs again, as JSON.

    The sha256 is one over the names and the bytes of all tensors, whatever file they came from. `encoder` is which one
    of a run directory was measured. `images_seen` and `epoch` are those of the pretraining, all runs of it together,
    where a log stands beside the weights.
    """
    digest = hashlib.sha256()
    for key, value in sorted(encoder.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    file = Path(encoder.pretrained_cfg.get("file") or "")
    of_run = file.stem in ("online", "target") and file.stem != Path(weights or name).stem
    return {
        "model": name,
        "weights": weights,
        "architecture": encoder.pretrained_cfg.get("architecture", ""),
        "random_init": random_init,
        "seed": seed if random_init else None,
        "weights_sha256": digest.hexdigest(),
        "transform": resolve_model_data_config(encoder),
        **({"encoder": file.stem} if of_run and not random_init else {}),
        **({} if random_init else seen_by(file)),
    }


def _device(name: str | None) -> torch.device:
    try:
        place = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return place


def _is_of_timm(model: str) -> bool:
    """Whether a name is that of a model of timm, not of one of ours; ConfigError if it is of neither."""
    asked = parse_name(model, ARCHITECTURES)
    name = asked.architecture
    if asked.source != "registry" or name in ARCHITECTURES:
        return False
    if not timm.is_model(name):
        hint = folder_or_close_to(asked, ARCHITECTURES, others=timm.list_models())
        raise ConfigError(f"no model, in timm neither, is named {name!r}{hint}")
    return True


def _from_timm(name: str, pretrained: bool) -> nn.Module:
    """A model of timm, and any trouble with its download as one kind of error."""
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:
        raise WeightsError(f"timm cannot load {name}: {' '.join(str(error).split())}") from error


def _described(model: str) -> Weights:
    """The weights of a name, or just the architecture where none are released."""
    try:
        return resolve(model)
    except WeightsError:
        if model not in ARCHITECTURES:
            raise
        return Weights(model, model, {})


def _resize(encoder: Any, size: int) -> None:
    """Makes an encoder, and the transform that belongs to it, take images of another size."""
    embed: Any = getattr(encoder, "patch_embed", None)
    sides = embed.patch_size if isinstance(embed, PatchEmbed) and not embed.dynamic_img_pad else (1,)
    if size < 1 or any(size % side for side in sides):
        raise ConfigError(f"image_size={size} does not fit {type(encoder).__name__}: give a multiple of {max(sides)}")
    if hasattr(encoder, "set_input_size") and not getattr(encoder, "dynamic_img_size", False):
        try:
            encoder.set_input_size(img_size=size)
        except (AssertionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"image_size={size} does not fit {type(encoder).__name__}: {error}") from error
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "input_size": (3, size, size)}


def find_weights(model: str, weights: str | None = None) -> Weights | None:
    """The verified weights behind a name, or its architecture alone where none are released; None for timm's models."""
    if _is_of_timm(model):
        return None
    return _described(model) if weights is None else resolve(model, weights)


def rebuilt(encoder: Any, model_args: Mapping[str, Any], seed: int = 0, **changes: Any) -> Any:
    """Builds an encoder once more with other arguments, such as `num_classes` or `features_only`.

    Args:
        encoder: From `open_encoder`.
        model_args: How it differs from its architecture (`find_weights`).
        seed: Of what is new: a classifier, and a norm that moves to the other side of the pooling.
        changes: What timm's constructor or builder shall get beside.

    Returns:
        The new model with the encoder's weights, on its device, in evaluation mode; without stochastic depth unless
        `drop_path_rate` is among the changes.

    Raises:
        ConfigError: If the architecture does not take such an argument.
    """
    name = encoder.pretrained_cfg["architecture"]
    args = {**model_args, **changes}
    if hasattr(getattr(encoder, "patch_embed", None), "img_size"):
        args["img_size"] = encoder.patch_embed.img_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = build(name, **args) if name in ARCHITECTURES else timm.create_model(name, **args)
        except (TypeError, AssertionError, RuntimeError) as error:
            raise ConfigError(f"{name} cannot be built with {changes}: {error}") from error
    model.pretrained_cfg = {**encoder.pretrained_cfg, "num_classes": changes.get("num_classes", 0)}
    inner = model.model if isinstance(model, FeatureGetterNet) else model
    held, wanted = encoder.state_dict(), inner.state_dict()
    if not changes.get("drop_path_rate"):  # some architectures of timm have one of their own
        for module in model.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
    new = {"norm", "fc_norm", str(encoder.pretrained_cfg["classifier"]).partition(".")[0]}
    lost = set() if changes.get("features_only") else held.keys() - wanted
    odd = sorted(key for key in {*lost, *(wanted.keys() - held)} if key.partition(".")[0] not in new)
    if odd:
        raise ConfigError(f"{name} has other tensors with {changes}: {', '.join(odd[:5])}")
    inner.load_state_dict({key: value for key, value in held.items() if key in wanted}, strict=False)
    return model.to(next(encoder.parameters()).device).eval()
