"""`cim …`: parses, calls one function of the package, prints what it returns."""

import argparse
import contextlib
import difflib
import importlib
import inspect
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from cim_models import __version__
from cim_models.errors import CimModelsError

if TYPE_CHECKING:
    from cim_models.pretraining.config import PretrainConfig

COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("cim_models.evaluation.quickstart:quickstart", "features, neighbours and heat maps of your images"),
    "list": ("cim_models.hub.manifest:table", "released weights"),
    "info": ("cim_models.hub.manifest:info", "everything about one release"),
    "fetch": ("cim_models.hub.fetch:fetch", "make a folder of a release, for machines without a network"),
    "verify": ("cim_models.hub.verify:verify_releases", "check released weights against what is recorded of them"),
    "embed": ("cim_models.evaluation.embed:embed", "write the features of a folder of images"),
    "locate": ("cim_models.evaluation.locate:locate", "where in a picture an exemplar lies"),
    "pretrain": ("cim_models.pretraining.loop:pretrain", "pretrain an encoder on a folder of images"),
    "runs plot": ("cim_models.pretraining.curves:plot_runs", "draw the curves of runs side by side"),
    "evaluate correlation": (
        "cim_models.evaluation.correlation:correlation",
        "how well exemplars are found in pictures of a folder",
    ),
    "evaluate knn": ("cim_models.evaluation.knn:knn", "nearest-neighbour accuracy of an encoder"),
    "evaluate linear": ("cim_models.evaluation.linear:linear", "accuracy of a linear classifier on frozen features"),
    "evaluate lowshot": ("cim_models.evaluation.lowshot:lowshot", "accuracy with few labels on frozen features"),
    "evaluate finetune": ("cim_models.evaluation.finetune:finetune", "fine-tune an encoder, and measure it"),
    "evaluate report": ("cim_models.evaluation.report:report", "tables and plots of results"),
    "evaluate segment": ("cim_models.evaluation.segment:segment", "mean IoU of an encoder that labels every pixel"),
    "release": ("cim_models.hub.release:release", "make a release folder of a run"),
    "export": ("cim_models.hub.export:export", "write an encoder as ONNX"),
    "publish": ("cim_models.hub.publish:publish", "upload a release to the Hugging Face Hub"),
    "import-official": ("cim_models.hub.official:import_release", "convert the authors' checkpoints"),
}
"""Name: the function to call, and one line of help. Its signature and docstring are the command's options and help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Of the command line, without the program's name; by default `sys.argv`.

    Returns:
        The exit code: 0 done, 1 a `CimModelsError` or one of the system, 2 wrong usage, 130 interrupted, 141 nobody
        reads the output.

    Raises:
        SystemExit: By the parser, or with 143 on SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    handler = logging.StreamHandler()
    handler.addFilter(_Once())
    logging.basicConfig(format="cim: %(message)s", level=logging.WARNING, handlers=[handler])
    level = logging.INFO if _first() else logging.ERROR
    logging.getLogger("cim_models").setLevel(logging.DEBUG if debug else level)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: any file name can be printed
    try:
        with _orderly_end():
            code = _run(arguments)
        print(end="", flush=True)
        return code
    except KeyboardInterrupt:
        if debug:
            raise
        print("cim: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _give_up_output()
        return 141
    except (CimModelsError, OSError) as error:  # the system's own says which file
        if debug:
            raise
        print(f"cim: {error}", file=sys.stderr)
        _give_up_output()
        return 1


def _give_up_output() -> None:
    """Forgets what cannot be written, which the interpreter would try again at its end."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _first() -> bool:
    """Whether this process speaks for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _orderly_end() -> Iterator[None]:
    """Lets a process that is told to terminate, as launchers do when another one is gone, clean up first."""
    main = threading.current_thread() is threading.main_thread()
    changed = main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if changed:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        if changed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Once(logging.Filter):
    """Lets each message through once: a model that is loaded twice says its licence once."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self.said
        self.said.add(message)
        return new


