"""Features, neighbours and correlation maps of a few images, to see in a minute what an encoder does."""

import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cim_models.errors import ConfigError
from cim_models.evaluation.correlation import central, spread
from cim_models.evaluation.embed import embed, load_features
from cim_models.evaluation.encoders import DEFAULT_MODEL, open_encoder, open_pretext
from cim_models.evaluation.features import extract_all
from cim_models.evaluation.knn import nearest
from cim_models.evaluation.locate import square
from cim_models.files import replacing
from cim_models.images import read_image
from cim_models.plots import correlation_sheet, neighbour_sheet
from cim_models.pretext import views
from cim_models.pretext.exemplars import ExemplarConfig
from cim_models.pretext.measures import iou
from cim_models.pretext.views import ViewConfig, denormalise, make_views

PHOTOGRAPHS = (
    "astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "hubble_deep_field.jpg",
    "motorcycle_left.png", "rocket.jpg",
)  # fmt: skip
"""Of scikit-image, those that are more than a texture and come with the package itself, in most versions."""
GRID = 3
"""Of few photographs, GRID × GRID tiles of each are compared."""
FEW = 50
"""From so many images on, the images themselves are compared."""
LARGEST = 768
"""Pixels of a photograph's longer side before it is cut into tiles."""
ROWS, NEIGHBOURS, EXEMPLARS = 8, 5, 3
"""Images on a sheet, neighbours of each and exemplars of each."""


@dataclass
class Quickstart:
    """What `quickstart` wrote and found."""

    features: Path
    neighbours: Path
    correlation: Path
    images: int
    """How many have features."""
    iou: float
    """Mean overlap of the true places of the exemplars with the predicted ones (probability above one half)."""
    iou_shuffled: float | None
    """The same with the exemplars of another image: what the shape of an average map gives. None for one image."""
    same: float | None
    """Share of tiles that are nearest to another tile of the same photograph; None if images were compared."""
    same_random: float | None
    """The same with random weights."""
    same_chance: float
    """The same by chance."""
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"{self.features}  features of {self.images} images",
            f"{self.neighbours}  nearest neighbours by cosine similarity",
            f"{self.correlation}  exemplars, their true places and the predicted ones",
        ]
        if self.same is not None:
            lines.append(
                f"A tile is nearest to another of the same photograph in {self.same:.0%} of cases "
                f"(random weights {self.same_random:.0%}, chance {self.same_chance:.0%})."
            )
        shuffled = "" if self.iou_shuffled is None else f" ({self.iou_shuffled:.2f} with exemplars of another image)"
        lines.append(f"Predicted and true places overlap by {self.iou:.2f}{shuffled}.")
        return "\n".join([*lines, f"{self.seconds:.0f} seconds"])


def quickstart(
    images: Path | None = None,
    /,
    out: Path = Path("cim_quickstart"),
    *,
    model: str = DEFAULT_MODEL,
    device: str | None = None,
) -> Quickstart:
    """Shows what an encoder makes of your images: features, nearest neighbours and correlation maps.

    Of fewer than 50 images, tiles that do not overlap are compared, nine of each: the nearest neighbours of a tile
    should be of the same photograph.

    Args:
        images: A folder, a text file of paths or one image; by default the photographs that scikit-image comes with.
        out: Folder for features.safetensors, neighbours.png and correlation.png.
        model: Name of released weights with a correlation head, a release folder or a run directory.
        device: Such as cuda or cpu; by default the GPU where there is one.

    Raises:
        ConfigError: If scikit-image is needed and missing, or the folder cannot be written.
        DataError: If there are no images or none can be read.
        WeightsError: If there are no such weights, or they have no correlation head.
    """
    start, out = time.perf_counter(), Path(out)
    if images is None:
        images = out / "images.txt"
        with replacing(images) as file:
            file.write_bytes(b"".join(os.fsencode(path) + b"\n" for path in photographs()))
    features, names = load_features(embed(images, model, out / "features.safetensors", device=device).path)
    shown = spread(len(names), ROWS)

    picture, iou, iou_shuffled = _correlation([names[i] for i in shown], model, device)
    correlation = _save(picture, out / "correlation.png")

    same, same_random = None, None
    if len(names) < FEW:
        picture, same, same_random = _tile_neighbours(names, shown, model, device)
    else:
        found = _others(features[shown], features, shown)
        picture = _sheet(shown, found, names, lambda i: read_image(names[i]))
    return Quickstart(
        features=out / "features.safetensors",
        neighbours=_save(picture, out / "neighbours.png"),
        correlation=correlation,
        images=len(names),
        iou=iou,
        iou_shuffled=iou_shuffled,
        same=same,
        same_random=same_random,
        same_chance=(GRID**2 - 1) / (len(names) * GRID**2 - 1),
        seconds=time.perf_counter() - start,
    )


