"""Files to RGB pictures: find images in a folder or a list, and read each as a person would see it."""

import contextlib
import io
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cim_models.errors import DataError

EXTENSIONS = frozenset(".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())
NOT_READ = frozenset(".arw .cr2 .cr3 .dng .heic .heif .jxl .nef .orf .psd .raf .rw2".split())
"""Photographs as cameras, phones and editors write them, which are left out of a folder with a warning."""
PIXEL_LIMIT = 178_956_970
"""Pictures that declare more pixels (0.5 GB as RGB) are refused before anything is decoded."""

logger = logging.getLogger(__name__)


def find_images(source: str | Path) -> list[Path]:
    """Lists the images of a folder, of a text file of paths, or one image file itself.

    Args:
        source: a folder, searched recursively without hidden files and folders, each real folder once however many
            links lead to it; or an image file; or a text file with one path per line, relative to that file's folder,
            where blank lines and lines that start with # are skipped. Listed paths are not opened here.
            Photographs of a folder in formats that are not read (HEIC, raw) are counted in a warning.

    Returns:
        Paths, sorted for a folder, in the order of the lines for a list.

    Raises:
        DataError: the source does not exist, is neither a folder, an image nor a text file, or names no image.
    """
    source = Path(source).expanduser()
    if source.is_dir():
        names = sorted(_walk(source))
        paths = [Path(name) for name in names if _suffix(name) in EXTENSIONS]
        others = Counter(_suffix(name) for name in names if _suffix(name) in NOT_READ)
        if others:
            counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
            logger.warning("%s: left out %s, which are not read: convert them, to JPEG for instance", source, counts)
        wanted = f"no images in this folder; looked for {' '.join(sorted(EXTENSIONS))}"
    elif source.suffix.lower() in EXTENSIONS and source.is_file():
        return [source]
    elif source.is_file():
        paths = [source.parent / line for _, line in read_list(source)]
        wanted = "this list names no image; write one path per line, relative to the list's folder"
    else:
        raise DataError(f"{source}: no such file or folder; give a folder of images, an image or a text file of paths")
    if not paths:
        raise DataError(f"{source}: {wanted}")
    return paths


def read_list(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file of paths, which may be in any encoding, and their numbers from 1 on.

    They are stripped; blank ones and those that start with # are left out.

    Raises:
        DataError: If it cannot be read, or is no text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read this list of images, {error.strerror}") from error
    if b"\0" in content:
        raise DataError(f"{path}: neither a text file of paths nor a file with an image's suffix")
    lines = [line.strip() for line in content.decode("utf-8-sig", "surrogateescape").split("\n")]
    return [(number, line) for number, line in enumerate(lines, start=1) if line and not line.startswith("#")]


def read_image(path: str | Path, min_size: int | None = None, content: bytes | None = None) -> Image.Image:
    """Reads the first frame of an image file as RGB, 8 bits per channel.

    The EXIF orientation is applied, transparency is laid over white, CMYK and palettes are converted and 16-bit grey
    is scaled.

    Args:
        path: the file; its content decides the format, not its name.
        min_size: allows a JPEG to be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep this many
            pixels; faster for photographs that will be shrunk anyway.
        content: of the file, where it lies in an archive and `path` is but its name.

    Raises:
        DataError: `path: reason`, whatever keeps the file from being read: missing, empty, truncated, not an image, or
            more than PIXEL_LIMIT pixels.
    """
    with _opened(path, min_size, content) as image:
        image.load()
        _turn_upright(image)
        return to_rgb(image)


def decoded_size(path: str | Path, min_size: int | None = None, content: bytes | None = None) -> tuple[int, int]:
    """Width and height of what `read_image` would decode, before it is turned upright, from the file's header alone.

    Arguments and errors are those of `read_image`.
    """
    with _opened(path, min_size, content) as image:
        return image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode of Pillow to RGB, with transparency over white."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@contextlib.contextmanager
def _opened(path: str | Path, min_size: int | None, content: bytes | None) -> Iterator[Image.Image]:
    """Opens an image, not decoded yet; whatever happens to it is a DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path if content is None else io.BytesIO(content)) as image:
                if image.width * image.height > PIXEL_LIMIT:
                    raise Image.DecompressionBombError
                if min_size:
                    image.draft(None, (min_size, min_size))
                yield image
    except Exception as error:
        empty = not content if content is not None else os.path.isfile(path) and not os.path.getsize(path)
        raise DataError(f"{os.fspath(path)}: {_reason(error, empty)}") from error


def _walk(folder: Path) -> Iterator[str]:
    """Yields the files of pictures below a folder; links are followed, a folder that was seen is not entered again."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_skip_folder):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if _suffix(name) in EXTENSIONS | NOT_READ and not name.startswith("."):
                yield os.path.join(root, name)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _skip_folder(error: OSError) -> None:
    logger.warning("%s: folder skipped, %s", error.filename, error.strerror)


def _turn_upright(image: Image.Image) -> None:
    """Applies the EXIF orientation in place; a damaged EXIF block does not make the picture unreadable."""
    if image.format == "JPEG" and image.info.keys().isdisjoint(("exif", "xmp")):
        return  # without asking, which takes a tenth of the time that a small picture does
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Scales 16-bit integers by 1/257 and floats in [0, 1] by 255; values beyond that range are stretched to 0–255."""
    low, high = (0.0, 65535.0) if values.dtype.kind in "iu" else (0.0, 1.0)
    values = np.nan_to_num(values.astype(np.float64), posinf=high, neginf=low)
    if values.min() < low or values.max() > high:
        low, high = values.min(), values.max()
    return np.rint((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


def _reason(error: Exception, empty: bool) -> str:
    """Says in a few words, on one line, why a file was not read."""
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {PIXEL_LIMIT / 1e6:.0f} million pixels; shrink it or leave it out"
    if isinstance(error, UnidentifiedImageError):
        return "empty file" if empty else "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
