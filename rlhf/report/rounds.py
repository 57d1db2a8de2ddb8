"""The part of a run's page that is about its rounds: a table, two figures, the same prompts through all rounds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rlhf.report.change import FALLS, direction
from rlhf.report.figures import curves
from rlhf.report.records import JUDGED_KEYS, Facts, JudgedPrompt, Round, Summary, read_rows, start_name
from rlhf.report.render import Figure

SHOWN = 6
LOPSIDED = 1.2  # times as far as the other end: then an interval is not told by half of its width


def last_evaluated(summary: Summary) -> Round:
    """Return the last round whose policy was evaluated; the last round of all where none was."""
    rounds = summary["rounds"]
    return next((entry for entry in reversed(rounds) if entry["policy"]["proxy"] is not None), rounds[-1])


def rounds_section(run: Path, summary: Summary) -> dict[str, Any] | None:
    """Return `table`, `figures` and `samples` for the template; None where there was one round only."""
    rounds = summary["rounds"]
    if len(rounds) < 2:
        return None
    start = start_name(summary)
    return {
        "table": _table(rounds, start),
        "figures": _figures(rounds, summary),
        "samples": _samples(run, rounds, start.removeprefix("the ")),
    }


def rounds_verdict(summary: Summary) -> list[str]:
    """Return sentences: which round is best, and where the true reward fell, by paired intervals."""
    rounds = summary["rounds"]
    stopped = [summary["stopped"]] if summary["stopped"] else []
    if len(rounds) < 2 or summary["best_round"] is None:
        return stopped
    best = summary["best_round"]
    sentences = [f"Of {len(rounds)} rounds, the true reward is highest in round {best}; RUN/best links to its policy."]
    if last_evaluated(summary)["policy"]["gold"] is None:
        sentences = [
            f"{len(rounds)} rounds; no true reward is known. RUN/best links to round {best}, the last whose policy no later reward "
            "model finds worse than the one before."
        ]
    falls = [
        entry["round"]
        for entry in rounds
        if entry["change_in_gold"] and direction(entry["change_in_gold"]["difference_ci"]) == FALLS
    ]
    if falls:
        sentences.append(f"The true reward fell in round {', '.join(map(str, falls))} (paired, 95 % interval below 0).")
    return sentences + stopped


def number(section: Facts, name: str, form: str = ".2f") -> str:
    """Return a number with half the width of its interval, or with its ends where it is not in the middle; "-" if not known.

    >>> number({"gold": 0.5, "gold_ci": [0.25, 0.75]}, "gold"), number({"gold": 1.0, "gold_ci": [0.69, 1.0]}, "gold")
    ('0.50 ±0.25', '1.00 [0.69, 1.00]')
    """
    value, interval = section.get(name), section.get(f"{name}_ci")
    if value is None:
        return "-"
    if interval is None:
        return f"{value:{form}}"
    below, above = value - interval[0], interval[1] - value
    if max(below, above) > LOPSIDED * min(below, above):
        return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"
    return f"{value:{form}} ±{(below + above) / 2:{form}}"


def _shares(section: Facts) -> str:
    shares = section["win_tie_lose"]
    return "-" if shares is None else " / ".join(f"{100 * share:.0f}" for share in shares) + " %"


def _change(change: Facts) -> str:
    """Return a paired difference, with its interval where there is one."""
    span = " [{:+.3f}, {:+.3f}]".format(*change["difference_ci"]) if change["difference_ci"] else ""
    return f"{change['difference']:+.3f}{span}"


def _wrong_around(look: Facts | None) -> str:
    """Return the share of all labels that contradict the true reward, before and after a second look."""
    if look is None or look["flip_rate"]["before"] is None:
        return "-"
    return f"{look['flip_rate']['before']:.1%} → {look['flip_rate']['after']:.1%}"


def _table(rounds: Sequence[Round], start: str) -> list[dict[str, str]]:
    """Return a row a round; a column of which nothing is known is left out. Hindsight is for runs without a true reward."""
    rows = []
    for entry in rounds:
        policy, labels, change = entry["policy"], entry["labels"], entry["change_in_gold"]
        look = entry.get("second_look")
        rows.append(
            {
                "round": str(entry["round"]),
                "true reward": number(policy, "gold"),
                "from the round before": _change(change) if change else "-",
                "win / tie / lose": _shares(change) if change else "-",
                f"against {start}": _shares(policy),
                "in hindsight": "-" if policy["gold"] is not None else number(entry.get("hindsight") or {}, "win_rate"),
                "KL": number(policy, "kl", ".1f"),
                "words": number(policy, "words", ".1f"),
                "different": number(policy, "different_answers"),
                "new labels": "-" if labels["fresh"] is None else str(labels["fresh"]),
                "wrong": "-" if labels["flip_rate"] is None else f"{labels['flip_rate']:.0%}",
                "looked at again": "-" if look is None else str(look["looked_at"]),
                "labels flipped": "-" if look is None else str(look["flipped"]),
                "all wrong, before and after": _wrong_around(look),
                "reward model before, on them": number(labels, "fresh_accuracy", ".3f"),
                "reward model, held out": number(entry["reward"], "accuracy", ".3f"),
            }
        )
    return known_columns(rows)


def known_columns(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows without columns that are "-" in all of them.

    >>> known_columns([{"a": "1", "b": "-", "c": "-"}, {"a": "2", "b": "3", "c": "-"}])
    [{'a': '1', 'b': '-'}, {'a': '2', 'b': '3'}]
    """
    known = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    return [{name: row[name] for name in known} for row in rows]


