"""Reports: how a number came about is written beside it, and the command that it names repeats it."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from cim_models import __version__, cli
from cim_models.errors import ConfigError, DataError
from cim_models.evaluation.frozen import FrozenConfig
from cim_models.evaluation.knn import knn
from cim_models.evaluation.protocol import commit, percent, variant

HERE = FrozenConfig(workers=0)


def test_a_report_says_how_it_was_made(splits, run):
    (splits / "train" / "odd" / "broken.jpg").write_text("no picture")
    out = splits / "results" / "knn.json"
    report = knn(str(run), splits / "train", splits / "val", out, ks=(1, 5, 20), config=HERE)
    saved = json.loads(out.read_text())
    assert saved["protocol"] == "knn-1" and saved["model"]["model"] == str(run) and not saved["model"]["random_init"]
    assert saved["versions"]["cim_models"] == __version__ and {"torch", "timm", "python"} < set(saved["versions"])
    assert saved["data"]["train"]["images"] == 17 and saved["data"]["val"]["unreadable"] == []
    assert saved["data"]["train"]["unreadable"][0].startswith(str(splits / "train" / "odd" / "broken.jpg"))
    assert saved["model"]["transform"]["input_size"] == [3, 64, 64]
    assert list(saved["result"]["scores"]) == ["k=1", "k=5"] and saved["result"]["chance"] == 0.5
    assert saved["result"]["headline"] is None and saved["settings"]["temperature"] == 0.07
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == ["top-1", "k=1", "k=5", "chance"]
    assert lines[1].split()[1] == f"{100 * saved['result']['scores']['k=1']:.2f}"
    assert len({len(line) for line in lines}) == 1


def test_the_command_of_a_report_repeats_it(splits, run, capsys):
    out = splits / "k n n.json"
    folders = splits / "train", splits / "val"
    config = FrozenConfig(pooling="both", workers=0)
    knn(str(run), *folders, out, ks=(1, 3), limit_per_class=4, random_init=True, config=config)
    first = json.loads(out.read_text())
    out.unlink()
    assert cli.main(shlex.split(first["command"])[1:]) == 0 and "k=3" in capsys.readouterr().out
    assert json.loads(out.read_text()) == first


def test_the_commit_is_that_of_the_checkout():
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("needs a git checkout")
    assert commit() in (git.stdout.strip(), f"{git.stdout.strip()}-dirty")


def test_a_variant_is_not_the_protocol():
    frozen = {"epochs": 100, "lr": (1, 2)}
    assert variant("linear-1", frozen, {"epochs": 100, "lr": (1, 2), "other": 3}) == "linear-1"
    assert variant("linear-1", frozen, {"epochs": 5, "lr": (1, 2)}) == "linear-1, epochs=5"


def test_per_cent():
    assert percent(0.12345) == "12.35" and percent([0.1, 0.2, 0.3]) == "20.00 ± 10.00" and percent([0.5]) == "50.00"


def test_the_same_folder_twice_is_known_by_heart(splits, run):
    report = knn(str(run), splits / "train", splits / "train", splits / "k.json", ks=(1,), config=HERE)
    assert report.result["scores"]["k=1"] == 1.0
    options = dict(ks=(2,), limit_per_class=1, random_init=True, config=HERE)
    random = knn(str(run), splits / "train", splits / "val", splits / "r.json", temperature=0.1, **options)
    assert random.model["random_init"] and random.model["weights_sha256"] != report.model["weights_sha256"]
    assert random.data["val"]["images"] == 2 and random.protocol == "knn-1, temperature=0.1"


def test_settings_that_cannot_work(splits, run):
    folders = splits / "train", splits / "val"
    with pytest.raises(ConfigError, match="dense"):
        knn(str(run), *folders, splits / "k.json", config=FrozenConfig(pooling="dense"))
    with pytest.raises(DataError, match="16 images are too few for k=20"):
        knn(str(run), *folders, splits / "k.json", ks=(20, 50), config=HERE)
    assert not (splits / "k.json").exists()
