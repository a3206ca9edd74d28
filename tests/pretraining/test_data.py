"""cim_models.pretraining.data: samples depend on (seed, epoch, index) alone, and nothing is lost in silence."""

import gc
import multiprocessing
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from cim_models.errors import ConfigError, DataError
from cim_models.images import find_images
from cim_models.pretraining.data import GlobalBatches, Pictures, Unreadable, generator, in_order, loader
from cim_models.pretraining.readers import Files, Subset

DRAWS = 7
# torch warns where there are more workers than cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten pictures of several sizes and modes, with awkward names."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels = rng.integers(0, 256, (20 + 3 * i, 50 - 2 * i, 3), dtype=np.uint8)
        mode, suffix = [("RGB", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("RGB", "jpg")][i % 4]
        Image.fromarray(pixels).convert(mode).save(root / f"café – 猫 {i}.{suffix}")
    return root


def pictures(folder, size=16, seed=5, **options) -> Pictures:
    return Pictures(Files(find_images(folder)), size, exemplars=3, draws=DRAWS, seed=seed, **options)


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a["failed"] == b["failed"] and a["index"].tolist() == b["index"].tolist()
        assert torch.equal(a["source"], b["source"]) and torch.equal(a["uniforms"], b["uniforms"])


def test_a_sample(folder):
    samples = pictures(folder)
    for index in range(len(samples)):
        sample = samples[0, index]
        assert sample["source"].shape == (3, 16, 16) and sample["source"].dtype == torch.uint8
        assert sample["uniforms"].shape == (3, DRAWS) and sample["uniforms"].dtype == torch.float32
        assert sample["index"] == index and sample["failed"] == []


def test_a_sample_depends_on_seed_epoch_and_index(folder):
    first = pictures(folder)
    assert torch.equal(first[3, 4]["source"], pictures(folder)[3, 4]["source"])
    uniforms = [first[0, 0], first[1, 0], first[0, 1], pictures(folder, seed=6)[0, 0]]
    assert len({tuple(sample["uniforms"].flatten().tolist()) for sample in uniforms}) == 4
    assert not torch.equal(first[0, 0]["source"], first[1, 0]["source"])


def test_streams_do_not_overlap():
    keys = [
        (seed, epoch, stream, index) for seed in (0, 1) for epoch in (0, 1) for stream in (0, 1) for index in (0, 1)
    ]
    numbers = np.concatenate([generator(*key).random(1000) for key in keys])
    assert len(np.unique(numbers)) == len(numbers)
    assert abs(numbers.mean() - 0.5) < 0.01


def test_uniforms_stay_below_one():
    numbers = generator(0, 0, 2).random(2_000_000, dtype=np.float32)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 1e-3


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_for_any_number_of_workers(folder, workers):
    batches = GlobalBatches(10, 4, seed=1, total_steps=5)
    here, there = loader(pictures(folder), batches, 0), loader(pictures(folder), batches, workers)
    assert_same(list(here), list(there))
    assert len(there) == 5


def test_two_processes_see_what_one_sees(folder):
    one = list(loader(pictures(folder), GlobalBatches(10, 4, seed=1, total_steps=5), 0))
    ranks = [
        list(loader(pictures(folder), GlobalBatches(10, 2, seed=1, rank=rank, processes=2, total_steps=5), 0))
        for rank in range(2)
    ]
    both = [
        {
            **{key: torch.cat([a[key], b[key]]) for key in ("source", "uniforms", "index")},
            "failed": a["failed"] + b["failed"],
        }
        for a, b in zip(*ranks, strict=True)
    ]
    assert_same(one, both)


def test_the_global_random_state_is_left_alone(folder):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader(pictures(folder), GlobalBatches(10, 5, seed=1, total_steps=2), 0))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_each_image_once_per_epoch():
    batches = GlobalBatches(12, 2, seed=0, processes=2, total_steps=9)
    assert batches.steps_per_epoch == 3
    steps = [
        [pair for rank in range(2) for pair in list(GlobalBatches(12, 2, 0, rank, 2, total_steps=9))[step]]
        for step in range(9)
    ]
    epochs = [sum(steps[3 * epoch : 3 * epoch + 3], []) for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(index for _, index in epoch) == list(range(12))
    assert len({tuple(index for _, index in epoch) for epoch in epochs}) == 3


def test_the_last_incomplete_batch_is_dropped():
    steps = list(GlobalBatches(11, 4, seed=0, total_steps=4))
    assert [len(step) for step in steps] == [4] * 4
    assert [step[0][0] for step in steps] == [0, 0, 1, 1]
    assert len({index for step in steps[:2] for _, index in step}) == 8


@pytest.mark.parametrize("start", [0, 1, 5, 6, 13, 20])
def test_resume_at_any_step(start):
    whole = list(GlobalBatches(25, 4, seed=3, total_steps=20))
    rest = GlobalBatches(25, 4, seed=3, start_step=start, total_steps=20)
    assert list(rest) == whole[start:] and len(rest) == 20 - start


def test_resume_of_a_long_run_is_immediate():
    batches = GlobalBatches(1000, 10, seed=0, start_step=10**9, total_steps=10**9 + 1)
    assert list(batches)[0][0][0] == 10**7


def test_too_few_images():
    with pytest.raises(
        ConfigError, match=r"7 images .* global batch of 8 \(4 per process × 2 processes\); give a small"
    ):
        GlobalBatches(7, 4, seed=0, processes=2, total_steps=1)


def crops(tmp_path, **options) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Area, ratio, relative position and flip of 800 crops of a picture whose red and green are x and y."""
    y, x = np.mgrid[:256, :256].astype(np.uint8)
    Image.fromarray(np.stack([x, y, x], -1)).save(tmp_path / "a.png")
    samples = Pictures(Files([tmp_path / "a.png"]), 32, exemplars=1, draws=1, seed=0, **options)
    sources = torch.stack([samples[epoch, 0]["source"] for epoch in range(800)]).double().numpy()
    across, down = sources[:, 0].mean(1), sources[:, 1].mean(2)
    width, height = (abs(edge[:, 27] - edge[:, 4]) * 32 / 23 for edge in (across, down))
    centre = (across[:, [15, 16]].mean(1) + 0.5 - width / 2) / np.maximum(256 - width, 1)
    return width * height / 256**2, width / height, centre, across[:, -1] < across[:, 0]


def test_crops_are_those_of_torchvision(tmp_path):
    area, ratio, position, flip = crops(tmp_path)
    torch.manual_seed(0)
    picture = torch.zeros(3, 256, 256)
    boxes = [RandomResizedCrop.get_params(picture, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    top, left, height, width = np.array(boxes, dtype=float).T
    for ours, theirs in ((area, width * height / 256**2), (np.log(ratio), np.log(width / height))):
        assert abs(ours.mean() - theirs.mean()) < 5 * theirs.std() / 800**0.5
        assert abs(ours.std() / theirs.std() - 1) < 0.1
        assert np.abs(np.quantile(ours, [0.1, 0.5, 0.9]) - np.quantile(theirs, [0.1, 0.5, 0.9])).max() < 0.05
    free = width < 250
    assert abs(position[area < 0.9].mean() - (left[free] / (256 - width[free])).mean()) < 0.06
    assert 0.43 < flip.mean() < 0.57


def test_fixed_crops(tmp_path):
    area, ratio, _, flip = crops(tmp_path, crop_area=(0.25, 0.25), crop_ratio=(1.0, 1.0), flip=0.0)
    assert np.allclose(area, 0.25, atol=0.01) and np.allclose(ratio, 1, atol=0.03)
    assert not flip.any()


@pytest.mark.parametrize("size", [(1, 1), (2000, 4), (4, 2000), (1, 300)])
def test_extreme_shapes_are_cropped(tmp_path, size):
    Image.new("RGB", size, (200, 30, 60)).save(tmp_path / "a.png")
    source = Pictures(Files([tmp_path / "a.png"]), 16, exemplars=1, draws=1, seed=0)[0, 0]["source"]
    assert (source == torch.tensor([200, 30, 60])[:, None, None]).all()


def test_large_photographs_decoded_smaller_look_the_same(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((1400, 1000)).save(tmp_path / "a.jpg")
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    both = [Pictures(Files([tmp_path / name]), 64, exemplars=1, draws=1, seed=0) for name in ("a.jpg", "a.png")]
    for epoch in range(5):
        shrunk, whole = (samples[epoch, 0]["source"].double() for samples in both)
        assert (shrunk - whole).abs().mean() < 4


@pytest.fixture
def damaged(folder, tmp_path):
    """The ten pictures in a list of their own, with a truncated and a missing one."""
    whole = find_images(folder)
    (tmp_path / "broken é.jpg").write_bytes(whole[3].read_bytes()[:300])
    lines = [*map(str, whole), "broken é.jpg", "missing.png"]
    (tmp_path / "list.txt").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "list.txt"


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_and_named(damaged, workers):
    samples = pictures(damaged)
    batches = list(loader(samples, GlobalBatches(12, 6, seed=0, total_steps=4), workers))
    assert [len(batch["source"]) for batch in batches] == [6] * 4
    failures = [set(sum((batch["failed"] for batch in batches[first : first + 2]), [])) for first in (0, 2)]
    assert failures[0] == failures[1] and len(failures[0]) == 2
    broken, missing = sorted(failures[0])
    assert broken.startswith(f"{damaged.parent / 'broken é.jpg'}: ") and "truncated" in broken.lower()
    assert missing == f"{damaged.parent / 'missing.png'}: No such file or directory"
    again = list(loader(pictures(damaged), GlobalBatches(12, 6, seed=0, total_steps=4), 0))
    assert_same(batches, again)


def test_replacements_vary(damaged):
    samples = pictures(damaged, flip=0.0, crop_area=(1.0, 1.0))
    means = {round(samples[epoch, 10]["source"].double().mean().item(), 3) for epoch in range(12)}
    assert len(means) > 3


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Cycles stay."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("workers", [0, 2])
def test_none_readable(tmp_path, workers, uncollected):
    """The readers end with the error, not with the cycle that its frames were, which any thread may collect."""
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    samples, batches = pictures(tmp_path), GlobalBatches(2, 1, seed=0, total_steps=1)
    for stream in (loader(samples, batches, workers), in_order(samples, workers)):
        with pytest.raises(DataError, match="^none readable of 2 images") as caught:
            list(stream)
        assert "Traceback" not in str(caught.value) and "empty file" in str(caught.value)
        assert not multiprocessing.active_children()


def test_what_readers_sent_can_be_kept(folder, few_files):
    samples = pictures(folder)
    samples.records = Subset(samples.records, np.arange(50) % 10)
    kept = list(in_order(samples, 1))
    assert [sample["index"] for sample in kept] == list(range(50))
    assert all(torch.equal(sample["source"], samples[0, i]["source"]) for i, sample in enumerate(kept))


def test_unreadable_collects_until_there_are_too_many():
    unreadable = Unreadable(images=300)
    assert unreadable.add([]) == []
    assert unreadable.add(["a.jpg: empty file", "b.jpg: truncated", "a.jpg: empty file"]) == [
        "a.jpg: empty file",
        "b.jpg: truncated",
    ]
    assert unreadable.add(["b.jpg: truncated", "c.jpg: empty file"]) == ["c.jpg: empty file"]
    assert len(unreadable) == 3
    with pytest.raises(DataError, match="4 of 300 images could not be read so far, more than 1%") as caught:
        unreadable.add(["d.jpg: empty file"])
    for failure in ("a.jpg: empty file", "b.jpg: truncated", "d.jpg"):
        assert failure in str(caught.value)


def test_one_unreadable_image_of_a_few_is_too_many():
    with pytest.raises(DataError, match="1 of 99"):
        Unreadable(images=99).add(["a.jpg: empty file"])
    assert Unreadable(images=100).add(["a.jpg: empty file"])
