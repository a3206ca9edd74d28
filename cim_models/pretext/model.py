"""CIM: an online encoder for exemplars, a target encoder for contexts, a head that correlates them."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cim_models.backbones.modes import evaluation_mode
from cim_models.backbones.tokens import Encoder, Tokens, encode, resample_pos_embed
from cim_models.backbones.vit import VisionTransformer
from cim_models.errors import ConfigError
from cim_models.pretext.correlation import CorrelationHead, CosineHead, GlobalHead, info_nce


@dataclass
class PretextConfig:
    """What the model is, beside its backbone; the defaults are those of the released code but for the reduction."""

    head: Literal["cross_attention", "cosine"] = "cross_attention"
    """How contexts and exemplars are correlated."""
    head_width: int = 512
    """Width of the correlation head."""
    head_heads: int = 16
    """Attention heads of the correlation head."""
    reduction: Literal["mean", "sum"] = "mean"
    """Of the loss over the exemplars of an image; the released code sums."""
    correlation_weight: float = 1.0
    """Weight of the correlation loss."""
    global_weight: float = 0.0
    """Weight of the global loss; without it the model has no global head."""
    global_summary: Literal["class", "mean"] = "class"
    """What the global loss compares: class tokens, as in the released code, or the means of patch tokens."""
    global_hidden: int = 4096
    """Hidden width of the global head."""
    global_temperature: float = 0.2
    """Temperature of the global loss."""
    moving_average: bool = True
    """Off: the online encoder sees the contexts too, without gradient."""
    freeze_patch_embed: bool = True
    """The patch projection stays at its random initialisation."""
    share_class_token: bool = False
    """The target uses the online class token, as in the released code, in place of its moving average."""


class Output(NamedTuple):
    """What one forward pass gives."""

    loss: Tensor
    """Scalar: the weighted sum of the losses below."""
    logits: Tensor
    """(B, K, S, S) log-odds that a context pixel belongs to the exemplar."""
    correlation_loss: Tensor
    """Scalar, nats per pixel (times K if summed)."""
    global_loss: Tensor
    """Scalar; zero without a global head."""
    context: Tokens
    """Of the target encoder."""
    exemplars: Tensor
    """(B, K, M, D) tokens of the online encoder, without gradient."""


def no_gather(projections: Tensor) -> tuple[Tensor, int]:
    """One process: all the contexts there are, and the row where this process's begin."""
    return projections, 0


