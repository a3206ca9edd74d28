"""Class folders and reports: what is measured can be named, and what is wrong with a folder is said."""

import json
import shutil

import pytest

from cim_models import __version__
from cim_models.errors import ConfigError, DataError
from cim_models.evaluation.knn import evaluate_knn
from cim_models.evaluation.protocol import check_same_classes, class_folders
from cim_models.images import find_images


@pytest.fixture
def splits(tmp_path, photographs):
    """Two classes, the photographs with even and odd numbers: `train` has 8 + 8 files and `val` 3 + 3."""
    paths = find_images(photographs(22, 80))
    for split, start, stop in (("train", 0, 8), ("val", 8, 11)):
        for label, name in enumerate(("even", "odd")):
            folder = tmp_path / split / name / "deep"
            folder.mkdir(parents=True)
            for path in paths[label::2][start:stop]:
                shutil.copy(path, folder)
    return tmp_path


def test_class_folders(splits):
    found = class_folders(splits / "train")
    assert found.classes == ["even", "odd"] and found.labels.tolist() == [0] * 8 + [1] * 8
    assert all(path.parts[-3] == found.classes[label] for path, label in zip(found.paths, found.labels, strict=True))
    few = class_folders(splits / "train", limit_per_class=3)
    assert few.labels.tolist() == [0] * 3 + [1] * 3 and few.paths == found.paths[:3] + found.paths[8:11]


def test_the_fingerprint_follows_names_and_sizes_not_the_place(splits):
    found = class_folders(splits / "train").fingerprint()
    shutil.copytree(splits / "train", splits / "copy")
    copy = class_folders(splits / "copy").fingerprint()
    assert {**copy, "path": found["path"]} == found and found["images"] == 16 and found["classes"] == 2
    some = find_images(splits / "copy")[0]
    some.write_bytes(some.read_bytes() + b" ")
    larger = class_folders(splits / "copy").fingerprint()["sha256"]
    some.rename(some.with_name("renamed.jpg"))
    renamed = class_folders(splits / "copy").fingerprint()["sha256"]
    assert len({found["sha256"], larger, renamed, class_folders(splits / "train", 3).fingerprint()["sha256"]}) == 4


def test_what_is_wrong_with_a_folder_is_said(splits):
    train = splits / "train"
    with pytest.raises(DataError, match="nowhere: no such folder"):
        class_folders(splits / "nowhere")
    with pytest.raises(DataError, match="one class|at least two"):
        class_folders(train / "even")
    (train / "empty").mkdir()
    with pytest.raises(DataError, match="empty: this class folder holds no image"):
        class_folders(train)
    (train / "empty").rmdir()
    shutil.copy(find_images(train)[0], train / "stray.jpg")
    with pytest.raises(DataError, match="stray.jpg: this image is in no class folder"):
        class_folders(train)
    (train / "stray.jpg").unlink()
    (train / "odd").rename(train / "strange")
    with pytest.raises(DataError, match="train has class folders that .*val has not: strange"):
        check_same_classes(class_folders(train), class_folders(splits / "val"))
    shutil.copytree(splits / "val" / "odd", train / "odd")
    shutil.copytree(train / "strange", splits / "val" / "strange")
    shutil.copytree(train / "strange", splits / "val" / "unseen")
    with pytest.raises(DataError, match="val has class folders that .*train has not: unseen"):
        check_same_classes(class_folders(train), class_folders(splits / "val"))


def test_a_report_says_how_it_was_made(splits, run):
    (splits / "train" / "odd" / "broken.jpg").write_text("no picture")
    out = splits / "results" / "knn.json"
    report = evaluate_knn(str(run), splits / "train", splits / "val", out, ks=(1, 5, 20), workers=0)
    saved = json.loads(out.read_text())
    assert saved["protocol"] == "knn-1" and saved["model"]["model"] == str(run) and not saved["model"]["random_init"]
    assert saved["versions"]["cim_models"] == __version__ and {"torch", "timm", "python"} < set(saved["versions"])
    assert saved["data"]["train"]["images"] == 17 and saved["data"]["val"]["unreadable"] == []
    assert saved["data"]["train"]["unreadable"][0].startswith(str(splits / "train" / "odd" / "broken.jpg"))
    assert saved["model"]["transform"]["input_size"] == [3, 64, 64] and "pytest" in saved["command"]
    assert list(saved["result"]["top1"]) == ["1", "5"] and saved["result"]["chance"] == 0.5
    assert saved["result"]["headline"] is None and saved["settings"]["temperature"] == 0.07
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == ["k", "1", "5"]
    assert lines[1].split()[1] == f"{saved['result']['top1']['1']:.2%}" and len({len(line) for line in lines}) == 1


def test_the_same_folder_twice_is_known_by_heart(splits, run):
    report = evaluate_knn(str(run), splits / "train", splits / "train", splits / "k.json", ks=(1,), workers=0)
    assert report.result["top1"]["1"] == 1.0
    options = dict(ks=(2,), limit_per_class=1, random_init=True, workers=0)
    random = evaluate_knn(str(run), splits / "train", splits / "val", splits / "r.json", **options)
    assert random.model["random_init"] and random.model["weights_sha256"] != report.model["weights_sha256"]
    assert random.data["val"]["images"] == 2


def test_settings_that_cannot_work(splits, run):
    folders = splits / "train", splits / "val"
    with pytest.raises(ConfigError, match="dense"):
        evaluate_knn(str(run), *folders, splits / "k.json", pooling="dense")
    with pytest.raises(DataError, match="16 images are too few for k=20"):
        evaluate_knn(str(run), *folders, splits / "k.json", ks=(20, 50), workers=0)
    assert not (splits / "k.json").exists()
