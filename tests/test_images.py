"""cim_models.images: which files are found, and that each is read as a person would see it."""

import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cim_models import images
from cim_models.errors import DataError
from cim_models.images import find_images, read_image

TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a stored picture has to be turned from the upright one, so that its EXIF orientation turns it back."""


def base() -> Image.Image:
    """Four quarters in red, green, blue and yellow with a white F, 96 × 64."""
    picture = Image.new("RGB", (96, 64))
    draw = ImageDraw.Draw(picture)
    for (x, y), colour in {(0, 0): "red", (48, 0): "green", (0, 32): "blue", (48, 32): "yellow"}.items():
        draw.rectangle((x, y, x + 47, y + 31), colour)
    for box in ((38, 12, 45, 52), (38, 12, 60, 19), (38, 28, 55, 35)):
        draw.rectangle(box, "white")
    return picture


def apart(left: Image.Image, right: Image.Image) -> float:
    """Mean absolute difference of two RGB pictures, in 0–255."""
    assert (left.mode, left.size) == (right.mode, right.size)
    return float(np.abs(np.asarray(left, dtype=float) - np.asarray(right, dtype=float)).mean())


def reason(path) -> str:
    """The reason that read_image gives, which follows the path."""
    with pytest.raises(DataError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def declare(path, width: int, height: int) -> None:
    """Rewrites the header of a PNG so that it declares another size."""
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def test_find_in_a_folder(tmp_path):
    names = ["b.JPEG", "a/1.png", "a/café – снимок 猫 1.jpg", "a/b/c.webp", "Z.tif"]
    for name in [*names, ".hidden.jpg", ".git/a.png", "a/.cache/b.png", "notes.txt", "jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert find_images(tmp_path) == [tmp_path / name for name in sorted(names)]
    assert find_images(str(tmp_path)) == find_images(tmp_path)


def test_photographs_that_are_not_read_are_counted(tmp_path, caplog):
    for name in ("a.jpg", "1.HEIC", "b/2.heic", "b/3.nef", ".hidden.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [tmp_path / "a.jpg"]
    assert f"{tmp_path}: left out 2 .heic, 1 .nef, which are not read: convert them" in caplog.text


def test_find_in_a_hidden_folder(tmp_path):
    (tmp_path / ".data").mkdir()
    (tmp_path / ".data" / "a.png").touch()
    assert find_images(tmp_path / ".data") == [tmp_path / ".data" / "a.png"]


def test_find_follows_links_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.png").touch()
    try:
        (tmp_path / "a" / "loop").symlink_to(tmp_path / "a", target_is_directory=True)
        (tmp_path / "a" / "other").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    assert find_images(tmp_path / "a") == [tmp_path / "a" / "1.png", tmp_path / "a" / "other" / "2.png"]


def test_a_locked_folder_is_named_and_skipped(tmp_path, caplog, monkeypatch):
    (tmp_path / "a.png").touch()
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(folder):
        if os.fspath(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert find_images(tmp_path) == [tmp_path / "a.png"]
    assert f"{tmp_path / 'locked'}: folder skipped, Permission denied" in caplog.text


def test_find_in_a_list(tmp_path):
    text = f"\ufeff# two of them\r\nb/é x.jpg\r\n\r\n  {tmp_path / 'c.png'}  \nb/missing.png"
    (tmp_path / "list.txt").write_bytes(text.encode())
    expected = ["b/é x.jpg", "c.png", "b/missing.png"]
    assert find_images(tmp_path / "list.txt") == [tmp_path / name for name in expected]


@pytest.mark.skipif(os.name == "nt", reason="names are text on Windows")
def test_a_list_in_another_encoding(tmp_path):
    name = os.fsdecode("é.png".encode("latin-1"))
    try:
        base().save(tmp_path / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    (tmp_path / "list.txt").write_bytes("é.png\n".encode("latin-1"))
    assert find_images(tmp_path / "list.txt") == find_images(tmp_path) == [tmp_path / name]
    assert read_image(find_images(tmp_path)[0]).size == (96, 64)


def test_find_one_image(tmp_path):
    (tmp_path / "a.JPG").touch()
    assert find_images(tmp_path / "a.JPG") == [tmp_path / "a.JPG"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "no such file or folder"),
        ("missing.jpg", None, "no such file or folder"),
        ("empty.txt", b"# nothing\n\n", "names no image"),
        ("weights.bin", b"\x00\x01\xff", "neither a text file"),
    ],
)
def test_nothing_to_find(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        find_images(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_no_image_in_a_folder(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"no images in this folder; looked for .*\.jpg"):
        find_images(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "gif", "jpg", "ppm"])
def test_formats(tmp_path, suffix):
    base().save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert apart(read_image(tmp_path / f"a.{suffix}"), base()) < (6 if suffix == "jpg" else 1e-9)


def test_the_content_decides(tmp_path):
    base().save(tmp_path / "a.jpg", format="png")
    assert apart(read_image(tmp_path / "a.jpg"), base()) == 0


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_other_modes(tmp_path, mode):
    base().convert(mode).save(tmp_path / "a.png")
    assert apart(read_image(tmp_path / "a.png"), base().convert(mode).convert("RGB")) == 0


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    ramp = np.tile(np.linspace(0, 65535, 256).round().astype(np.uint16), (4, 1))
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    picture = read_image(tmp_path / f"a.{suffix}")
    assert (np.asarray(picture)[0] == np.arange(256)[:, None]).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 0.2, 1]], dtype=np.float32), [0, 51, 255]),
        (np.array([[-1, 0, 3]], dtype=np.float32), [0, 64, 255]),
        (np.array([[np.nan, 0.2, np.inf]], dtype=np.float32), [0, 51, 255]),
        (np.array([[-100_000, 0, 300_000]], dtype=np.int32), [0, 64, 255]),
    ],
)
def test_floats_and_wide_integers(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.asarray(read_image(tmp_path / "a.tif"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparency_is_laid_over_white(tmp_path, mode):
    alpha = np.tile(np.linspace(0, 255, 96).round().astype(np.uint8), (64, 1))
    if mode == "P":
        picture = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8), (64, 1)))
        picture.putpalette([255, 0, 255] * 96)
        picture.save(tmp_path / "a.png", transparency=bytes(alpha[0].tolist()))
        colour = np.array([255.0, 0, 255])
    else:
        picture = Image.new(mode.removesuffix("A"), (96, 64), "black")
        picture.putalpha(Image.fromarray(alpha))
        picture.save(tmp_path / "a.png")
        colour = np.zeros(3)
    opacity = alpha[..., None] / 255
    expected = opacity * colour + (1 - opacity) * 255
    assert np.abs(np.asarray(read_image(tmp_path / "a.png")) - expected).max() <= 1


def test_a_transparent_colour(tmp_path):
    base().save(tmp_path / "a.png", transparency=(255, 0, 0))
    picture = read_image(tmp_path / "a.png")
    assert picture.getpixel((0, 0)) == (255, 255, 255) and picture.getpixel((95, 63)) == (255, 255, 0)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_orientation(tmp_path, orientation, suffix):
    turn = TURNS[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (base() if turn is None else base().transpose(turn)).save(tmp_path / f"a.{suffix}", exif=exif)
    assert apart(read_image(tmp_path / f"a.{suffix}"), base()) < 6


def test_a_damaged_exif_block_does_not_matter(tmp_path):
    base().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fnot a directory")
    assert apart(read_image(tmp_path / "a.jpg"), base()) < 6


def test_cmyk(tmp_path):
    picture = base().convert("CMYK")
    picture.save(tmp_path / "adobe.jpg")
    picture.save(tmp_path / "a.tif")
    assert apart(read_image(tmp_path / "adobe.jpg"), base()) < 6
    assert apart(read_image(tmp_path / "a.tif"), base()) == 0


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert apart(read_image(tmp_path / f"a.{suffix}"), frames[0]) == 0


@pytest.mark.parametrize("size", [(1, 1), (20_000, 4), (4, 20_000)])
def test_extreme_shapes(tmp_path, size):
    Image.new("RGB", size, (200, 30, 60)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", min_size=64).size == size


def test_unreadable(tmp_path):
    base().save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    files = {"empty.jpg": b"", "text.jpg": b"not a picture\n", "truncated.jpg": content[: len(content) // 2]}
    for name, part in files.items():
        (tmp_path / name).write_bytes(part)
    assert reason(tmp_path / "empty.jpg") == "empty file"
    assert reason(tmp_path / "text.jpg") == "not an image"
    assert "truncated" in reason(tmp_path / "truncated.jpg")
    assert reason(tmp_path / "missing.jpg") == "No such file or directory"
    assert reason(tmp_path)


def test_every_truncation_is_a_data_error(tmp_path):
    for suffix in ("jpg", "png", "gif", "tif", "webp", "bmp"):
        base().save(tmp_path / f"whole.{suffix}")
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        for size in range(0, len(content), max(1, len(content) // 40)):
            (tmp_path / "part").write_bytes(content[:size])
            try:
                assert read_image(tmp_path / "part").mode == "RGB"
            except DataError as error:
                assert str(error).startswith(str(tmp_path / "part"))


def test_a_bomb_is_refused_by_its_header(tmp_path):
    base().save(tmp_path / "a.png")
    declare(tmp_path / "a.png", 60_000, 60_000)
    assert reason(tmp_path / "a.png").startswith("more than 179 million pixels")


def test_the_limit_is_our_own(tmp_path, monkeypatch):
    base().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(images, "PIXEL_LIMIT", 96 * 64)
    assert read_image(tmp_path / "a.png").size == (96, 64)
    monkeypatch.setattr(images, "PIXEL_LIMIT", 96 * 64 - 1)
    assert "million pixels" in reason(tmp_path / "a.png")


def test_large_pictures_are_read_without_a_warning(tmp_path, monkeypatch):
    base().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 64 - 1)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(tmp_path / "a.png").close()
    assert read_image(tmp_path / "a.png").size == (96, 64)
    assert Image.MAX_IMAGE_PIXELS == 96 * 64 - 1


def test_min_size_decodes_fewer_pixels(tmp_path):
    base().resize((1024, 768)).save(tmp_path / "a.jpg", quality=95)
    whole = read_image(tmp_path / "a.jpg")
    for min_size, size in {96: (128, 96), 97: (256, 192), 300: (512, 384), 385: (1024, 768), 2000: (1024, 768)}.items():
        picture = read_image(tmp_path / "a.jpg", min_size=min_size)
        assert picture.size == size
        assert apart(picture, whole.resize(size, Image.Resampling.BOX)) < 4


def test_odd_files(shared, tmp_path):
    with zipfile.ZipFile(shared / "data" / "odd.zip") as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "odd"
    pictures, failed = {}, {}
    for path in find_images(folder):
        try:
            pictures[path.name] = read_image(path)
        except DataError as error:
            failed[path.name] = str(error)
    assert sorted(failed) == ["bomb.jpg", "empty.jpg", "text.jpg", "truncated.jpg"]
    assert len(pictures) == 19
    assert all(picture.mode == "RGB" for picture in pictures.values())
    plain = pictures["lzw.tif"]
    for name in ["cmyk.jpg", "café – снимок 猫 1.jpg", *(f"exif-{orientation}.jpg" for orientation in range(1, 9))]:
        assert apart(pictures[name], plain) < 6, name
    assert apart(pictures["grey.jpg"], plain.convert("L").convert("RGB")) < 6
    ramp = np.asarray(pictures["grey16.png"])[0, :, 0]
    assert np.abs(ramp - np.linspace(0, 255, 96)).max() <= 1
    assert pictures["rgba.png"].getpixel((0, 0)) == pictures["palette-transparent.png"].getpixel((0, 0)) == (255,) * 3
    assert apart(pictures["animated.gif"], pictures["animated.webp"]) < 6
    assert pictures["animated.gif"].getpixel((95, 63))[0] > 150
    assert pictures["pixel-1x1.png"].getpixel((0, 0)) == (200, 30, 60)
    assert pictures["strip-20000x4.png"].size == (20_000, 4)
