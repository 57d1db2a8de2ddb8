"""The page of `rlhf evaluate`: the models side by side, a section a data set, and their biases."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from rlhf.files import write_text
from rlhf.report.evaluation_terminal import bias_sentence, length_sentence, letters, with_interval
from rlhf.report.figures import curves, effects
from rlhf.report.records import Facts
from rlhf.report.render import render, reward_facts, reward_figures, worst


def write_evaluation(target: Path, result: Facts, pairs: Mapping[str, Sequence[Facts]]) -> Path:
    """Write the page of an evaluation; return its path.

    Args:
        result: the JSON that `rlhf evaluate` writes.
        pairs: data set → its pairs with scores.
    """
    sections = []
    for name, report in result["data"].items():
        figures = reward_figures(report, pairs[name])
        ranked = report.get("rankings")
        if ranked and len(ranked["best_of_n"]) > 1:
            series = {
                label: ([row["kl"] for row in ranked["best_of_n"]], [row[key] for row in ranked["best_of_n"]])
                for label, key in (("chosen by this model", "by_model"), ("chosen by the labels", "by_label"))
            }
            note = "What choosing the best of n answers gives, and at which KL."
            figures.append(("Best of n", note, Markup(curves({}, x="KL, nats", y="label", points=series))))
        sections.append(
            {
                "name": name,
                "facts": reward_facts(report),
                "more": _more(report),
                "models": _models(report) if len(result["models"]) > 1 else [],
                "benchmark": report["benchmark"],
                "benchmark_rows": _figure_rows(report) if report["benchmark"] else [],
                "matrices": report.get("matrices", [{}])[0],
                "length": length_sentence(report),
                "groups": {k: v for k, v in report["by"].items() if k != "difficulty"},
                "read": report["read"],
                "figures": figures,
                "worst": worst(pairs[name]),
            }
        )
    named = dict(zip(letters(result["models"]), result["models"], strict=True))
    page = render(
        "evaluation.html.jinja",
        title=f"Evaluation of {result['model']}",
        letters=named if len(named) > 1 else {},
        columns=list(named) if len(named) > 1 else ["score"],
        sections=sections,
        probes=[_probe(letter, entry) for letter, entry in zip(named, result.get("probes", []), strict=False)],
    )
    write_text(target, page)
    return target


def _more(report: Facts) -> list[tuple[str, str, str]]:
    """Return the facts that only some data have: name, value, note."""
    facts = _verdicts(report["verdicts"]) if "verdicts" in report else []
    if "rankings" not in report:
        return facts
    ranked = report["rankings"]
    chance = f"by chance {ranked['best_of_k_by_chance']:.3f}; {ranked['prompts']} rankings, a tie is wrong"
    tau = "-" if ranked["tau_b"] is None else f"{ranked['tau_b']:.3f}"
    return [
        *facts,
        ("best of K is a best one", with_interval(ranked["best_of_k"], ranked["best_of_k_ci"]), chance),
        ("Kendall's tau-b", tau, "mean over prompts"),
    ]


def _verdicts(entry: Facts) -> list[tuple[str, str, str]]:
    """Return the facts of a causal model's verdicts on the same pairs: name, value, note."""
    difference = with_interval(entry["difference"], entry["difference_ci"], sign=True)
    note = f"{difference} from the reward model; ECE {entry['ece']:.3f}"
    order = f"A is said {entry['says_a']:.0%} of the time; mean bias {entry['bias']:+.2f} nats"
    letters = f"of the probability of its next token; {entry['too_long']} pairs were too long for it"
    return [
        (f"verdicts of {entry['model']}", with_interval(entry["accuracy"], entry["accuracy_ci"]), note),
        ("verdicts that turn with the order", with_interval(entry["turned"], entry["turned_ci"]), order),
        ("on the letters A and B", f"{entry['letter_share']:.0%}", letters),
    ]


def _models(report: Facts) -> list[tuple[str, str, str]]:
    """Return each model's letter, its accuracy, and how it differs from the first."""
    rows = []
    for letter, entry in zip(letters(report["models"]), report["models"], strict=True):
        note = "the first"
        if "difference" in entry:
            difference = with_interval(entry["difference"], entry["difference_ci"], sign=True)
            note = f"{difference} from A, p = {entry['p_value']:.2g} (paired over conversations)"
        rows.append((letter, with_interval(entry["accuracy"], entry["accuracy_ci"]), note))
    return rows


def _figure_rows(report: Facts) -> list[Facts]:
    """Return a benchmark's figures: name, a cell a model, what length rules get, how many rows."""
    rows: list[Facts] = []
    for figure, entry in report["figures"].items():
        cells = []
        for value in entry["models"]:
            cell = with_interval(value["value"], value["ci"])
            if "difference" in value:
                cell += f" ({with_interval(value['difference'], value['difference_ci'], sign=True)})"
            cells.append(cell)
        rows.append(
            {"name": figure, "cells": cells, "longer": entry["longer"], "shorter": entry["shorter"], "n": entry["n"]}
        )
    return rows


def _probe(letter: str, entry: Facts) -> Facts:
    """Return one model's probes: a figure, a sentence, and a row an edit."""
    known = {name: effect for name, effect in entry["effects"].items() if effect["effect"] is not None}
    rows = [
        {
            "name": name,
            "effect": "-" if name not in known else with_interval(effect["effect"], effect["effect_ci"], sign=True),
            "higher": "-" if effect["higher"] is None else f"{effect['higher']:.0%}",
            "n": effect["n"],
            "meaning": effect["meaning"],
        }
        for name, effect in entry["effects"].items()
    ]
    drawn = {name: effect for name, effect in known.items() if effect["effect_ci"] is not None}
    drawing = effects(list(drawn.values()), list(drawn)) if drawn else ""
    note = "0 is no bias; bars are 95 % intervals."
    return {
        "model": entry["model"],
        "letter": letter,
        "sentence": bias_sentence(entry),
        "rows": rows,
        "answers": entry["answers"],
        "deviation": entry["deviation"],
        "figures": [("Effects in deviations of the score", note, Markup(drawing))] if known else [],
    }
