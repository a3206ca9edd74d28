"""The model of docs/scaling.md: operations, memory and time of ImageNet-1K for 300 epochs, for each backbone.

    python benchmarks/scaling.py [--ceiling 650] [--out docs/scaling.md]

Operations are counted by torch from a training step (`costs.counted_flops`), bytes from shapes; a ceiling and the
share of it that a run reaches are assumptions, which the table names. `--out` replaces what stands between the marks
in that file.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from costs import counted_flops, on_meta, saved_bytes

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
DECODING = Path(__file__).resolve().parent / "performance" / "decode.json"
START, END = "<!-- written by benchmarks/scaling.py -->\n", "<!-- end -->\n"
MODELS = (
    "cim_vit_tiny", "cim_vit_small", "cim_vit_base", "cim_vit_large", "cim_vit_huge", "cim_resnet50",
)  # fmt: skip
IMAGES, EPOCHS, GLOBAL_BATCH, GPUS = 1_281_167, 300, 4096, 8
CEILING = 650e12
"""Operations per second of large bf16 matrix products, assumed of an H100 SXM, whose data sheet says 989e12."""
UTILISATION = {"cim_vit_tiny": 0.2, "cim_vit_small": 0.3, "cim_resnet50": 0.3}
"""Share of it that a run is assumed to reach; of other backbones 0.45."""


class Costs(NamedTuple):
    """Of one backbone."""

    parameters: int
    """That are trained."""
    flops: float
    """Per image."""
    rest: int
    """Bytes of weights, gradients, AdamW's moments, and the target encoder."""
    image: float
    """Bytes per image that the backward pass needs."""


def costs(model: str) -> Costs:
    """Counted, without running anything."""
    cim = on_meta(model)
    trained = sum(p.numel() for p in cim.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in cim.parameters())
    return Costs(trained, counted_flops(model), 4 * (everything + 3 * trained), saved_bytes(model, number=2))


def markdown(ceiling: float = CEILING, decoded: float | None = None) -> str:
    """The table and its assumptions.

    Args:
        ceiling: Operations per second.
        decoded: Images per second that one core reads, if it was measured.
    """
    reading = "" if decoded is None else " cores/GPU |"
    lines = [
        f"| backbone | trained parameters | GFLOP/image | assumed share | images/s per GPU | hours on {GPUS} GPUs | "
        f"fixed GB | MB/image | gradients, MB/step | ms/step |{reading}",
        "|---|" + "---:|" * (10 if decoded else 9),
    ]
    for model in MODELS:
        parameters, flops, rest, image = costs(model)
        share = UTILISATION.get(model, 0.45)
        rate = share * ceiling / flops
        hours = IMAGES * EPOCHS / (rate * GPUS) / 3600
        step = 1000 * GLOBAL_BATCH / (rate * GPUS)
        cells = [
            f"{parameters / 1e6:.1f} M", f"{flops / 1e9:.1f}", f"{share:.0%}", f"{rate:,.0f}", f"{hours:.1f}",
            f"{rest / 1e9:.2f}", f"{image / 1e6:.0f}", f"{4 * parameters / 1e6:.0f}", f"{step:,.0f}",
        ]  # fmt: skip
        cells += [] if decoded is None else [f"{rate / decoded:.0f}"]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    lines += [
        "",
        "Counted: operations and bytes, of K = 6, S = 160, T = 64 (huge: 168 and 70), bf16. Assumed, not measured: "
        f"large matrix products at {ceiling / 1e12:.0f} TFLOP/s, as an H100 SXM makes them, and the share of it that a "
        f"run reaches. ImageNet-1K: {IMAGES:,} images, {EPOCHS} epochs, {GLOBAL_BATCH} images per step.",
    ]
    if decoded is not None:
        lines[-1] += (
            f" Reading: {decoded:.0f} images/s per core, as [measured](performance.md) for 500 × 375 pixels; a cache "
            "needs none of it after the first epoch."
        )
    return "\n".join(lines) + "\n"


def decoding_rate(file: Path = DECODING) -> float | None:
    """Images of ImageNet's usual size that one core reads in a second, from the results of decode.py."""
    if not file.exists():
        return None
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return next(row[0] for name, row in rows.items() if name.startswith("500 × 375") and name.endswith("worker path"))


def replaced(document: str, table: str) -> str:
    """The document with this table between its marks."""
    before, rest = document.split(START)
    return before + START + table + END + rest.split(END)[1]


def write(document: Path, ceiling: float = CEILING) -> None:
    """Replaces the table of a document."""
    text = document.read_text(encoding="utf-8")
    document.write_text(replaced(text, markdown(ceiling, decoding_rate())), encoding="utf-8")


def main() -> None:
    """Prints the table, or writes it."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--ceiling", type=float, default=CEILING / 1e12, help="TFLOP/s")
    arguments.add_argument("--out", type=Path, help="document whose table is replaced")
    options = arguments.parse_args()
    if options.out is None:
        print(markdown(1e12 * options.ceiling, decoding_rate()))
    else:
        write(options.out, 1e12 * options.ceiling)


if __name__ == "__main__":
    main()
