"""Where pictures come from: folders, lists, zip archives, tar shards, Hugging Face datasets; any of them by its index.

By index, since the order of a run is a function of (seed, epoch), whatever its number of processes and readers, and a
run goes on at any step. So a tar shard is no stream here: its headers are read once, each record from where it lies.
"""

import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from cim_models.errors import ConfigError, DataError
from cim_models.images import EXTENSIONS, find_images, read_image

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Records(Protocol):
    """Pictures by their index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a message calls this picture."""

    def content(self, index: int) -> str | bytes:
        """The path of its file, or the bytes of it.

        Raises:
            DataError: `name: reason`.
        """


def read_record(records: Records, index: int, min_size: int | None = None) -> Image.Image:
    """Reads one picture as RGB; see `cim_models.images.read_image`, also for the error."""
    content = records.content(index)
    if isinstance(content, str):
        return read_image(content, min_size)
    return read_image(records.name(index), min_size, content)


def open_records(source: str | Path) -> Records:
    """Finds out what a source is.

    Args:
        source: A folder of images, searched recursively; a text file of paths; a zip archive; a tar shard, a folder of
            shards or a pattern such as `train-*.tar`; a Parquet file or a folder of them; a folder that a Hugging Face
            dataset was saved to.

    Raises:
        DataError: If it does not exist, is none of these or holds no image.
        ConfigError: If it needs a library that is not installed.
    """
    path = Path(source).expanduser()
    if not path.exists() and set("*?[") & set(path.name):
        shards = sorted(path.parent.glob(path.name))
        if not shards:
            raise DataError(f"{path}: no file has such a name")
        return Tar(shards)
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            return HuggingFace.saved(path)
        try:
            return Files(find_images(path))
        except DataError:
            if shards := [file for file in sorted(path.iterdir()) if file.name.endswith(TAR_SUFFIXES)]:
                return Tar(shards)
            if tables := sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")]):
                return HuggingFace.parquet(path, tables)
            raise
    if path.name.endswith(TAR_SUFFIXES) and path.is_file():
        return Tar([path])
    if path.suffix == ".parquet" and path.is_file():
        return HuggingFace.parquet(path, [path])
    if path.is_file() and path.suffix.lower() not in EXTENSIONS and zipfile.is_zipfile(path):
        return Zip(path)
    return Files(find_images(path))


