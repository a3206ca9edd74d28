"""cim_models.pretraining.readers: the same pictures from any container, whatever made it."""

import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cim_models.errors import ConfigError, DataError
from cim_models.images import find_images
from cim_models.pretraining import readers
from cim_models.pretraining.data import GlobalBatches, Pictures, loader
from cim_models.pretraining.readers import Files, Subset, open_records, read_record

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
KINDS = ["zip", "stored zip", "tar", "shards", "pattern", "saved dataset", "parquet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures in two folders, one of them damaged, and what is none."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for i in range(6):
        path = root / ("猫" if i % 2 else "b") / f"{i:06}.{'png' if i % 3 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(path)
    (root / "b" / "000002.png").write_bytes((root / "b" / "000002.png").read_bytes()[:200])
    (root / "b" / "000002.json").write_text("{}")
    (root / "b" / ".hidden.jpg").write_text("")
    return root


def pack(kind: str, folder: Path, to: Path) -> Path:
    """The folder in a container, made by the tool that people make it with."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if kind.endswith("zip"):
        method = zipfile.ZIP_STORED if kind == "stored zip" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(to / "a.zip", "w", method) as archive:
            archive.mkdir("b.jpg")
            for name in reversed(files):
                archive.write(folder / name, name)
        return to / "a.zip"
    if kind == "tar":
        subprocess.run(["tar", "-cf", to / "a.tar", "-C", folder, *files], check=True)
        return to / "a.tar"
    if kind in ("shards", "pattern"):
        (to / "shards").mkdir()
        for shard, names in enumerate((files[:4], files[4:])):
            subprocess.run(["tar", "-cf", to / "shards" / f"s-{shard:03}.tar", "-C", folder, *names], check=True)
        return to / "shards" / ("s-*.tar" if kind == "pattern" else "")
    datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
    rows = [{"bytes": Path(path).read_bytes(), "path": None} for path in find_images(folder)]
    features = datasets.Features({"label": datasets.Value("int64"), "image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"label": [1] * len(rows), "image": rows}, features=features)
    if kind == "parquet":
        dataset.to_parquet(to / "data" / "train.parquet")
        return to
    dataset.save_to_disk(to / "saved")
    return to / "saved"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Whatever `datasets` copies goes away with the test."""
    try:
        import datasets
    except ImportError:
        return
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_any_container_gives_the_batches_of_the_folder(folder, tmp_path, kind, workers):
    batches = GlobalBatches(6, 3, seed=1, total_steps=4)
    ours, theirs = (
        list(loader(Pictures(open_records(source), 16, exemplars=2, draws=3, seed=1), batches, workers))
        for source in (folder, pack(kind, folder, tmp_path))
    )
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left["source"], right["source"]) and torch.equal(left["uniforms"], right["uniforms"])
        assert [text.split(": ")[1] for text in left["failed"]] == [text.split(": ")[1] for text in right["failed"]]
    failed = {text for batch in theirs for text in batch["failed"]}
    (reason,) = failed
    assert ("row 1: " if kind in ("saved dataset", "parquet") else "b/000002.png: ") in reason


def test_what_a_record_is_called(folder, tmp_path):
    archive = pack("zip", folder, tmp_path)
    assert open_records(archive).name(3) == f"{archive}/猫/000001.png"
    some = Subset(open_records(folder), np.array([5, 0]))
    assert len(some) == 2 and some.name(1) == str(folder / "b" / "000000.jpg") == some.content(1)
    assert read_record(some, 0).size == (30, 25)


def test_lists_and_single_images(folder, tmp_path):
    (tmp_path / "list.txt").write_text(str(folder / "b" / "000000.jpg"))
    for source in (tmp_path / "list.txt", folder / "b" / "000000.jpg"):
        assert [open_records(source).name(i) for i in range(1)] == [str(folder / "b" / "000000.jpg")]


