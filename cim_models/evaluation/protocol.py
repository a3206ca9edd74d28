"""What makes a number repeatable: a report of what was measured and how, as one JSON file."""

import inspect
import json
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from math import isfinite
from pathlib import Path
from platform import python_version
from statistics import mean, stdev
from typing import Any

import timm
import torch
import torchvision

from cim_models import __version__
from cim_models.errors import DataError
from cim_models.files import replacing


def _versions() -> dict[str, str]:
    packages = {package.__name__: str(package.__version__) for package in (torch, torchvision, timm)}
    return {"cim_models": __version__, "python": python_version(), **packages}


def commit() -> str | None:
    """The commit of the checkout that the package runs from, with `-dirty` if files differ; None if it is installed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], check=True, capture_output=True)
        name = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.decode().strip()


@dataclass
class Report:
    """A measurement and how it was made; `str` gives its table, `save` writes all of it.

    `result` holds what was found, shares in [0, 1]:

    - `metric`: what is measured, such as `top-1`;
    - `scores`: name → a share, or a list with one for each draw;
    - `headline`: the one that stands for all, a mean over draws, or None if it was not measured;
    - `chance`: what guessing reaches, where that is known;
    - `history`: where it was measured on the way, a list of {`epoch`, `images_seen`, `score`};

    and whatever else the protocol finds, of which numbers are printed.
    """

    protocol: str
    """Name and version, `variant` of it: results of different ones are not compared."""
    model: dict[str, Any]
    """`encoders.describe`: name, transform, sha256 of the weights."""
    data: dict[str, dict[str, Any]]
    """For each split its fingerprint."""
    settings: dict[str, Any]
    """All that the result depends on beside model and data; `seed` is what differs between repetitions."""
    result: dict[str, Any]
    command: str
    """`command_of` it, which repeats it."""
    versions: dict[str, str] = field(default_factory=_versions)
    commit: str | None = field(default_factory=commit)

    def save(self, path: Path) -> None:
        """Writes all of it as JSON.

        Raises:
            ConfigError: If it cannot be written.
        """
        with replacing(path) as file:
            file.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Reads what `save` wrote.

        Raises:
            DataError: If the file cannot be read or is no report.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            report = cls(**fields)
            scores = report.result["scores"].values()
            numbers = [share for score in scores for share in draws(score)]
            whole = numbers and all(isinstance(number, (int, float)) and isfinite(number) for number in numbers)
            whole = whole and isinstance(report.result["metric"], str) and set(fields) == set(asdict(report))
        except OSError as error:
            raise DataError(f"{path}: cannot be read, {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path}: not a report of `cim evaluate`: {error}") from error
        if not whole:
            raise DataError(f"{path}: not a whole report of `cim evaluate`; measure again")
        return report

    @property
    def numbers(self) -> dict[str, float]:
        """What `result` holds beside shares that is a number."""
        known = ("headline", "chance")
        return {name: value for name, value in self.result.items() if isinstance(value, float) and name not in known}

    def __str__(self) -> str:
        rows = [("", self.result["metric"]), *((name, percent(score)) for name, score in self.result["scores"].items())]
        if self.result.get("chance") is not None:
            rows.append(("chance", percent(self.result["chance"])))
        rows += [(name, f"{value:.4g}") for name, value in self.numbers.items()]
        names, values = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(f"{name:<{names}}  {value:>{values}}" for name, value in rows)


def draws(score: float | list[float]) -> list[float]:
    """A score as the shares of its draws."""
    return score if isinstance(score, list) else [score]


def percent(score: float | list[float]) -> str:
    """A share, or several as their mean ± standard deviation, in per cent with two decimals."""
    return with_deviation([100 * share for share in draws(score)], "{:.2f}")


def with_deviation(values: Sequence[float], form: str) -> str:
    """One value, or several as their mean ± standard deviation, each in a format such as `{:.3g}`."""
    return form.format(mean(values)) + (f" ± {form.format(stdev(values))}" if len(values) > 1 else "")


def variant(protocol: str, frozen: Mapping[str, Any], used: Mapping[str, Any]) -> str:
    """The name of a protocol, followed by what was done otherwise.

    Args:
        protocol: Name and version, such as `knn-1`.
        frozen: What this version says: name → value.
        used: The values that were used.

    Returns:
        Such as `knn-1`, or `knn-1, temperature=0.1`.
    """
    changed = [f"{name}={used[name]}" for name, value in frozen.items() if used[name] != value]
    return ", ".join([protocol, *changed])


def command_of(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """The command line that calls a function with some arguments, whoever called it.

    Args:
        name: Of the command, such as `evaluate knn`.
        function: What the command calls.
        arguments: By name, every parameter of it: its `locals()` before it does anything. A dataclass is its fields.
    """
    words = ["cim", *name.split()]
    for key, parameter in inspect.signature(function).parameters.items():
        value, default = arguments[key], parameter.default
        if parameter.kind is parameter.POSITIONAL_ONLY:
            words.append(str(value))
        elif is_dataclass(value):
            for setting in fields(value):
                words += _option(setting.name, getattr(value, setting.name), getattr(default, setting.name))
        else:
            words += _option(key, value, default)
    return shlex.join(words)


def _option(name: str, value: Any, default: Any) -> list[str]:
    """The words of an option, none if it has its default."""
    if value == default:
        return []
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    flag = name.replace("_", "-")
    return [f"--no-{flag}" if value is False else f"--{flag}", *(str(v) for v in values if not isinstance(v, bool))]
