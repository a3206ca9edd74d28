"""Vision transformers of CIM: timm's `VisionTransformer` with the method's fixed position embedding."""

from typing import Any

import torch
from timm.models import PretrainedCfg, build_model_with_cfg
from timm.models import VisionTransformer as TimmVisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

VITS: dict[str, dict[str, int]] = {
    "cim_vit_tiny": dict(patch_size=16, embed_dim=192, depth=12, num_heads=3),
    "cim_vit_small": dict(patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "cim_vit_base": dict(patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "cim_vit_large": dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16),
    "cim_vit_huge": dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16),
}


def sincos_pos_embed(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sin-cos position embedding: half of the channels for x, then half for y; sin, then cos.

    Args:
        width: Channels D, a multiple of 4.
        grid: Rows and columns (h, w).

    Returns:
        (h·w, D) float32, row by row; frequencies 1 / 10000^(i / (D/4)).
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width / 4))
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64, device="cpu") for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (x, y)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


VIT_CFG: dict[str, Any] = dict(num_classes=0, crop_pct=0.9, first_conv="patch_embed.proj", classifier="head")
"""What timm's `PretrainedCfg` says of the family."""


class VisionTransformer(TimmVisionTransformer):
    """timm's vision transformer, initialised as the method asks.

    The position embedding is the fixed sin-cos one of `sincos_pos_embed` (zero for the class token): a parameter that
    travels in the state dict under timm's name and takes no gradient.
    """

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Xavier-uniform projections (q, k and v apart), class token N(0, 0.02), fixed position embedding.

        On the meta device there is nothing to initialise.
        """
        if self.pos_embed is not None:
            self.pos_embed.requires_grad_(False)
        if self.patch_embed.proj.weight.is_meta:
            return
        super().init_weights(mode or "moco", needs_reset)
        projection = self.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.out_channels, -1))
        nn.init.zeros_(projection.bias)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            prefix = 0 if self.no_embed_class else self.num_prefix_tokens
            self.pos_embed[:, :prefix] = 0
            self.pos_embed[0, prefix:] = sincos_pos_embed(self.embed_dim, self.patch_embed.grid_size)


def build_vit(name: str, **kwargs: Any) -> Any:
    """Builds one of `VITS`; see `cim_models.backbones.build`.

    Features are the mean of the patch tokens after the final norm: CIM trains patch tokens, and nothing ever asks the
    class token of a context for anything.
    """
    kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or PretrainedCfg(architecture=name, **VIT_CFG)
    defaults = dict(VITS[name], global_pool="avg", fc_norm=False, dynamic_img_size=True)
    return build_model_with_cfg(
        VisionTransformer,
        name,
        pretrained=False,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter"),
        **{**defaults, **kwargs},
    )
