"""Figures are built as always, and only the tests that look at them have them drawn: drawing took a fifth of the pipeline's tests."""

import os

from matplotlib.figure import Figure

from rlhf.report import figures

DRAW = "RLHF_TESTS_DRAW"  # in the environment, so that the processes that a test starts know it too
UNDRAWN = '<svg xmlns="http://www.w3.org/2000/svg"></svg>'


def draw_only_where_asked() -> None:
    """From now on this process draws figures only while `DRAW` is in its environment."""
    drawn = figures._svg

    def drawn_if_asked(figure: Figure) -> str:
        return drawn(figure) if DRAW in os.environ else UNDRAWN

    figures._svg = drawn_if_asked
