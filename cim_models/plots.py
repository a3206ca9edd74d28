"""Contact sheets to look at: exemplars and where they belong, nearest neighbours. The caller saves them."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional as F

SIDE = 128
"""Pixels of a cell's side."""
GAP, MARGIN, LINE = 4, 20, 20
"""Pixels between the cells of a group, around the sheet and between groups, and of a line of text."""
INK, GREY, PALE, OUTLINE = (20, 20, 24), (110, 110, 118), (243, 243, 245), (255, 255, 255)
HEAT = np.array([(12, 8, 38), (84, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float32)
"""Colours of the probabilities 0, 0.25, 0.5, 0.75 and 1."""

Picture = Image.Image | Tensor


def correlation_sheet(
    contexts: Tensor,
    exemplars: Tensor,
    maps: Tensor | None,
    probabilities: Tensor,
    captions: Sequence[str] | None = None,
    per_line: int = 3,
) -> Image.Image:
    """Draws each context, then for each of its exemplars: the crop, its true place and the predicted heat map.

    Args:
        contexts: (N, 3, S, S) float in [0, 1].
        exemplars: (N, K, 3, T, T) float in [0, 1].
        maps: (N, K, S, S) bool, the context pixels that each exemplar covers; None leaves the true places out.
        probabilities: (N, K, S, S) in [0, 1].
        captions: a line of text for each context.
        per_line: exemplars on one line; the others continue below.

    Returns:
        An RGB sheet.
    """
    count = exemplars.shape[1]
    heading = ["exemplar", "true place", "predicted"] if maps is not None else ["exemplar", "predicted"]
    headings = [["context"]] + [heading] * min(count, per_line)
    rows: list[list[list[Image.Image | None]]] = []
    texts: list[str] = []
    for n in range(len(contexts)):
        context = _cell(contexts[n])
        groups: list[list[Image.Image | None]] = []
        for k in range(count):
            truth = _enlarge(maps[n, k]) > 0.5 if maps is not None else None
            groups.append([_cell(exemplars[n, k]), _heat(context, _enlarge(probabilities[n, k]), truth)])
            if truth is not None:
                groups[-1].insert(1, _place(context, truth))
        for first in range(0, count, per_line):
            rows.append([[None if first else context], *groups[first : first + per_line]])
            texts.append(captions[n] if captions and not first else "")
    return _legend(_sheet(rows, headings, texts if captions else None, []))


def neighbour_sheet(rows: Sequence[Sequence[Picture]], captions: Sequence[Sequence[str]] | None = None) -> Image.Image:
    """Draws each query picture and, to its right, its neighbours, nearest first.

    Args:
        rows: for each query, the query itself and then its neighbours: PIL images of any size, or tensors (3, H, W)
            float in [0, 1].
        captions: for each row, a short text below each picture, such as a file name or a similarity.

    Returns:
        An RGB sheet.
    """
    width = max((len(row) for row in rows), default=1)
    names = ["nearest", *(f"{rank}." for rank in range(2, width))][: width - 1]
    cells = [[[_cell(row[0])], [_cell(picture) for picture in row[1:]]] for row in rows]
    return _sheet(cells, [["query"], names], None, captions or [])


def _sheet(
    rows: Sequence[Sequence[Sequence[Image.Image | None]]],
    headings: Sequence[Sequence[str]],
    titles: Sequence[str] | None,
    captions: Sequence[Sequence[str]],
) -> Image.Image:
    """Lays out rows of groups of cells: a title above a row where it has one, captions below its cells."""
    step = SIDE + GAP
    starts = [MARGIN]
    for group in headings:
        starts.append(starts[-1] + len(group) * step - GAP + MARGIN)
    heights = [
        SIDE + GAP + (LINE if titles and titles[r] else 0) + (LINE + GAP if captions else 0) for r in range(len(rows))
    ]
    sheet = Image.new("RGB", (starts[-1], 2 * MARGIN + LINE + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for start, group in zip(starts, headings, strict=False):
        for c, name in enumerate(group):
            _text(draw, start + c * step, MARGIN, name, SIDE, INK)
    top = MARGIN + LINE
    for r, row in enumerate(rows):
        below = top
        if titles and titles[r]:
            _text(draw, MARGIN, below, titles[r], starts[-1] - 2 * MARGIN, GREY)
            below += LINE
        texts = iter(captions[r] if captions else ())
        for start, cells in zip(starts, row, strict=False):
            for c, cell in enumerate(cells):
                if cell is not None:
                    sheet.paste(cell, (start + c * step, below))
                _text(draw, start + c * step, below + SIDE + GAP // 2, next(texts, ""), SIDE, GREY)
        top += heights[r]
    return sheet


def _text(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, width: int, colour: tuple[int, int, int]) -> None:
    """Writes one line, its middle left out where it is wider than `width` pixels."""
    font = ImageFont.load_default(size=13)
    text = " ".join(text.split())  # a file name may hold the end of a line
    shown, kept = text, len(text)
    while kept > 1 and draw.textlength(shown, font) > width:
        kept -= 1
        shown = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
    draw.text((x, y), shown, fill=colour, font=font)


def _legend(sheet: Image.Image) -> Image.Image:
    """Adds the scale of the heat maps at the lower right."""
    width, height = sheet.size
    sheet = ImageOps.expand(sheet, (0, 0, 0, LINE), "white")
    ramp = np.broadcast_to(_colours(np.linspace(0, 1, SIDE, dtype=np.float32)), (10, SIDE, 3))
    left = width - MARGIN - SIDE - 12
    sheet.paste(Image.fromarray(ramp.round().astype(np.uint8)), (left, height - MARGIN + 8))
    draw = ImageDraw.Draw(sheet)
    _text(draw, left - 88, height - MARGIN + 5, "probability  0", 88, GREY)
    _text(draw, left + SIDE + 5, height - MARGIN + 5, "1", SIDE, GREY)
    return sheet


def _cell(picture: Picture) -> Image.Image:
    """Fits a picture, whole, into a pale square."""
    if isinstance(picture, Tensor):
        pixels = picture.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
        picture = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    return ImageOps.pad(picture.convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC, color=PALE)


def _enlarge(values: Tensor) -> np.ndarray:
    """Resamples (S, S) values to a cell."""
    values = values.detach().float().cpu()[None, None]
    return F.interpolate(values, (SIDE, SIDE), mode="bilinear", antialias=True)[0, 0].clamp(0, 1).numpy()


def _colours(values: np.ndarray) -> np.ndarray:
    """Maps values in [0, 1] of any shape to RGB in 0–255, linear between the colours of HEAT."""
    anchors = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(values, anchors, HEAT[:, c]) for c in range(3)], -1)


def _heat(context: Image.Image, values: np.ndarray, truth: np.ndarray | None) -> Image.Image:
    """Blends the colours of probabilities over a grey context, with the outline of the truth where it is known."""
    grey = np.asarray(context.convert("L"), dtype=np.float32)[..., None]
    pixels = 0.65 * _colours(values) + 0.35 * grey
    if truth is not None:
        pixels[_edge(truth)] = OUTLINE
    return Image.fromarray(pixels.round().astype(np.uint8))


def _place(context: Image.Image, truth: np.ndarray) -> Image.Image:
    """Shows the context as it is where the truth says so, and pale elsewhere."""
    pixels = np.asarray(context, dtype=np.float32)
    pixels = np.where(truth[..., None], pixels, 0.3 * pixels + 0.7 * 255)
    pixels[_edge(truth, 2)] = HEAT[2]
    return Image.fromarray(pixels.round().astype(np.uint8))


def _edge(inside: np.ndarray, width: int = 1) -> np.ndarray:
    """Returns the pixels of a region within `width` of its outside (the sheet's cell counts as outside)."""
    padded = np.pad(inside, width)
    kept = padded.copy()
    for axis in (0, 1):
        for shift in range(-width, width + 1):
            kept &= np.roll(padded, shift, axis)
    return inside & ~kept[width:-width, width:-width]