def _figures(rounds: Sequence[Round], summary: Summary) -> list[Figure]:
    evaluated = [entry for entry in rounds if entry["policy"]["proxy"] is not None]
    numbers = [float(entry["round"]) for entry in evaluated]
    figures: list[Figure] = []
    if evaluated and evaluated[0]["policy"]["gold"] is not None:
        start, gold = start_name(summary), [entry["policy"]["gold"] for entry in evaluated]
        best = summary["best_of_16"]["by_gold"]["gold"]
        series = {
            "policy": ([0.0, *numbers], [summary["sft"]["gold"], *gold]),
            f"best of 16 by true reward, from {start}": ([0.0, *numbers], [best] * (len(numbers) + 1)),
        }
        svg = curves(series, x=f"round (0 is {start})", y="true reward", whole_x=True)
        figures.append(("True reward by round", "On the same held-out prompts.", Markup(svg)))
    labels = [
        (float(e["round"]), e["labels"]["fresh_accuracy"]) for e in rounds if e["labels"]["fresh_accuracy"] is not None
    ]
    if labels:
        points = {"reward model of the round before": ([x for x, _ in labels], [y for _, y in labels])}
        note = "Its accuracy on pairs of its own policy that it has not seen."
        svg = curves({}, x="round", y="accuracy on the new labels", points=points, whole_x=True)
        figures.append(("Does the reward model keep up?", note, Markup(svg)))
    return figures


def _samples(run: Path, rounds: Sequence[Round], start: str) -> list[dict[str, object]]:
    """Return a few prompts with the answer of SFT, or of the backbone in its place, and each round's."""
    by_round: list[tuple[int, list[JudgedPrompt]]]
    by_round = [
        (e["round"], read_rows(run / f"round-{e['round']}" / "evaluate" / "samples.jsonl", JUDGED_KEYS)) for e in rounds
    ]
    by_round = [(number, rows) for number, rows in by_round if rows]
    if not by_round:
        return []
    return [
        {
            "prompt": by_round[0][1][i]["prompt"],
            "answers": [(start, by_round[0][1][i]["sft"], by_round[0][1][i]["gold_sft"])]
            + [(f"round {number}", rows[i]["policy"], rows[i]["gold_policy"]) for number, rows in by_round],
        }
        for i in range(min(SHOWN, len(by_round[0][1])))
    ]
