"""The authors' released checkpoints → our models and release folders.

A released file is a pickle, which `state.read_tensors` opens without running what it holds.
"""

import argparse
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cim_models.backbones import build
from cim_models.backbones.vit import VITS, sincos_pos_embed
from cim_models.errors import CheckpointError, ConfigError, some
from cim_models.hub.entry import Entry, Pretext
from cim_models.hub.folder import BLANK, Dtype, Tensors, preprocessing, staging, write_folder
from cim_models.pretext.model import CIM, PretextConfig
from cim_models.state import read_tensors

logger = logging.getLogger(__name__)

LICENSE = "S-Lab License 1.0 (non-commercial)"
"""Of the authors' code and weights."""
PREFIXES = {
    "patch_embed.": "online.patch_embed.",
    "blocks.": "online.blocks.",
    "norm.": "online.norm.",
    "patch_embed_c.": "target.patch_embed.",
    "blocks_c.": "target.blocks.",
    "norm_c.": "target.norm.",
    "decoder_embed.": "head.embed.",
    "decoder_corr_block.block.": "head.",
    "decoder_norm.": "head.norm.",
    "decoder_pred_mask.0.": "head.predict.",
    "decoder_g_embed.": "global_head.projector.",
    "decoder_predictor.": "global_head.predictor.",
    "decoder_g_embed_c.": "global_target.",
}
"""The released names of tensors, by their beginning, and those of `CIM`."""
SHARED = ("cls_token", "pos_embed")
"""One tensor in the file, for both encoders."""
DESCRIBING = {
    "pretext": {"decoder_embed.weight": 2},
    "finetuned": {"head.weight": 2},
    "both": {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2},
}
"""Tensors that everything else is read off, by kind of file, and their number of dimensions."""
SIZES = {"context": 160, "template": 64}
"""Pixels of contexts and exemplars in the released recipe, where a file's flags do not say."""
LISTED = 20
"""Names of tensors that a message spells out."""


@dataclass
class Official:
    """What a released file holds, in the terms of this package."""

    path: Path
    """The file."""
    kind: Literal["pretext", "finetuned"]
    """A pretraining checkpoint, or a classifier that was fine-tuned from one."""
    architecture: str
    """The nearest of `cim_models.backbones.ARCHITECTURES`."""
    model_args: dict[str, Any]
    """How the encoder differs from that architecture."""
    num_classes: int
    """Of a fine-tuned file; 0 of a pretraining checkpoint."""
    pretext: PretextConfig
    """Heads and losses, the weights of the losses as the training command had them."""
    state: dict[str, Tensor]
    """Tensors under the names of `CIM`, or of the classifier."""
    flags: dict[str, Any]
    """Of the training command."""
    epoch: int | None
    """Counted from 0; None if the file does not say."""
    extra: tuple[str, ...]
    """Names of tensors in the file that are not used."""

    def build(self) -> nn.Module:
        """The `CIM`, or the classifier, on the CPU in float32 and in evaluation mode."""
        model = self._skeleton().to_empty(device="cpu")
        model.load_state_dict(self.state)
        return model.eval()

    def _skeleton(self) -> nn.Module:
        """The model on the meta device; it has a global head where the file has one, whatever that loss weighs."""
        with torch.device("meta"):
            backbone = build(self.architecture, num_classes=self.num_classes, **self.model_args)
            if self.kind == "finetuned":
                return backbone
            has_global = any(key.startswith("global_head.") for key in self.state)
            cim = CIM(backbone, replace(self.pretext, global_weight=float(has_global)))
        cim.config = self.pretext
        return cim


def import_official(path: str | Path, num_heads: int | None = None, head_num_heads: int | None = None) -> CIM:
    """Reads a checkpoint that the authors' pretraining code wrote.

    The prediction of two channels under a softmax becomes one logit, their difference: the same function, and the
    same loss. Everything else is kept as it is, the optimiser's state aside.

    Args:
        path: The file (`.pth`).
        num_heads: Attention heads of the encoders, which the file does not tell; by default width / 64 for widths of
            192 to 1024, and 16 for 1280.
        head_num_heads: Attention heads of the correlation head; by default 16.

    Returns:
        The model in evaluation mode, float32, on the CPU. Tensors of the file that have no place in it are named in
        a warning of this module's logger.

    Raises:
        CheckpointError: If the file is missing, damaged, not such a checkpoint, lacks tensors or is a fine-tuned
            classifier.
        ConfigError: If the number of heads cannot be known, or does not divide the width.
    """
    official = read_official(path, num_heads, head_num_heads)
    if official.kind != "pretext":
        raise CheckpointError(
            f"{path} is a fine-tuned classifier, without target encoder and correlation head: "
            "`cim import-official` makes a release folder of it"
        )
    return cast(CIM, official.build())


