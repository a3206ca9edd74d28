"""The numbers of the log: what is known without an image, and what the model adds."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import binary_jaccard_index

from cim_models import backbones
from cim_models.pretext import views as views_module
from cim_models.pretext.colour import ColourConfig
from cim_models.pretext.exemplars import ExemplarConfig
from cim_models.pretext.measures import Prior, agreement, iou, location_prior
from cim_models.pretext.model import CIM, PretextConfig
from cim_models.pretext.views import ViewConfig, make_views
from cim_models.pretraining import diagnostics
from cim_models.pretraining.diagnostics import HeldOut, diagnose, hold_out, in_words, rankme
from cim_models.pretraining.loop import pictures_of, pretrain
from cim_models.pretraining.readers import Subset, open_records


def random_maps(draws: int, side: int, area, ratio, angle) -> np.ndarray:
    """(draws, side, side) bool maps by the words of the method, one by one: drawn again until the rectangle fits."""
    rng = np.random.default_rng(7)
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    maps = []
    while len(maps) < draws:
        a, r = rng.uniform(*area), np.exp(rng.uniform(*np.log(ratio)))
        t = np.deg2rad(rng.uniform(*angle))
        w, h, c, s = np.sqrt(a * r), np.sqrt(a / r), np.cos(t), np.sin(t)
        box = np.array([w * abs(c) + h * abs(s), w * abs(s) + h * abs(c)])
        if (box <= 1).all():
            cx, cy = box / 2 + (1 - box) * rng.random(2)
            u, v = (x - cx) * c + (y - cy) * s, (y - cy) * c - (x - cx) * s
            maps.append((abs(u) <= w / 2) & (abs(v) <= h / 2))
    return np.array(maps)


def entropy(p: np.ndarray) -> float:
    inside = p[(p > 0) & (p < 1)]
    return float(-(inside * np.log(inside) + (1 - inside) * np.log(1 - inside)).sum() / p.size)


@pytest.mark.parametrize(
    ("area", "ratio", "angle"),
    [
        pytest.param((0.05, 0.48), (1 / 3, 3.0), (-45.0, 45.0), id="released"),
        pytest.param((0.25, 0.25), (1.0, 1.0), (0.0, 0.0), id="fixed"),
        pytest.param((0.02, 0.2), (0.5, 2.0), (0.0, 90.0), id="small"),
    ],
)
def test_location_prior_is_the_entropy_of_the_mean_map(area, ratio, angle):
    maps = random_maps(4000, 32, area, ratio, angle)
    mean = maps.mean(axis=0)
    config = ViewConfig(32, ExemplarConfig(area=area, ratio=ratio, angle=angle))
    prior = location_prior(config, 64)
    assert prior.loss == pytest.approx(entropy(mean), abs=0.005)
    assert prior.constant_loss == pytest.approx(entropy(mean.mean(keepdims=True)), abs=0.005)
    assert prior.log_odds == pytest.approx(np.log(mean.mean() / (1 - mean.mean())), abs=0.03)
    best, n = mean > 0.5, len(maps)
    overlap = [(m & best).sum() / max(1, (m | best).sum()) for m in maps]
    assert prior.iou == pytest.approx(np.mean(overlap), abs=5 * np.std(overlap) / n**0.5 + 0.01)
    assert prior == location_prior(config, 64)


def test_location_prior_needs_no_larger_maps():
    small, large = (location_prior(ViewConfig(side), 64, draws=2000).loss for side in (32, 64))
    assert small == pytest.approx(large, abs=0.005)


def test_iou_is_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    predicted, maps = (torch.rand(5, 3, 20, 20, generator=generator) < share for share in (0.7, 0.4))
    pairs = zip(predicted.flatten(0, 1), maps.flatten(0, 1), strict=True)
    each = [binary_jaccard_index(p.int(), m.int()) for p, m in pairs]
    assert iou(predicted, maps).item() == pytest.approx(torch.stack(each).mean().item(), abs=1e-6)
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    assert iou(nothing, nothing) == 1 and iou(nothing, ~nothing) == 0


def some_views(images: int = 6, side: int = 32):
    generator = torch.Generator().manual_seed(1)
    config = ViewConfig(side, ExemplarConfig(count=2, size=16), ColourConfig.off())
    source = torch.rand(images, 3, side, side, generator=generator)
    return make_views(source, torch.rand(images, 2, views_module.DRAWS, generator=generator), config)


def test_a_model_that_knows_the_maps_has_a_gap():
    """Exemplar tokens that hold their own map, and a head that reads it off."""
    views = some_views()

    def knows(context, tokens, size):
        return 6 * tokens.unflatten(-1, (size, size)).squeeze(2)

    tokens = (2.0 * views.maps - 1).flatten(2).unsqueeze(2)
    numbers = agreement(knows, None, tokens, knows(None, tokens, 32), views.maps)
    assert numbers["iou"] == 1
    maps = views.maps.numpy()
    rolled = np.concatenate([maps[-1:], maps[:-1]])
    overlap = (maps & rolled).sum((2, 3)) / (maps | rolled).sum((2, 3))
    assert numbers["iou_shuffled"].item() == pytest.approx(overlap.mean(), abs=1e-6)
    differ = (maps != rolled).mean()
    assert numbers["gap"].item() == pytest.approx(6 * differ, rel=1e-4) and differ > 0.2


def small(**options) -> CIM:
    torch.manual_seed(0)
    backbone = backbones.build("cim_vit_tiny", embed_dim=24, depth=2, num_heads=2, img_size=32)
    return CIM(backbone, PretextConfig(head_width=16, head_heads=2, **options))


def test_an_untrained_model_has_no_gap():
    cim, views = small(), some_views()
    cim.head.start_from(-1.0)
    output = cim(*views)
    numbers = diagnose(cim, output, views)
    assert abs(numbers["gap"].item()) < 1e-6
    assert numbers["iou"] == numbers["iou_shuffled"] == 0
    assert set(numbers) == {"gap", "iou", "iou_shuffled", "cosine", "deviation"}


def test_the_gap_is_of_the_exemplars_of_the_next_image():
    cim, views = small(), some_views()
    torch.nn.init.normal_(cim.head.predict.weight)
    output = cim(*views)
    gap = diagnose(cim, output, views)["gap"]
    shuffled = cim(views.context, views.exemplars.roll(1, dims=0), views.maps).loss
    assert gap.item() == pytest.approx((shuffled - output.loss).item(), abs=1e-6) and abs(gap) > 1e-5


def test_cosine_and_deviation():
    cim, views = small(), some_views()
    same = diagnose(cim, cim(*views), views)
    assert same["cosine"].item() == pytest.approx(1, abs=1e-5)
    features = cim.encode_context(views.context).patches.mean(1).numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    assert same["deviation"].item() == pytest.approx(features.std(0, ddof=1).mean() * 24**0.5, rel=1e-4)
    with torch.no_grad():
        for parameter in cim.target.blocks.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    other = diagnose(cim, cim(*views), views)
    online, target = (encoder.forward_features(views.context)[:, 1:] for encoder in (cim.online, cim.target))
    assert other["cosine"].item() == pytest.approx(F.cosine_similarity(online, target, dim=-1).mean().item(), abs=1e-4)
    assert other["cosine"] < 0.9


def test_collapse_shows():
    cim, views = small(), some_views()
    with torch.no_grad():
        cim.target.patch_embed.proj.weight.zero_()
    assert diagnose(cim, cim(*views), views)["deviation"].item() < 1e-4


def test_both_parts_of_two_losses():
    cim, views = small(global_weight=0.5, global_hidden=8), some_views()
    output = cim(*views)
    numbers = diagnose(cim, output, views)
    total = numbers["correlation_loss"] + 0.5 * numbers["global_loss"]
    assert total.item() == pytest.approx(output.loss.item()) and numbers["global_loss"] > 0.1


def test_diagnosis_changes_nothing():
    torch.manual_seed(0)
    cim = CIM(backbones.build("cim_resnet18"), PretextConfig(head_width=16, head_heads=2))
    views = some_views(images=2)
    output = cim(*views)
    before, random = copy.deepcopy(cim.state_dict()), torch.get_rng_state()
    diagnose(cim, output, views)
    after = cim.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(module.training for module in cim.modules()) and torch.equal(random, torch.get_rng_state())


def test_rankme_is_the_number_of_directions():
    directions = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    for rank in (1, 3, 16):
        assert rankme(directions[:rank].repeat(4, 1)).item() == pytest.approx(rank, rel=1e-3)
    singular = np.linalg.svd(directions.numpy() * np.arange(16)[:, None], compute_uv=False)
    shares = singular / singular.sum()
    expected = np.exp(-(shares[shares > 1e-6] * np.log(shares[shares > 1e-6])).sum())
    assert rankme(directions * torch.arange(16)[:, None]).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("images", "count"), [(100_000, 512), (10_240, 512), (1000, 50), (160, 8), (159, 0), (3, 0)])
def test_what_is_held_out(images, count):
    trained, held = hold_out(images, 512, seed=1)
    assert len(held) == count and sorted([*trained, *held]) == list(range(images))
    assert all((np.diff(part) > 0).all() for part in (trained, held))
    assert np.array_equal(held, hold_out(images, 512, seed=1)[1])
    assert count == 0 or not np.array_equal(held, hold_out(images, 512, seed=2)[1])
    assert len(hold_out(images, 0, seed=1)[1]) == len(hold_out(images, 7, seed=1)[1]) == 0


GOOD = {"loss": 0.33, "gap": 0.2, "deviation": 0.5, "rankme": 40.0, "cosine": 0.9}


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({}, []),
        ({"gap": 0.003}, ["predicts the average map: the exemplars are ignored"]),
        ({"loss": 0.41, "gap": 0.003}, ["predicts the average map"]),
        ({"loss": 0.41}, ["reads the exemplars, but is no better than the location prior yet"]),
        ({"loss": 0.6}, ["worse than the location prior"]),
        ({"deviation": 0.001}, ["features collapse"]),
        ({"rankme": 1.0, "cosine": 0.0}, ["features collapse", "online and target encoder have little in common"]),
    ],
)
def test_numbers_in_words(numbers, words):
    said = in_words(GOOD | numbers, prior_loss=0.4)
    assert len(said) == len(words) and all(text.startswith(word) for text, word in zip(said, words, strict=True))


def held_out(configure, folder, **options) -> HeldOut:
    config = configure(folder, "run", views__exemplars__size=16, data__size=32, views__context_size=32)
    return HeldOut(
        pictures_of(config, open_records(folder)), config, Prior(0.4, 0, 0, 0), torch.device("cpu"), **options
    )


def test_held_out_numbers_are_those_of_the_whole_set(configure, photographs, monkeypatch):
    """In several chunks, against one forward pass over all of the images."""
    cim = small().eval()
    torch.nn.init.normal_(cim.head.predict.weight)
    diagnosis = held_out(configure, photographs(10, 32))
    monkeypatch.setattr(diagnostics, "CHUNK", 4)
    record = diagnosis(cim, 7)
    batch = [diagnosis.pictures[0, index] for index in range(10)]
    views = make_views(*(torch.stack([x[n] for x in batch]) for n in ("source", "uniforms")), diagnosis.config.views)
    with torch.no_grad():
        output = cim(*views)
    assert record["held_out_images"] == 10 and record["held_out_prior_loss"] == 0.4
    assert record["held_out_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    numbers = diagnose(cim, output, views)
    for name in ("iou", "cosine", "deviation"):
        assert record[f"held_out_{name}"] == pytest.approx(numbers[name].item(), rel=1e-4), name
    assert 1 <= record["held_out_rankme"] <= 10
    assert record == diagnosis(cim, 7)


def test_a_diagnosis_changes_nothing(configure, photographs):
    torch.manual_seed(0)
    cim = CIM(backbones.build("cim_resnet18"), PretextConfig(head_width=16, head_heads=2, global_weight=1.0))
    cim.head.eval()
    before, random = copy.deepcopy(cim.state_dict()), torch.get_rng_state()
    held_out(configure, photographs(10, 32))(cim, 1)
    after = cim.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert cim.online.training and not cim.head.training and torch.equal(random, torch.get_rng_state())


def test_warnings_are_said_once_and_not_in_the_warm_up(configure, photographs, caplog):
    cim = small()
    cim.head.start_from(-1.0)
    diagnosis = held_out(configure, photographs(10, 32), quiet=5)
    records = [diagnosis(cim, done) for done in (4, 5, 6)]
    assert ["warnings" in record for record in records] == [False, True, True]
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("step 5: ") and message.removeprefix("step 5: ") in records[1]["warnings"]


def test_held_out_images_that_cannot_be_read(configure, photographs, tmp_path, caplog):
    for path in photographs(10, 32).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "0003.jpg").write_text("not an image")
    assert held_out(configure, tmp_path)(small(), 1)["held_out_images"] == 9
    assert "held out, but skipped: " + str(tmp_path / "0003.jpg") in caplog.text


def test_a_probe_measures_what_it_likes(configure, photographs):
    seen = []
    diagnosis = held_out(configure, photographs(10, 32), probe=lambda cim: seen.append(cim.training) or {"knn": 0.5})
    assert diagnosis(small(), 1)["knn"] == 0.5 and seen == [False]
    diagnosis.pictures = Subset(diagnosis.pictures.records, np.array([], int))
    assert diagnosis.due(diagnosis.config.diagnostics.every, 10**6) and diagnosis(small(), 3) == {"knn": 0.5}


def test_a_run_is_diagnosed(configure, photographs, out):
    """The held-out images are trained on by none of its steps, and the log has the numbers of the others."""
    config = configure(
        photographs(200, 64), out, diagnostics__held_out=20, diagnostics__every=2, optimiser__batch_size=10,
        optimiser__epochs=3 / 19, optimiser__warmup_epochs=0.0,
    )  # fmt: skip
    probed = []
    pretrain(config, probe=lambda cim: probed.append(type(cim).__name__) or {"probe": len(probed)})
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = [line for line in lines if "held_out_loss" in line]
    assert [line["step"] for line in found] == [2, 3] and [line["probe"] for line in found] == [1, 2]
    assert probed == ["CIM", "CIM"]
    assert all(line["held_out_images"] == 10 and line["held_out_loss"] < 1 for line in found)
    assert [line["epoch"] for line in lines if "loss" in line] == pytest.approx([1 / 19, 2 / 19, 3 / 19], abs=1e-4)
