"""Low-shot accuracy: each draw is the logistic regression of scikit-learn on the drawn images."""

import json
import logging
from statistics import mean

import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cim_models.errors import ConfigError, DataError
from cim_models.evaluation.encoders import open_encoder
from cim_models.evaluation.features import extract_all
from cim_models.evaluation.frozen import FrozenConfig
from cim_models.evaluation.lowshot import lowshot
from cim_models.evaluation.splits import draw_per_class, read_split


@pytest.fixture
def folders(splits):
    return splits / "train", splits / "val"


def test_each_draw_is_that_of_scikit_learn(splits, folders, run):
    lowshot(str(run), *folders, splits / "l.json", shares=(0.5,), shots=(2, 8), config=FrozenConfig(seed=3, workers=0))
    saved = json.loads((splits / "l.json").read_text())
    encoder, parts = open_encoder(str(run)), [read_split(folder) for folder in folders]
    (train, val) = (extract_all(encoder, part.paths, workers=0).features for part in parts)
    assert saved["protocol"] == "lowshot-1" and saved["result"]["images"] == {
        "50%": 8,
        "2 per class": 4,
        "8 per class": 16,
    }
    C = 2 * 10 / 192  # of two classes scikit-learn penalises one vector, the difference of our two
    for name, count in (("50%", 0.5), ("2 per class", 2), ("8 per class", 8)):
        expected = []
        for draw in range(5):
            rows = draw_per_class(parts[0].labels, count, 3000 + draw)
            model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=5000, tol=1e-8))
            model.fit(train[rows].numpy(), parts[0].labels[rows])
            expected.append(model.score(val.numpy(), parts[1].labels))
        assert saved["result"]["scores"][name] == pytest.approx(expected)


def test_the_headline_is_the_mean_for_one_per_cent(splits, folders, run, caplog):
    with caplog.at_level(logging.WARNING, "cim_models"):
        report = lowshot(str(run), *folders, splits / "l.json", shots=(1, 9), draws=2, config=FrozenConfig(workers=0))
    assert "a class has 8 images" in caplog.text and list(report.result["scores"]) == ["1%", "10%", "1 per class"]
    assert report.result["headline"] == mean(report.result["scores"]["1%"])
    assert report.protocol == "lowshot-1, draws=2" and " ± " in str(report)


def test_what_cannot_work_is_said(splits, folders, run):
    for options in ({"draws": 0}, {"shares": (0.0,)}, {"shares": (1.5,)}, {"shots": (0,)}):
        with pytest.raises(ConfigError, match="shares lie in"):
            lowshot(str(run), *folders, splits / "l.json", **options)
    with pytest.raises(DataError, match="train: a class has 8 images, too few"):
        lowshot(str(run), *folders, splits / "l.json", shares=(), shots=(9,), config=FrozenConfig(workers=0))
