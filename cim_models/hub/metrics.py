"""Results that `cim evaluate` wrote → what an entry says of its weights. Needs no torch."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from cim_models.errors import ConfigError
from cim_models.hub.card import MEAN, RANDOM
from cim_models.hub.entry import Metric, read
from cim_models.hub.manifest import read_json

FORM = '[{"name": …, "value": …, "data": …, "command": …}, …]'

NOT_FOUND = ("headline", "chance", "epochs", "best_epoch", "lr")
"""Numbers of a result that say how it came about, or stand elsewhere."""


def read_metrics(paths: Iterable[Path]) -> tuple[Metric, ...]:
    """Reads metrics, those of the same name and data, which differ in their seeds, as one mean.

    Args:
        paths: JSON files of `cim evaluate`, or lists of metrics as an entry has them.

    Raises:
        ConfigError: If a file is neither.
    """
    found: dict[tuple[str, str], list[Metric]] = {}
    for path in paths:
        content = read_json(path)
        try:
            listed = _of_report(content) if isinstance(content, dict) else content
            metrics: tuple[Metric, ...] = read(tuple[Metric, ...], listed, "metrics")
        except (AttributeError, ConfigError, KeyError, TypeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else error
            raise ConfigError(f"{path} is neither a result of `cim evaluate` nor metrics {FORM}: {reason}") from error
        for metric in metrics:
            found.setdefault((metric.name, metric.data), []).append(metric)
    return tuple(_mean(metrics) for metrics in found.values())


def _of_report(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The headline of a measurement, and the other numbers that it found."""
    result, protocol = report["result"], report["protocol"].partition("-")[0]
    values = {result["metric"].lower().replace("-", ""): result["headline"]}
    values |= {name: x for name, x in result.items() if isinstance(x, float) and name not in NOT_FOUND}
    whose, data = _whose(report["model"]), "; ".join(map(_split, report["data"].values()))
    return [
        {"name": f"{protocol}_{name}{whose}", "value": value, "data": data, "command": report["command"]}
        for name, value in values.items()
        if value is not None
    ]


def _split(split: dict[str, Any]) -> str:
    classes = f" of {split['classes']} classes" if "classes" in split else ""
    return f"{split['path']}, {split['images']:,} images{classes}"


def _whose(model: dict[str, Any]) -> str:
    """`.random`, `.online` or `.target`, where a measurement is of one of them."""
    said = model.get("encoder") or Path(model.get("weights") or model["model"]).stem
    name = RANDOM if model.get("random_init") else said
    return f".{name}" if name in (RANDOM, "online", "target") else ""


def _mean(metrics: list[Metric]) -> Metric:
    first = metrics[0]
    if len(metrics) == 1:
        return first
    return replace(first, value=mean(metric.value for metric in metrics), data=f"{first.data}{MEAN}{len(metrics)}")