def read_official(path: str | Path, num_heads: int | None = None, head_num_heads: int | None = None) -> Official:
    """Reads a released file of either kind; arguments and errors as `import_official`."""
    path = Path(path)
    file = _load(path)
    tensors = file.get("model") if isinstance(file, Mapping) else None
    if not isinstance(tensors, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise CheckpointError(f"{path} is not a released CIM checkpoint: it has no dictionary of tensors named 'model'")
    flags = vars(file["args"]) if isinstance(file.get("args"), argparse.Namespace) else {}
    epoch = file["epoch"] if isinstance(file.get("epoch"), int) else None
    is_pretext = any(key.startswith(("blocks_c.", "decoder_")) for key in tensors)
    kind: Literal["pretext", "finetuned"] = "pretext" if is_pretext else "finetuned"
    describing = DESCRIBING["both"] | DESCRIBING[kind]
    _require(path, [key for key in describing if key not in tensors])
    odd = [key for key, ndim in describing.items() if tensors[key].ndim != ndim or not tensors[key].numel()]
    if odd:
        raise CheckpointError(f"{path} is not a released CIM checkpoint: no encoder has such {some(odd, LISTED)}")
    architecture, model_args = _describe_encoder(path, tensors, num_heads)

    if is_pretext:
        num_classes, pretext = 0, _describe_pretext(path, tensors, flags, head_num_heads)
        renamed = {key: _ours(key) for key in tensors}
        _check_fixed_pos_embed(path, tensors)
    else:
        num_classes, pretext = len(tensors["head.weight"]), PretextConfig()
        renamed = {key: (key,) for key in tensors}
        model_args |= {"fc_norm": True} if "fc_norm.weight" in tensors else {"global_pool": "token"}
    state = {ours: tensors[key] for key, names in renamed.items() for ours in names}
    if is_pretext:
        for key, ndim in {"head.predict.weight": 4, "head.predict.bias": 1}.items():
            if key in state:
                state[key] = _one_logit(path, state[key], ndim)

    official = Official(path, kind, architecture, model_args, num_classes, pretext, state, flags, epoch, ())
    expected = official._skeleton().state_dict()
    _require(path, list(dict.fromkeys(_theirs(key) if is_pretext else key for key in expected if key not in state)))
    wrong = [key for key, value in expected.items() if state[key].shape != value.shape]
    if wrong:
        shapes = [f"{key} {tuple(state[key].shape)}, not {tuple(expected[key].shape)}" for key in wrong]
        raise CheckpointError(f"{path} holds tensors of another shape than its others imply: {some(shapes, LISTED)}")
    used = {key for key, names in renamed.items() if names and all(name in expected for name in names)}
    extra = tuple(key for key in tensors if key not in used and key != "decoder_pos_embed")
    if extra:
        logger.warning("%s: %d tensors are not used: %s", path, len(extra), some(extra, LISTED))
    return replace(official, state={key: state[key] for key in expected}, extra=extra)


def import_release(
    path: Path,
    /,
    out: Path,
    *,
    num_heads: int | None = None,
    head_num_heads: int | None = None,
    encoder: Literal["online", "target"] = "online",
    dtype: Dtype = "float32",
) -> list[Path]:
    """Converts a checkpoint of the authors to release folders: `pretext` and `backbone`, or `finetuned`.

    Args:
        path: The authors' file (`.pth`).
        out: Folder to make; it may exist if it is empty.
        num_heads: Attention heads of the encoders, where their width does not tell.
        head_num_heads: Attention heads of the correlation head; by default 16.
        encoder: Which of the two becomes the backbone. The authors fine-tune the online one, which saw only exemplars;
            the target encoder saw whole contexts.
        dtype: Of the tensors in the new files.

    Returns:
        The release folders. Their licence is the authors', for non-commercial use.

    Raises:
        CheckpointError: As `import_official`.
        ConfigError: As `import_official`, and if `out` holds something or cannot be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists: give the name of a new folder")
    official = read_official(path, num_heads, head_num_heads)
    if official.kind == "finetuned":
        parts: dict[str, Tensors] = {"finetuned": {"backbone": official.state}}
    else:
        backbone = {k.removeprefix(f"{encoder}."): v for k, v in official.state.items() if k.startswith(f"{encoder}.")}
        parts = {"pretext": {"pretext": official.state}, "backbone": {"backbone": backbone}}
    with staging(out) as (temporary, install):
        for name, tensors in parts.items():
            (temporary / name).mkdir()
            write_folder(temporary / name, _entry(official, name, encoder, dtype), tensors, {})
        install()
    return [out / name for name in parts]


def _entry(official: Official, kind: str, encoder: Literal["online", "target"], dtype: Dtype) -> Entry:
    """What is known of a released checkpoint without its tensors."""
    what = {
        "backbone": f"{encoder} encoder",
        "pretext": "both encoders, correlation head and heads of the global loss",
        "finetuned": f"classifier of {official.num_classes} classes, fine-tuned",
    }[kind]
    epochs = "" if official.epoch is None else f" after {official.epoch + 1} epochs"
    context_size, exemplar_size = (int(_number(official.flags, f"{x}_size", y)) for x, y in SIZES.items())
    return Entry(
        id=f"{official.architecture}.official_{kind}",
        architecture=official.architecture,
        model_args=official.model_args,
        num_classes=official.num_classes,
        kind=cast(Any, kind),
        encoder=encoder if kind == "backbone" else None,
        sources=(),
        preprocessing=preprocessing(official.model_args.get("img_size", 224), crop_pct=0.875),
        pretext=Pretext(asdict(official.pretext), context_size, exemplar_size) if kind == "pretext" else None,
        dtype=dtype,
        licence=LICENSE,
        data=(),
        metrics=(),
        summary=f"Converted from a checkpoint of the authors of CIM{epochs}: {what}.",
        released=date.today().isoformat(),
        **BLANK,
    )


def _load(path: Path) -> Any:
    """The unpickled file, or an error that names it."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        return read_tensors(path, mapped=True)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged, or not a released CIM checkpoint: {error}") from error


