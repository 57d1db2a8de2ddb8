"""Templates to one self-contained page: opens without a network, prints, light and dark."""

import json
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from rlhf.report.figures import calibration, histogram, intervals

SHOWN_CHARACTERS = 900
Figure = tuple[str, str, Markup]


def render(template: str, **values: Any) -> str:
    """A template of this package; everything but figures is escaped."""
    environment = Environment(
        loader=PackageLoader("rlhf", "report"),
        autoescape=select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = _short
    return environment.get_template(template).render(**values)


def write_page(target: Path, text: str) -> Path:
    """Write beside and rename."""
    beside = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, target)
    return target


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl file of ours, but for marks of resumption; none if it is not there."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [row for line in file if "resumed_from" not in (row := json.loads(line))]


def reward_facts(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """A reward model's numbers on labelled pairs: name, value, what it is beside."""

    def value(name: str, form: str = ".3f") -> str:
        number, interval = report.get(name), report.get(f"{name}_ci")
        if number is None:
            return "-"
        return f"{number:{form}}" + (f"  [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")

    longer = report["length_baseline"]
    facts = [
        (
            "accuracy",
            value("accuracy"),
            f"{report['n']} held-out pairs of {report['prompts']} prompts, {report['ties']} ties",
        ),
        ("longer answer wins", f"{longer:.3f}", f"so judging by length alone reaches {max(longer, 1 - longer):.3f}"),
        (
            "accuracy, length-controlled",
            value("accuracy_length_controlled"),
            "0.5 for a model that looks at length alone",
        ),
        ("ECE", value("ece"), "distance between stated probability and frequency"),
        ("Brier score", value("brier"), "0.25 for a coin"),
        ("temperature", value("temperature", ".2f"), "that would fit these labels best; above 1 the model is too sure"),
    ]
    if report.get("accuracy_true") is not None:
        facts.insert(
            1,
            ("accuracy by the true reward", value("accuracy_true"), "of the same pairs, where the true reward decides"),
        )
    return facts


def reward_figures(report: dict[str, Any], pairs: list[dict[str, Any]]) -> list[Figure]:
    """Scores of both sides, calibration, accuracy by length difference and by difficulty."""
    sides = {"chosen": [r["score_chosen"] for r in pairs], "rejected": [r["score_rejected"] for r in pairs]}
    labels = [f"{row['low']:.0f}…{row['high']:.0f}" for row in report["by_length"]]
    figures = [
        ("Scores of held-out pairs", "The more they overlap, the less it knows.", histogram(sides, x="raw score")),
        ("Calibration", "Marks grow with the number of pairs.", calibration(report["calibration"])),
        (
            "Accuracy by length difference",
            "A line that rises is a model (or labels) that likes length.",
            intervals(report["by_length"], labels, x="characters: chosen minus rejected"),
        ),
    ]
    difficulty = report["by"].get("difficulty")
    if difficulty:
        figures.append(
            (
                "Accuracy by difficulty",
                "",
                intervals(list(difficulty.values()), list(difficulty), x="strength of the label"),
            )
        )
    return [(title, note, Markup(svg)) for title, note, svg in figures]


def worst(pairs: list[dict[str, Any]], count: int = 5) -> list[dict[str, Any]]:
    """The pairs in which the rejected answer is furthest above the chosen one."""
    return sorted(pairs, key=lambda row: row["score_chosen"] - row["score_rejected"])[:count]


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} … ({len(text)} characters)"
