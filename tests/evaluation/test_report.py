"""Results become tables and plots: every number is one of the files, every row has its command."""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cim_models.errors import ConfigError, DataError
from cim_models.evaluation.curves import Curve, draw_curves
from cim_models.evaluation.frozen import FrozenConfig
from cim_models.evaluation.knn import knn
from cim_models.evaluation.protocol import Report
from cim_models.evaluation.report import report

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks"


def result(seed=0, scores=None, model=None, settings=None, history=None, headline=0.5, **fields):
    """A report with little in it."""
    found = {"metric": "top-1", "scores": scores or {"last": 0.5}, "headline": headline, "chance": 0.1}
    return Report(
        protocol=fields.pop("protocol", "finetune-1"),
        model={"model": "m", "random_init": False, "weights_sha256": "a" * 64, "architecture": "arch"} | (model or {}),
        data={name: {"path": name, "images": 1000, "classes": 10, "sha256": name * 4} for name in ("train", "val")},
        settings={"lr": 1.0, "seed": seed} | (settings or {}),
        result=found | ({"history": history} if history else {}),
        command=fields.pop("command", f"cim evaluate finetune m --seed {seed}"),
        **fields,
    )


def table(markdown):
    """Rows of the only table: heading → cell."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    heading, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    return [dict(zip(heading, row, strict=True)) for row in rows]


def test_repetitions_are_a_mean_and_a_deviation(tmp_path):
    shares = {0: [0.1, 0.31], 1: [0.4, 0.2], 2: [0.35, 0.25]}
    for seed, values in shares.items():
        result(seed, {"last": values[0], "draws": values}).save(tmp_path / f"{9 - seed}.json")
    (row,) = table(report((tmp_path,)).markdown)
    flat = np.array(list(shares.values())) * 100
    assert row["last"] == f"{flat[:, 0].mean():.2f} ± {flat[:, 0].std(ddof=1):.2f}"
    assert row["draws"] == f"{flat.mean():.2f} ± {flat.std(ddof=1):.2f}"
    assert row["seeds"] == "0, 1, 2" and row["command"] == "`cim evaluate finetune m --seed 0`"


def test_other_numbers_and_images_without_classes(tmp_path):
    for seed in range(2):
        found = result(seed, protocol="correlation-1")
        found.data = {"images": {"path": "pictures", "images": 1234, "sha256": "cd" * 32}}
        found.result |= {"loss": 0.25 + seed / 10, "chance": None, "steps": 3}
        found.save(tmp_path / f"{seed}.json")
    markdown = report((tmp_path,)).markdown
    (row,) = table(markdown)
    assert row["loss"] == "0.3 ± 0.0707" and "steps" not in row
    assert "- images: `pictures`, 1,234 images, sha256 `cdcdcdcd`\n- measured: top-1\n" in markdown


def test_a_path_of_any_bytes_is_written_as_it_is(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    result(command=f"cim evaluate finetune m {name}").save(tmp_path / "a.json")
    report((tmp_path,), tmp_path / "report.md")
    assert b"`cim evaluate finetune m caf\xe9`" in (tmp_path / "report.md").read_bytes()


def test_random_weights_are_repetitions_other_weights_are_not(tmp_path):
    for seed in range(2):
        random = {"random_init": True, "weights_sha256": str(seed) * 64, "seed": seed}
        result(seed, {"last": seed / 2}, random).save(tmp_path / f"r{seed}.json")
        result(seed, {"last": seed / 2}, {"weights_sha256": str(seed) * 64}).save(tmp_path / f"p{seed}.json")
    rows = table(report((tmp_path,)).markdown)
    assert [row["model"] for row in rows] == ["m", "m", "m, random weights"]
    assert [row["last"] for row in rows] == ["0.00", "50.00", "25.00 ± 35.36"]
    assert rows[2]["weights sha256"] == "00000000, 11111111"


def test_settings_in_which_rows_differ_are_columns(tmp_path):
    for lr in (1.0, 2.0):
        result(settings={"lr": lr, "kept": 3}, command=f"cim x | {lr}").save(tmp_path / f"{lr}.json")
    markdown = report((tmp_path,)).markdown
    rows = table(markdown)
    assert [row["lr"] for row in rows] == ["1.0", "2.0"] and not any("kept" in row for row in rows)
    assert "\n- settings: kept=3\n" in markdown
    assert rows[0]["command"] == "`cim x \\| 1.0`"


def test_what_pretraining_took_is_a_column(tmp_path):
    result(model={"images_seen": 124928, "minutes": 22.5}).save(tmp_path / "a.json")
    result(model={"random_init": True}).save(tmp_path / "b.json")
    weights, random = table(report((tmp_path,)).markdown)
    assert (weights["images seen"], weights["minutes"]) == ("124,928", "22.5")
    assert (random["images seen"], random["minutes"]) == ("", "")


def test_pretraining_below_a_twentieth_of_a_minute_took_something_all_the_same(tmp_path):
    result(model={"images_seen": 240, "minutes": 0.0}).save(tmp_path / "a.json")
    (short,) = table(report((tmp_path,)).markdown)
    assert (short["images seen"], short["minutes"]) == ("240", "0.0")


def test_what_may_not_be_compared_has_its_own_table(tmp_path):
    result(protocol="knn-1").save(tmp_path / "deep" / "a.json")
    result(protocol="knn-2").save(tmp_path / "b.json")
    other = result(protocol="knn-1")
    other.data["val"]["sha256"] = "other"
    other.save(tmp_path / "c.json")
    (tmp_path / "config.json").write_text('{"no": "report"}')
    markdown = report((tmp_path,)).markdown
    assert re.findall("^## (.*)", markdown, re.M) == ["Overview", "knn-1", "knn-1", "knn-2", "Made with"]
    assert "- val: `val`, 1,000 images of 10 classes, sha256 `other`" in markdown
    assert "- measured: top-1; guessing reaches 10.00" in markdown


def test_the_overview_has_what_stands_for_all_of_each_table(tmp_path):
    """Random weights first, then by images seen; what several tables measured of one model is one row."""
    trained = {"model": "long", "images_seen": 900, "minutes": 2.5}
    measured = {
        "knn": [({"k=10": 0.2, "k=20": 0.3}, 0.3, {"model": "short", "images_seen": 20}, {}),
                ({"k=10": 0.5, "k=20": 0.6}, 0.6, trained, {}), ({"k=10": 0.1, "k=20": 0.2}, 0.2, trained, {"pool": 1}),
                ({"k=5": 0.1}, None, {"model": "few"}, {})],
        "tuned": [({"top-1": 0.7, "top-5": 0.9}, 0.7, trained, {}),
                  ({"top-1": 0.4, "top-5": 0.5}, 0.4, {"random_init": True}, {"from_scratch": True}),
                  ({"top-1": 0.8}, 0.8, {"model": "theirs"}, {})],
    }  # fmt: skip
    for protocol, rows in measured.items():
        for number, (scores, headline, model, settings) in enumerate(rows):
            made = result(0, scores, model, settings, headline=headline, protocol=protocol)
            made.save(tmp_path / f"{protocol}{number}.json")
    markdown = report((tmp_path,)).markdown
    assert table(markdown.partition("## Overview")[2].partition("\n## ")[0]) == [
        {"model": name, "images seen": seen, "minutes": minutes, "knn: k=20, val": knn, "tuned: top-1, val": tuned}
        for name, seen, minutes, knn, tuned in [
            ("m, from scratch", "", "", "", "40.00"),
            ("short", "20", "", "30.00", ""),
            ("long", "900", "2.5", "60.00 / 20.00", "70.00"),
            ("theirs", "", "", "", "80.00"),
        ]
    ]
    for path in tmp_path.glob("knn*"):
        path.unlink()
    assert "## Overview" not in report((tmp_path,)).markdown


def test_a_score_that_equals_the_headline_once_does_not_stand_for_all(tmp_path):
    for name, scores in (("a", {"k=10": 0.2, "k=20": 0.2}), ("b", {"k=10": 0.5, "k=20": 0.6})):
        for protocol in ("knn-1", "knn-2"):
            found = result(scores=scores, headline=scores["k=20"], model={"model": name}, protocol=protocol)
            found.save(tmp_path / f"{name}{protocol}.json")
    overview = report((tmp_path,)).markdown.partition("## Overview")[2].partition("\n## ")[0]
    assert [row["knn-1: k=20, val"] for row in table(overview)] == ["20.00", "60.00"]


def test_the_document_does_not_depend_on_names_of_files(tmp_path):
    for folder, names in (("a", "xyz"), ("b", "zxy")):
        for name, seed in zip(names, range(3), strict=True):
            result(seed, model={"model": f"m{seed % 2}"}).save(tmp_path / folder / f"{name}.json")
    assert report((tmp_path / "a",)).markdown == report((tmp_path / "b",)).markdown


def test_other_numbers_of_neighbours_are_another_row(tmp_path):
    for seed in range(2):
        result(seed, {"k=10": 0.5, "k=20": 0.4 + seed / 10}, command="all").save(tmp_path / f"a{seed}.json")
        result(seed, {"k=5": 0.3}, headline=None, command="few").save(tmp_path / f"b{seed}.json")
    first, second = table(report((tmp_path,)).markdown)
    assert (first["command"], first["k=20"], first["k=5"], first["seeds"]) == ("`all`", "45.00 ± 7.07", "", "0, 1")
    assert (second["command"], second["k=20"], second["k=5"]) == ("`few`", "", "30.00 ± 0.00")


def test_small_numbers_are_not_printed_as_none():
    found = result()
    found.result["penalty"] = 1e-6
    assert str(found).splitlines()[-1].split() == ["penalty", "1e-06"]


def test_the_same_measurement_twice(tmp_path):
    result(scores={"last": 0.5}).save(tmp_path / "a.json")
    result(scores={"last": 0.5}).save(tmp_path / "b.json")
    assert table(report((tmp_path,)).markdown)[0]["last"] == "50.00"
    result(scores={"last": 0.6}).save(tmp_path / "b.json")
    with pytest.raises(DataError, match="a.json and .*b.json are the same measurement with different scores"):
        report((tmp_path,))


def test_plots(tmp_path):
    for seed in range(2):
        history = [{"epoch": e, "images_seen": 100 * e, "score": 0.1 * e + seed / 10} for e in range(1, 4)]
        result(seed, history=history).save(tmp_path / f"f{seed}.json")
    for seen in (100, 200):
        pretrained = {"images_seen": seen, "epoch": seen / 100, "model": f"run{seen}"}
        result(model=pretrained, protocol="knn-1").save(tmp_path / f"k{seen}.json")
    random = {"random_init": True, "weights_sha256": "x"}
    result(model=random, protocol="knn-1", headline=0.1).save(tmp_path / "r.json")
    out = tmp_path / "docs" / "results.md"
    made = report((tmp_path,), out, plots=tmp_path / "docs" / "results")
    names = [path.name for path in made.plots]
    assert made.out == out and str(made).splitlines() == list(map(str, [out, *made.plots]))
    assert [re.sub("_[a-z]+_", "_", name, count=1) for name in names] == [
        "finetune-1_history_epoch.png", "finetune-1_history_images_seen.png",
        "knn-1_pretraining_epoch.png", "knn-1_pretraining_images_seen.png",
    ]  # fmt: skip
    for path in made.plots:
        assert f"](results/{path.name})" in out.read_text()
        assert len(np.unique(np.asarray(Image.open(path).convert("L")))) > 20
    first = {path: path.read_bytes() for path in [out, *made.plots]}
    report((tmp_path,), out, plots=tmp_path / "docs" / "results")
    assert all(path.read_bytes() == content for path, content in first.items())


def test_a_line_of_pretraining_is_one_model_from_its_random_weights_on(tmp_path, monkeypatch):
    drawn = {}
    module = sys.modules[report.__module__]
    monkeypatch.setattr(module, "draw_curves", lambda curves, path, *_: drawn.update({path: curves}))
    for name, seen, share in (("ours", 50, 0.3), ("ours", 100, 0.4), ("theirs", 100, 0.2)):
        cost = {"model": name, "architecture": "vit", "images_seen": seen, "minutes": seen / 10}
        result(model=cost, headline=share).save(tmp_path / f"{name}{seen}.json")
    for seed, architecture, share in ((0, "vit", 0.1), (1, "vit", 0.12), (0, "resnet", 0.6)):
        random = {"random_init": True, "model": architecture, "architecture": architecture, "weights_sha256": str(seed)}
        result(seed, model=random, headline=share).save(tmp_path / f"r{architecture}{seed}.json")
    report((tmp_path,), plots=tmp_path / "plots")
    assert sorted(path.stem.rpartition("pretraining_")[2] for path in drawn) == ["images_seen", "minutes"]
    by_minutes = next(curves for path, curves in drawn.items() if path.stem.endswith("minutes"))
    assert {curve.name: curve.points for curve in by_minutes} == {
        "ours": {0: [0.1, 0.12], 5.0: [0.3], 10.0: [0.4]}, "theirs": {0: [0.1, 0.12], 10.0: [0.2]},
    }  # fmt: skip


def test_more_lines_than_there_are_colours(tmp_path, monkeypatch):
    """None looks like another, and the names of all lie beside what is drawn."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: drawn.append(figure) or file.write_bytes(b""))
    draw_curves([Curve(f"run {n}", {0: [0.1], 1: [n / 30]}) for n in range(25)], tmp_path / "a.png", "t", "x", "y")
    (figure,) = drawn
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 25
    assert [text.get_text() for text in legend.texts] == [f"run {n}" for n in range(25)]
    assert not legend.get_window_extent().overlaps(axes.get_window_extent()) and axes.get_window_extent().height > 300


