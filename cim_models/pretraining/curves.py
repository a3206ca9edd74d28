"""The curves of runs, side by side: `curves.png`."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from cim_models.errors import CheckpointError, ConfigError
from cim_models.files import replacing

PANELS = {
    "loss": ("loss", "prior_loss", "held_out_loss"),
    "gap with the exemplars of another image": ("gap", "held_out_gap"),
    "correlation IoU": ("iou", "iou_shuffled", "held_out_iou"),
    "deviation of target features": ("deviation", "held_out_deviation"),
    "RankMe of target features": ("held_out_rankme",),
    "cosine of online and target tokens": ("cosine", "held_out_cosine"),
    "norm of the gradient": ("grad_norm",),
    "learning rate": ("lr",),
    "images per second": ("images_per_second",),
}
"""Title: fields of `log.jsonl`, the first one drawn as a line, the second dashed, the third dotted."""
STYLES = ("-", "--", ":")


def plot_runs(runs: tuple[Path, ...], /, out: Path = Path("curves.png")) -> Path:
    """Draws what the logs of some runs say, over the images seen: one colour for each run.

    Args:
        runs: Run directories of `cim pretrain`, also of runs that go on.
        out: The picture; its suffix says of which kind.

    Returns:
        `out`.

    Raises:
        CheckpointError: If a run has no log, or an empty one.
        ConfigError: If matplotlib is not installed, no run is given, or the picture cannot be written.
    """
    if not runs:
        raise ConfigError("no run to draw; give one or more run directories")
    logs = {name: read_log(run) for name, run in zip(_names(runs), runs, strict=True)}
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("matplotlib is not installed: pip install 'cim-models[demo]'") from error
    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if out.suffix[1:].lower() not in kinds:
        raise ConfigError(f"{out}: no picture has such a suffix; there are {' '.join('.' + kind for kind in kinds)}")

    panels = {
        title: fields
        for title, fields in PANELS.items()
        if any(field in record for records in logs.values() for record in records for field in fields)
    }
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(15, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, min(3, len(panels)), squeeze=False).flat
    for axis, (title, fields) in zip(axes, panels.items(), strict=False):
        for number, records in enumerate(logs.values()):
            for field, style in zip(fields, STYLES, strict=False):
                x, y = curve(records, field)
                marker = "." if len(x) == 1 else ""
                axis.plot(x, y, style, marker=marker, color=f"C{number % 10}", label=field if not number else None)
        axis.set_title(title)
        axis.set_xlabel("images seen")
        axis.grid(alpha=0.3)
        if len(fields) > 1:
            axis.legend(fontsize="small")
    for axis in list(axes)[len(panels) :]:
        axis.remove()
    lines = [figure.axes[0].plot([], [], color=f"C{number % 10}")[0] for number in range(len(logs))]
    figure.legend(lines, list(logs), loc="outside upper center", ncols=min(len(logs), 6))
    with replacing(out) as file:
        figure.savefig(file, format=out.suffix[1:].lower(), dpi=110)
    return out


def read_log(run: Path) -> list[dict[str, Any]]:
    """The records of a run's log; a last line that is not whole, of a run that goes on or was killed, is left out.

    Raises:
        CheckpointError: If there is none, or it is damaged.
    """
    path = run / "log.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{path}: not the log of a run: {reason}; give run directories of `cim pretrain`"
        ) from error
    if not any("images_seen" in record for record in records):
        raise CheckpointError(f"{path}: nothing is logged yet; wait for the first `log_every` steps")
    return records


def curve(records: list[dict[str, Any]], field: str) -> tuple[np.ndarray, np.ndarray]:
    """Images seen and values of a field, where it is; steps between two lines lie between their images."""
    known = [(record["step"], record["images_seen"]) for record in records if "images_seen" in record]
    points = [(record["step"], record[field]) for record in records if field in record]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return np.interp(steps, *np.array(known, dtype=float).T), values


def _names(runs: tuple[Path, ...]) -> list[str]:
    """The paths without what they begin with in common; one run by its own name."""
    paths = [run.resolve() for run in runs]
    if len(set(paths)) < 2:
        return [f"{path.name}{f' ({n})' if n else ''}" for n, path in enumerate(paths)]
    common = os.path.commonpath(paths)
    names = [os.path.relpath(path, common) for path in paths]
    return [f"{name} ({n})" if name in names[:n] else name for n, name in enumerate(names)]
