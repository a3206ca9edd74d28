"""cim_models.pretraining.curves: the numbers of the logs are where they should be, and colours are those of runs."""

import json

import numpy as np
import pytest
from PIL import Image

from cim_models.errors import CheckpointError, ConfigError
from cim_models.pretraining.curves import curve, plot_runs, read_log


def run(folder, rate: float = 1.0, **fields):
    """A run directory with a log of ten lines, two diagnoses and an image that was skipped."""
    folder.mkdir(parents=True)
    records = [{"step": 3, "skipped": "a.jpg: empty file", "unreadable": 1}]
    for step in range(10, 110, 10):
        records.append({"step": step, "images_seen": 32 * step, "loss": rate / step, "gap": 0.1, "prior_loss": 0.4})
        if step % 50 == 0:
            records.append({"step": step, "held_out_loss": 0.3, "held_out_rankme": 7.0, "warnings": ["a", "b"]})
    (folder / "log.jsonl").write_text("".join(json.dumps(record | fields) + "\n" for record in records))
    return folder


def test_curves_are_over_images_seen(tmp_path):
    records = read_log(run(tmp_path / "a"))
    x, y = curve(records, "loss")
    assert x.tolist() == [32 * step for step in range(10, 110, 10)] and y[1] == 1 / 20
    assert [values.tolist() for values in curve(records, "held_out_rankme")] == [[1600, 3200], [7, 7]]
    assert [len(values) for values in curve(records, "absent")] == [0, 0]


def test_runs_side_by_side(tmp_path):
    runs = [run(tmp_path / "runs" / name, rate) for name, rate in (("a", 1.0), ("b", 2.0))]
    for count, out in ((1, tmp_path / "one.png"), (2, tmp_path / "deep" / "two.png")):
        assert plot_runs(tuple(runs[:count]), out) == out
        pixels = np.asarray(Image.open(out).convert("RGB")).astype(int)
        drawn = [(abs(pixels - colour).sum(-1) < 12).sum() for colour in ((31, 119, 180), (255, 127, 14))]
        assert drawn[0] > 500 and (drawn[1] > 500) == (count == 2)  # matplotlib's first two colours
    plot_runs((runs[0], runs[0]), tmp_path / "twice.svg")
    text = (tmp_path / "twice.svg").read_text()
    assert "RankMe" in text or "<svg" in text


def test_a_run_that_goes_on(tmp_path):
    folder = run(tmp_path / "a")
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 110, "images_se')
    assert read_log(folder)[-1]["step"] == 100


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(ConfigError, match="no run to draw"):
        plot_runs(())
    with pytest.raises(CheckpointError, match="absent/log.jsonl: not the log of a run: No such file"):
        plot_runs((tmp_path / "absent",))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "log.jsonl").write_text("no JSON\n")
    with pytest.raises(CheckpointError, match="b/log.jsonl: not the log of a run"):
        plot_runs((tmp_path / "b",))
    (tmp_path / "b" / "log.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="nothing is logged yet"):
        plot_runs((tmp_path / "b",))
    with pytest.raises(ConfigError, match="curves.txt: no picture has such a suffix; there are .*.png"):
        plot_runs((run(tmp_path / "a"),), tmp_path / "curves.txt")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        plot_runs((tmp_path / "a",), tmp_path / "file" / "curves.png")
