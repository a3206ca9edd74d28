"""Files as the authors' released code writes them, made on the spot, and its method in plain steps."""

import argparse
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cim_models.pretext.model import CIM

WIDTH, HEADS, DEPTH, PATCH, GRID, HEAD_WIDTH, HEAD_HEADS, HIDDEN = 24, 3, 2, 8, 6, 16, 2, 20


def block_shapes(prefix: str, width: int, attention: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of one transformer block under released names; `attention` maps its projections to their outputs."""
    linear = {f"attn.{name}": (out, width) for name, out in attention.items()}
    linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linear.items():
        shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
    for name in ("norm1", "norm2"):
        shapes |= {f"{prefix}{name}.weight": (width,), f"{prefix}{name}.bias": (width,)}
    return shapes


def released_shapes(width=WIDTH, depth=DEPTH, patch=PATCH, head_width=HEAD_WIDTH, hidden=HIDDEN, out=256):
    """Names and shapes of all tensors of a released file."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width)}
    for copy in ("", "_c"):
        shapes |= {f"patch_embed{copy}.proj.weight": (width, 3, patch, patch), f"patch_embed{copy}.proj.bias": (width,)}
        for i in range(depth):
            shapes |= block_shapes(f"blocks{copy}.{i}.", width, {"qkv": 3 * width, "proj": width})
        shapes |= {f"norm{copy}.weight": (width,), f"norm{copy}.bias": (width,)}
    shapes |= {"decoder_embed.weight": (head_width, width), "decoder_embed.bias": (head_width,)}
    attention = {"q": head_width, "kv": 2 * head_width, "proj": head_width}
    shapes |= block_shapes("decoder_corr_block.block.", head_width, attention)
    shapes |= {"decoder_norm.weight": (head_width,), "decoder_norm.bias": (head_width,)}
    shapes |= {"decoder_pred_mask.0.weight": (2, head_width, 1, 1), "decoder_pred_mask.0.bias": (2,)}
    for name, widths in (
        ("decoder_g_embed", (width, hidden, hidden, out)),
        ("decoder_g_embed_c", (width, hidden, hidden, out)),
        ("decoder_predictor", (out, hidden, out)),
    ):
        for i in range(len(widths) - 1):
            shapes[f"{name}.{3 * i}.weight"] = (widths[i + 1], widths[i])
            norm = ("running_mean", "running_var", *(("weight", "bias") if i < len(widths) - 2 else ()))
            shapes |= {f"{name}.{3 * i + 1}.{key}": (widths[i + 1],) for key in norm}
            shapes[f"{name}.{3 * i + 1}.num_batches_tracked"] = ()
    return shapes


def sincos(width: int, side: int) -> Tensor:
    """Position by position, straight from the definition: (1, 1 + side², width), the class position zero."""
    rows = [[0.0] * width]
    for y in range(side):
        for x in range(side):
            angles = [[p / 10000 ** (i / (width / 4)) for i in range(width // 4)] for p in (x, y)]
            rows.append([f(a) for axis in angles for f in (math.sin, math.cos) for a in axis])
    return torch.tensor(rows)[None]


def released_tensors(seed: int = 0, context_grid: int = 4) -> dict[str, Tensor]:
    """A small model under released names; every tensor random but the fixed position embeddings."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in released_shapes().items():
        value = 0.3 * torch.randn(shape, generator=generator)
        if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            value = 1 + value.abs()
        tensors[name] = torch.tensor(7) if name.endswith("num_batches_tracked") else value
    return tensors | {"pos_embed": sincos(WIDTH, GRID), "decoder_pos_embed": sincos(HEAD_WIDTH, context_grid)}


def save(path: Path, tensors: dict[str, Tensor], **flags) -> Path:
    """Writes a file as the released tool does: optimiser, epoch, scaler and flags beside the model."""
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    flags = dict(model="mae_vit_small", sigma_cont=0.5, sigma_corr=2.0, context_size=32, template_size=16) | flags
    file = {"model": tensors, "optimizer": optimiser.state_dict(), "epoch": 299, "scaler": None}
    torch.save(file | {"args": argparse.Namespace(**flags)}, path)
    return path


def finetuned_tensors(tensors: dict[str, Tensor], mean: bool, classes: int = 5) -> dict[str, Tensor]:
    """A classifier as released fine-tuning writes it: mean pooling has its norm after the pooling."""
    kept = {k: v for k, v in tensors.items() if k.split(".")[0] in ("cls_token", "pos_embed", "patch_embed", "blocks")}
    last = "fc_norm" if mean else "norm"
    kept |= {f"{last}.{key}": tensors[f"norm.{key}"] for key in ("weight", "bias")}
    return kept | {"head.weight": torch.randn(classes, WIDTH), "head.bias": torch.randn(classes)}


def shapes_only(path: Path, **shape) -> Path:
    """A file of tensors that have the shapes of a large model and the size of a small one."""
    tensors = {name: torch.zeros(()).expand(size) for name, size in released_shapes(**shape).items()}
    tensors["pos_embed"] = torch.zeros(()).expand(1, 1 + (224 // shape["patch"]) ** 2, shape["width"])
    return save(path, tensors)


class Plain:
    """The released method's forward pass, step by step from its description, on a dictionary of released tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.t = tensors

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.t[f"{name}.weight"].T + self.t[f"{name}.bias"]

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.t[f"{name}.weight"] + self.t[f"{name}.bias"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        parts = []
        for q_, k_, v_ in zip(*(x.chunk(heads, -1) for x in (q, k, v)), strict=True):
            weights = (q_ @ k_.transpose(-1, -2) / math.sqrt(q_.shape[-1])).softmax(-1)
            parts.append(weights @ v_)
        return torch.cat(parts, -1)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        hidden = self.linear(f"{name}.fc1", x)
        return self.linear(f"{name}.fc2", hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)

    def encode(self, images: Tensor, copy: str, norm: bool = True) -> Tensor:
        side, name = images.shape[-1] // PATCH, f"patch_embed{copy}.proj"
        weight, bias = self.t[f"{name}.weight"], self.t[f"{name}.bias"]
        patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
        x = torch.einsum("bchwij,dcij->bhwd", patches, weight).flatten(1, 2) + bias
        x = torch.cat([self.t["cls_token"].expand(len(x), -1, -1), x], 1)
        grid = self.t["pos_embed"][:, 1:].transpose(1, 2).unflatten(2, (GRID, GRID))
        if side != GRID:
            grid = F.interpolate(grid, scale_factor=(side + 0.1) / GRID, mode="bicubic")
        x = x + torch.cat([self.t["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], 1)
        for i in range(DEPTH):
            block = f"blocks{copy}.{i}"
            q, k, v = self.linear(f"{block}.attn.qkv", self.layer_norm(f"{block}.norm1", x)).chunk(3, -1)
            x = x + self.linear(f"{block}.attn.proj", self.attend(q, k, v, HEADS))
            x = x + self.mlp(f"{block}.mlp", self.layer_norm(f"{block}.norm2", x))
        return self.layer_norm(f"norm{copy}", x) if norm else x

    def correlate(self, context: Tensor, exemplar: Tensor, size: int) -> Tensor:
        """(B, 2, S, S): two channels for one exemplar of each context."""
        block, norm = "decoder_corr_block.block", "decoder_corr_block.block.norm1"
        x = self.linear("decoder_embed", context) + self.t["decoder_pos_embed"]
        q = self.linear(f"{block}.attn.q", self.layer_norm(norm, x))
        exemplar = self.layer_norm(norm, self.linear("decoder_embed", exemplar))
        k, v = self.linear(f"{block}.attn.kv", exemplar).chunk(2, -1)
        x = x + self.linear(f"{block}.attn.proj", self.attend(q, k, v, HEAD_HEADS))
        x = self.layer_norm("decoder_norm", x + self.mlp(f"{block}.mlp", self.layer_norm(f"{block}.norm2", x)))
        grid = x[:, 1:].transpose(1, 2).unflatten(2, (math.isqrt(x.shape[1] - 1),) * 2)
        weight, bias = (self.t[f"decoder_pred_mask.0.{key}"] for key in ("weight", "bias"))
        grid = torch.einsum("bchw,oc->bohw", grid, weight[:, :, 0, 0]) + bias[:, None, None]
        return F.interpolate(grid, (size, size), mode="bilinear", align_corners=True)

    def project(self, name: str, x: Tensor, layers: int, train: bool = False) -> Tensor:
        for i in range(layers):
            x = x @ self.t[f"{name}.{3 * i}.weight"].T
            n = f"{name}.{3 * i + 1}"
            mean, var = self.t[f"{n}.running_mean"], self.t[f"{n}.running_var"]
            if train:
                self.t[f"{n}.running_mean"] = 0.9 * mean + 0.1 * x.mean(0)
                self.t[f"{n}.running_var"] = 0.9 * var + 0.1 * x.var(0)
                mean, var = x.mean(0), x.var(0, correction=0)
            x = (x - mean) / (var + 1e-5).sqrt()
            if i < layers - 1:
                x = (x * self.t[f"{n}.weight"] + self.t[f"{n}.bias"]).clamp_min(0)
        return x

    def losses(self, context: Tensor, exemplars: Tensor, maps: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Logit pairs for each exemplar, and both losses summed over them."""
        with torch.no_grad():
            target = self.encode(context, "_c")
        keys = F.normalize(self.project("decoder_g_embed_c", target[:, 0], 3), dim=-1)
        pairs, correlation, contrast = [], torch.zeros(()), torch.zeros(())
        for k in range(exemplars.shape[1]):
            online = self.encode(exemplars[:, k], "")
            pairs.append(self.correlate(target, online, context.shape[-1]))
            correlation = correlation + F.cross_entropy(pairs[-1], maps[:, k].long())
            queries = self.project("decoder_predictor", self.project("decoder_g_embed", online[:, 0], 3), 2)
            scores = F.normalize(queries, dim=-1) @ keys.T / 0.2
            contrast = contrast + 2 * 0.2 * F.cross_entropy(scores, torch.arange(len(scores)))
        return pairs, correlation, contrast


def batch(size: int = 3, count: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(size, 3, 32, 32, generator=generator)
    exemplars = torch.randn(size, count, 3, 16, 16, generator=generator)
    return context, exemplars, torch.rand(size, count, 32, 32, generator=generator) < 0.3


def norm(gradients) -> Tensor:
    return torch.stack([gradient.norm() for gradient in gradients]).norm()


def correlation_gradients(cim: CIM, loss: Tensor) -> dict[str, Tensor]:
    """2-norms of the correlation loss's gradients by released part; the one logit stands for two channels, ± it."""
    named = {n: p for n, p in cim.named_parameters() if p.requires_grad and not n.startswith("global_")}
    gradients = dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))
    parts = {"cls_token": [], "blocks": [], "norm": []} | {f"decoder_{x}": [] for x in ("embed", "corr_block", "norm")}
    parts["decoder_pred_mask"] = []
    for name, gradient in gradients.items():
        room, part = name.split(".")[:2]
        if room == "head":
            known = {"embed": "decoder_embed", "norm": "decoder_norm", "predict": "decoder_pred_mask"}
            part = known.get(part, "decoder_corr_block")
        parts[part].append(gradient * (math.sqrt(2) if part == "decoder_pred_mask" else 1))
    norms = {f"expected.grad_norm.{part}": norm(values) for part, values in parts.items()}
    return norms | {"expected.grad_norm_online": norm([g for values in parts.values() for g in values])}


@pytest.fixture(scope="session")
def authors() -> SimpleNamespace:
    """What this file defines, and the heads that the small model's shapes do not tell."""
    return SimpleNamespace(**globals(), heads=dict(num_heads=HEADS, head_num_heads=HEAD_HEADS))


@pytest.fixture(scope="session")
def tensors() -> dict[str, Tensor]:
    """The small model under released names; not to be written to."""
    return released_tensors()


@pytest.fixture(scope="session")
def released(tmp_path_factory, tensors) -> Path:
    """The file that holds them."""
    return save(tmp_path_factory.mktemp("released") / "small.pth", tensors)
