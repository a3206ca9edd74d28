"""cim_models.pretraining.cache: the same batches as without it, nearly so from squares; nothing that does not fit."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cim_models.errors import ConfigError, DataError
from cim_models.images import find_images, read_image
from cim_models.pretraining import cache
from cim_models.pretraining.cache import OnDevice, SharedMemory, check_room
from cim_models.pretraining.data import GlobalBatches, Pictures, batch_of, loader
from cim_models.pretraining.loop import pretrain
from cim_models.pretraining.readers import Files
from cim_models.pretraining.shared import shared_memory
from cim_models.processes import Processes

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
CPU = torch.device("cpu")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Pictures of several sizes and modes, one turned by its EXIF block, one large JPEG, and one that is none."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(7):
        pixels = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((60 + 9 * i, 50))
        pixels.convert(["RGB", "L", "CMYK"][i % 3]).save(root / f"{i}.jpg")
    turned = Image.new("RGB", (40, 80), "red").getexif()
    turned[0x0112] = 6
    Image.open(root / "0.jpg").save(root / "7.jpg", exif=turned)
    Image.open(root / "0.jpg").resize((900, 700)).save(root / "8.jpg")
    (root / "9.jpg").write_text("not an image")
    return root


def pictures(images) -> Pictures:
    return Pictures(Files(find_images(images)), 32, exemplars=2, draws=3, seed=4)


def batches_of(samples: Pictures, workers: int = 0) -> list[dict]:
    batches = list(loader(samples, GlobalBatches(10, 5, seed=0, total_steps=6), workers))
    return [{**batch, "source": samples.sources(batch, CPU)} for batch in batches]


@needs_fork
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_gives_the_same_batches(images, workers, tmp_path):
    images = Path(shutil.copytree(images, tmp_path / "images"))
    expected, samples = batches_of(pictures(images)), pictures(images)
    SharedMemory.of(samples, workers)
    for _ in range(2):
        for ours, theirs in zip(batches_of(samples, workers), expected, strict=True):
            assert ours["failed"] == theirs["failed"] and torch.equal(ours["index"], theirs["index"])
            assert torch.equal(ours["source"], theirs["source"]) and torch.equal(ours["uniforms"], theirs["uniforms"])
        # By whichever process, all that can be read was read, and is not read again.
        assert samples.cache.shapes[:9].all() and not samples.cache.shapes[9].any()
        for number in range(9):
            (images / f"{number}.jpg").unlink(missing_ok=True)


TWO = """
import hashlib, os, sys
from pathlib import Path
import torch
from cim_models.images import find_images
from cim_models.pretraining.cache import SharedMemory
from cim_models.pretraining.data import GlobalBatches, Pictures, loader
from cim_models.pretraining.readers import Files
from cim_models.processes import launched

processes = launched()
assert processes.count == 2
images = find_images(sys.argv[1])
samples = Pictures(Files(images), 32, exemplars=2, draws=3, seed=4)
SharedMemory.of(samples, 1, processes)
order = GlobalBatches(10, 5, seed=0, total_steps=4)


def read():
    batches = list(loader(samples, order, 1))
    return hashlib.sha256(b"".join(batch["source"].numpy().tobytes() for batch in batches)).hexdigest()


if processes.first:
    digest = read()
    for path in images[:-1]:
        path.unlink()
processes.gather_for_all("all is read, and the files are gone")
if not processes.first:
    digest = read()
digests = processes.gather(digest)
if processes.first:
    print(*digests)