def test_a_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="matplotlib: pip install"):
        draw_curves([Curve("a", {0: [0.1], 1: [0.2]})], tmp_path / "a.png", "t", "x", "y")


def test_paths_may_be_strings(tmp_path):
    for epoch in (1, 2):
        result(model={"epoch": epoch}).save(tmp_path / f"{epoch}.json")
    made = report((str(tmp_path),), str(tmp_path / "r.md"), plots=str(tmp_path))
    assert made.markdown == report((tmp_path,), tmp_path / "r.md", plots=tmp_path).markdown and made.plots[0].is_file()


def test_what_is_no_result_is_said(tmp_path):
    with pytest.raises(DataError, match="no result of `cim evaluate` there"):
        report((tmp_path,))
    result().save(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    with pytest.raises(DataError, match="nowhere.json: cannot be read"):
        report((tmp_path / "nowhere.json",))
    broken = [
        {**content, "surplus": 1},
        {key: value for key, value in content.items() if key != "versions"},
        {**content, "result": {"metric": "top-1"}},
        {**content, "result": {"metric": "top-1", "scores": {}}},
        {**content, "result": {"metric": "top-1", "scores": {"a": "high"}}},
        {**content, "result": {"metric": "top-1", "scores": {"a": float("nan")}}},
    ]
    for value in broken:
        (tmp_path / "a.json").write_text(json.dumps(value))
        with pytest.raises(DataError, match="a.json: not a"):
            report((tmp_path,))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match="a.json: damaged"):
        report((tmp_path,))


def test_a_measured_result_is_read_as_it_was(splits, run):
    made = knn(str(run), splits / "train", splits / "val", splits / "k.json", ks=(1,), config=FrozenConfig(workers=0))
    read = Report.load(splits / "k.json")
    assert json.dumps(dataclasses.asdict(read)) == json.dumps(dataclasses.asdict(made))
    (row,) = table(report((splits / "k.json",)).markdown)
    assert row["k=1"] == str(made).splitlines()[1].split()[1] and row["input"] == "64 × 64"
    assert row["command"] == f"`{made.command}`"


def test_the_results_of_the_repository_are_those_of_its_files(tmp_path):
    made = report((RESULTS,), tmp_path / "results.md", plots=tmp_path / "results")
    assert made.markdown == (ROOT / "docs" / "results.md").read_text()
    for path in made.plots:
        assert (ROOT / "docs" / "results" / path.name).is_file()
