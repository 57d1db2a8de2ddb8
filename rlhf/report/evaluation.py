"""The page of `rlhf evaluate`: one section a data set."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from rlhf.files import write_text
from rlhf.report.figures import curves
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
                "more": _more(report, result["against"]),
                "groups": {k: v for k, v in report["by"].items() if k != "difficulty"},
                "read": report["read"],
                "figures": figures,
                "worst": worst(pairs[name]),
            }
        )
    page = render(
        "evaluation.html.jinja", title=f"Evaluation of {result['model']}", model=result["model"], sections=sections
    )
    write_text(target, page)
    return target


def _more(report: Facts, against: str | None) -> list[tuple[str, str, str]]:
    """Return the facts that only some data have: name, value, note."""
    rows = []
    if "rankings" in report:
        ranked = report["rankings"]
        low, high = ranked["best_of_k_ci"]
        chance = f"by chance {ranked['best_of_k_by_chance']:.3f}; {ranked['prompts']} rankings, a tie is wrong"
        rows.append(("best of K is a best one", f"{ranked['best_of_k']:.3f}  [{low:.3f}, {high:.3f}]", chance))
        rows.append(
            ("Kendall's tau-b", "-" if ranked["tau_b"] is None else f"{ranked['tau_b']:.3f}", "mean over prompts")
        )
    if "against" in report:
        other = report["against"]
        low, high = other["difference_ci"]
        note = f"{against} has {other['accuracy']:.3f}; paired test over prompts: p = {other['p_value']:.2g}"
        rows.append(
            ("accuracy against the other model", f"{other['difference']:+.3f}  [{low:+.3f}, {high:+.3f}]", note)
        )
    for benchmark in (report["reward_bench"], report.get("rankings", {}).get("reward_bench_2")):
        rows += [(section, f"{value:.3f}", "RewardBench") for section, value in (benchmark or {}).items()]
    return rows
