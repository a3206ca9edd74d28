"""Exemplars, maps and colour of a 224-pixel source: ours by the batch, torchvision's calls one by one.

    python benchmarks/exemplars.py [--device cuda]

Released sizes: K = 6 exemplars of T = 64 and maps of S = 160, from uint8 to normalised; the shrunken context, which
both would make with the same call, is left out. All on one core, where the rows count processor time; on a GPU ours is
compared with torchvision on one core, as a reading process would run it. The rows alternate, so that a busy machine
slows all alike; the table gives medians and the median of each round's ratio.
"""

import math
import random
import statistics
import time

import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image
from table import Table, parser, ratio, take_turns

from cim_models.pretext import colour, exemplars
from cim_models.pretext.colour import ColourConfig
from cim_models.pretext.exemplars import ExemplarConfig
from cim_models.pretext.views import CHUNK, DEVIATION, MEAN, normalise

SOURCE, CONTEXT, EXEMPLAR, COUNT = 224, 160, 64, 6
COLOUR = T.Compose(
    [
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([T.GaussianBlur(13, (0.1, 2.0))], p=0.5),
    ]
)
BARS = {"cpu": 10, "cuda": 100}
"""How many times faster than torchvision's pipeline ours shall be."""
BATCHES = 8
"""Of ours in a turn, one after the other as in training; torchvision, which is slower, takes 16 pictures."""
OURS, PIL, TENSORS = "ours, by the batch", "torchvision on PIL", "torchvision on tensors"
BILINEAR, NEAREST = T.InterpolationMode.BILINEAR, T.InterpolationMode.NEAREST


def ours(sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `make_views` does, but for the context."""
    uniforms = torch.rand(len(sources), COUNT, exemplars.DRAWS + colour.DRAWS, device=sources.device)
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


def main() -> None:
    """Prints the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--batch", type=int, help="sources per batch of ours; by default 8, on a GPU 256")
    arguments.add_argument("--rounds", type=int, default=15)
    options = arguments.parse_args()
    device = torch.device(options.device)
    batch = options.batch or (256 if device.type == "cuda" else CHUNK)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)

    noise = torch.rand(batch, 3, 28, 28)
    sources = torch.nn.functional.interpolate(noise, (SOURCE, SOURCE), mode="bicubic").clamp(0, 1)
    sources = (sources * 255).to(torch.uint8)
    pictures = [TF.to_pil_image(source) for source in sources[:16]]
    on_device = sources.to(device)

    def batched() -> None:
        for _ in range(BATCHES):
            ours(on_device)
        if device.type == "cuda":
            torch.cuda.synchronize()

    rows = {
        OURS: batched,
        PIL: lambda: [plain(picture) for picture in pictures],
        TENSORS: lambda: [plain(source) for source in sources[:16]],
    }
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times = take_turns(rows, options.rounds, clock, warm=2)
    images = {OURS: BATCHES * batch, PIL: len(pictures), TENSORS: len(pictures)}
    times = {name: [t / images[name] for t in took] for name, took in times.items()}

    columns = {"ms/image": ".2f", "images/s": ".1f", "ours is": ".1f", "bar": ".0f"}
    sizes = f"source {SOURCE}, K {COUNT}, T {EXEMPLAR}, S {CONTEXT}, batches of {batch}, {options.rounds} rounds"
    where = "a GPU" if device.type == "cuda" else "one core"
    table = Table(f"Exemplars on {where}", columns, [f"{sizes}; torchvision on one core"], options.device)
    for name, took in times.items():
        median = statistics.median(took)
        bar = BARS[device.type] if name == PIL else None
        table.rows[name] = [1000 * median, 1 / median, ratio(took, times[OURS]), bar]
    table.finish(options.out)


if __name__ == "__main__":
    main()
