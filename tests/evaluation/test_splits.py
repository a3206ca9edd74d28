"""Labelled images: what is measured can be named, and what is wrong with a folder or a file of labels is said."""

import shutil

import pytest
import torch

from cim_models.errors import DataError
from cim_models.evaluation.splits import check_same_classes, draw_per_class, hold_out, read_split
from cim_models.images import find_images


def test_class_folders(splits):
    found = read_split(splits / "train")
    assert found.classes == ["even", "odd"] and found.labels.tolist() == [0] * 8 + [1] * 8
    assert all(path.parts[-3] == found.classes[label] for path, label in zip(found.paths, found.labels, strict=True))
    few = read_split(splits / "train", limit_per_class=3)
    assert few.labels.tolist() == [0] * 3 + [1] * 3 and few.paths == found.paths[:3] + found.paths[8:11]


@pytest.mark.parametrize("separator", ["\t", ",", " , "])
def test_a_file_of_labels_is_the_same_split(splits, separator):
    found = read_split(splits / "train")
    lines = [
        f"{path.relative_to(splits)}{separator}{found.classes[label]}"
        for path, label in zip(found.paths, found.labels, strict=True)
    ]
    (splits / "train.txt").write_text("# path and class\n\n" + "\r\n".join(reversed(lines)))
    listed = read_split(splits / "train.txt")
    assert listed.classes == found.classes and listed.paths == found.paths[7::-1] + found.paths[:7:-1]
    assert torch.equal(listed.labels, found.labels)
    assert len(read_split(splits / "train.txt", limit_per_class=2).paths) == 4


def test_a_path_may_hold_a_comma(splits):
    source = find_images(splits / "train")
    shutil.copy(source[0], splits / "a, b.jpg")
    shutil.copy(source[8], splits / "c.jpg")
    (splits / "labels.csv").write_text("a, b.jpg,even\nc.jpg,odd\n")
    assert read_split(splits / "labels.csv").paths == [splits / "a, b.jpg", splits / "c.jpg"]


def test_the_fingerprint_follows_names_classes_and_sizes_not_the_place(splits):
    found = read_split(splits / "train").fingerprint()
    shutil.copytree(splits / "train", splits / "copy")
    copy = read_split(splits / "copy").fingerprint()
    assert {**copy, "path": found["path"]} == found and found["images"] == 16 and found["classes"] == 2
    some = find_images(splits / "copy")[0]
    some.write_bytes(some.read_bytes() + b" ")
    larger = read_split(splits / "copy").fingerprint()["sha256"]
    some.rename(some.with_name("renamed.jpg"))
    renamed = read_split(splits / "copy").fingerprint()["sha256"]
    assert len({found["sha256"], larger, renamed, read_split(splits / "train", 3).fingerprint()["sha256"]}) == 4
    digests = set()
    for second in ("odd", "other"):
        names = [path.relative_to(splits) for path in find_images(splits / "train")]
        (splits / "labels.txt").write_text(f"{names[0]},even\n{names[8]},{second}\n")
        digests.add(read_split(splits / "labels.txt").fingerprint()["sha256"])
    assert len(digests) == 2


def test_what_is_wrong_with_a_folder_is_said(splits):
    train = splits / "train"
    with pytest.raises(DataError, match="nowhere: no such folder"):
        read_split(splits / "nowhere")
    with pytest.raises(DataError, match="jpg: an image, not labelled ones"):
        read_split(find_images(train)[0])
    with pytest.raises(DataError, match="even: 1 class; accuracy needs at least two"):
        read_split(train / "even")
    with pytest.raises(DataError, match="train: limit_per_class=0"):
        read_split(train, 0)
    (train / "empty").mkdir()
    with pytest.raises(DataError, match="empty: this class folder holds no image"):
        read_split(train)
    with pytest.raises(DataError, match="empty: no images in this folder"):
        read_split(train / "empty")
    (train / "empty").rmdir()
    shutil.copy(find_images(train)[0], train / "stray.jpg")
    with pytest.raises(DataError, match="stray.jpg: this image is in no class folder"):
        read_split(train)
    (train / "stray.jpg").unlink()
    (train / "odd").rename(train / "strange")
    with pytest.raises(DataError, match="train has classes that .*val has not: strange"):
        check_same_classes(read_split(train), read_split(splits / "val"))
    shutil.copytree(splits / "val" / "odd", train / "odd")
    shutil.copytree(train / "strange", splits / "val" / "strange")
    shutil.copytree(train / "strange", splits / "val" / "unseen")
    with pytest.raises(DataError, match="val has classes that .*train has not: unseen"):
        check_same_classes(read_split(train), read_split(splits / "val"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a},even\nno/such.jpg,odd\n", "labels.txt, line 2: there is no image .*no/such.jpg"),
        ("path,class\n{a},even\n", "labels.txt, line 1: there is no image .*path"),
        ("{a},even\n{a},odd\n", "labels.txt, line 2: .*listed before, as 'even'"),
        ("{a}\n", "labels.txt, line 1: .* is not `path<TAB>class`"),
        ("{a},\n", "labels.txt, line 1: .* is not `path<TAB>class`"),
        ("{a},even\n", "labels.txt: 1 class; accuracy needs at least two"),
        ("# nothing\n", "labels.txt: this file lists no image"),
        ("{a}\0even", "labels.txt: neither a text file of paths nor"),
    ],
)
def test_what_is_wrong_with_a_file_of_labels_is_said(splits, text, message):
    name = find_images(splits / "train")[0].relative_to(splits)
    (splits / "labels.txt").write_text(text.format(a=name))
    with pytest.raises(DataError, match=message):
        read_split(splits / "labels.txt")


LABELS = torch.tensor([2] * 30 + [0] * 11 + [1] * 1)


def test_draws_are_of_every_class_and_of_the_seed():
    for count, expected in ((5, [5, 1, 5]), (0.1, [1, 1, 3]), (0.5, [6, 1, 15]), (1.0, [11, 1, 30])):
        drawn = draw_per_class(LABELS, count, seed=0)
        assert LABELS[drawn].bincount(minlength=3).tolist() == expected
        assert len(drawn.unique()) == len(drawn) and torch.equal(drawn, draw_per_class(LABELS, count, seed=0))
    assert not torch.equal(draw_per_class(LABELS, 5, seed=0), draw_per_class(LABELS, 5, seed=1))


def test_what_is_held_out_is_a_tenth_of_every_class():
    kept, held = hold_out(LABELS, 0.1, seed=3)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(len(LABELS)))
    assert LABELS[held].bincount(minlength=3).tolist() == [1, 0, 3]
    kept, held = hold_out(LABELS, 0)
    assert kept.tolist() == list(range(len(LABELS))) and not len(held)
    with pytest.raises(DataError, match="at least two per class"):
        hold_out(torch.arange(4))
