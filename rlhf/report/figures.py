"""Figures as inline SVG. Greys and two accents that can be read on white and on black."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf.report.records import Facts

GREY, BLUE, ORANGE, GREEN = "#8a8f98", "#3b82c4", "#d9822b", "#3f9b6c"
STYLE: Any = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhf",
}
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def curves(series: Series, *, x: str, y: str, points: Series | None = None, whole_x: bool = False) -> str:
    """Draw lines over a common axis, and marked points on top; return the SVG.

    Args:
        series: name → (x values, y values); empty ones are left out.
        points: the same, drawn as marks that are joined by a thin line.
        whole_x: x counts things, so that ticks between whole numbers mean nothing.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(x, y)
        for (name, (xs, ys)), color in zip(series.items(), (BLUE, ORANGE, GREY), strict=False):
            if xs:
                axes.plot(xs, ys, color=color, linewidth=1.6, label=name)
        for (name, (xs, ys)), color in zip((points or {}).items(), (GREEN, GREY), strict=False):
            axes.plot(xs, ys, color=color, linewidth=0.8, marker="o", markersize=4, label=name)
        if whole_x:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(axes.lines) > 1:
            axes.legend(frameon=False, loc="best")
        return _svg(figure)


def histogram(series: Mapping[str, Sequence[float]], *, x: str) -> str:
    """Draw distributions over one axis, as outlines so that they can overlap; return the SVG."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(x, "share")
        values = [value for ys in series.values() for value in ys]
        low, high = min(values), max(values)
        edges = [low + (high - low or 1.0) * i / 40 for i in range(41)]
        for (name, ys), color in zip(series.items(), (BLUE, ORANGE), strict=False):
            weights = [1 / len(ys)] * len(ys)
            axes.hist(ys, bins=edges, weights=weights, color=color, alpha=0.35, label=name, histtype="stepfilled")
            axes.hist(ys, bins=edges, weights=weights, color=color, histtype="step")
        if len(series) > 1:
            axes.legend(frameon=False, loc="best")
        return _svg(figure)


def bars(labels: Sequence[str], values: Sequence[float], *, x: str, y: str) -> str:
    """Draw one bar a label; return the SVG."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(x, y)
        axes.bar(list(labels), list(values), color=BLUE, alpha=0.7)
        return _svg(figure)


def calibration(table: Sequence[Mapping[str, float]]) -> str:
    """Draw stated probability against observed frequency, marks growing with the number of pairs; return the SVG."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure("probability that the model states", "how often it is right")
        axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1, linestyle="--", label="calibrated")
        total = sum(row["n"] for row in table)
        sizes = [12 + 260 * row["n"] / total for row in table]
        stated, seen = [row["probability"] for row in table], [row["frequency"] for row in table]
        axes.plot(stated, seen, color=BLUE, linewidth=1)
        axes.scatter(stated, seen, s=sizes, color=BLUE, alpha=0.7, label="this model")
        axes.set_xlim(0.48, 1.02)
        axes.set_ylim(min(0.4, *seen) - 0.03, 1.03)
        return _svg(figure)


def intervals(rows: Sequence[Facts], labels: Sequence[str], *, x: str, baseline: float = 0.5) -> str:
    """Draw a value with its interval in each of several groups; return the SVG.

    Args:
        rows: each with `accuracy` and `accuracy_ci`.
        baseline: where chance lies.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(x, "accuracy")
        values = [row["accuracy"] for row in rows]
        below = [max(0.0, row["accuracy"] - row["accuracy_ci"][0]) for row in rows]
        above = [max(0.0, row["accuracy_ci"][1] - row["accuracy"]) for row in rows]
        places = range(len(rows))
        axes.errorbar(places, values, yerr=[below, above], color=BLUE, fmt="o", capsize=3)
        axes.axhline(baseline, color=GREY, linewidth=1, linestyle="--")
        axes.set_xticks(list(places), list(labels))
        return _svg(figure)


def effects(rows: Sequence[Facts], labels: Sequence[str]) -> str:
    """Draw effects with their intervals, one below the other, around the line of no effect; return the SVG.

    Args:
        rows: each with `effect` and `effect_ci`.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure("deviations of the score", "")
        values = [row["effect"] for row in rows]
        below = [max(0.0, row["effect"] - row["effect_ci"][0]) for row in rows]
        above = [max(0.0, row["effect_ci"][1] - row["effect"]) for row in rows]
        places = range(len(rows))
        axes.errorbar(values, places, xerr=[below, above], color=BLUE, fmt="o", capsize=3)
        axes.axvline(0, color=GREY, linewidth=1, linestyle="--")
        axes.set_yticks(list(places), list(labels))
        axes.invert_yaxis()
        return _svg(figure)


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=GREY, alpha=0.2, linewidth=0.6)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
