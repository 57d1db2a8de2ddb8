"""Figures as inline SVG. Greys and two accents that can be read on white and on black."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY, BLUE, ORANGE = "#8a8f98", "#3b82c4", "#d9822b"
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


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x: str, y: str) -> str:
    """Lines over a common axis.

    Args:
        series: name → (x values, y values); empty ones are left out.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(x, y)
        for (name, (xs, ys)), color in zip(series.items(), (BLUE, ORANGE, GREY), strict=False):
            if xs:
                axes.plot(xs, ys, color=color, linewidth=1.6, label=name)
        if len(series) > 1:
            axes.legend(frameon=False, loc="best")
        return _svg(figure)


def histogram(series: Mapping[str, Sequence[float]], *, x: str) -> str:
    """Distributions over one axis, drawn as outlines so that they can overlap."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(x, "share")
        values = [value for ys in series.values() for value in ys]
        low, high = min(values), max(values)
        edges = [low + (high - low or 1.0) * i / 40 for i in range(41)]
        for (name, ys), color in zip(series.items(), (BLUE, ORANGE), strict=False):
            weights = [1 / len(ys)] * len(ys)
            axes.hist(ys, bins=edges, weights=weights, color=color, alpha=0.35, label=name)
            axes.hist(ys, bins=edges, weights=weights, color=color, histtype="step")
        axes.legend(frameon=False, loc="best")
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
