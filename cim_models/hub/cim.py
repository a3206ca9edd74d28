"""Every backbone, with its released tags, under its name in timm: `timm.create_model('cim_vit_tiny', pretrained=True)`.

Importing this module registers them, as timm's module `cim`. Weights come verified from `load`, not from timm's loader.
"""

import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models import DefaultCfg, is_model, model_entrypoint, register_model
from torch import nn

from cim_models.backbones import ARCHITECTURES
from cim_models.hub.entry import Entry
from cim_models.hub.manifest import Manifest, load_manifest
from cim_models.hub.pretrained_cfg import pretrained_cfg
from cim_models.hub.weights import Weights

__all__: list[str] = []  # register_model adds the names


def _released(entry: Entry, root: Path) -> Weights:
    """An entry as it stands in the repository, not yet verified."""
    files = {}
    if "repository" in entry.sources:
        files["backbone"] = tuple(root / file.path for file in entry.files if file.part == "backbone")
    return Weights.of(entry, files)


def _default_cfg(name: str, manifest: Manifest) -> DefaultCfg:
    """The tags of an architecture, its default first."""
    entries = [e for e in manifest.entries.values() if e.architecture == name and "backbone" in e.parts]
    if not entries:
        return DefaultCfg(deque([""]), {"": pretrained_cfg(Weights(name, name, {}))})
    first = manifest.default(name)
    tags = deque([first.tag, *(entry.tag for entry in entries if entry is not first)])
    cfgs = {entry.tag: pretrained_cfg(_released(entry, manifest.root)) for entry in entries}
    return DefaultCfg(tags, cfgs, is_pretrained=True)


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        from cim_models.hub.load import create_from_timm

        return create_from_timm(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"`cim_models.create_model({name!r}, …)` with the arguments that timm passes."
    return entrypoint


default_cfgs = {name: _default_cfg(name, manifest) for manifest in [load_manifest()] for name in ARCHITECTURES}
for _name in ARCHITECTURES:
    with warnings.catch_warnings():
        if is_model(_name) and model_entrypoint(_name).__module__ == __name__:
            warnings.simplefilter("ignore")  # this module is being reloaded
        register_model(_entrypoint(_name))