def _run(arguments: list[str]) -> int:
    """Finds the command, and prints what it returns."""
    first, *others = arguments or [""]
    group = [name for name in COMMANDS if name.startswith(f"{first} ")]
    if first in ("", "-h", "--help") or (group and others[:1] in ([], ["-h"], ["--help"])):
        print(_help(group or list(COMMANDS)))
        return 0 if arguments[-1:] in (["-h"], ["--help"]) else 2
    if first == "--version":
        print(__version__)
        return 0
    name = " ".join(arguments[: 2 if group else 1])
    if name in COMMANDS:
        result = _call(name, others[1:] if group else others)
        if result is not None and _first():
            print("\n".join(map(str, result)) if isinstance(result, (list, tuple)) else result)
        return 0
    spellings = {spelling: name for name in COMMANDS for spelling in (name, name.split()[-1])}
    close = difflib.get_close_matches(name, spellings, n=1, cutoff=0.5)
    hint = f"did you mean `cim {spellings[close[0]]}`?" if close else "`cim --help` lists the commands"
    print(f"cim: there is no command {name!r}; {hint}", file=sys.stderr)
    return 2


def _call(name: str, arguments: list[str]) -> Any:
    """Imports the command's function, parses its arguments by its signature, and calls it.

    Positional arguments are a function's positional-only ones, or, if it has none, those without a default.
    """
    module, _, function = COMMANDS[name][0].partition(":")
    target = getattr(importlib.import_module(module), function)
    if name == "pretrain":
        return target(_parse_run(arguments))
    parameters = inspect.signature(target).parameters.values()
    if not parameters and not arguments:
        return target()  # `cim list` does not wait for the parser

    import tyro

    conf = tyro.conf
    config = [conf.PositionalMetavarFromFieldName, conf.DisallowNone, conf.FlagCreatePairsOff, conf.OmitArgPrefixes]
    if inspect.Parameter.POSITIONAL_ONLY not in [parameter.kind for parameter in parameters]:
        config.append(conf.PositionalRequiredArgs)
    return tyro.cli(target, prog=f"cim {name}", args=arguments, config=config)


def _parse_run(arguments: list[str]) -> "PretrainConfig":
    """The configuration of a run: its fields are flags, whose defaults are those of the recipe."""
    import tyro

    from cim_models.pretraining.config import PretrainConfig, load_recipe, recipes

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    name = finder.parse_known_args(arguments)[0].recipe
    start = load_recipe(name) if name else PretrainConfig()
    known = f"What differs from the defaults: {', '.join(recipes())}, or a YAML file."

    def pretrain(
        data: str,
        /,
        recipe: Annotated[str, tyro.conf.arg(help=known)],
        config: Annotated[PretrainConfig, tyro.conf.arg(name="")] = start,
    ) -> PretrainConfig:
        """Pretrains an encoder with Correlational Image Modeling. Defaults are those of the recipe.

        Args:
            data: A folder of images, searched recursively, a text file with one path per line, a zip archive, tar
                shards, Parquet files, or a saved Hugging Face dataset.
        """
        config.data.path = data
        return config

    config = (tyro.conf.PositionalMetavarFromFieldName,)
    return tyro.cli(pretrain, prog="cim pretrain", args=_with_values(arguments), config=config)


def _with_values(arguments: list[str]) -> list[str]:
    """Gives a bare `--resume` the value that it stands for; it also takes `auto`."""
    following = [*arguments[1:], ""]
    pairs = zip(arguments, following, strict=True)
    bare = [name == "--resume" and value not in ("auto", "True", "False") for name, value in pairs]
    return [word for name, add in zip(arguments, bare, strict=True) for word in ([name, "True"] if add else [name])]


def _help(names: Sequence[str]) -> str:
    """Some commands, a line each."""
    width = max(map(len, names))
    lines = [f"  {name.ljust(width)}  {COMMANDS[name][1]}" for name in names]
    return "\n".join(
        [
            "usage: cim COMMAND …",
            "",
            "Correlational Image Modeling: pretrain on a folder of images, load released encoders.",
            "",
            *lines,
            "",
            "`cim COMMAND --help` explains one. --debug shows where an error comes from, --version the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
