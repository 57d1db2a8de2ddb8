"""Templates to one self-contained page: opens without a network, prints, light and dark."""

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from rlhf.report.figures import calibration, histogram, intervals
from rlhf.report.records import Facts

SHOWN_CHARACTERS = 900
Figure = tuple[str, str, Markup]


def render(template: str, **values: object) -> str:
    """Render a template of this package; everything but figures is escaped."""
    environment = Environment(
        loader=PackageLoader("rlhf", "report"),
        autoescape=select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = _short
    return environment.get_template(template).render(**values)


def reward_facts(report: Facts) -> list[tuple[str, str, str]]:
    """Return a reward model's numbers on labelled pairs: name, value, and what to compare it with."""

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
        (
            "longer answer wins",
            value("length_baseline"),
            f"so judging by length alone reaches {max(longer, 1 - longer):.3f}",
        ),
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


def reward_figures(report: Facts, pairs: Sequence[Facts]) -> list[Figure]:
    """Draw scores of both sides, calibration, accuracy by length difference and by difficulty."""
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


def worst(pairs: Sequence[Facts], count: int = 5) -> list[Facts]:
    """Return the pairs in which the rejected answer is furthest above the chosen one."""
    return sorted(pairs, key=lambda row: row["score_chosen"] - row["score_rejected"])[:count]


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} … ({len(text)} characters)"
