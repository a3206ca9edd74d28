"""Reading without a cache: the worker path beside bare JPEG decoding and one resize, on the same files, on one core.

    python benchmarks/decode.py [FOLDER ...]

The worker path is `Pictures[epoch, index]`: read, decode (at 1/2 or 1/4 where every crop allows it), draw a crop, make
it a source of uint8, draw the uniforms. The bare way opens the file with Pillow, decodes it whole or at the same
scale, and resizes the same crop, which it is told: nothing less can feed a network. Without folders, three kinds of
pictures with the spectrum of photographs are generated: 500 × 375 and 1000 × 750 for sources of 224, as in ImageNet's
recipe, and 64 × 64, as those of Tiny ImageNet. The rows alternate, so that a busy machine slows all alike, and count
processor time.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from table import Table, parser, ratio, take_turns

from cim_models.images import find_images
from cim_models.pretext import views
from cim_models.pretraining.data import _CROP as CROP
from cim_models.pretraining.data import CROP_TRIES, Pictures, generator
from cim_models.pretraining.readers import Files, read_record

GENERATED = {
    "500 × 375, sources of 224": ((500, 375), 224),
    "1000 × 750, sources of 224": ((1000, 750), 224),
    "64 × 64, sources of 64": ((64, 64), 64),
}
WORKER, SCALED = "worker path", "bare, decoded at the same scale"
BAR = 0.85
"""Share of images per second that the worker path shall reach."""


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise whose amplitude falls with its frequency, as that of photographs does."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / max(width, height))
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width))) * amplitude
    pixels = np.fft.irfft2(spectrum, (height, width))
    pixels = pixels + pixels[:1]  # channels that go together
    pixels = 128 + 55 * (pixels - pixels.mean()) / pixels.std()
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def generate(folder: Path, images: int, size: tuple[int, int]) -> list[Path]:
    """JPEG files of Pillow's usual quality for photographs."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.jpg" for number in range(images)]
    for path in paths:
        photograph(rng, *size).save(path, quality=90)
    return paths


def bare(path: Path, size: int, draft: int | None, box: tuple[int, int, int, int] | None = None) -> torch.Tensor:
    """Decoding and one resize: uint8 (3, size, size)."""
    with Image.open(path) as image:
        if draft:
            image.draft(None, (draft, draft))
        picture = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())


def boxes(pictures: Pictures, min_size: int | None) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of the crops."""
    found = []
    for index in range(len(pictures)):
        picture = read_record(pictures.records, index, min_size)
        uniforms = generator(pictures.seed, 0, CROP, index).random(2 * CROP_TRIES + 3)
        left, top, width, height = pictures.box(*picture.size, uniforms)
        found.append((left, top, left + width, top + height))
    return found


def rows_of(paths: list[Path], size: int) -> dict[str, Callable[[], object]]:
    """The ways to read all of the files, by name."""
    pictures = Pictures(Files(paths), size, exemplars=6, draws=views.DRAWS, seed=0)
    scaled, whole = (list(zip(paths, boxes(pictures, least), strict=True)) for least in (pictures.min_size, None))
    return {
        WORKER: lambda: [pictures[0, index] for index in range(len(paths))],
        SCALED: lambda: [bare(path, size, pictures.min_size, box) for path, box in scaled],
        "bare, decoded whole": lambda: [bare(path, size, None, box) for path, box in whole],
    }


def main() -> None:
    """Prints the table."""
    arguments = parser(__doc__)
    arguments.add_argument("folders", nargs="*", type=Path, help="JPEG files to read in place of generated ones")
    arguments.add_argument("--size", type=int, default=224, help="of the sources that are made of these folders' files")
    arguments.add_argument("--images", type=int, default=64, help="files of each kind")
    arguments.add_argument("--rounds", type=int, default=9)
    options = arguments.parse_args()
    torch.set_num_threads(1)

    columns = {"images/s": ".0f", "ms/image": ".2f", "of bare": ".0%", "bar": ".0%"}
    table = Table(
        "Reading on one core", columns, [f"{options.images} JPEG files of each kind, {options.rounds} rounds"]
    )
    with tempfile.TemporaryDirectory() as name:
        kinds: dict[str, tuple[list[Path], int]] = {}
        for folder in options.folders:
            kinds[f"{folder.name}, sources of {options.size}"] = find_images(folder)[: options.images], options.size
        for kind, (shape, size) in GENERATED.items() if not options.folders else ():
            (folder := Path(name) / str(shape[0])).mkdir()
            kinds[kind] = generate(folder, options.images, shape), size
        for kind, (paths, size) in kinds.items():
            times = take_turns(rows_of(paths, size), options.rounds, time.process_time)
            for row, took in times.items():
                median = statistics.median(took) / len(paths)
                share, bar = (ratio(times[SCALED], took), BAR) if row == WORKER else (None, None)
                table.rows[f"{kind}: {row}"] = [1 / median, 1000 * median, share, bar]
    table.finish(options.out)


if __name__ == "__main__":
    main()