class Names(Sequence[str]):
    """Strings in one array of bytes, because reading processes would copy a million Python strings page by page."""

    def __init__(self, names: Sequence[str | Path]) -> None:
        self.ends = np.cumsum([0, *(len(os.fsencode(name)) for name in names)])
        self.bytes = np.frombuffer(b"".join(map(os.fsencode, names)), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> str:
        return os.fsdecode(self.bytes[self.ends[index] : self.ends[index + 1]].tobytes())


class Files:
    """Image files, each one a picture."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.names = Names(paths)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Its path."""
        return self.names[index]

    def content(self, index: int) -> str | bytes:
        """Its path."""
        return self.names[index]


class Subset:
    """Some of the records, in the order of `indices`."""

    def __init__(self, records: Records, indices: np.ndarray) -> None:
        self.records, self.indices = records, indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Of the record."""
        return self.records.name(int(self.indices[index]))

    def content(self, index: int) -> str | bytes:
        """Of the record."""
        return self.records.content(int(self.indices[index]))


class Zip:
    """The images of a zip archive, sorted by name as those of a folder; stored or deflated.

    Raises:
        DataError: If it cannot be read, or holds no image.
    """

    def __init__(self, path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                members = sorted((m for m in archive.infolist() if _is_image(m.filename)), key=lambda m: m.filename)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: not a readable zip archive: {error}") from error
        if not members:
            raise DataError(f"{path}: no images in this archive; looked for {' '.join(sorted(EXTENSIONS))}")
        self.path, self.names = path, Names([member.filename for member in members])
        self.table = np.array([(m.header_offset, m.compress_size, m.compress_type, m.CRC) for m in members], np.int64)
        self.encrypted = np.array([m.flag_bits & 1 for m in members], bool)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """archive.zip/member."""
        return f"{self.path}/{self.names[index]}"

    def content(self, index: int) -> bytes:
        """Of the member, its checksum compared."""
        start, size, method, checksum = self.table[index].tolist()
        if self.encrypted[index] or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{self.name(index)}: encrypted, or compressed by another method than deflate")
        try:
            with open(self.path, "rb") as file:  # each time: readers share no position, and nothing is kept open
                file.seek(start)
                file.seek(sum(struct.unpack("<26x2H", file.read(30))), os.SEEK_CUR)  # beyond name and extra field
                content = file.read(size)
            content = zlib.decompress(content, -zlib.MAX_WBITS) if method == zipfile.ZIP_DEFLATED else content
        except (OSError, struct.error, zlib.error) as error:
            raise DataError(f"{self.name(index)}: {error}") from error
        if zlib.crc32(content) != checksum:
            raise DataError(f"{self.name(index)}: damaged, its checksum is another")
        return content


class _Member(NamedTuple):
    name: str
    shard: int
    start: int
    size: int


class Tar:
    """The images of tar shards, in their order; of a WebDataset sample with several images the plain one (`key.jpg`).

    Raises:
        DataError: If a shard is compressed or cannot be read, or none holds an image.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        members = [member for shard, path in enumerate(paths) for member in _members(path, shard)]
        if not members:
            raise DataError(f"{paths[0]}: no images in these shards; looked for {' '.join(sorted(EXTENSIONS))}")
        self.paths, self.names = list(paths), Names([member.name for member in members])
        self.table = np.array([member[1:] for member in members], np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """shard.tar/member."""
        return f"{self.paths[self.table[index, 0]]}/{self.names[index]}"

    def content(self, index: int) -> bytes:
        """Of the member."""
        shard, start, size = self.table[index].tolist()
        try:
            with open(self.paths[shard], "rb") as file:
                file.seek(start)
                return file.read(size)
        except OSError as error:
            raise DataError(f"{self.name(index)}: {error.strerror}") from error


def _members(path: Path, shard: int) -> list[_Member]:
    """The images of one shard."""
    if path.suffix != ".tar":
        raise DataError(f"{path}: a record of a compressed shard cannot be found by its place; decompress it")
    plain: dict[str, list[_Member]] = {}
    others: dict[str, list[_Member]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isreg() and _is_image(member.name):
                    folder, _, name = member.name.rpartition("/")
                    key, _, suffix = name.partition(".")
                    found = others if "." in suffix else plain
                    entry = _Member(member.name, shard, member.offset_data, member.size)
                    found.setdefault(f"{folder}/{key}", []).append(entry)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: not a readable tar shard: {error}; repair it or leave it out") from error
    alone = {key: members for key, members in others.items() if key not in plain}
    return sorted((m for members in (*plain.values(), *alone.values()) for m in members), key=lambda m: m.start)


class HuggingFace:
    """The first column of images of a dataset; its rows are read by number, the image undecoded.

    Args:
        dataset: A `datasets.Dataset`. A stream has no rows by number: its order would depend on the readers.
        source: What messages call it.

    Raises:
        DataError: If it has no such column.
    """

    def __init__(self, dataset: Any, source: Path) -> None:
        datasets = _datasets()
        of_images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        if not of_images:
            raise DataError(f"{source}: no column of images; there are {', '.join(dataset.features)}")
        self.source, self.column = source, of_images[0]
        self.rows = dataset.select_columns(self.column).cast_column(self.column, datasets.Image(decode=False))

    @classmethod
    def saved(cls, path: Path) -> "HuggingFace":
        """A folder that `save_to_disk` made."""
        if (path / "dataset_dict.json").is_file():
            splits = ", ".join(str(folder.parent) for folder in sorted(path.glob("*/dataset_info.json")))
            raise DataError(f"{path}: a dataset of several splits; give one of them: {splits}")
        try:
            return cls(_datasets().load_from_disk(str(path)), path)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: not a readable dataset: {error}") from error

    @classmethod
    def parquet(cls, path: Path, tables: Sequence[Path]) -> "HuggingFace":
        """Parquet files, which `datasets` copies into its cache once, to find rows by number."""
        datasets = _datasets()
        try:
            return cls(datasets.Dataset.from_parquet([str(table) for table in tables]), path)
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise DataError(f"{path}: not readable Parquet files: {error}") from error

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """source, row N."""
        return f"{self.source}, row {index}"

    def content(self, index: int) -> str | bytes:
        """Bytes, or the path where the row holds no more."""
        value = self.rows[index][self.column] or {}
        content = value.get("bytes") or value.get("path")
        if not content:
            raise DataError(f"{self.name(index)}: no image in this row")
        return content


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("datasets is not installed: pip install 'cim-models[data]'") from error
    return datasets


def _is_image(name: str) -> bool:
    base = name.rpartition("/")[2]
    return os.path.splitext(base)[1].lower() in EXTENSIONS and not base.startswith(".")