def shard(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(names):
            content = io.BytesIO()
            Image.new("L", (4, 4), number).save(content, "png")
            member = tarfile.TarInfo(name)
            member.size = content.tell()
            content.seek(0)
            archive.addfile(member, content)
    return path


def test_samples_of_several_images_count_once(tmp_path):
    names = ["a/1.png", "a/1.mask.png", "a/1.cls", "b/1.left.png", "b/1.right.png", "a/2.mask.png", "a/2.png"]
    records = open_records(shard(tmp_path / "s.tar", names))
    kept = [records.name(i).removeprefix(f"{tmp_path / 's.tar'}/") for i in range(len(records))]
    assert kept == ["a/1.png", "b/1.left.png", "b/1.right.png", "a/2.png"]
    assert [read_record(records, i).getpixel((0, 0))[0] for i in range(4)] == [0, 3, 4, 6]


def test_a_damaged_member_is_a_damaged_picture(folder, tmp_path):
    archive = pack("stored zip", folder, tmp_path)
    content = bytearray(archive.read_bytes())
    jpeg = (folder / "b" / "000000.jpg").read_bytes()
    content[content.index(jpeg) + 300] ^= 255
    archive.write_bytes(content)
    with pytest.raises(DataError, match="a.zip/b/000000.jpg: damaged, its checksum is another"):
        open_records(archive).content(0)
    with pytest.raises(DataError, match="a.zip/b/000002.png: .*truncated"):
        read_record(open_records(archive), 1)


def test_members_that_cannot_be_read(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.write(folder / "b" / "000000.jpg", "x.jpg")
    with pytest.raises(DataError, match="a.zip/x.jpg: encrypted, or compressed by another method than deflate"):
        open_records(tmp_path / "a.zip").content(0)
    path = shard(tmp_path / "s.tar", ["1.png"])
    records = open_records(path)
    path.unlink()
    with pytest.raises(DataError, match="s.tar/1.png: No such file"):
        records.content(0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tar", b"not a tar" * 200, "a.tar: not a readable tar shard"),
        ("a.tar.gz", b"", "a.tar.gz: a record of a compressed shard cannot be found by its place; decompress it"),
        ("a.parquet", b"not a table", "a.parquet: not readable Parquet files"),
        ("a.txt", b"\0", "neither a text file of paths nor"),
    ],
)
def test_what_is_no_container(tmp_path, name, content, message):
    if name == "a.parquet":
        pytest.importorskip("datasets", reason="needs the extra `data`")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_records(tmp_path / name)


def test_containers_without_images(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(DataError, match="a.zip: no images in this archive"):
        open_records(tmp_path / "a.zip")
    with pytest.raises(DataError, match="s.tar: no images in these shards"):
        open_records(shard(tmp_path / "s.tar", ["1.cls"]))
    with pytest.raises(DataError, match=r"x-\*.tar: no file has such a name"):
        open_records(tmp_path / "x-*.tar")


def test_datasets_that_are_not_meant(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
    numbers = datasets.Dataset.from_dict({"label": [1, 2]})
    numbers.save_to_disk(tmp_path / "numbers")
    with pytest.raises(DataError, match="numbers: no column of images; there are label"):
        open_records(tmp_path / "numbers")
    datasets.DatasetDict(train=numbers, test=numbers).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="several splits; give one of them: .*splits/test, .*splits/train"):
        open_records(tmp_path / "splits")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'cim-models\[data\]'"):
        open_records(tmp_path / "numbers")


def test_rows_that_hold_a_path(folder, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
    path = str(folder / "b" / "000000.jpg")
    rows = [{"bytes": None, "path": path}, None]
    features = datasets.Features({"image": datasets.Image()})
    records = readers.HuggingFace(datasets.Dataset.from_dict({"image": rows}, features=features), tmp_path)
    assert records.content(0) == path and read_record(records, 0).size == (30, 20)
    with pytest.raises(DataError, match="row 1: no image in this row"):
        records.content(1)


def test_a_million_names_are_two_arrays():
    files = Files([f"folder/{i}.jpg" for i in range(1000)])
    assert {type(value) for value in vars(files.names).values()} == {np.ndarray}
    assert [files.name(i) for i in (0, 10, 999)] == ["folder/0.jpg", "folder/10.jpg", "folder/999.jpg"]
