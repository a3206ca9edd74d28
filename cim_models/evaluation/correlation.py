"""How well an encoder pair and its head find exemplars in pictures that they were not trained on."""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from cim_models.errors import ConfigError, DataError
from cim_models.evaluation.encoders import describe, open_pretext
from cim_models.evaluation.locate import square
from cim_models.evaluation.protocol import Report, command_of
from cim_models.evaluation.splits import fingerprint
from cim_models.files import check_writable
from cim_models.images import find_images, read_image
from cim_models.pretext import views
from cim_models.pretext.exemplars import ExemplarConfig
from cim_models.pretext.measures import agreement, location_prior
from cim_models.pretext.model import CIM
from cim_models.pretext.views import ViewConfig, Views, make_views

PROTOCOL = "correlation-1"
EXEMPLARS = 6


def correlation(
    model: str,
    images: Path,
    /,
    out: Path = Path("correlation.json"),
    *,
    encoder: Literal["both", "online", "target"] = "both",
    source_size: int | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str | None = None,
) -> Report:
    """Cuts exemplars of the released distribution out of pictures and looks for them again.

    The loss stands beside the location prior's, which knows where rectangles usually lie and looks at no picture; loss
    and overlap stand beside those with the exemplars of another picture.

    Args:
        model: Name of released weights with a correlation head, a release folder or a run directory.
        images: Folder of images, searched recursively, or a text file of paths.
        out: JSON file for the whole protocol and the result.
        encoder: Of a run, which has two: the online one for exemplars and the target for contexts, or one for both.
        source_size: Pixels of the side of the squares that exemplars are cut from; by default twice the context's.
        limit: Only so many images, evenly spread over all.
        batch_size: Images at a time; exemplars are exchanged within a batch.
        seed: Of the exemplars.
        device: Such as cuda or cpu; by default the GPU where there is one.

    Raises:
        DataError: If there are fewer than two images, or one cannot be read.
        WeightsError: If there are no such weights, or they have no correlation head.
        ConfigError: If a setting cannot work.
    """
    command = command_of("evaluate correlation", correlation, locals())
    if batch_size < 2:
        raise ConfigError(f"batch_size={batch_size}: must be 2 or more, since images exchange their exemplars")
    if (limit is not None and limit < 1) or (source_size is not None and source_size < 1):
        raise ConfigError(f"limit={limit}, source_size={source_size}: must be 1 or more")
    check_writable(out)
    images = Path(images)
    paths = find_images(images)
    paths = [paths[i] for i in spread(len(paths), limit or len(paths))]
    if len(paths) < 2:
        raise DataError(f"{images}: {len(paths)} image; at least two are needed, which exchange their exemplars")
    pretext, context_size, exemplar_size = open_pretext(model, device)
    use_encoder(pretext, encoder)
    config = ViewConfig(context_size, ExemplarConfig(count=EXEMPLARS, size=exemplar_size))
    side = source_size or 2 * context_size
    prior = location_prior(config, side)

    place = next(pretext.parameters()).device
    uniforms = torch.rand(len(paths), EXEMPLARS, views.DRAWS, generator=torch.Generator().manual_seed(seed))
    sums = torch.zeros(4, dtype=torch.float64)
    for rows in tqdm(_batches(len(paths), batch_size), desc="correlation", disable=None, unit="batch"):
        sources = torch.stack([square(central(read_image(paths[i])), side) for i in rows])
        cut = make_views(sources.to(place), uniforms[rows].to(place), config)
        sums += len(rows) * _measure(pretext, cut)
    loss, gap, overlap, overlap_shuffled = (sums / len(paths)).tolist()

    report = Report(
        protocol=PROTOCOL,
        model={**describe(pretext.online, model), "encoder": encoder},
        data={"images": fingerprint(paths, images)},
        settings={
            "exemplars": EXEMPLARS,
            "context_size": context_size,
            "exemplar_size": exemplar_size,
            "source_size": side,
            "batch_size": batch_size,
            "seed": seed,
        },
        result={
            "metric": "IoU",
            "scores": {"exemplars": overlap},
            "headline": overlap,
            "loss": loss,
            "prior_loss": prior.loss,
            "gap": gap,
            "iou_shuffled": overlap_shuffled,
            "iou_prior": prior.iou,
        },
        command=command,
    )
    report.save(out)
    return report


def use_encoder(pretext: CIM, encoder: Literal["both", "online", "target"]) -> None:
    """Lets one of the two encoders serve both sides, as a release with one encoder does."""
    if encoder == "both" or pretext.target is None:
        return
    source, copy = (pretext.online, pretext.target) if encoder == "online" else (pretext.target, pretext.online)
    copy.load_state_dict(source.state_dict())


def central(image: Image.Image) -> Image.Image:
    """The central square of a picture."""
    return ImageOps.fit(image, (min(image.size),) * 2)


def spread(length: int, count: int) -> list[int]:
    """Up to `count` indices, evenly spread over `length`."""
    return [i * length // min(count, length) for i in range(min(count, length))]


@torch.no_grad()
def _measure(pretext: CIM, cut: Views) -> Tensor:
    """(4,): the loss, then what `agreement` says: gap and both overlaps."""
    context, (exemplars, _) = pretext.encode_context(cut.context), pretext.encode_exemplars(cut.exemplars)
    logits = pretext.head(context, exemplars, cut.maps.shape[-1])
    loss = F.binary_cross_entropy_with_logits(logits, cut.maps.float())
    agreed = agreement(pretext.head, context, exemplars, logits, cut.maps)
    return torch.stack([loss, *agreed.values()]).double().cpu()


def _batches(length: int, size: int) -> list[Tensor]:
    """Indices of batches; a last one of a single image joins the one before it."""
    batches = list(torch.arange(length).split(size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches
