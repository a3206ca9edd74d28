"""A release folder: tensors, config.json, card and other texts; whole, or not there."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cim_models.backbones import VisionTransformer, build
from cim_models.backbones.vit import VITS
from cim_models.errors import ConfigError
from cim_models.hub.access import alone
from cim_models.hub.card import render_card
from cim_models.hub.digest import sha256
from cim_models.hub.entry import Entry, Golden, Part, Preprocessing, WeightFile, key_digest, read_entry, to_dict
from cim_models.hub.load import create_model, create_pretext
from cim_models.hub.pretrained_cfg import pretrained_cfg
from cim_models.hub.verify import golden_output
from cim_models.hub.weights import Weights
from cim_models.pretext.views import DEVIATION, MEAN

Dtype: TypeAlias = Literal["float16", "bfloat16", "float32"]
Tensors: TypeAlias = Mapping[Literal["backbone", "pretext"], Mapping[str, Tensor]]
"""What a release holds: an encoder under timm's names; a `CIM`, or its head alone, under `CIM`'s."""

NAMES = {"backbone": "model", "pretext": "pretext"}
"""Of the files, as the Hub has them: `model.safetensors`, or `model-00001-of-00002.safetensors` … and their index."""
SHARD = 49_000_000
"""Bytes of tensors in a file, which stays below 50 MB with its header, unless one tensor alone has more."""
WHOLE = "model.safetensors"
"""An encoder in one file: the only name that plain timm knows."""
BLANK: dict[str, Any] = dict(files=(), parameters=0, tensors=0, key_digest="", golden=())
"""Fields of an entry that `write_folder` fills in."""
GOLDEN_ATOL = 1e-4
"""How far float32 on another machine may be from the recorded output."""


def write_folder(
    folder: Path, entry: Entry, tensors: Tensors, texts: Mapping[str, str], labels: Sequence[str] = ()
) -> Entry:
    """Fills an empty folder with everything that a release consists of.

    Args:
        folder: It exists.
        entry: Everything that cannot be computed, and `BLANK`.
        tensors: Of each file; cast to `entry.dtype` if floating point.
        texts: Other files, by name.
        labels: Names of a classifier's classes, in their order.

    Returns:
        The whole entry. Its golden outputs come from the files as they were written.

    Raises:
        ConfigError: If an entry of this kind is not possible, or a tensor has no finite value in this dtype.
        WeightsError: If the tensors are not those of the entry's architecture.
    """
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    files, shapes = [], {}
    for part, values in tensors.items():
        for path in _save(_cast(values, entry), folder, NAMES[part]):
            kind: Part = "index" if path.suffix == ".json" else part
            files.append(WeightFile(f"weights/{entry.id}/{path.name}", kind, path.stat().st_size, sha256(path)))
        shapes[part] = {key: tuple(value.shape) for key, value in values.items()}
    main = shapes.get("backbone") or shapes["pretext"]
    entry = dataclasses.replace(entry, files=tuple(files), tensors=len(main), key_digest=key_digest(main))
    entry = read_entry(to_dict(entry), entry.id)

    write_config(folder, entry, labels)
    models: dict[str, nn.Module] = {}
    if "backbone" in tensors:
        models["backbone"] = create_model(folder)
    if "pretext" in tensors:
        models["pretext"] = create_pretext(folder)
    golden = [Golden(part, "waves", tuple(golden_output(models[part])), GOLDEN_ATOL) for part in tensors]
    parameters = sum(parameter.numel() for parameter in next(iter(models.values())).parameters())
    entry = dataclasses.replace(entry, parameters=parameters, golden=tuple(golden))
    write_config(folder, entry, labels)
    (folder / "README.md").write_text(render_card(entry, folder), encoding="utf-8")
    return entry


@contextmanager
def staging(folder: Path) -> Iterator[tuple[Path, Callable[..., None]]]:
    """A hidden folder beside the one that shall be, which vanishes if the block fails; one at a time for each.

    Yields:
        The hidden folder, and a function that renames it to `folder` and calls its argument, if there is one; if that
        fails, what was there before is put back.

    Raises:
        ConfigError: If something cannot be written.
    """
    folder = folder.resolve()  # what a link leads to, not the link
    temporary, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))

    def install(record: Callable[[], Any] = lambda: None) -> None:
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
            record()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)

    with alone(folder):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary, install
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{folder} cannot be written: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def preprocessing(size: int, crop_pct: float) -> Preprocessing:
    """What CIM's encoders are used with: ImageNet's mean and deviation, bicubic, centre crop."""
    return Preprocessing((3, size, size), MEAN, DEVIATION, "bicubic", crop_pct, "center")


def _save(tensors: Mapping[str, Tensor], folder: Path, name: str) -> list[Path]:
    """One safetensors file, or several and their index if it would be too large."""
    pattern = f"{name}{{suffix}}.safetensors"
    save_torch_state_dict(
        dict(tensors), folder, filename_pattern=pattern, max_shard_size=SHARD, metadata={"format": "pt"}
    )
    paths = [*sorted(folder.glob(f"{name}*.safetensors")), *folder.glob(f"{name}.safetensors.index.json")]
    for path in paths:
        path.chmod(0o644)
    return paths


def join(paths: Sequence[Path], file: Path) -> None:
    """Writes the tensors of several safetensors files as one; the same bytes each time."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= load_file(path)
    save_file(tensors, file, metadata={"format": "pt"})


def write_config(folder: Path, entry: Entry, labels: Sequence[str] = ()) -> None:
    """config.json: for stock timm the encoder as one of its own architectures, for us the entry."""
    config: dict[str, Any] = {}
    if "backbone" in entry.parts:
        with torch.device("meta"):
            model = build(entry.architecture, num_classes=entry.num_classes, **entry.model_args)
        model_args, name = dict(entry.model_args), entry.architecture.removeprefix("cim_")
        if isinstance(model, VisionTransformer):
            name += f"_patch{VITS[entry.architecture]['patch_size']}_224"
            model_args |= dict(
                global_pool=model.global_pool,
                fc_norm=not isinstance(model.fc_norm, nn.Identity),
                dynamic_img_size=model.dynamic_img_size,
            )
        cfg = pretrained_cfg(Weights.of(entry)).to_dict(remove_source=True)
        config = {
            "architecture": name,
            "num_classes": entry.num_classes,
            "num_features": model.num_features,
            "global_pool": model_args.get("global_pool", "avg"),
            "model_args": model_args,
            "pretrained_cfg": {key: value for key, value in cfg.items() if key != "architecture"}
            | {"fixed_input_size": isinstance(model, VisionTransformer)},
        }
        if labels:
            config["label_names"] = list(labels)
    config["cim_models"] = to_dict(entry)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cast(tensors: Mapping[str, Tensor], entry: Entry) -> dict[str, Tensor]:
    dtype = getattr(torch, entry.dtype)
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    bad = [key for key, value in cast.items() if not value.isfinite().all()]
    if bad:
        raise ConfigError(f"{entry.id}: not finite as {entry.dtype}: {', '.join(bad)}; is another dtype meant?")
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in cast.items()}
