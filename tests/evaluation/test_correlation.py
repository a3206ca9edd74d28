"""Held-out correlation: loss and overlap as scikit-learn computes them from the model's own probabilities."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.metrics import jaccard_score, log_loss

from cim_models import create_pretext
from cim_models.errors import ConfigError, DataError, WeightsError
from cim_models.evaluation.correlation import EXEMPLARS, central, correlation
from cim_models.evaluation.locate import square
from cim_models.images import find_images, read_image
from cim_models.pretext import views
from cim_models.pretext.exemplars import ExemplarConfig
from cim_models.pretext.views import ViewConfig, make_views


def independent(run, folder, side: int, batches: list[list[int]]) -> dict[str, float]:
    """What scikit-learn says of `locate` on the same exemplars."""
    pretext, paths = create_pretext(run).eval(), find_images(folder)
    uniforms = torch.rand(len(paths), EXEMPLARS, views.DRAWS, generator=torch.Generator().manual_seed(0))
    sources = torch.stack([square(central(read_image(path)), side) for path in paths])
    cut = make_views(sources, uniforms, ViewConfig(64, ExemplarConfig(EXEMPLARS, 32)))
    found: dict[str, list[float]] = {"loss": [], "shuffled": [], "iou": [], "iou_shuffled": []}
    for batch in batches:
        for name, order in (("", batch), ("_shuffled", batch[-1:] + batch[:-1])):
            heat = pretext.locate(cut.context[batch], cut.exemplars[order]).double().numpy()
            maps = cut.maps[batch].numpy()
            found["shuffled" if name else "loss"] += [
                log_loss(true.ravel(), p.ravel()) for p, true in zip(heat, maps, strict=True)
            ]
            pairs = zip(heat.reshape(-1, 64 * 64) > 0.5, maps.reshape(-1, 64 * 64), strict=True)
            found[f"iou{name}"] += [jaccard_score(true, p, zero_division=1) for p, true in pairs]
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    return {**mean, "gap": mean["shuffled"] - mean["loss"]}


@pytest.fixture
def unsure(run, tmp_path):
    """The run with a head that is not too certain: probabilities of 0 and 1 have no logarithm."""
    folder = shutil.copytree(run, tmp_path / "unsure")
    with safe_open(folder / "head.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    tensors["predict.weight"] *= 0.1
    save_file(tensors, folder / "head.safetensors", metadata)
    return folder


def test_it_agrees_with_scikit_learn(tmp_path, unsure, photographs):
    folder = photographs(5, 70)
    report = correlation(str(unsure), str(folder), str(tmp_path / "c.json"), source_size=96, batch_size=2)
    expected = independent(unsure, folder, 96, [[0, 1], [2, 3, 4]])  # nobody is left alone
    found = {**report.result, "iou": report.result["scores"]["exemplars"]}
    for name in ("loss", "gap", "iou", "iou_shuffled"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5), name
    assert report.result["iou_prior"] > 0 and report.result["prior_loss"] < np.log(2)
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["result"] == report.result and written["protocol"] == "correlation-1"
    assert written["data"]["images"]["images"] == 5
    assert "gap" in str(report)


def test_one_encoder_for_both_sides(tmp_path, run, photographs):
    results = {
        encoder: correlation(str(run), photographs(4, 70), tmp_path / "c.json", encoder=encoder).result["loss"]
        for encoder in ("both", "online", "target")
    }
    assert len(set(results.values())) == 3


def test_what_cannot_be_is_said(tmp_path, run, photographs):
    with pytest.raises(DataError, match="at least two"):
        correlation(str(run), photographs(4, 70), tmp_path / "c.json", limit=1)
    with pytest.raises(ConfigError, match="batch_size=1"):
        correlation(str(run), photographs(4, 70), tmp_path / "c.json", batch_size=1)
    for wrong in ({"limit": 0}, {"limit": -1}, {"source_size": 0}, {"source_size": -5}):
        with pytest.raises(ConfigError, match=f"{[*wrong][0]}={[*wrong.values()][0]}.*must be 1 or more"):
            correlation(str(run), photographs(4, 70), tmp_path / "c.json", **wrong)
    with pytest.raises(WeightsError, match="no correlation head"):
        correlation(str(run / "online.safetensors"), photographs(4, 70), tmp_path / "c.json")
