"""Exemplars, maps and colour of a 224-pixel source on one core: ours by the batch, torchvision's calls one by one.

    python benchmarks/exemplars.py

Released sizes: K = 6 exemplars of T = 64 and maps of S = 160, from uint8 to normalised; the shrunken context, which
both would make with the same call, is left out. The rows alternate and count processor time, so that a busy machine
slows all alike; the table gives medians and the median of each round's ratio.
"""

import argparse
import math
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image

from cim_models.pretext import colour, exemplars
from cim_models.pretext.colour import ColourConfig
from cim_models.pretext.exemplars import ExemplarConfig
from cim_models.pretext.views import DEVIATION, MEAN, normalise

SOURCE, CONTEXT, EXEMPLAR, COUNT = 224, 160, 64, 6
COLOUR = T.Compose(
    [
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([T.GaussianBlur(13, (0.1, 2.0))], p=0.5),
    ]
)
BILINEAR, NEAREST = T.InterpolationMode.BILINEAR, T.InterpolationMode.NEAREST


def ours(sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `make_views` does, but for the context."""
    uniforms = torch.rand(len(sources), COUNT, exemplars.DRAWS + colour.DRAWS)
    geometry, colours = uniforms.split((exemplars.DRAWS, colour.DRAWS), dim=-1)
    rectangles = exemplars.draw_rectangles(geometry, SOURCE, SOURCE, ExemplarConfig(COUNT, EXEMPLAR))
    crops = exemplars.crop(sources.float().div_(255), rectangles, EXEMPLAR)
    maps = exemplars.cover(rectangles, (SOURCE, SOURCE), CONTEXT)
    return normalise(colour.recolour(crops, colours, ColourConfig())), maps


def plain(source: Image.Image | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What one would write with torchvision, for a PIL picture or a uint8 tensor (3, H, W)."""
    views = [plain_exemplar(source) for _ in range(COUNT)]
    return torch.stack([view[0] for view in views]), torch.stack([view[1] for view in views])


def plain_exemplar(source: Image.Image | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns the source, cuts an upright rectangle of it, and turns the rectangle's mask back."""
    while True:
        area, ratio = random.uniform(0.05, 0.48) * SOURCE**2, math.exp(random.uniform(-math.log(3), math.log(3)))
        degrees = random.uniform(-45, 45)
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        box = w * cos + h * abs(sin), w * abs(sin) + h * cos
        if max(box) <= SOURCE:
            break
    x, y = ((random.random() - 0.5) * (SOURCE - side) for side in box)

    turned = TF.rotate(source, degrees, BILINEAR, expand=True)
    width, height = TF.get_image_size(turned)
    u, v = x * cos + y * sin + width / 2, -x * sin + y * cos + height / 2
    left, top, w, h = round(u - w / 2), round(v - h / 2), round(w), round(h)
    exemplar = TF.resized_crop(turned, top, left, h, w, [EXEMPLAR, EXEMPLAR], antialias=True)
    if random.random() < 0.5:
        exemplar = TF.hflip(exemplar)
    exemplar = COLOUR(exemplar)
    if random.random() < 0.2:
        exemplar = TF.solarize(exemplar, 128)

    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, max(top, 0) : top + h, max(left, 0) : left + w] = 1
    picture = mask if isinstance(source, torch.Tensor) else Image.fromarray(mask[0].numpy())
    picture = TF.center_crop(TF.rotate(picture, -degrees, NEAREST), [SOURCE, SOURCE])
    picture = TF.resize(picture, [CONTEXT, CONTEXT], NEAREST)
    mask = picture if isinstance(picture, torch.Tensor) else TF.pil_to_tensor(picture)
    return as_input(exemplar), mask[0].bool()


def as_input(picture: Image.Image | torch.Tensor) -> torch.Tensor:
    x = TF.convert_image_dtype(picture) if isinstance(picture, torch.Tensor) else TF.to_tensor(picture)
    return TF.normalize(x, MEAN, DEVIATION)


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="sources per batch of ours")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)

    noise = torch.rand(options.batch, 3, 28, 28)
    sources = torch.nn.functional.interpolate(noise, (SOURCE, SOURCE), mode="bicubic").clamp(0, 1)
    sources = (sources * 255).to(torch.uint8)
    pictures = [TF.to_pil_image(source) for source in sources]
    rows = {
        "ours, by the batch": lambda: ours(sources),
        "torchvision on PIL": lambda: [plain(picture) for picture in pictures],
        "torchvision on tensors": lambda: [plain(source) for source in sources],
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for round_ in range(-1, options.rounds):
        for name, function in rows.items():
            took = seconds(function) / options.batch
            if round_ >= 0:
                times[name].append(took)

    print(f"{hardware()}, one core; torch {torch.__version__}, torchvision {torchvision.__version__}")
    print(f"source {SOURCE}, K {COUNT}, T {EXEMPLAR}, S {CONTEXT}, batches of {options.batch}, {options.rounds} rounds")
    print(f"{'':24}{'ms/image':>10}{'images/s':>10}{'ours is':>10}")
    for name, took in times.items():
        median = statistics.median(took)
        ratio = statistics.median(b / a for a, b in zip(times["ours, by the batch"], took, strict=True))
        print(f"{name:24}{1000 * median:10.2f}{1 / median:10.1f}{ratio:9.1f}×")


def hardware() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
