"""The command line as a user meets it: in a process of its own where that matters, in this one where it is enough."""

import errno
import inspect
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from importlib import import_module

import pytest
from safetensors.torch import load_file

import cim_models
from cim_models import cli, evaluation
from cim_models.errors import DataError

CIM = [sys.executable, "-c", "import sys; from cim_models.cli import main; sys.exit(main())"]


@pytest.fixture(autouse=True)
def quiet_logger():
    """`main` sets the level of the package's logger, once for a process."""
    logger = logging.getLogger("cim_models")
    level = logger.level
    yield
    logger.setLevel(level)


def usage(arguments, capsys):
    """Exit code, standard output and standard error of a command that this process runs."""
    try:
        code = cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    return (code, *capsys.readouterr())


@pytest.fixture(scope="module")
def small_run(photographs, tmp_path_factory):
    """A run directory, made by the command itself."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    flags = f"--out {folder} --model cim_vit_tiny --backbone.img-size 64 --data.size 64 --data.workers 0"
    flags += " --views.context-size 64 --views.exemplars.size 32 --views.exemplars.count 2 --precision fp32"
    flags += " --optimiser.batch-size 4 --optimiser.epochs 1 --optimiser.warmup-epochs 0"
    flags += " --pretext.head-width 64 --pretext.head-heads 4"
    assert cli.main(["pretrain", str(photographs(8, 64)), "--recipe", "cpu-demo", *flags.split()]) == 0
    return folder


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists_and_explains_itself(name, capsys):
    path, line = cli.COMMANDS[name]
    module, _, function = path.partition(":")
    target = getattr(import_module(module), function)
    assert inspect.getdoc(target) and line[0].islower() and len(line) < 60
    code, out, err = usage([*name.split(), "--help"], capsys)
    assert code == 0 and not err and f"usage: cim {name}" in out and "STR (required)" not in out.split("options")[0]
    assert all(f" {name} " in usage(["--help"], capsys)[1] for name in cli.COMMANDS)


def test_help_and_version(capsys):
    code, out, err = usage(["--help"], capsys)
    assert code == 0 and not err
    assert usage(["-h"], capsys) == (0, out, "") and usage([], capsys) == (2, out, "")
    assert usage(["--version"], capsys) == (0, f"{cim_models.__version__}\n", "")
    code, out, _ = usage(["evaluate", "--help"], capsys)
    assert code == 0 and "evaluate knn" in out and "quickstart" not in out


@pytest.mark.parametrize(
    ("arguments", "offered"),
    [(["qiuckstart"], "quickstart"), (["import_official", "x"], "import-official"), (["knn"], "evaluate knn"),
     (["evaluate", "kn"], "evaluate knn"), (["zzz"], "--help")],
)  # fmt: skip
def test_an_unknown_command_offers_the_close_one(arguments, offered, capsys):
    code, out, err = usage(arguments, capsys)
    assert code == 2 and not out and err.count("\n") == 1 and offered in err


@pytest.mark.parametrize(
    "arguments", [["embed"], ["embed", "a", "b"], ["embed", "a", "--poling", "class"], ["embed", "a", "--pooling", "x"],
                  ["list", "a"], ["locate", "a"], ["pretrain", "a"], ["evaluate", "knn", "a"], ["release", "a"]],
)  # fmt: skip
def test_wrong_usage(arguments, capsys):
    code, out, err = usage(arguments, capsys)
    assert code == 2 and not out and err and "Traceback" not in err


def test_an_error_is_one_line_unless_the_traceback_is_asked_for(tmp_path, capsys):
    arguments = ["embed", str(tmp_path / "nowhere")]
    code, out, err = usage(arguments, capsys)
    assert code == 1 and not out and err.count("\n") == 1 and err.startswith("cim: ") and "nowhere" in err
    for debug in ([*arguments, "--debug"], ["--debug", *arguments]):
        with pytest.raises(DataError, match="nowhere"):
            cli.main(debug)
    code, _, err = usage(["pretrain", "x", "--recipe", "cpu-dmo"], capsys)
    assert code == 1 and "cpu-demo" in err


def test_an_interruption_is_no_traceback(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("cim_models.hub.manifest.table", interrupt)
    assert usage(["list"], capsys) == (130, "", "cim: interrupted\n")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.EIO])
def test_what_the_system_refuses_is_an_error_of_one_line(number, monkeypatch, capsys):
    def refuse():
        raise OSError(number, os.strerror(number), "theirs/run")

    monkeypatch.setattr("cim_models.hub.manifest.table", refuse)
    code, out, err = usage(["list"], capsys)
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("cim: ") and "'theirs/run'" in err


def test_a_message_is_said_once(capsys):
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(cli._Once())
    for message in ("licence x", "licence x", "licence y"):
        handler.handle(logging.makeLogRecord({"msg": message}))
    assert capsys.readouterr().err == "licence x\nlicence y\n"


def test_light_commands_import_no_torch():
    program = (
        "import sys; from cim_models.cli import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'timm', 'numpy', 'PIL', 'tyro'} & set(sys.modules), 'too much'; sys.exit(code)"
    )
    for argument in ("--help", "list", "--version", "evalute"):
        process = subprocess.run([sys.executable, "-c", program, argument], capture_output=True, text=True)
        assert process.returncode == (2 if argument == "evalute" else 0), process.stderr
        assert bool(process.stdout) != bool(process.stderr)


def test_a_reader_that_goes_away_is_no_error():
    with subprocess.Popen([*CIM, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("argument", ["list", "--help"])
def test_a_full_disk_is_an_error_of_one_line(argument):
    with open("/dev/full", "w") as full:
        process = subprocess.run([*CIM, argument], stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("cim: ") and os.strerror(errno.ENOSPC) in process.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs a shell that closes files")
def test_without_any_output(tmp_path):
    process = subprocess.run(["sh", "-c", 'exec "$0" "$@" >&-', *CIM, "list"], capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_characters(encoding):
    process = subprocess.run([*CIM, "--help"], capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert process.returncode == 0 and not process.stderr
    assert process.stdout.startswith("usage: cim COMMAND …\n".encode(encoding, "backslashreplace"))


def test_info_of_what_is_not_released(capsys):
    code, out, err = usage(["info", "cim_vit_tinny.nothing"], capsys)
    assert code == 1 and not out and "cim_vit_tinny" in err


@pytest.mark.parametrize(
    ("flags", "resume"),
    [([], False), (["--resume"], True), (["--resume", "--seed", "1"], True), (["--resume", "auto"], "auto"),
     (["--resume", "False"], False)],
)  # fmt: skip
def test_resume_with_and_without_a_value(flags, resume):
    config = cli._parse_run(["photos", "--recipe", "cpu-demo", "--out", "run", *flags])
    assert config.resume == resume and type(config.resume) is type(resume)


def test_curves_of_two_runs(small_run, tmp_path, capsys):
    out = tmp_path / "curves.png"
    assert usage(["runs", "plot", str(small_run), str(small_run), "--out", str(out)], capsys)[:2] == (0, f"{out}\n")
    assert out.read_bytes().startswith(b"\x89PNG")


def test_embed_writes_what_the_function_writes(tmp_path, photographs, small_run, capsys):
    folder, out = photographs(6, 80), tmp_path / "f.safetensors"
    options = ["--model", str(small_run), "--out", str(out), "--pooling", "both", "--batch-size", "4", "--workers", "0"]
    code, printed, _ = usage(["embed", str(folder), *options], capsys)
    assert code == 0 and printed.splitlines()[0] == f"{out}  features 6 × 384"
    result = evaluation.embed(folder, str(small_run), tmp_path / "g.safetensors", pooling="both", workers=0)
    assert (load_file(out)["features"] == load_file(result.path)["features"]).all()


def test_evaluate_knn(tmp_path, photographs, small_run, capsys):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for index, path in enumerate(sorted(photographs(6, 80).iterdir())):
        (tmp_path / "data" / "ab"[index % 2] / path.name).write_bytes(path.read_bytes())
    data, out = str(tmp_path / "data"), tmp_path / "knn.json"
    arguments = ["evaluate", "knn", str(small_run), data, data, "--ks", "1", "3", "--workers", "0", "--out", str(out)]
    code, printed, _ = usage(arguments, capsys)
    assert code == 0 and printed.splitlines()[1].split() == ["k=1", "100.00"]
    saved = json.loads(out.read_text())
    assert saved["result"]["scores"]["k=1"] == 1 and sorted(shlex.split(saved["command"])[1:]) == sorted(arguments)


def test_evaluate_the_rest_and_report(tmp_path, photographs, small_run, capsys):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for index, path in enumerate(sorted(photographs(6, 80).iterdir())):
        (tmp_path / "data" / "ab"[index % 2] / path.name).write_bytes(path.read_bytes())
    data, results = str(tmp_path / "data"), tmp_path / "results"
    flags = ["--workers", "0", "--cache", str(tmp_path / "cache")]
    for protocol, more in (("linear", ["--quick"]), ("lowshot", ["--shots", "1", "3", "--draws", "2"])):
        arguments = [str(small_run), data, data, "--out", str(results / f"{protocol}.json"), *more, *flags]
        code, printed, err = usage(["evaluate", protocol, *arguments], capsys)
        assert code == 0 and "top-1" in printed and "chance" in printed
    assert "3 per class" in printed
    code, printed, _ = usage(["evaluate", "report", str(results)], capsys)
    assert code == 0 and "## linear-lbfgs-1" in printed and "## lowshot-1, draws=2" in printed
    code, printed, _ = usage(["evaluate", "report", str(results), "--out", str(tmp_path / "r.md")], capsys)
    assert code == 0 and printed == f"{tmp_path / 'r.md'}\n" and (tmp_path / "r.md").is_file()


def test_quickstart_and_locate(tmp_path, photographs, small_run, capsys):
    folder = photographs(6, 80)
    code, out, _ = usage(["quickstart", str(folder), "--out", str(tmp_path), "--model", str(small_run)], capsys)
    assert code == 0 and all(f"{tmp_path / name}" in out for name in ("features.safetensors", "neighbours.png"))
    images = [str(path) for path in sorted(folder.iterdir())[:2]]
    code, out, _ = usage(["locate", *images, "--model", str(small_run), "--out", str(tmp_path / "h.png")], capsys)
    assert code == 0 and out.startswith(str(tmp_path / "h.png")) and (tmp_path / "h.png").is_file()


def test_pretrain_takes_the_fields_of_a_run(tmp_path, photographs, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("cim_models.pretraining.loop.pretrain", lambda config: seen.append(config) or tmp_path)
    flags = "--optimiser.epochs 3 --views.exemplars.area 0.1 0.2 --pretext.no-moving-average --resume"
    flags += f" --optimiser.clip None --model cim_resnet18 --out {tmp_path}"
    code, out, _ = usage(["pretrain", "images", "--recipe", "cpu-demo", *flags.split()], capsys)
    (config,) = seen
    assert code == 0 and out == f"{tmp_path}\n"
    assert (config.data.path, config.model, config.out) == ("images", "cim_resnet18", str(tmp_path)) and config.resume
    assert config.optimiser.epochs == 3 and config.optimiser.clip is None and not config.pretext.moving_average
    assert config.views.exemplars.area == (0.1, 0.2)
    recipe = cim_models.pretraining.config.load_recipe("cpu-demo")
    assert config.optimiser.lr == recipe.optimiser.lr and config.data.size == recipe.data.size


def test_every_switch_of_a_run_has_both_ways_whatever_the_recipe_says(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("cim_models.pretraining.loop.pretrain", lambda config: seen.append(config) or tmp_path)
    for recipe in ("cpu-demo", "imagenet-1k"):
        for flag in ("freeze-patch-embed", "no-freeze-patch-embed"):
            assert usage(["pretrain", "images", "--recipe", recipe, f"--pretext.{flag}"], capsys)[0] == 0
    assert [config.pretext.freeze_patch_embed for config in seen] == [True, False, True, False]


def test_help_of_pretrain_names_the_backbones(capsys):
    words = usage(["pretrain", "--help"], capsys)[1].replace(",", " ").replace(".", " ").split()
    assert set(cim_models.list_models()) <= set(words)


def test_pretrain_does_not_write_over_a_run(photographs, small_run, capsys):
    arguments = ["pretrain", str(photographs(8, 64)), "--recipe", "cpu-demo", "--out", str(small_run)]
    code, out, err = usage(arguments, capsys)
    assert code == 1 and not out and "--resume" in err


def test_a_command_that_is_terminated_cleans_up(tmp_path, photographs, small_run, monkeypatch, capsys):
    monkeypatch.setattr("cim_models.evaluation.rows.RowWriter.finish", lambda _: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    flags = ["--out", str(tmp_path / "out" / "f.safetensors"), "--workers", "0"]
    code, out, _ = usage(["embed", str(photographs(8, 64)), "--model", str(small_run), *flags], capsys)
    assert code == 143 and not out and not list((tmp_path / "out").iterdir())
    assert signal.getsignal(signal.SIGTERM) == before == signal.SIG_DFL
