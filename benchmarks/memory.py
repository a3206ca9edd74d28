"""Peak memory of a training step per image, beside the least that the backward pass needs (`costs.saved_bytes`).

    python benchmarks/memory.py [--device cuda] [--models cim_vit_small …]

Each row is the difference of the peaks of two fresh processes that make two steps (forward, backward, AdamW, moving
average) with few and with many images, over the images between them; `at rest` is what remains of the peak for none:
weights, gradients, optimiser and, on a CPU, the libraries. A CPU's peak is that of the process's resident memory, a
GPU's that of torch's allocations.
"""

import argparse
import subprocess
import sys

import torch
from costs import Shapes, saved_bytes, shapes_for
from table import Table, parser, peak_memory

from cim_models.backbones import build
from cim_models.precision import fast_bf16
from cim_models.pretext.model import CIM

MODELS = {
    "cpu": ["cim_vit_tiny", "cim_vit_small", "cim_resnet50"],
    "cuda": ["cim_vit_tiny", "cim_vit_small", "cim_vit_base", "cim_resnet50"],
}
IMAGES = {"cpu": (4, 12), "cuda": (32, 128)}


def peak(model: str, images: int, checkpointing: bool, bf16: bool, device: torch.device) -> int:
    """Bytes of two training steps in this process."""
    context, exemplar, count = shapes_for(model)
    cim = CIM(build(model)).to(device)
    cim.online.set_grad_checkpointing(checkpointing)
    optimiser = torch.optim.AdamW([p for p in cim.parameters() if p.requires_grad], lr=1e-6)
    shapes = (3, context, context), (count, 3, exemplar, exemplar)
    inputs = [torch.zeros(images, *shape, device=device) for shape in shapes]
    maps = torch.zeros(images, count, context, context, dtype=torch.bool, device=device)
    for _ in range(2):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = cim(*inputs, maps).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        cim.update_target(0.99)
    return peak_memory(device)


def in_a_process(*arguments: object) -> int:
    """`peak` in a fresh one."""
    command = [sys.executable, __file__, "--peak", *map(str, arguments)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    """Prints the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--models", nargs="+", help="by default those that the device has room for")
    arguments.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.peak:
        model, images, checkpointing, bf16, device = options.peak
        print(peak(model, int(images), checkpointing == "True", bf16 == "True", torch.device(device)))
        return

    kind, bf16 = torch.device(options.device).type, fast_bf16()
    (few, many), shapes = IMAGES[kind], Shapes()
    columns = {"MB/image": ".1f", "least, MB/image": ".1f", "ratio": ".2f", "at rest, MB": ".0f"}
    sizes = f"S {shapes.context}, T {shapes.exemplar}, K {shapes.count}; {few} and {many} images"
    sizes += ", bf16 autocast" if bf16 else ", fp32"
    table = Table(f"Memory of a training step, {kind}", columns, [sizes], options.device)
    for model in options.models or MODELS[kind]:
        for checkpointing in (False, True):
            low, high = (in_a_process(model, n, checkpointing, bf16, options.device) for n in (few, many))
            each = (high - low) / (many - few)
            name, rest = f"{model}, checkpointing" if checkpointing else model, (low - few * each) / 1e6
            if checkpointing and model.startswith("cim_resnet"):  # of whole stages, for which there is no formula
                table.rows[name] = [each / 1e6, None, None, rest]
                continue
            least = saved_bytes(model, number=2 if bf16 else 4, checkpointing=checkpointing)
            table.rows[name] = [each / 1e6, least / 1e6, each / least, rest]
    table.finish(options.out)


if __name__ == "__main__":
    main()
