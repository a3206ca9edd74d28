"""Linear probe: its setting is chosen on training images alone, and its numbers are those of scikit-learn."""

import json
import shutil

import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cim_models.errors import ConfigError, DataError
from cim_models.evaluation.encoders import open_encoder
from cim_models.evaluation.features import extract_all
from cim_models.evaluation.frozen import FrozenConfig
from cim_models.evaluation.linear import LRS, PENALTIES, linear
from cim_models.evaluation.splits import read_split

HERE = FrozenConfig(workers=0)


@pytest.fixture
def folders(splits):
    return splits / "train", splits / "val"


def test_the_report_of_sgd(splits, folders, run):
    report = linear(str(run), *folders, splits / "l.json", config=FrozenConfig(workers=0, cache=splits / "cache"))
    saved = json.loads((splits / "l.json").read_text())
    assert saved["protocol"] == "linear-1" and list(saved["result"]["scores"]) == ["top-1"]
    assert saved["result"]["headline"] == saved["result"]["scores"]["top-1"] >= 0.5
    assert saved["settings"]["lrs"] == list(LRS) and saved["result"]["lr"] in LRS
    tried = saved["result"]["held_out_top1"]
    assert len(tried) == len(LRS) and tried[f"{saved['result']['lr']:g}"] == max(tried.values())
    assert str(report).splitlines()[1].startswith("top-1")
    again = linear(str(run), *folders, splits / "l.json", config=HERE)
    assert again.result == report.result
    other = linear(str(run), *folders, splits / "l.json", config=HERE, epochs=2, lrs=(0.1, 0.01))
    assert other.protocol == "linear-1, epochs=2, lrs=(0.01, 0.1)" and other.result["lr"] in (0.01, 0.1)


def test_quick_is_the_logistic_regression_of_scikit_learn(splits, folders, run):
    report = linear(str(run), *folders, splits / "q.json", quick=True, config=HERE)
    assert report.protocol == "linear-lbfgs-1" and report.result["penalty"] in PENALTIES
    encoder, parts = open_encoder(str(run)), [read_split(folder) for folder in folders]
    (train, val) = (extract_all(encoder, part.paths, workers=0).features.numpy() for part in parts)
    # Of two classes scikit-learn penalises one vector, the difference of our two.
    C = 2 / (report.result["penalty"] * len(train))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=5000, tol=1e-8)).fit(
        train, parts[0].labels
    )
    assert report.result["scores"]["top-1"] == pytest.approx(model.score(val, parts[1].labels))


def test_the_images_to_classify_have_no_say_in_the_choice(splits, folders, run):
    first = linear(str(run), *folders, splits / "a.json", config=HERE).result
    (splits / "val" / "odd").rename(splits / "val" / "other")
    (splits / "val" / "even").rename(splits / "val" / "odd")
    (splits / "val" / "other").rename(splits / "val" / "even")
    second = linear(str(run), *folders, splits / "b.json", config=HERE).result
    assert second["held_out_top1"] == first["held_out_top1"] and second["lr"] == first["lr"]
    assert second["headline"] == pytest.approx(1 - first["headline"])


def test_what_cannot_work_is_said(splits, folders, run):
    with pytest.raises(ConfigError, match="epochs=0"):
        linear(str(run), *folders, splits / "l.json", epochs=0)
    for lrs in ((), (0.1, 0.0), (float("nan"),), (0.1, float("inf"))):
        with pytest.raises(ConfigError, match="learning rates above 0"):
            linear(str(run), *folders, splits / "l.json", lrs=lrs)
    with pytest.raises(ConfigError, match="has diverged with the best of them"):
        linear(str(run), *folders, splits / "l.json", lrs=(1e38, 3e38), config=HERE)
    with pytest.raises(ConfigError, match="of SGD, quick is not"):
        linear(str(run), *folders, splits / "l.json", epochs=3, quick=True)
    with pytest.raises(DataError, match="train: each class has one training image"):
        linear(str(run), *folders, splits / "l.json", limit_per_class=1, config=HERE)
    shutil.rmtree(splits / "val" / "odd")
    with pytest.raises(DataError, match="val: 1 class"):
        linear(str(run), *folders, splits / "l.json")
    for path in (splits / "val" / "even").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError, match="val: no images in this folder"):
        linear(str(run), *folders, splits / "l.json")
    assert not (splits / "l.json").exists()
