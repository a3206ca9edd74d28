"""Is it learning? The numbers that say so, of a batch and of images that are held out, and what they mean in words."""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cim_models.backbones.modes import evaluation_mode
from cim_models.backbones.tokens import encode
from cim_models.pretext.measures import Prior, agreement
from cim_models.pretext.model import CIM, Output
from cim_models.pretext.views import Views, make_views
from cim_models.pretraining.config import PretrainConfig
from cim_models.pretraining.data import Pictures, generator, in_order
from cim_models.workers import usable_workers

SHARE, FEWEST, CHUNK = 20, 8, 64
"""One image of so many may be held out; fewer are not worth it; so many are diagnosed at once."""
_STREAM = 4
Probe: TypeAlias = Callable[[CIM], Mapping[str, float]]
"""Measures the model at every diagnosis, whatever it likes; its numbers go into the log under their names."""

logger = logging.getLogger(__name__)


def hold_out(images: int, wanted: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which images are trained on, and which only diagnosed: a function of the seed.

    Returns:
        Rising indices of the two; `wanted` are held out, but at most a twentieth, and none if that is fewer than 8.
    """
    count = min(wanted, images // SHARE)
    order = generator(seed, 0, _STREAM).permutation(images)
    count = count if count >= FEWEST else 0
    return np.sort(order[count:]), np.sort(order[:count])


class HeldOut:
    """The diagnosis of images that are not trained on, always with the same crops and exemplars.

    Args:
        pictures: These images.
        config: The run.
        prior: Of the run's distribution of exemplars.
        device: Of the model.
        quiet: Steps before which there are no warnings: those of the warm-up.
        probe: Measures the model, too.
    """

    def __init__(
        self,
        pictures: Pictures,
        config: PretrainConfig,
        prior: Prior,
        device: torch.device,
        quiet: int = 0,
        probe: Probe | None = None,
    ) -> None:
        self.pictures, self.config, self.prior, self.device = pictures, config, prior, device
        self.quiet, self.probe = quiet, probe
        self.said: list[str] = []
        self.batches: list[tuple[Tensor, Tensor]] | None = None

    def due(self, done: int, steps: int) -> bool:
        """Whether to diagnose after this step: every so many, and at the end."""
        something = len(self.pictures) > 0 or self.probe is not None
        return something and (done % self.config.diagnostics.every == 0 or done == steps)

    def __call__(self, cim: CIM, done: int) -> dict[str, Any]:
        """Fields of a line of the log; says in a warning what has become wrong.

        Args:
            cim: The model, not wrapped; left as it was.
            done: Steps.

        Returns:
            `held_out_images`, `held_out_loss` in nats per pixel with the prior's `held_out_prior_loss` beside it,
            `held_out_gap`, `held_out_iou`, `held_out_iou_shuffled`, `held_out_cosine`, `held_out_deviation` and
            `held_out_rankme`, `warnings` if there are any, and the probe's numbers.
        """
        record: dict[str, Any] = {}
        with evaluation_mode(cim):
            if len(self.pictures):
                numbers = self._measure(cim)
                warnings = in_words(numbers, self.prior.loss) if done >= self.quiet else []
                record |= {f"held_out_{name}": value for name, value in numbers.items()}
                record |= {"held_out_prior_loss": self.prior.loss} | ({"warnings": warnings} if warnings else {})
                for warning in (text for text in warnings if text not in self.said):
                    logger.warning("step %d: %s", done, warning)
                self.said = warnings
            return record | dict(self.probe(cim) if self.probe else {})

    @torch.no_grad()
    def _measure(self, cim: CIM) -> dict[str, float]:
        if self.batches is None:
            self.batches = list(self._read())
        parts, features = [], []
        for source, uniforms in self.batches:
            with torch.autocast(self.device.type, enabled=False):  # as in training
                views = make_views(source.to(self.device), uniforms.to(self.device), self.config.views)
            context, (exemplars, _) = cim.encode_context(views.context), cim.encode_exemplars(views.exemplars)
            logits = cim.head(context, exemplars, views.maps.shape[-1])
            loss = F.binary_cross_entropy_with_logits(logits.float(), views.maps.float())
            online = encode(cim.online, views.context, cim.pos_embed(views.context)).patches
            cosine = F.cosine_similarity(online.float(), context.patches.float(), dim=-1).mean()
            agreed = agreement(cim.head, context, exemplars, logits, views.maps)
            parts.append({"loss": loss, **agreed, "cosine": cosine})
            features.append(context.patches.float().mean(dim=1))
        share = torch.tensor([len(x) for x in features], device=self.device) / sum(map(len, features))
        values = torch.stack([torch.stack([p.float() for p in part.values()]) for part in parts], dim=1)
        means = (values * share).sum(dim=1)  # a matrix product would be rounded by autocast
        every = torch.cat(features)
        return {
            "images": len(every),
            **dict(zip(parts[0], means.tolist(), strict=True)),
            "deviation": deviation(every).item(),
            "rankme": rankme(every).item(),
        }

    def _read(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Sources and uniforms, in chunks of two images or more; images that cannot be read are left out."""
        samples = list(in_order(self.pictures, usable_workers(self.config.data.workers)))
        for failure in dict.fromkeys(failure for sample in samples for failure in sample["failed"]):
            logger.warning("held out, but skipped: %s", failure)
        whole = [sample for sample in samples if not sample["failed"]] or samples[:2]
        stacked = [torch.stack([sample[name] for sample in whole]) for name in ("source", "uniforms")]
        return zip(*(x.chunk(-(-len(whole) // CHUNK)) for x in stacked), strict=True)


def in_words(numbers: Mapping[str, float], prior_loss: float) -> list[str]:
    """What is wrong with a model that is past its warm-up.

    Args:
        numbers: `loss`, `gap`, `deviation`, `rankme` and `cosine` of held-out images.
        prior_loss: What the location prior reaches.
    """
    loss, gap = numbers["loss"], numbers["gap"]
    warnings = []
    if loss > prior_loss + 0.05:
        warnings.append("worse than the location prior: the learning rate may be too high, or nothing is learned yet")
    elif gap < 0.01:
        warnings.append("predicts the average map: the exemplars are ignored")
    elif loss > prior_loss:
        warnings.append("reads the exemplars, but is no better than the location prior yet")
    if numbers["deviation"] < 0.01 or numbers["rankme"] < 1.1:
        warnings.append("features collapse: all images look the same to the target encoder")
    if numbers["cosine"] < 0.2:
        warnings.append("online and target encoder have little in common: the target's momentum may be too high")
    return warnings


def deviation(features: Tensor) -> Tensor:
    """Mean over channels of the deviation of normalised (N, D) features, times √D: 1 is spread out, 0 collapsed."""
    return F.normalize(features, dim=-1).std(dim=0).mean() * features.shape[1] ** 0.5


def rankme(features: Tensor, epsilon: float = 1e-7) -> Tensor:
    """Effective rank of (N, D) features: e to the entropy of their singular values (Garrido et al., ICML 2023)."""
    values = torch.linalg.svdvals(features.float())
    shares = values / values.sum().clamp_min(epsilon) + epsilon
    return torch.exp(-(shares * shares.log()).sum())


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
    few = views.context[:16]
    with evaluation_mode(cim.online):  # leaves the running statistics of a ResNet alone
        online = encode(cim.online, few, cim.pos_embed(few)).patches
    return {
        **agreement(cim.head, output.context, output.exemplars, output.logits, views.maps),
        "cosine": F.cosine_similarity(online.float(), output.context.patches[:16].float(), dim=-1).mean(),
        "deviation": deviation(output.context.patches.float().mean(dim=1)),
        **parts,
    }
