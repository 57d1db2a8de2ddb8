"""Every kind of figure, drawn: its words are text in the SVG, it is the same again, and odd data draw too."""

import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import pytest

from rlhf.report.figures import bars, calibration, curves, effects, histogram, intervals

ROWS: list[dict[str, Any]] = [
    {"accuracy": 0.7, "accuracy_ci": [0.6, 0.8], "effect": 0.2, "effect_ci": [0.1, 0.3]},
    {"accuracy": 0.5, "accuracy_ci": [0.5, 0.5], "effect": -1.0, "effect_ci": [-2.0, 0.0]},
]
TABLE = [{"probability": 0.6, "frequency": 0.55, "n": 10}, {"probability": 0.9, "frequency": 1.0, "n": 1}]
KINDS: dict[str, tuple[Callable[[], str], set[str]]] = {
    "curves": (
        lambda: curves({"red": ([1, 2], [3, 4]), "none": ([], [])}, x="steps", y="loss", points={"dot": ([1], [2])}),
        {"red", "dot", "steps", "loss"},
    ),
    "one point": (lambda: curves({"red": ([1], [3])}, x="steps", y="loss", whole_x=True), {"steps", "loss"}),
    "nothing to draw": (lambda: curves({"a": ([], []), "b": ([], [])}, x="steps", y="loss"), {"steps", "loss"}),
    "histogram": (lambda: histogram({"a": [1.0, 2.0], "b": [5.0]}, x="score"), {"a", "b", "score", "share"}),
    "all alike": (lambda: histogram({"a": [2.0, 2.0]}, x="score"), {"score", "share"}),
    "bars": (lambda: bars(["first", "last"], [1.0, 2.0], x="group", y="rows"), {"first", "last", "group", "rows"}),
    "calibration": (lambda: calibration(TABLE), {"how often it is right"}),
    "intervals": (lambda: intervals(ROWS, ["hh", "shp"], x="source"), {"hh", "shp", "source", "accuracy"}),
    "effects": (lambda: effects(ROWS, ["longer", "polite"]), {"longer", "polite", "deviations of the score"}),
}


@pytest.mark.usefixtures("drawn")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_a_figure_says_what_it_shows_and_is_the_same_again(kind: str) -> None:
    draw, words = KINDS[kind]
    svg = draw()
    texts = {element.text for element in ET.fromstring(svg).iter() if element.tag.endswith("}text")}
    assert words <= texts
    assert draw() == svg
    assert len(svg) > 3000


def test_no_other_test_waits_for_a_drawing() -> None:
    draw, _ = KINDS["curves"]
    assert len(draw()) < 100
