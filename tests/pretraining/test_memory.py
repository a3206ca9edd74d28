"""cim_models.pretraining.memory: what is measured against what is known to be held, and what `auto` makes of it."""

import json
import logging
import platform

import pytest
import torch
import yaml

from cim_models.errors import CheckpointError, ConfigError
from cim_models.pretraining import memory
from cim_models.pretraining.config import load_recipe
from cim_models.pretraining.loop import pretrain
from cim_models.pretraining.memory import Meter, free_memory, in_words, largest_batch, search

CPU = torch.device("cpu")
MB = 1_000_000
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def hold(megabytes: int, device: str = "cpu") -> None:
    """Takes so much memory for a moment, in blocks that a system takes back at once."""
    for _ in range(3):
        torch.ones(megabytes * MB, dtype=torch.uint8, device=device)


def test_free_memory_is_the_containers(monkeypatch, tmp_path):
    machine = free_memory()
    assert 0 < machine < 2**50
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    inside = memory.Path
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path / inside(name).name)
    assert free_memory() == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 3000


@pytest.mark.parametrize("device", DEVICES)
def test_the_meter_sees_the_peak(device):
    kept = torch.ones(100 * MB, dtype=torch.uint8, device=device)
    meter = Meter(torch.device(device))
    meter.start()
    hold(400, device)
    peak = meter.stop(coming=50 * MB)
    assert peak - meter.before == pytest.approx(400 * MB, rel=0.1)
    assert meter.before > len(kept) + 50 * MB
    held = meter.peak
    hold(600, device)
    meter.close()
    assert meter.peak == held
    words = in_words(meter, 4)
    assert words.startswith(f"peak memory {peak / 1e9:.3g} GB of ")
    assert float(words.split(", ")[1].removesuffix(" MB an image")) == pytest.approx(100, rel=0.1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs an allocator that can be told to give back")
def test_the_meter_sees_memory_that_was_held_before():
    """As by an earlier run in this process, in blocks that the allocator keeps for later."""

    def blocks() -> list[bytearray]:
        return [bytearray(100_000) for _ in range(2000)]

    earlier, last = blocks(), bytearray(100_000)
    del earlier
    meter = Meter(CPU)
    meter.start()
    for _ in range(3):
        blocks()
    assert meter.stop() - meter.before == pytest.approx(200 * MB, rel=0.1)
    assert last


@pytest.mark.parametrize("limit", [2, 3, 7, 8, 9, 100, 128, 1000, 12345])
@pytest.mark.parametrize("most", [2, 3, 50, 128, 5000])
def test_the_search(limit, most):
    tried = []
    found = search(lambda number: tried.append(number) or number <= limit, most)
    best = min(limit, most)
    assert best / 1.125 - 1 <= found <= best
    assert max(tried, default=2) <= min(2 * best, most) and len(tried) < 20


def test_the_largest_batch_of_a_cpu_leaves_a_tenth(monkeypatch):
    def room_for(size: int) -> int:
        """Free memory of which a step may take so much, whatever this process holds already."""
        meter = Meter(CPU)
        meter.start()  # which gives back what nothing uses any more
        meter.close()
        return round((size + meter.before) / 0.9 - meter.before)

    def found(size: int, most: int = 1000, **kwargs: int) -> int:
        monkeypatch.setattr(memory, "room", lambda device: kwargs.get("sharing", 1) * room_for(size))
        return largest_batch(lambda images: hold(10 * images), most, CPU, **kwargs)

    whole = found(600 * MB)
    assert 45 <= whole <= 63
    assert found(600 * MB, taken=300 * MB) <= whole - 20
    assert 45 <= found(600 * MB, sharing=2) <= 63
    assert found(600 * MB, most=5) == 5
    monkeypatch.setattr(memory, "room", lambda device: 1)
    with pytest.raises(ConfigError, match="batch_size is auto, but not even 2 images fit"):
        largest_batch(lambda images: hold(10 * images), 1000, CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_largest_batch_of_a_gpu_leaves_a_tenth():
    free = memory.room(torch.device("cuda"))
    found = largest_batch(lambda images: hold(images * (free // 100 // MB), "cuda"), 1000, torch.device("cuda"))
    assert 75 <= found <= 90


def test_auto_is_a_number_that_the_run_keeps(out, photographs, configure, caplog, monkeypatch):
    images = photographs(12, 64)
    config = configure(images, out / "auto", optimiser__batch_size="auto", optimiser__epochs=2.0, save_every=1, keep=2)
    config.optimiser.accumulation = 2
    with caplog.at_level(logging.INFO, "cim_models"):
        pretrain(config)
    assert config.optimiser.batch_size == "auto"
    said = [record.message for record in caplog.records]
    assert "optimiser.batch_size: auto is 6" in said
    assert [text for text in said if text.startswith("peak memory ") and text.endswith(" MB an image")]
    assert load_recipe(out / "auto" / "config.yaml").optimiser.batch_size == 6
    lines = [json.loads(line) for line in (out / "auto" / "log.jsonl").read_text().splitlines()]
    assert [line["images_seen"] for line in lines] == [12, 24]
    assert all(100 * MB < line["peak_memory"] < free_memory() for line in lines)

    given = configure(images, out / "given", optimiser__batch_size=6, optimiser__epochs=2.0)
    given.optimiser.accumulation = 2
    pretrain(given)
    states = [torch.load(out / name / "last.pt", weights_only=True)["model"] for name in ("auto", "given")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())

    (out / "auto" / "step-00000001.pt").rename(out / "auto" / "last.pt")
    settings = yaml.safe_load((out / "auto" / "config.yaml").read_text())
    (out / "auto" / "config.yaml").unlink()
    config.resume = True
    with pytest.raises(CheckpointError, match="there is no .*config.yaml, which says what auto stands for"):
        pretrain(config)
    (out / "auto" / "config.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(memory, "room", lambda device: 1)
    pretrain(config)
    again = torch.load(out / "auto" / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in again.items())
