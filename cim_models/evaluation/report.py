"""Results of any protocol, as JSON files → tables in Markdown, and plots."""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isclose
from pathlib import Path
from statistics import mean
from typing import Any

from cim_models.errors import DataError
from cim_models.evaluation.curves import Curve, draw_curves
from cim_models.evaluation.protocol import Report, draws, percent, with_deviation
from cim_models.files import replacing

KEYS = {"protocol", "model", "data", "settings", "result"}
"""What tells a report from other JSON files in a folder."""
AXES = {"epoch": "epochs", "images_seen": "images seen", "minutes": "minutes"}
COST = {"images_seen": "images seen", "minutes": "minutes"}
"""What pretraining took, where a row's weights say it."""

logger = logging.getLogger(__name__)


@dataclass
class Row:
    """Repetitions of one measurement, which differ in their seeds alone."""

    runs: list[Report] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The model, its weights, and whether they are random, or were when all of it was trained."""
        model = self.runs[0].model
        weights = f" + {model['weights']}" if model.get("weights") else ""
        random = ", from scratch" if self.runs[0].settings.get("from_scratch") else ", random weights"
        return f"{model['model']}{weights}{random if model.get('random_init') else ''}"

    @property
    def settings(self) -> dict[str, Any]:
        """What all repetitions were made with, and the size of the input."""
        return self.runs[0].settings | {"input": _size(self.runs[0])}

    def cost(self, key: str) -> str:
        """What the pretraining of its weights took, of `COST`."""
        value = self.runs[0].model.get(key)
        return "" if value is None else f"{value:,}"

    @property
    def cells(self) -> dict[str, str]:
        """Name → scores over draws and seeds in per cent, and the other numbers that were found."""
        scores: dict[str, list[float]] = {}
        numbers: dict[str, list[float]] = {}
        for run in self.runs:
            for name, score in run.result["scores"].items():
                scores.setdefault(name, []).extend(draws(score))
            for name, number in run.numbers.items():
                numbers.setdefault(name, []).append(number)
        return {
            **{name: percent(shares) for name, shares in scores.items()},
            **{name: with_deviation(values, "{:.3g}") for name, values in numbers.items()},
        }


@dataclass
class Section:
    """Rows that may be compared: one protocol on the same data."""

    protocol: str
    rows: list[Row]

    @property
    def first(self) -> Report:
        """Any of its measurements, for what they have in common."""
        return self.rows[0].runs[0]

    @property
    def headline(self) -> str | None:
        """The name of the score that stands for all, which is the headline of every result that has one."""
        results = [run.result for row in self.rows for run in row.runs if run.result.get("headline") is not None]
        equal: list[list[str]] = [
            [name for name, score in found["scores"].items() if isclose(mean(draws(score)), found["headline"])]
            for found in results
        ]
        return next((name for name in equal[0] if all(name in names for names in equal)), None) if equal else None

    @property
    def slug(self) -> str:
        """For names of files."""
        digests = "".join(str(split.get("sha256", ""))[:4] for split in self.first.data.values())
        return f"{re.sub(r'[^A-Za-z0-9]+', '-', self.protocol).strip('-')}_{digests}"


@dataclass
class Results:
    """What `report` made; `str` is the document, or the names of the files if it is one of them."""

    markdown: str
    out: Path | None
    plots: list[Path]

    def __str__(self) -> str:
        return self.markdown.rstrip("\n") if self.out is None else "\n".join(map(str, [self.out, *self.plots]))


def report(sources: tuple[Path, ...], /, out: Path | None = None, *, plots: Path | None = None) -> Results:
    """Turns results of `cim evaluate` into Markdown tables and plots.

    Rows of a table share protocol, version and data; each names its command. Repetitions with other seeds are one row,
    mean ± standard deviation. Plots show the score against epochs and images seen: of fine-tuning where it was measured
    on the way, and of encoders that come from a run or a release with its log, against what their pretraining took.

    Args:
        sources: JSON files, or folders that hold some at any depth.
        out: Markdown file to write; by default it is printed only.
        plots: Folder for PNG files, which the Markdown shows.

    Raises:
        DataError: If there is no result, a file is damaged, or two of the same measurement and seed disagree.
        ConfigError: If a file cannot be written, or matplotlib is missing.
    """
    sections = _sections(_read(sources))
    figures: dict[str, list[Path]] = {}
    if plots is not None:
        figures = {section.slug: _plot(section, Path(plots)) for section in sections}
    base = Path(out).parent if out is not None else Path()
    shown = {slug: [Path(os.path.relpath(path, base)).as_posix() for path in paths] for slug, paths in figures.items()}
    markdown = _markdown(sections, shown)
    if out is not None:
        with replacing(out) as file:
            file.write_bytes(markdown.encode("utf-8", "surrogateescape"))
    return Results(markdown, out, [path for paths in figures.values() for path in paths])


def _read(sources: Sequence[Path]) -> dict[Path, Report]:
    """The reports of files and folders."""
    found: dict[Path, Report] = {}
    for source in map(Path, sources):
        if source.is_dir():
            paths = sorted(source.rglob("*.json"))
            found |= {path: Report.load(path) for path in paths if _is_report(path)}
        else:
            found[source] = Report.load(source)
    if not found:
        names = ", ".join(map(str, sources)) or "no folder given"
        raise DataError(f"{names}: no result of `cim evaluate` there; give folders or JSON files")
    return found


def _is_report(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged, {error}; remove it or measure again") from error
    return isinstance(content, dict) and content.keys() >= KEYS


def _sections(reports: Mapping[Path, Report]) -> list[Section]:
    """Puts together what may be compared, and repetitions, in an order that does not depend on names of files."""
    sections: dict[str, dict[str, Row]] = {}
    known: dict[str, tuple[Path, Report]] = {}
    for path, run in reports.items():
        splits = {name: split.get("sha256") for name, split in run.data.items()}
        section = json.dumps([run.protocol, splits], sort_keys=True)
        row = json.dumps([section, _identity(run)], sort_keys=True)
        repetition = json.dumps([row, _seed(run)])
        if repetition in known:
            other, first = known[repetition]
            if first.result["scores"] != run.result["scores"]:
                raise DataError(f"{other} and {path} are the same measurement with different scores: remove one")
            continue
        known[repetition] = path, run
        sections.setdefault(section, {}).setdefault(row, Row()).runs.append(run)
    ordered = []
    for rows in sections.values():
        for entry in rows.values():
            entry.runs.sort(key=lambda run: (str(_seed(run)), run.command))
        content = sorted(rows.values(), key=lambda entry: (entry.name, entry.runs[0].command))
        ordered.append(Section(content[0].runs[0].protocol, content))
    return sorted(ordered, key=lambda section: (section.protocol, section.slug))


def _identity(run: Report) -> list[Any]:
    """What repetitions have in common beside protocol and data: what was asked, such as numbers of shots, too."""
    model = {key: value for key, value in run.model.items() if key != "seed"}
    if model.get("random_init"):
        model.pop("weights_sha256", None)
    return [model, {key: value for key, value in run.settings.items() if key != "seed"}, sorted(run.result["scores"])]


def _seed(run: Report) -> Any:
    return run.settings.get("seed", run.model.get("seed"))


def _markdown(sections: Sequence[Section], figures: Mapping[str, Sequence[str]]) -> str:
    parts = [
        "# Results",
        "Written by `cim evaluate report`; every row names the command that measured it. Scores are in %, "
        "other numbers as they were found.",
    ]
    if len(sections) > 1:
        parts += ["## Overview", "Of each table below the score that stands for all.", _overview(sections)]
    made: dict[str, int] = {}
    for section in sections:
        parts += [f"## {section.protocol}", _data(section), _table(section)]
        parts += [f"![{section.protocol}]({path})" for path in figures.get(section.slug, ())]
        for run in (run for row in section.rows for run in row.runs):
            versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
            line = f"{versions}, commit {run.commit or 'unknown'}"
            made[line] = made.get(line, 0) + 1
    parts += ["## Made with", "\n".join(f"- {line}: {count} results" for line, count in sorted(made.items()))]
    return "\n\n".join(parts) + "\n"


def _overview(sections: Sequence[Section]) -> str:
    """A row for each model, in the order of what it saw, and a column for each table; other settings behind a slash."""
    heading, columns = ["model", *COST.values()], []
    seen: dict[tuple[str, ...], float] = {}
    for section in sections:
        headline, column = section.headline, dict[tuple[str, ...], list[str]]()
        for row in section.rows:
            if score := row.cells.get(headline or ""):
                model = (row.name, *map(row.cost, COST))
                column.setdefault(model, []).append(score)
                seen[model] = -1 if row.runs[0].model.get("random_init") else row.runs[0].model.get("images_seen", inf)
        if column:
            data = [str(split.get("path", "?")) for split in section.first.data.values()]
            heading.append(f"{section.protocol}: {headline}, {data[-1]}")
            columns.append(column)
    models = sorted(seen, key=lambda model: (seen[model], model))
    rows = [[*model, *(" / ".join(column.get(model, ())) for column in columns)] for model in models]
    return _lines([heading, *rows])


def _data(section: Section) -> str:
    """The splits, what is measured on them, what guessing reaches, and the settings of all rows."""
    lines = []
    for name, split in section.first.data.items():
        limit = f", at most {split['limit_per_class']} per class" if split.get("limit_per_class") else ""
        missing = f", {len(split['unreadable'])} unreadable" if split.get("unreadable") else ""
        classes = f" of {split['classes']} classes" if split.get("classes") else ""
        count = f"{split.get('images', 0):,} images{classes}{limit}{missing}"
        lines.append(f"- {name}: `{split.get('path', '?')}`, {count}, sha256 `{str(split.get('sha256'))[:8]}`")
    chance = section.first.result.get("chance")
    guessing = f"; guessing reaches {percent(chance)}" if chance is not None else ""
    lines.append(f"- measured: {section.first.result['metric']}{guessing}")
    differing = {*_differing(section), "seed"}
    common = [f"{key}={value}" for key, value in section.rows[0].settings.items() if key not in differing]
    return "\n".join(lines + ([f"- settings: {', '.join(common)}"] if common else []))


def _table(section: Section) -> str:
    """One row for each measurement, with the settings in which the rows differ."""
    cells = [row.cells for row in section.rows]
    names = list(dict.fromkeys(name for found in cells for name in found))
    settings = [row.settings for row in section.rows]
    differing = _differing(section)
    cost = [key for key in COST if any(row.cost(key) for row in section.rows)]
    table = [["model", "weights sha256", *(COST[key] for key in cost), *differing, *names, "seeds", "command"]]
    for row, found, setting in zip(section.rows, cells, settings, strict=True):
        digests = list(dict.fromkeys(str(run.model.get("weights_sha256", ""))[:8] for run in row.runs))
        seeds = [str(_seed(run)) for run in row.runs if _seed(run) is not None]
        table.append(
            [
                row.name,
                ", ".join(digests),
                *map(row.cost, cost),
                *(str(setting.get(key, "")) for key in differing),
                *(found.get(name, "") for name in names),
                ", ".join(seeds),
                f"`{row.runs[0].command}`",
            ]
        )
    return _lines(table)


def _lines(table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def _differing(section: Section) -> list[str]:
    """The settings in which rows differ, and the input's size."""
    settings = [row.settings for row in section.rows]
    keys = dict.fromkeys(key for one in settings for key in one if key != "seed")
    return [key for key in keys if key == "input" or len({str(one.get(key)) for one in settings}) > 1]


