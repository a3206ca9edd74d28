"""What an entry says is what `cim evaluate` found."""

import json

import pytest

from cim_models.errors import ConfigError
from cim_models.evaluation.protocol import Report
from cim_models.hub.entry import Metric
from cim_models.hub.metrics import read_metrics

VAL = {"path": "val", "images": 5000, "sha256": "0"}
TRAIN = {**VAL, "path": "train", "classes": 200}


def knn(path, headline: float, model: str = "runs/a/online.safetensors", **described):
    """A report of the kNN protocol, saved as the command does."""
    result = {"metric": "top-1", "scores": {"20": headline}, "headline": headline, "chance": 0.005}
    model = {"model": model, **described}
    Report("knn-1", model, {"train": TRAIN, "val": {**VAL, "classes": 200}}, {}, result, "cim evaluate knn …").save(
        path
    )
    return path


def test_headlines_and_other_numbers(tmp_path):
    result = {"metric": "IoU", "scores": {}, "headline": 0.4, "chance": 0.3, "gap": 0.25, "loss": 0.3}
    model = {"model": "runs/a", "encoder": "both"}
    Report("correlation-1", model, {"images": VAL}, {}, result, "cim evaluate …").save(tmp_path / "correlation.json")
    online = knn(tmp_path / "knn.json", 0.06)
    assert read_metrics([online, tmp_path / "correlation.json"]) == (
        Metric("knn_top1.online", 0.06, "train, 5,000 images of 200 classes; val, 5,000 images of 200 classes",
               "cim evaluate knn …"),
        Metric("correlation_iou", 0.4, "val, 5,000 images", "cim evaluate …"),
        Metric("correlation_gap", 0.25, "val, 5,000 images", "cim evaluate …"),
        Metric("correlation_loss", 0.3, "val, 5,000 images", "cim evaluate …"),
    )  # fmt: skip


def test_whose_a_number_is(tmp_path):
    described = [
        {},
        {"random_init": True},
        {"model": "runs/a/target.safetensors"},
        {"model": "cim_vit_tiny"},
        {"model": "runs/a", "encoder": "online"},
        {"model": "cim_vit_tiny", "weights": "runs/a/target.safetensors"},
    ]
    paths = [knn(tmp_path / f"{i}.json", 0.1, **model) for i, model in enumerate(described)]
    names = [read_metrics([path])[0].name for path in paths]
    whose = [".online", ".random", ".target", "", ".online", ".target"]
    assert names == [f"knn_top1{end}" for end in whose]


def test_repetitions_become_a_mean(tmp_path):
    paths = [knn(tmp_path / f"{i}.json", headline, random_init=True) for i, headline in enumerate((0.02, 0.04))]
    (metric,) = read_metrics(paths)
    assert metric.value == pytest.approx(0.03) and metric.data.endswith("; mean of 2")


def test_other_data_are_no_repetition(tmp_path):
    paths = [knn(tmp_path / f"{i}.json", headline) for i, headline in enumerate((0.02, 0.04))]
    paths[1].write_text(paths[1].read_text().replace('"path": "val"', '"path": "other"'))
    assert [metric.value for metric in read_metrics(paths)] == [0.02, 0.04]


def test_a_list_of_metrics(tmp_path):
    listed = [{"name": "a", "value": 1.0, "data": "b", "command": "c"}]
    (tmp_path / "m.json").write_text(json.dumps(listed))
    assert read_metrics([tmp_path / "m.json"]) == (Metric("a", 1.0, "b", "c"),)


LISTED = {"name": "a", "value": 1.0, "data": "b", "command": "c"}


@pytest.mark.parametrize(
    "content",
    [
        3,
        [3],
        [{"name": "a"}],
        [LISTED | {"value": "1.0"}] * 2,
        [LISTED | {"name": ["a"]}],
        {"protocol": "knn-1"},
        {"protocol": 1, "result": {}},
    ],
)
def test_files_of_another_kind(tmp_path, content):
    (tmp_path / "m.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="m.json is neither a result of `cim evaluate` nor metrics"):
        read_metrics([tmp_path / "m.json"])
