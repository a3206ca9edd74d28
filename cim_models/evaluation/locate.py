"""Where in a picture an exemplar lies, as a heat map over the picture."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cim_models.evaluation.encoders import DEFAULT_MODEL, open_pretext
from cim_models.files import check_writable, replacing
from cim_models.images import read_image
from cim_models.plots import HEAT
from cim_models.pretext.views import normalise

LARGEST = 1024
"""Pixels of the longer side of a heat map's picture at most."""


@dataclass
class Located:
    """Where an exemplar was found."""

    path: Path
    """The picture with the heat map over it."""
    x: float
    """Pixels from the left edge of the context to the most probable place."""
    y: float
    """Pixels from its upper edge."""
    probability: float
    """At that place, in [0, 1]."""
    area: float
    """Share of the context with a probability above one half."""

    def __str__(self) -> str:
        return (
            f"{self.path}  most probable at x {self.x:.0f}, y {self.y:.0f} (probability {self.probability:.2f}); "
            f"above one half in {self.area:.1%} of the picture"
        )


def locate(
    context: Path,
    exemplar: Path,
    /,
    out: Path = Path("heat.png"),
    *,
    model: str = DEFAULT_MODEL,
    device: str | None = None,
) -> Located:
    """Draws where in a picture another, smaller one lies.

    Both pictures are squashed to the squares that the model was trained on; the heat map is stretched back.

    Args:
        context: The picture to look in.
        exemplar: A part of it, or of one like it, upright or turned.
        out: The PNG file to write.
        model: Name of released weights with a correlation head, a release folder or a run directory.
        device: Such as cuda or cpu; by default the GPU where there is one.

    Raises:
        DataError: If a picture cannot be read.
        ConfigError: If the file cannot be written.
        WeightsError: If there are no such weights, or they have no correlation head.
    """
    check_writable(out)
    pictures = read_image(context), read_image(exemplar)
    pretext, context_size, exemplar_size = open_pretext(model, device)
    place = next(pretext.parameters()).device
    sizes = (context_size, exemplar_size)
    inputs = [normalise(square(p, size).to(place))[None] for p, size in zip(pictures, sizes, strict=True)]
    heat = pretext.locate(inputs[0], inputs[1][:, None])[0, 0].float().cpu()

    row, column = divmod(int(heat.argmax()), context_size)
    width, height = pictures[0].size
    with replacing(out) as file:
        overlay(pictures[0], heat).save(file, format="PNG")
    return Located(
        path=out,
        x=(column + 0.5) * width / context_size,
        y=(row + 0.5) * height / context_size,
        probability=float(heat.max()),
        area=float((heat > 0.5).float().mean()),
    )


def square(picture: Image.Image, size: int) -> Tensor:
    """A picture squashed to (3, size, size) in [0, 1]."""
    resized = picture.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def overlay(picture: Image.Image, probabilities: Tensor) -> Image.Image:
    """The colours of probabilities (S, S) in [0, 1] over a grey picture, at the picture's proportions."""
    shrink = max(1, max(picture.size) / LARGEST)
    width, height = (max(1, round(side / shrink)) for side in picture.size)
    grey = picture.resize((width, height), Image.Resampling.BICUBIC) if shrink > 1 else picture
    heat = Image.fromarray((255 * probabilities).round().to(torch.uint8).numpy())
    heat = heat.resize(grey.size, Image.Resampling.BILINEAR)
    low, middle, high = (tuple(map(int, HEAT[i])) for i in (0, len(HEAT) // 2, -1))
    colours = ImageOps.colorize(heat, black=low, mid=middle, white=high)
    return Image.blend(ImageOps.grayscale(grey).convert("RGB"), colours, 0.6)