def _size(run: Report) -> str:
    size = run.model.get("transform", {}).get("input_size")
    return " × ".join(map(str, size[1:])) if size else ""


def _plot(section: Section, folder: Path) -> list[Path]:
    """Draws a figure for each axis along which something was measured more than once."""
    found = []
    for axis, label in AXES.items():
        pictures = {"history": _histories(section, axis), "pretraining": _pretraining(section, axis)}
        for kind, curves in pictures.items():
            if not any(len(curve.points) > 1 for curve in curves):
                continue
            path = folder / f"{section.slug}_{kind}_{axis}.png"
            metric, chance = section.first.result["metric"], section.first.result.get("chance")
            x_label = f"{label} in pretraining" if kind == "pretraining" else label
            draw_curves(curves, path, section.protocol, x_label, metric, chance)
            found.append(path)
    return found


def _histories(section: Section, axis: str) -> list[Curve]:
    """What was measured on the way: a line for each row."""
    curves = []
    for row in section.rows:
        curve = Curve(row.name)
        for record in (record for run in row.runs for record in run.result.get("history") or ()):
            if axis in record and record.get("score") is not None:
                curve.add(record[axis], record["score"])
        curves.append(curve)
    return [curve for curve in curves if curve.points]


def _pretraining(section: Section, axis: str) -> list[Curve]:
    """The headline of each pretrained model against what it took; random weights of its kind took nothing."""
    differing = [key for key in _differing(section) if key != "input"]
    runs = [run for row in section.rows for run in row.runs if run.result.get("headline") is not None]
    random: dict[tuple[str, ...], list[float]] = {}
    for run in (run for run in runs if run.model.get("random_init")):
        random.setdefault(_kind(run, differing), []).append(run.result["headline"])
    curves: dict[str, Curve] = {}
    for run in (run for run in runs if not run.model.get("random_init") and run.model.get(axis)):
        kind = _kind(run, differing)
        name = ", ".join([run.model["model"], *kind[2:]])
        curve = curves.setdefault(name, Curve(name, {0: random[kind]} if kind in random else {}))
        curve.add(run.model[axis], run.result["headline"])
    return list(curves.values())


def _kind(run: Report, differing: Sequence[str]) -> tuple[str, ...]:
    """What random weights and the pretrained ones that are compared with them have in common."""
    settings = (f"{key}={run.settings.get(key)}" for key in differing)
    return (run.model.get("architecture") or run.model["model"], _size(run), *settings)
