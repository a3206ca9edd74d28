"""Verified files → models.

Names, shapes and dtypes of a file's header are compared with a model on the meta device before a tensor is read; the
model then takes the file's tensors for its own. Nothing is random but a classifier that was asked for.
"""

import fnmatch
import logging
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform as timm_transform
from timm.data import resolve_data_config
from timm.models import PretrainedCfg
from torch import Tensor, nn

from cim_models.backbones import ARCHITECTURES, build
from cim_models.errors import ConfigError, WeightsError
from cim_models.hub import fit
from cim_models.hub.access import Access
from cim_models.hub.entry import Part
from cim_models.hub.manifest import Manifest, known_manifest
from cim_models.hub.names import Name, folder_or_close_to, parse_name
from cim_models.hub.pretrained_cfg import pretrained_cfg
from cim_models.hub.store import resolve
from cim_models.hub.weights import Weights
from cim_models.images import to_rgb
from cim_models.pretext.model import CIM, PretextConfig

NOT_OF_A_MODEL = ("features_only", "out_indices", "feature_cls", "pretrained_cfg_overlay")
"""Arguments of timm's builder that say nothing about the tensors."""
POOLING = ("global_pool", "fc_norm")
"""Arguments that move the final norm behind the pooling, or back."""
PREFIXES = {"backbone": "online.", "target": "target.", "head": "head.", "pretext": ""}
"""Where the tensors of each kind of file are in a `CIM`."""

logger = logging.getLogger(__name__)


def list_models(filter: str = "", pretrained: bool = False, manifest: Manifest | None = None) -> list[str]:
    """Names that `create_model` knows.

    Args:
        filter: A pattern with wildcards, such as `cim_vit*`.
        pretrained: Ids of released weights instead of architectures.
        manifest: Another manifest than the package's.
    """
    names: Iterable[str] = (manifest or known_manifest()).entries if pretrained else ARCHITECTURES
    pattern = filter or "*"
    return [n for n in names if fnmatch.fnmatch(n, pattern) or fnmatch.fnmatch(n.partition(".")[0], pattern)]


