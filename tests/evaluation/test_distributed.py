"""Two processes of one launcher extract what one process does: each row once, in order, written and printed once."""

import json
import logging
from pathlib import Path

import pytest
import torch

from cim_models import cli
from cim_models.images import find_images

COMMANDS = """
import json, sys
import torch
from cim_models import cli

torch.set_num_threads(1)
for command in json.loads(open(sys.argv[1]).read()):
    code = cli.main(command)
    if code:
        sys.exit(code)
"""
KILLED = """
import os, signal, sys
from cim_models import cli
from cim_models.evaluation import features

pool, calls = features.pool, []
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what it says is for its own reasons


def kill(*arguments):
    calls.append(1)
    if len(calls) == 2 and os.environ["RANK"] == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    return pool(*arguments)


features.pool = kill
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture
def alone():
    """This process computes with one thread, as those of the launcher do."""
    threads, level = torch.get_num_threads(), logging.getLogger("cim_models").level
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.getLogger("cim_models").setLevel(level)


@pytest.fixture
def listed(tmp_path, photographs) -> Path:
    """A list of 19 images, of which one, and a whole batch of three, cannot be read."""
    paths = find_images(photographs(22, 80))[:19]
    for index in (4, 9, 10, 11):
        paths[index] = tmp_path / f"broken {20 - index}.jpg"
        paths[index].write_text("no picture")
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    return tmp_path / "list.txt"


def without(path: Path, *keys: str) -> dict:
    report = json.loads(path.read_text())
    return {key: value for key, value in report.items() if key not in keys}


def test_two_processes_write_the_bytes_of_one(tmp_path, run, splits, listed, launch, alone, capfd, caplog):
    for place, name in (("train/even/deep", "aa.jpg"), ("val/odd/deep", "zz.jpg")):
        (splits / place / name).write_text("no picture")
    folders = [str(run), str(splits / "train"), str(splits / "val")]

    def commands(out: Path) -> list[list[str]]:
        few = ["--workers", "1", "--batch-size", "3"]
        model = [str(listed), "--model", str(run)]
        kept = [*few, "--cache", str(out / "cache")]
        return [
            ["embed", *model, "--out", str(out / "f.safetensors"), *few],
            ["embed", *model, "--out", str(out / "dense.safetensors"), *few, "--pooling", "dense"],
            ["evaluate", "knn", *folders, "--out", str(out / "knn.json"), *few, "--ks", "1", "5"],
            ["evaluate", "linear", *folders, "--out", str(out / "linear.json"), *kept, "--quick"],
            ["evaluate", "lowshot", *folders, "--out", str(out / "lowshot.json"), *kept, "--draws", "2"],
        ]

    with caplog.at_level(logging.WARNING, "cim_models"):
        assert [cli.main(command) for command in commands(tmp_path / "one")] == [0] * 5
    said = capfd.readouterr()
    (tmp_path / "commands.json").write_text(json.dumps(commands(tmp_path / "two")))
    done = launch(COMMANDS, tmp_path / "commands.json")
    assert done.returncode == 0, done.stderr

    assert done.stdout == said.out.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    skipped = [record.getMessage() for record in caplog.records if record.getMessage().startswith("skipped")]
    lines = [line.removeprefix("cim: ") for line in done.stderr.splitlines() if "skipped" in line]
    assert lines == list(dict.fromkeys(skipped)) and len(lines) == 6  # each message once, in the order of the images
    files = [{path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")} for name in ("one", "two")]
    assert files[0] == files[1] and len([path for path in files[0] if path.suffix]) == 4 + 3 + 4
    for path in sorted(files[0]):
        one, two = tmp_path / "one" / path, tmp_path / "two" / path
        if path.suffix == ".json" and path.stem != "about":
            assert without(one, "command") == without(two, "command")
        elif path.suffix:
            assert one.read_bytes() == two.read_bytes(), path


@pytest.mark.parametrize("killed", ["0", "1"])
def test_a_killed_process_ends_the_other_and_the_old_file_stays(tmp_path, run, listed, launch, killed):
    (tmp_path / "out").mkdir()
    names = ["f.paths.jsonl", "f.safetensors"]
    for name in names:
        (tmp_path / "out" / name).write_text("old")
    flags = ["--workers", "0", "--batch-size", "3"]
    done = launch(KILLED, killed, "embed", listed, "--model", run, "--out", tmp_path / "out" / "f.safetensors", *flags)
    assert done.returncode != 0 and not done.stdout
    assert "cim: another process of the run has ended, hence this one too" in done.stderr
    assert [(tmp_path / "out" / name).read_text() for name in names] == ["old"] * 2
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {*names} or killed == "0"  # whoever writes cannot clean up after that


def test_processes_that_see_other_images_are_told(tmp_path, run, listed, launch, photographs):
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "list.txt").write_text(listed.read_text())
    with (tmp_path / "1" / "list.txt").open("a") as file:
        file.write(f"\n{find_images(photographs(22, 80))[0]}")
    command = ["embed", "list.txt", "--model", str(run), "--out", str(tmp_path / "f.safetensors")]
    (tmp_path / "commands.json").write_text(json.dumps([command]))
    elsewhere = f"import os; os.chdir(os.path.join({str(tmp_path)!r}, os.environ['RANK']))\n"
    done = launch(elsewhere + COMMANDS, tmp_path / "commands.json")
    assert done.returncode != 0 and not (tmp_path / "f.safetensors").exists()
    assert f"cim: list.txt or {run}: process 1 does not find there what the first one does" in done.stderr
