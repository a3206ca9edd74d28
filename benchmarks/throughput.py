"""Images per second of whole runs, and the share of the device's matrix products that the model's operations are.

    python benchmarks/throughput.py [--device cuda] [--models …] [--batch N] [--set data.cache=none] [--profile]
    python benchmarks/throughput.py --recipe benchmarks/zoo/recipes/whole.yaml --batch 512

Each row is `cim_models.pretraining.pretrain` itself, some steps of a recipe (imagenet-1k: S = 160, T = 64, K = 6) on
generated pictures in the device cache; images per second and the wait for data are those of its log, the median of its
lines but the first two. Utilisation is that of `costs.counted_flops` against the ceiling: the fastest product of two
large bf16 matrices on the same device just before. `--set` changes any field of the configuration; `--profile` says
which kernels the time of some more steps went to, and for which share of the time a GPU has one to run. Without a GPU
it rehearses on the CPU, and says so.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import yaml
from costs import Shapes, counted_flops
from decode import generate
from table import Table, parser

from cim_models.pretraining.config import PretrainConfig, from_dict, load_recipe, to_dict
from cim_models.pretraining.loop import pretrain

MODELS = {"cuda": ["cim_vit_tiny", "cim_vit_small", "cim_vit_base", "cim_resnet50"], "cpu": ["cim_vit_tiny"]}
BATCH = {"cuda": 256, "cpu": 8}
STEPS = {"cuda": 120, "cpu": 12}
SIDES = {"cuda": (16384, 8192, 4096), "cpu": (1024, 512)}
"""Of the matrices whose product is the ceiling."""
LINES = 6
"""Lines of the log that a run writes; few, since each is a diagnosis, and a wait for the GPU."""
FILES = 64
"""Different pictures; the list of a run names them over and over."""
BARS = {"cim_vit_base": 0.45, "cim_vit_small": 0.30}
"""Share of the ceiling that shall be reached on a GPU."""
WAIT = 0.02
"""Share of the time that may be spent waiting for data there."""


def ceiling(device: torch.device) -> float:
    """Operations per second of the fastest of some bf16 matrix products."""
    best = 0.0
    for side in SIDES[device.type]:
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(8):
            synchronise(device)
            start = time.perf_counter()
            for _ in range(10):
                a @ b
            synchronise(device)
            best = max(best, 10 * 2 * side**3 / (time.perf_counter() - start))
    return best


def synchronise(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def configuration(
    model: str, pictures: Path, out: Path, options: argparse.Namespace, steps: int, images: int, lines: int = LINES
) -> PretrainConfig:
    """Of a run of so many steps and lines of the log, without diagnoses."""
    values = to_dict(load_recipe(options.recipe))
    values |= {"model": model, "out": str(out), "log_every": max(1, steps // lines), "save_minutes": None}
    values["save_every"] = steps
    values["data"] |= {"path": str(pictures), "cache": "device", "workers": options.workers}
    values["diagnostics"]["held_out"] = 0
    values["optimiser"] |= {"batch_size": options.batch, "accumulation": 1, "warmup_epochs": 0.0}
    values["optimiser"]["epochs"] = steps * options.batch / images
    for change in options.set:
        name, _, value = change.partition("=")
        *path, last = name.split(".")
        functools.reduce(dict.__getitem__, path, values)[last] = yaml.safe_load(value)
    return from_dict(PretrainConfig, values, "configuration")


def kernels(profile: torch.profiler.profile, device: torch.device, rows: int = 12) -> tuple[float, list[str]]:
    """Seconds of all kernels, and those that took longest, with their shares of them."""
    of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = [event for event in profile.key_averages() if getattr(event, of) > 0]
    if device.type == "cuda":  # annotations span kernels, which count for themselves
        on_device = torch.autograd.DeviceType.CUDA
        found = [event for event in found if event.device_type == on_device and not event.is_user_annotation]
    total = sum(getattr(event, of) for event in found)
    found.sort(key=lambda event: -getattr(event, of))
    shares = [f"{getattr(event, of) / total:.1%} {event.key[:100]} ({event.count} times)" for event in found[:rows]]
    return total / 1e6, shares


def profiled(config: PretrainConfig, images: int, rate: float, device: torch.device) -> list[str]:
    """Where the time of a run of so many images goes that trains on so many a second unless it is profiled."""
    activity = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        pretrain(config)
    seconds, shares = kernels(profile, device)
    busy = f"{rate * seconds / images:.0%} of the time the GPU has a kernel to run" if device.type == "cuda" else ""
    return [f"{config.model}: where the time went", *(f"- {line}" for line in [busy, *shares] if line)]


def main() -> None:
    """Prints the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--models", nargs="+")
    arguments.add_argument("--recipe", default="imagenet-1k", help="name of one, or a YAML file")
    arguments.add_argument("--batch", type=int)
    arguments.add_argument("--steps", type=int)
    arguments.add_argument("--workers", type=int, default=8)
    arguments.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of the run's configuration")
    arguments.add_argument("--profile", action="store_true")
    options = arguments.parse_args()
    device = torch.device(options.device)
    options.batch = options.batch or BATCH[device.type]
    steps = options.steps or STEPS[device.type]
    images = max(4 * options.batch, FILES)

    columns = {"images/s": ".0f", "TFLOP/s": ".3g", "of ceiling": ".1%", "bar": ".0%", "data wait": ".2%"}
    columns |= {"GFLOP/image": ".1f", "peak GB": ".1f"}
    best = ceiling(device)
    settings = " ".join([f"recipe {options.recipe}", *options.set])
    sizes = f"batch {options.batch}, {steps} steps, {settings}, device cache"
    title = "Throughput on a GPU" if device.type == "cuda" else "Throughput, rehearsed on a CPU"
    table = Table(title, columns, [f"{sizes}; ceiling {best / 1e12:.3g} TFLOP/s of bf16"], options.device)
    if device.type == "cuda":
        table.notes.append(f"The wait for data shall be under {WAIT:.0%}.")
    else:
        table.notes.append("No GPU here: this was a CPU, and says only that the script works.")
    with tempfile.TemporaryDirectory() as name:
        files = generate(Path(name), FILES, (500, 375))
        (pictures := Path(name) / "pictures.txt").write_text("\n".join(files[i % FILES].name for i in range(images)))
        for model in options.models or MODELS[device.type]:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            config = configuration(model, pictures, Path(name) / model, options, steps, images)
            run = pretrain(config)
            lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            lines = [line for line in lines if "images_per_second" in line][2:]
            rate, wait = (statistics.median(x[key] for x in lines) for key in ("images_per_second", "data_wait"))
            exemplars = config.views.exemplars
            shapes = Shapes(config.views.context_size, exemplars.size, exemplars.count)
            flops = counted_flops(model, shapes, config.pretext)
            memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
            bar = BARS.get(model) if device.type == "cuda" else None
            used = rate * flops
            table.rows[model] = [rate, used / 1e12, used / best, bar, wait, flops / 1e9, memory]
            if options.profile:
                few = configuration(model, pictures, Path(name) / f"{model}-profile", options, 12, images, lines=1)
                table.notes += profiled(few, 12 * options.batch, rate, device)
    table.finish(options.out)


if __name__ == "__main__":
    main()
