"""What nearest neighbours cost as the gallery grows: memory that stays, time that grows in proportion.

    python benchmarks/neighbours.py                                              # four galleries, 2,048 queries
    python benchmarks/neighbours.py --images 1281167 --queries 50000 --width 768     # ImageNet-1k, features of a ViT-B

Features are generated: row i begins at number i of one long row of random numbers, so the gallery itself takes no
memory, and what is measured is what the search adds. On a GPU, memory is the GPU's. All runs in one process, from
the smallest gallery to the largest, so that a peak is seen where it grows.
"""

import argparse
import time

import torch
from table import peak_memory

from cim_models.evaluation.knn import KS, knn_accuracy

CLASSES = 1000


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[20_000, 40_000, 80_000, 160_000])
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--width", type=int, default=192)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device}, {options.queries:,} queries, {options.width} features, k up to {max(KS)}")
    print(f"{'gallery':>10}{'seconds':>10}{'ratio':>8}{'peak MB':>10}{'growth MB':>11}{'matrix MB':>11}")
    first_seconds, before = 0.0, peak_memory(device) / 2**20
    for images in sorted(options.images):
        numbers = torch.randn(images + options.width, generator=torch.Generator().manual_seed(0))
        gallery = numbers.as_strided((images, options.width), (1, 1))
        labels = torch.arange(images) % CLASSES
        rows = torch.randint(images, (options.queries,), generator=torch.Generator().manual_seed(1))
        start = time.perf_counter()
        accuracy = knn_accuracy(gallery, labels, gallery[rows].to(device), labels[rows], (1, *KS))[1]
        seconds, peak = time.perf_counter() - start, peak_memory(device) / 2**20
        if accuracy < 1:
            raise SystemExit(f"a row is not its own nearest neighbour: {accuracy:%}")
        first_seconds = first_seconds or seconds
        matrix = images * options.queries * 4 / 2**20
        print(
            f"{images:10,}{seconds:10.1f}{seconds / first_seconds:8.2f}{peak:10.0f}{peak - before:11.0f}{matrix:11.0f}",
            flush=True,
        )
        before = peak


if __name__ == "__main__":
    main()