"""


@needs_fork
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memory that processes find each other's")
def test_processes_of_a_machine_share_the_memory(images, launch, tmp_path):
    """The second one reads no file: what the readers of the first have decoded is there."""
    images = Path(shutil.copytree(images, tmp_path / "images"))
    batches = list(loader(pictures(images), GlobalBatches(10, 5, seed=0, total_steps=4), 0))
    expected = hashlib.sha256(b"".join(batch["source"].numpy().tobytes() for batch in batches)).hexdigest()
    done = launch(TWO, images)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [expected, expected]


@needs_fork
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memory that processes find each other's")
def test_shared_memory_is_gone_with_its_last_user():
    class Pair(Processes):
        def gather_for_all(self, item):
            return [item, item]

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    memory, lock = shared_memory(1000, Pair(count=2))
    with lock:
        memory[:3] = b"abc"
    assert descriptors() > before
    del memory, lock
    assert descriptors() == before


def test_processes_that_cannot_share_need_room_for_each(images, monkeypatch):
    samples = pictures(images)
    total = int(SharedMemory(samples.records, samples.min_size).ends[-1])
    monkeypatch.setattr(cache, "free_memory", lambda: int(1.5 * total))
    monkeypatch.setattr(cache, "machine", lambda: "")
    with pytest.raises(ConfigError, match="data.cache is ram"):
        SharedMemory.of(samples, 0, Processes(count=2))
    SharedMemory.of(samples, 0)


@needs_fork
def test_the_size_is_predicted(images):
    samples = pictures(images)
    memory = SharedMemory(samples.records, samples.min_size)
    sizes = [read_image(path, samples.min_size).size for path in find_images(images)[:9]]
    assert memory.ends[-1] == sum(3 * width * height for width, height in sizes)
    assert 3 * 900 * 700 > memory.ends[9] - memory.ends[8] > 0  # decoded at a fraction of its size


def test_what_does_not_fit_is_refused(images, monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda: 50_000)
    with pytest.raises(ConfigError, match="data.cache is ram: 10 decoded pictures take .* GB, and 5e-05 GB are free"):
        SharedMemory.of(pictures(images), 0)
    monkeypatch.setattr(cache, "room", lambda device: 50_000)
    with pytest.raises(ConfigError, match="data.cache is device: 10 pictures of 64 × 64 take 0.000123 GB"):
        OnDevice(pictures(images), 64, 0, CPU)
    check_room(900, 1000, "what fits")
    with pytest.raises(ConfigError, match="give data.cache none, or fewer images"):
        check_room(901, 1000, "what does not")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_device_crops_as_the_reader_does(images, workers):
    """The same crops and flips, in the same order; pixels nearly so, as they come from squares."""
    expected, samples = batches_of(pictures(images)), OnDevice(pictures(images), 64, workers, CPU)
    assert samples.squares.shape == (10, 3, 64, 64)
    for ours, theirs in zip(batches_of(samples, workers), expected, strict=True):
        assert ours["failed"] == theirs["failed"] and torch.equal(ours["index"], theirs["index"])
        assert torch.equal(ours["uniforms"], theirs["uniforms"])
        assert ours["source"].dtype == torch.uint8 and ours["source"].shape == theirs["source"].shape
        difference = (ours["source"].double() - theirs["source"].double()).abs().mean((1, 2, 3))
        contrast = theirs["source"].double().flatten(1).std(1)
        assert (difference < 0.12 * contrast).all(), difference / contrast


def test_crops_from_squares_are_where_they_should_be(tmp_path):
    """A picture whose red and green are x and y, three times as wide as high."""
    y, x = np.mgrid[:80, :240].astype(np.uint8)
    Image.fromarray(np.stack([x, y, x], -1)).save(tmp_path / "a.png")
    whole = Pictures(Files([tmp_path / "a.png"]), 32, (0.2, 0.3), exemplars=1, draws=1, seed=0)
    squares = OnDevice(whole, 96, 0, CPU)
    whole = Pictures(Files([tmp_path / "a.png"]), 32, (0.2, 0.3), exemplars=1, draws=1, seed=0)
    batches = GlobalBatches(1, 1, seed=0, total_steps=20)
    for step in range(20):
        ours, theirs = (batch_of(samples, batches, step)["source"].double() for samples in (squares, whole))
        assert (ours - theirs)[..., 2:-2, 2:-2].abs().max() <= 3


def test_readers_of_the_device_cache_take_no_pixels_along(images):
    samples = OnDevice(pictures(images), 64, 0, CPU)
    copy = pickle.loads(pickle.dumps(samples))
    assert copy.squares.numel() == 0
    assert torch.equal(copy[1, 3]["uniforms"], samples[1, 3]["uniforms"])
    with pytest.raises(DataError, match="9.jpg: not an image"):
        copy.decode(9)


@pytest.mark.parametrize("kind", ["ram", "device"])
def test_a_run_with_a_cache(configure, photographs, out, tmp_path, kind):
    numbers = {}
    for name in ("none", kind):
        config = configure(photographs(8, 64), out / name, data__cache=name, data__cache_side=96, optimiser__epochs=1)
        pretrain(config)
        lines = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
        numbers[name] = [line[field] for line in lines for field in ("loss", "grad_norm")]
    assert numbers[kind] == (numbers["none"] if kind == "ram" else pytest.approx(numbers["none"], abs=0.1))
    config.resume, config.data.cache = True, "none"
    if kind == "ram":
        pretrain(config)