def _describe_encoder(path: Path, tensors: Mapping[str, Tensor], num_heads: int | None) -> tuple[str, dict[str, Any]]:
    """The nearest architecture, and how the encoder differs from it; read off the shapes."""
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    if num_heads is None:
        if width != 1280 and (width % 64 or not 192 <= width <= 1024):
            raise ConfigError(f"{path} holds encoders of width {width}, and no heads are known for it: give num_heads")
        num_heads = 16 if width == 1280 else width // 64
    if num_heads < 1 or width % num_heads:
        raise ConfigError(f"num_heads {num_heads} does not divide the width {width} of the encoders in {path}")
    blocks = [re.match(r"blocks(?:_c)?\.(\d+)\.", key) for key in tensors]
    args: dict[str, Any] = dict(patch_size=patch, embed_dim=width, num_heads=num_heads, in_chans=channels)
    args["depth"] = len({block[1] for block in blocks if block})
    args["img_size"] = patch * max(1, math.isqrt(tensors["pos_embed"].shape[1] - 1))
    args["mlp_ratio"] = len(tensors["blocks.0.mlp.fc1.weight"]) / width
    name = min(VITS, key=lambda name: abs(VITS[name]["embed_dim"] - width))
    defaults = dict(VITS[name], in_chans=3, img_size=224, mlp_ratio=4.0)
    return name, {key: value for key, value in args.items() if value != defaults[key]}


def _describe_pretext(
    path: Path, tensors: Mapping[str, Tensor], flags: dict[str, Any], num_heads: int | None
) -> PretextConfig:
    """Heads read off the shapes, the weights of the losses off the training command's flags."""
    config = PretextConfig(reduction="sum", share_class_token=True)
    width, hidden = len(tensors["decoder_embed.weight"]), tensors.get("decoder_g_embed.0.weight", torch.empty(0))
    heads = config.head_heads if num_heads is None else num_heads
    if heads < 1 or width % heads:
        raise ConfigError(f"{path} holds a correlation head {width} wide, not for {heads} heads: give head_num_heads")
    return replace(
        config,
        head_width=width,
        head_heads=heads,
        global_hidden=len(hidden) if hidden.numel() and hidden.ndim else config.global_hidden,
        correlation_weight=_number(flags, "sigma_corr", config.correlation_weight),
        global_weight=_number(flags, "sigma_cont", config.global_weight),
    )


def _number(flags: Mapping[str, Any], name: str, default: float) -> float:
    value = flags.get(name)
    return float(value) if isinstance(value, (int, float)) else default


def _check_fixed_pos_embed(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """The head's position embedding is computed, not loaded: what the file holds must be that."""
    held = tensors.get("decoder_pos_embed")
    if held is None:
        return
    width = len(tensors["decoder_embed.weight"])
    side = math.isqrt(held.numel() // width)
    expected = sincos_pos_embed(width, (side, side))
    if held.shape != (1, 1 + side**2, width) or not torch.allclose(held[0, 1:].float(), expected, atol=1e-4):
        raise CheckpointError(f"{path}: decoder_pos_embed is not the fixed sin-cos embedding of the released code")


def _one_logit(path: Path, prediction: Tensor, ndim: int) -> Tensor:
    """Channel 1 minus channel 0: (2, W, 1, 1) → (1, W), (2,) → (1,)."""
    if prediction.ndim != ndim or len(prediction) != 2:
        raise CheckpointError(f"{path}: decoder_pred_mask is {tuple(prediction.shape)}, not of two channels")
    difference = (prediction[1] - prediction[0]).flatten()
    return difference if ndim == 1 else difference[None]


def _ours(key: str) -> tuple[str, ...]:
    """The names in `CIM` of a released tensor; none if it has no place there."""
    if key in SHARED:
        return f"online.{key}", f"target.{key}"
    return tuple(new + key.removeprefix(old) for old, new in PREFIXES.items() if key.startswith(old))


def _theirs(key: str) -> str:
    """The released name of a tensor of `CIM`."""
    if key.split(".", 1)[1] in SHARED:
        return key.split(".", 1)[1]
    old, new = max(((old, new) for old, new in PREFIXES.items() if key.startswith(new)), key=lambda pair: len(pair[1]))
    return old + key.removeprefix(new)


def _require(path: Path, missing: list[str]) -> None:
    if missing:
        raise CheckpointError(f"{path} is not a whole released CIM checkpoint: it lacks {some(missing, LISTED)}")