class CIM(nn.Module):
    """Correlational Image Modeling (Li, Xie, Loy, CVPR 2023) over any backbone of this package.

    Args:
        backbone: The online encoder; the target starts as its copy.
        config: Heads, losses and ablations.
    """

    def __init__(self, backbone: Encoder, config: PretextConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or PretextConfig()
        dim = int(backbone.num_features)
        self.online = backbone
        self.target = copy.deepcopy(backbone).requires_grad_(False) if config.moving_average else None
        if config.head == "cross_attention":
            if config.head_width % 4 or config.head_width % config.head_heads:
                raise ConfigError(
                    f"head_width {config.head_width} must be a multiple of 4 and of head_heads {config.head_heads}"
                )
            self.head: nn.Module = CorrelationHead(dim, config.head_width, config.head_heads)
        elif config.head == "cosine":
            self.head = CosineHead()
        else:
            raise ConfigError(f"head {config.head!r} is neither 'cross_attention' nor 'cosine'")
        if config.reduction not in ("mean", "sum"):
            raise ConfigError(f"reduction {config.reduction!r} is neither 'mean' nor 'sum'")
        if config.freeze_patch_embed and isinstance(backbone, VisionTransformer):
            backbone.patch_embed.requires_grad_(False)
        self.global_head: GlobalHead | None = None
        self.global_target: nn.Module | None = None
        if config.global_weight:
            self.global_head = GlobalHead(dim, config.global_hidden)
            self.global_target = copy.deepcopy(self.global_head.projector).requires_grad_(False)
        self.gather: Callable[[Tensor], tuple[Tensor, int]] = no_gather
        self._pos_embeds: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    @property
    def context_encoder(self) -> Encoder:
        """The encoder of contexts: the target, or the online encoder where there is no moving average."""
        return self.online if self.target is None else self.target

    def forward(self, context: Tensor, exemplars: Tensor, maps: Tensor) -> Output:
        """One training pass.

        Args:
            context: (B, 3, S, S), normalised.
            exemplars: (B, K, 3, T, T), normalised.
            maps: (B, K, S, S) bool or in [0, 1].
        """
        tokens = self.encode_context(context)
        if self.target is None:
            torch.clear_autocast_cache()  # older PyTorch keeps what it cast without gradient, for the exemplars too
        with self._trained_attention(context.device):
            sequence, summaries = self.encode_exemplars(exemplars)
            logits = self.head(tokens, sequence, context.shape[-1])
        correlation_loss = F.binary_cross_entropy_with_logits(logits, maps.float())
        per_image = exemplars.shape[1] if self.config.reduction == "sum" else 1
        correlation_loss = correlation_loss * per_image
        global_loss = torch.zeros_like(correlation_loss)
        if self.global_head is not None and self.global_target is not None:
            if self.config.global_summary == "mean":
                summaries = sequence[:, :, tokens.prefix.shape[1] :].mean(dim=2)
                tokens = tokens._replace(summary=tokens.patches.mean(dim=1))
            with torch.no_grad():
                contexts, first = self.gather(self.global_target(tokens.summary))
            losses = info_nce(self.global_head(summaries), contexts, first, self.config.global_temperature)
            global_loss = losses.mean() * per_image
        loss = self.config.correlation_weight * correlation_loss + self.config.global_weight * global_loss
        return Output(loss, logits, correlation_loss, global_loss, tokens, sequence.detach())

    @torch.no_grad()
    def locate(self, context: Tensor, exemplars: Tensor) -> Tensor:
        """Where each exemplar lies in its context, in evaluation mode.

        Args:
            context: (B, 3, S, S), normalised.
            exemplars: (B, K, 3, T, T), normalised.

        Returns:
            (B, K, S, S) probabilities.

        Raises:
            ConfigError: If context or exemplars are not of these shapes.
        """
        is_square = context.ndim == 4 and context.shape[-2] == context.shape[-1]
        if not is_square or exemplars.ndim != 5 or len(exemplars) != len(context):
            shapes = f"context {tuple(context.shape)}, exemplars {tuple(exemplars.shape)}"
            raise ConfigError(f"locate takes a context (B, 3, S, S) and exemplars (B, K, 3, T, T), not {shapes}")
        with evaluation_mode(self):
            sequence, _ = self.encode_exemplars(exemplars)
            return self.head(self.encode_context(context), sequence, context.shape[-1]).sigmoid()

    @torch.no_grad()
    def encode_context(self, context: Tensor) -> Tokens:
        """Tokens of (B, 3, S, S) contexts, without gradient."""
        return encode(self.context_encoder, context, self.pos_embed(context))

    def encode_exemplars(self, exemplars: Tensor) -> tuple[Tensor, Tensor]:
        """One pass for all of (B, K, 3, T, T): tokens (B, K, M, D) and summaries (B, K, D)."""
        images = exemplars.flatten(0, 1)
        tokens = encode(self.online, images, self.pos_embed(images))
        return tuple(x.unflatten(0, exemplars.shape[:2]) for x in (tokens.sequence, tokens.summary))

    def _trained_attention(self, device: torch.device) -> AbstractContextManager[None]:
        """The attention that is fastest forward and backward for the few tokens of exemplars: on a CPU the plain one.

        Checkpointed activations are computed again outside of this block, hence by torch's own choice at all times.
        """
        plain = device.type == "cpu" and not getattr(self.online, "grad_checkpointing", False)
        return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target ← momentum · target + (1 − momentum) · online, over parameters; buffers stay the target's own."""
        target = self.target
        pairs = [] if target is None else list(zip(target.parameters(), self.online.parameters(), strict=True))
        if self.global_head is not None and self.global_target is not None:
            pairs += zip(self.global_target.parameters(), self.global_head.projector.parameters(), strict=True)
        if not pairs:
            return
        targets, onlines = zip(*pairs, strict=True)
        torch._foreach_lerp_(targets, onlines, 1 - momentum)
        if self.config.share_class_token:
            ours, theirs = (getattr(encoder, "cls_token", None) for encoder in (target, self.online))
            if ours is not None and theirs is not None:
                ours.copy_(theirs)

    def pos_embed(self, images: Tensor) -> Tensor | None:
        """Position embedding for images of this size by the released rule, computed once per size; None for ResNets.

        It is fixed, hence the same for both encoders.
        """
        if not isinstance(self.online, VisionTransformer) or self.online.pos_embed is None:
            return None
        patch = self.online.patch_embed
        grid = (images.shape[-2] // patch.patch_size[0], images.shape[-1] // patch.patch_size[1])
        key = (*grid, images.device, self.online.pos_embed.dtype)
        if key not in self._pos_embeds:
            embed = self.online.pos_embed.detach().clone()
            self._pos_embeds[key] = resample_pos_embed(embed, patch.grid_size, grid)
        return self._pos_embeds[key]
