"""cim_models.evaluation.probe: the accuracies that `cim evaluate knn` measures of the same encoders."""

import copy

import pytest
import torch

from cim_models import backbones
from cim_models.errors import DataError
from cim_models.evaluation.frozen import FrozenConfig
from cim_models.evaluation.knn import knn
from cim_models.evaluation.probe import knn_probe
from cim_models.hub.load import create_pretext
from cim_models.pretext.model import CIM, PretextConfig


def test_the_numbers_are_those_of_knn(run, splits, tmp_path):
    cim = create_pretext("cim_vit_tiny", weights=run)
    before = copy.deepcopy(cim.state_dict())
    cim.eval()
    with torch.autocast("cpu", torch.bfloat16):  # as a run measures
        numbers = knn_probe(splits / "train", splits / "val", k=5, workers=0)(cim)
    assert numbers.keys() == {"knn_online", "knn_target"}
    for name in ("online", "target"):
        file = str(run / f"{name}.safetensors")
        config = FrozenConfig(workers=0)
        report = knn(file, splits / "train", splits / "val", tmp_path / "knn.json", ks=(5,), config=config)
        assert numbers[f"knn_{name}"] == report.result["scores"]["k=5"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in cim.state_dict().items())


def test_one_encoder_and_other_sizes(splits):
    torch.manual_seed(0)
    backbone = backbones.build("cim_vit_tiny", depth=1, img_size=64)
    cim = CIM(backbone, PretextConfig(head="cosine", moving_average=False))
    probe = knn_probe(splits / "train", splits / "val", k=3, image_size=32, limit_per_class=2, workers=0)
    numbers = probe(cim)
    assert numbers.keys() == {"knn_online"} and 0 <= numbers["knn_online"] <= 1


def test_splits_are_checked_before_a_run_begins(splits):
    with pytest.raises(DataError, match="16 images are too few for k=20; give a smaller k"):
        knn_probe(splits / "train", splits / "val")
    with pytest.raises(DataError, match="no such folder"):
        knn_probe(splits / "train", splits / "nowhere", k=2)
