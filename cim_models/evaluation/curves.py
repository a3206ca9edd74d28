"""Scores against epochs or images seen, drawn with matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from cim_models.errors import ConfigError
from cim_models.files import replacing

STYLES = ("-", "--", "-.", ":")
"""Of ten lines each, whose colours differ."""


@dataclass
class Curve:
    """One line of a figure."""

    name: str
    points: dict[float, list[float]] = field(default_factory=dict)
    """x → shares in [0, 1], one for each repetition."""

    def add(self, x: float, share: float) -> None:
        """Adds a repetition."""
        self.points.setdefault(x, []).append(share)


def draw_curves(
    curves: Sequence[Curve], path: Path, title: str, x_label: str, y_label: str, chance: float | None = None
) -> None:
    """Draws lines of means, with a band of one standard deviation where there are repetitions.

    Args:
        curves: The lines.
        path: PNG file to write.
        title: Above.
        x_label: Below.
        y_label: At the left; shares are drawn in per cent.
        chance: A dotted line.

    Raises:
        ConfigError: If matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'cim-models[demo]'") from error
    figure = Figure(figsize=(6.4, 4.0 + 0.16 * len(curves)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for number, curve in enumerate(curves):
        xs = sorted(curve.points)
        means = [100 * mean(curve.points[x]) for x in xs]
        style = STYLES[number // 10 % len(STYLES)]
        (line,) = axes.plot(xs, means, style, color=f"C{number % 10}", marker="o", markersize=3, label=curve.name)
        spread = [100 * stdev(curve.points[x]) if len(curve.points[x]) > 1 else 0.0 for x in xs]
        if any(spread):
            low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(xs, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    if chance is not None:
        axes.axhline(100 * chance, linestyle=":", color="grey", linewidth=1, label="chance")
    axes.set(title=title, xlabel=x_label, ylabel=f"{y_label}, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