def photographs() -> list[Path]:
    """The photographs that scikit-image is installed with; ConfigError if there are none."""
    spec = importlib.util.find_spec("skimage")
    folders = spec.submodule_search_locations if spec else None
    found = [Path(folder, "data", name) for folder in folders or () for name in PHOTOGRAPHS]
    found = [path for path in found if path.is_file()]
    if not found:
        raise ConfigError(
            "no images are given, and scikit-image, whose photographs are the default, is not installed: "
            "give a folder of images, or run pip install 'cim-models[demo]'"
        )
    return found


def _correlation(names: Sequence[str], model: str, device: str | None) -> tuple[Image.Image, float, float | None]:
    """The sheet of `correlation.png`; the overlap of true and predicted places, also with exchanged exemplars."""
    pretext, size, exemplar_size = open_pretext(model, device)
    config = ViewConfig(context_size=size, exemplars=ExemplarConfig(count=EXEMPLARS, size=exemplar_size))
    sources = torch.stack([square(central(read_image(name)), 2 * size) for name in names])
    uniforms = torch.rand(len(names), EXEMPLARS, views.DRAWS, generator=torch.Generator().manual_seed(0))
    context, exemplars, maps = make_views(sources, uniforms, config)
    place = next(pretext.parameters()).device
    heat = pretext.locate(context.to(place), exemplars.to(place)).cpu()
    other = pretext.locate(context.to(place), exemplars.roll(1, 0).to(place)).cpu() if len(names) > 1 else None
    captions = [Path(name).name for name in names]
    sheet = correlation_sheet(denormalise(context), denormalise(exemplars), maps, heat, captions)
    return sheet, float(iou(heat > 0.5, maps)), None if other is None else float(iou(other > 0.5, maps))


def _tile_neighbours(
    names: Sequence[str], shown: Sequence[int], model: str, device: str | None
) -> tuple[Image.Image, float, float]:
    """The sheet for tiles, and how often the nearest one is of the same photograph; also with random weights."""
    tiles = [tile for name in names for tile in _tiles(read_image(name))]
    owners = [name for name in names for _ in range(GRID**2)]
    shares = []
    for random_init in (True, False):
        encoder = open_encoder(model, random_init=random_init, device=device)
        features = extract_all(encoder, tiles, workers=0).features
        found = _others(features, features, range(len(tiles)))
        shares.append(sum(owners[row[0][0]] == owner for row, owner in zip(found, owners, strict=True)) / len(tiles))
    centres = [i * GRID**2 + GRID**2 // 2 for i in shown]
    picture = _sheet(centres, [found[i] for i in centres], owners, tiles.__getitem__)
    return picture, shares[1], shares[0]


def _others(queries: Tensor, gallery: Tensor, own: Sequence[int]) -> list[list[tuple[int, float]]]:
    """For each query the nearest rows of the gallery and their similarities, without its own row."""
    rows: list[list[tuple[int, float]]] = []
    for similarities, indices in nearest(queries, gallery, min(NEIGHBOURS + 1, len(gallery))):
        for row in zip(indices.tolist(), similarities.tolist(), strict=True):
            mine = own[len(rows)]
            rows.append([pair for pair in zip(*row, strict=True) if pair[0] != mine][:NEIGHBOURS])
    return rows


def _sheet(
    own: Sequence[int],
    found: Sequence[Sequence[tuple[int, float]]],
    names: Sequence[str],
    picture: Callable[[int], Image.Image],
) -> Image.Image:
    """The sheet of `neighbours.png`: pictures of some rows, each beside those of the rows that were found for it."""
    labels = [Path(name).stem for name in names]
    rows = [[picture(mine), *(picture(i) for i, _ in row)] for mine, row in zip(own, found, strict=True)]
    captions = [
        [labels[mine], *(f"{similarity:.2f} {labels[i]}" for i, similarity in row)]
        for mine, row in zip(own, found, strict=True)
    ]
    return neighbour_sheet(rows, captions)


def _tiles(image: Image.Image) -> list[Image.Image]:
    """GRID × GRID parts of a picture that do not overlap, row by row."""
    image.thumbnail((LARGEST, LARGEST))
    width, height = (max(side, GRID) for side in image.size)
    image = image.resize((width, height)) if image.size != (width, height) else image
    x, y = ([round(i * side / GRID) for i in range(GRID + 1)] for side in (width, height))
    return [image.crop((x[c], y[r], x[c + 1], y[r + 1])) for r in range(GRID) for c in range(GRID)]


def _save(picture: Image.Image, path: Path) -> Path:
    with replacing(path) as file:
        picture.save(file, format="PNG")
    return path