def create_model(
    name: str | Path,
    pretrained: bool = False,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    manifest: Manifest | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Creates an encoder: a timm model, which carries its `pretrained_cfg`.

    Args:
        name: An architecture (`cim_vit_tiny`: with `pretrained` its newest weights), an id (`cim_vit_tiny.tag`), or
            `hf-hub:org/name[@revision]`, `local-dir:PATH` or a path, which are always loaded.
        pretrained: Load released weights; random ones otherwise.
        weights: Load these instead: a release folder, a run directory, a safetensors file, or a name of weights.
        num_classes: Classes of the classifier. Another number than that of the weights makes a new one, initialised
            here; 0 none. By default what the weights have.
        dtype: Of the parameters, whatever that of the file; float32 by default.
        device: Where the model shall be.
        manifest: Another manifest than the package's.
        kwargs: Anything that timm's constructor or builder takes: `features_only`, `in_chans` and `img_size` (weights
            are adapted by timm's rules), `drop_path_rate`, …; and the fields of `hub.access.Access`, which say how
            files may be fetched: `revision`, `cache_dir`, `local_files_only`, `endpoint`, `token`.

    Returns:
        The model, in training mode as timm's are.

    Raises:
        ConfigError: If there is no such architecture, or the arguments contradict each other.
        WeightsError: If there are no such weights, they are damaged, or they do not fit; every mismatch is named.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    access = _access(kwargs)
    asked = _parse(name)
    if pretrained or weights is not None or asked.source != "registry":
        found = _resolve(name, weights, manifest, access)
        model = _load_encoder(found, num_classes, dtype or torch.float32, kwargs)
    else:
        if asked.tag:
            entry = (manifest or known_manifest(asked.id, access=access)).find(asked.id)
            kwargs = {"pretrained_cfg": pretrained_cfg(Weights.of(entry)), **entry.model_args, **kwargs}
        if num_classes is not None:
            kwargs["num_classes"] = num_classes
        model = build(asked.architecture, **kwargs).to(dtype=dtype)
    if "img_size" in kwargs:
        cfg: Any = model.pretrained_cfg
        size = kwargs["img_size"]
        cfg["input_size"] = (cfg["input_size"][0], *((size, size) if isinstance(size, int) else size))
    return model if device is None else model.to(device=device)


def create_pretext(
    name: str | Path,
    pretrained: bool = True,
    weights: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    manifest: Manifest | None = None,
    **kwargs: Any,
) -> CIM:
    """Creates the encoder pair with its correlation head.

    Where one encoder was released, it serves both sides: contexts and exemplars.

    Args:
        name: As for `create_model`.
        pretrained: Off: a fresh model of an architecture, with the default configuration.
        weights: As for `create_model`.
        dtype: Of the parameters; float32 by default.
        device: Where the model shall be.
        manifest: Another manifest than the package's.
        kwargs: The fields of `hub.access.Access`, as for `create_model`.

    Raises:
        ConfigError: As `create_model`.
        WeightsError: As `create_model`, and if the weights have no correlation head.
    """
    access = _access(kwargs)
    if kwargs:
        raise ConfigError(f"create_pretext takes no {', '.join(kwargs)}")
    asked = _parse(name)
    if not pretrained and weights is None and asked.source == "registry":
        if asked.tag:
            raise ConfigError(f"{name} without pretrained=True: give the architecture, {asked.architecture}")
        return CIM(build(asked.architecture)).to(device=device, dtype=dtype)
    found = _resolve(name, weights, manifest, access, "pretext")
    if found.pretext is None or not {"pretext", "head"} & found.files.keys():
        raise WeightsError(f"{found.name} holds no correlation head: give a run directory or a release that has one")
    parts = {part: prefix for part, prefix in PREFIXES.items() if part in found.files}
    specs = {prefix + key: spec for part, prefix in parts.items() for key, spec in fit.specs_in(found, part).items()}
    has_global = any(key.startswith("global_head.") for key in specs)
    try:
        config = PretextConfig(**found.pretext.config)
    except TypeError as error:
        raise WeightsError(f"{found.name}: its pretext configuration is of another version: {error}") from error
    with torch.device("meta"):
        args = {**(found.model_args or {}), "num_classes": 0, "pretrained_cfg": pretrained_cfg(found)}
        cim = CIM(build(found.architecture, **args), replace(config, global_weight=float(has_global)))
    cim.config = config
    expected = fit.specs_of(cim.state_dict())
    shared = {key: f"online.{key.removeprefix('target.')}" for key in expected if key.startswith("target.")}
    shared = {key: online for key, online in shared.items() if key not in specs and online in specs}
    fit.compare(found, specs | {key: specs[online] for key, online in shared.items()}, expected)
    tensors = {prefix + key: value for part, prefix in parts.items() for key, value in fit.read(found, part).items()}
    tensors |= {key: tensors[online].clone() for key, online in shared.items()}
    fit.assign(cim, tensors, dtype or torch.float32)
    return cim.to(device=device)


def create_transform(model: nn.Module, is_training: bool = False, **kwargs: Any) -> Callable[[Any], Tensor]:
    """The preprocessing that belongs to a model's weights: picture → (3, H, W) float32, normalised.

    Pictures of any mode of Pillow become RGB first, transparency over white, as `cim embed` reads them; the EXIF
    orientation is for `cim_models.images.read_image`.

    Args:
        model: A timm model or a `CIM`.
        is_training: timm's random augmentation instead of the evaluation crop.
        kwargs: Anything that `timm.data.create_transform` takes; `img_size` is short for a square `input_size`.

    Raises:
        ConfigError: If it is another model, such as one that wraps them.
    """
    known = getattr(getattr(model, "online", model), "pretrained_cfg", None)
    if known is None:
        raise ConfigError(f"{type(model).__name__} does not know its preprocessing: give the timm model in it")
    config = resolve_data_config(kwargs, pretrained_cfg=known)
    kwargs.pop("img_size", None)
    transform = timm_transform(**{**config, **kwargs}, is_training=is_training)
    first = transform[0] if isinstance(transform, tuple) else transform
    first.transforms.insert(0, _as_rgb)
    return transform


def _as_rgb(picture: Any) -> Any:
    """A picture of Pillow as RGB; what is RGB, or a tensor, which timm's transforms take as well, as it is."""
    fits = not isinstance(picture, Image.Image) or (picture.mode == "RGB" and not picture.has_transparency_data)
    return picture if fits else to_rgb(picture)


def create_from_timm(
    name: str,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """`create_model` with the arguments that `timm.create_model` hands to an entry point.

    A tag is one of the manifest. `file` of a configuration or an overlay, as timm's `local-dir:` gives it too, is a
    file or folder of the user's; `hf_hub_id`, which `hf-hub:` gives, a repository. `pretrained_model_args` are of
    timm's own loader.
    """
    cfg = vars(pretrained_cfg) if isinstance(pretrained_cfg, PretrainedCfg) else pretrained_cfg
    if isinstance(cfg, str):
        name, cfg = f"{name}.{cfg}", None
    given = {**(cfg or {}), **(pretrained_cfg_overlay or {})}
    place = given.get("file") or (f"hf-hub:{given['hf_hub_id']}" if given.get("hf_hub_id") else None)
    if pretrained and not place and any(given.get(key) for key in ("url", "state_dict")):
        raise WeightsError(f"{name}: neither a url nor a dictionary is loaded: give a file or a Hub id")
    if pretrained and place:
        kwargs["weights"], name = place, name.partition(".")[0]
    kwargs["cache_dir"] = cache_dir
    return create_model(name, pretrained, pretrained_cfg=cfg, pretrained_cfg_overlay=pretrained_cfg_overlay, **kwargs)


def _parse(name: str | Path) -> Name:
    """A name whose architecture, if it says one, exists."""
    asked = parse_name(name, ARCHITECTURES)
    if asked.source == "registry" and asked.architecture not in ARCHITECTURES:
        hint = folder_or_close_to(asked, ARCHITECTURES)
        raise ConfigError(f"no architecture is named {asked.architecture!r}{hint}")
    return asked


def _access(kwargs: dict[str, Any]) -> Access:
    """Takes the arguments that say how files may be fetched out of all the others."""
    return Access(**{field.name: kwargs.pop(field.name) for field in fields(Access) if field.name in kwargs})


def _resolve(
    name: str | Path, weights: str | Path | None, manifest: Manifest | None, access: Access, part: Part = "backbone"
) -> Weights:
    """Verified files of one of our architectures."""
    if weights is None and name in ARCHITECTURES:
        manifest = manifest or known_manifest(str(name), part, access)
        if name not in {entry.architecture for entry in manifest.entries.values()}:
            raise WeightsError(
                f"{name} has no released weights yet: there are {', '.join(manifest.entries) or 'none'}. Random ones "
                "come without pretrained=True, your own from a release folder, a run directory or a file"
            )
    found = resolve(name, weights, manifest, part, access)
    if found.architecture not in ARCHITECTURES:
        raise WeightsError(f"{found.name} holds weights of {found.architecture}, which is not of this package")
    if found.entry is not None:
        logger.info("%s: licence %s", found.entry.id, found.entry.licence)
    return found


def _load_encoder(found: Weights, num_classes: int | None, dtype: torch.dtype, kwargs: dict[str, Any]) -> nn.Module:
    """An encoder with the tensors of `found`, adapted to what the caller asked for, on the CPU."""
    if "backbone" not in found.files:
        raise WeightsError(f"{found.name} has no encoder alone: take create_pretext(…).online or .target")
    cfg = pretrained_cfg(found)
    header = fit.specs_in(found, "backbone")
    held = header[f"{cfg.classifier}.weight"][0][0] if f"{cfg.classifier}.weight" in header else 0
    wanted = held if num_classes is None else num_classes
    described = found.model_args
    if described is None:  # the file does not say, so it is what the caller says
        described = {key: value for key, value in kwargs.items() if key not in NOT_OF_A_MODEL}
    source_args = {**described, "pretrained_cfg": cfg, "num_classes": held}
    try:
        source = model = build(found.architecture, **source_args, device="meta")
    except TypeError as error:
        raise WeightsError(f"{found.name}: {found.architecture} takes no such arguments: {error}") from error
    fit.compare(found, header, fit.specs_of(source.state_dict()))
    if kwargs or wanted != held:
        args = {"pretrained_model_args": dict(described), **source_args, **kwargs, "num_classes": wanted}
        model = build(found.architecture, **args, device="meta")

    prefix = next((p for p in ("model.", "body.") if all(key.startswith(p) for key in model.state_dict())), "")
    inner = model.get_submodule(prefix.rstrip("."))  # timm's feature extractors hold a model, or are its layers
    expected = inner.state_dict()
    tensors = fit.read(found, "backbone")
    changed = {str(cfg.classifier)} if wanted != held else set()
    changed |= {"norm", "fc_norm"} if any(key in kwargs for key in POOLING) else set()
    tensors = {key: value for key, value in tensors.items() if wanted == held or _root(key) != cfg.classifier}
    for name in sorted({_root(key) for key in expected if key not in tensors} & changed):
        fresh = fit.initialise(inner.get_submodule(name))
        tensors |= {f"{name}.{key}": value for key, value in fresh.items()}
        logger.info("%s: %s is new and random", found.name, name)
    for key in [key for key in tensors if key not in expected]:
        if kwargs.get("features_only") or _root(key) in changed:
            del tensors[key]
    if model is not source:
        tensors = fit.adapt(found, tensors, inner, str(cfg.first_conv))
    fit.assign(inner, tensors, dtype)
    return model


def _root(key: str) -> str:
    return key.partition(".")[0]
