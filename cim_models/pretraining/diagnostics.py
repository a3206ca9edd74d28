"""Is it learning? The numbers that say so."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cim_models.backbones.tokens import encode
from cim_models.pretext.measures import agreement
from cim_models.pretext.model import CIM, Output
from cim_models.pretext.views import Views


@torch.no_grad()
def diagnose(cim: CIM, output: Output, views: Views) -> dict[str, Tensor]:
    """Numbers of one batch.

    Args:
        cim: The model, not wrapped.
        output: Of its forward pass on `views`.
        views: A batch of two images or more.

    Returns:
        Scalars: those of `cim_models.pretext.measures.agreement`, `cosine` of online and target tokens of the same
        contexts, `deviation` of normalised target features over the batch × √D (1: spread out, 0: collapsed); with a
        global loss also both parts of the loss.
    """
    parts = {} if cim.global_head is None else {"correlation_loss": output.correlation_loss,
                                                "global_loss": output.global_loss}  # fmt: skip
    features = F.normalize(output.context.patches.float().mean(dim=1), dim=-1)
    few = views.context[:16]
    cim.online.eval()  # leaves the running statistics of a ResNet alone
    online = encode(cim.online, few, cim.pos_embed(few)).patches
    cim.online.train()
    return {
        **agreement(cim, output, views),
        "cosine": F.cosine_similarity(online.float(), output.context.patches[:16].float(), dim=-1).mean(),
        "deviation": features.std(dim=0).mean() * features.shape[1] ** 0.5,
        **parts,
    }
