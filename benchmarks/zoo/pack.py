"""Packs folders of images into tar shards of a few megabytes, for a machine that takes no large files.

    python benchmarks/zoo/pack.py tiny-imagenet/train tiny-imagenet/val --out packed      # here
    for shard in packed/*.tar; do tar xf "$shard" -C data; done                           # there

The shards of one folder are also one dataset as they are: `cim pretrain 'packed/train-*.tar'`. `--rehearse` packs the
first 20 images of the first 10 classes of each folder.
"""

import argparse
import sys
import tarfile
from pathlib import Path

from cim_models.errors import CimModelsError
from cim_models.files import replacing
from cim_models.images import find_images

CLASSES, IMAGES = 10, 20
"""Of a folder, in a rehearsal."""


def pack(folder: Path, out: Path, size: int, rehearse: bool = False) -> list[Path]:
    """Writes shards of all images of a folder.

    Args:
        folder: Of images; members are named from it on.
        out: Folder for the shards.
        size: Of a shard in bytes, at most, unless one image alone has more.
        rehearse: Only some of them.

    Returns:
        The shards.
    """
    paths = find_images(folder)
    if rehearse:
        classes = sorted({path.parent for path in paths})[:CLASSES]
        paths = [path for name in classes for path in [path for path in paths if path.parent == name][:IMAGES]]
    parts: list[list[Path]] = []
    room = 0
    for path in paths:
        needed = path.stat().st_size + 2 * tarfile.BLOCKSIZE
        if needed > room:
            parts.append([])
            room = size - tarfile.RECORDSIZE
        parts[-1].append(path)
        room -= needed
    shards = [out / f"{folder.name}-{number:03}.tar" for number in range(len(parts))]
    for shard, part in zip(shards, parts, strict=True):
        with replacing(shard) as temporary, tarfile.open(temporary, "w") as archive:
            for path in part:
                archive.add(path, f"{folder.name}/{path.relative_to(folder).as_posix()}")
    return shards


def main() -> int:
    """Packs what the command line names; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--megabytes", type=float, default=45, help="of a shard, at most")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        for folder in options.folders:
            for shard in pack(folder, options.out, int(1e6 * options.megabytes), options.rehearse):
                print(f"{shard}  {shard.stat().st_size / 1e6:.1f} MB")
    except CimModelsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
