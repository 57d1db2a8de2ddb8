"""The page of `rlhf audit`: how many labels are wrong, which ones, and what else is odd about the data."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup, escape

from rlhf.files import write_text
from rlhf.report.annotators import annotator_rows, annotator_sentences
from rlhf.report.figures import bars, histogram
from rlhf.report.meter import meter_sentences
from rlhf.report.noise import suspects, wanted, worth, wrong_labels
from rlhf.report.records import Facts
from rlhf.report.render import render
from rlhf.report.second_look import before_verdicts, second_look_sentences

MARKED_CHARACTERS = 1200


def write_audit_page(
    target: Path,
    result: Facts,
    suspicious: Sequence[Mapping[str, object]],
    means: Sequence[float],
    deviations: Sequence[float],
    *,
    contradictions: Sequence[Mapping[str, object]] = (),
    examples: Mapping[str, Sequence[Mapping[str, object]]] | None = None,
) -> Path:
    """Write the page of an audit; return its path.

    Args:
        result: the content of `audit.json`.
        suspicious: the most suspicious pairs: `row`, `prompt`, `chosen`, `rejected`, `strength_mean`, `strength_std`,
            `strength_votes`, `probability_wrong`.
        means, deviations: strength of every pair.
        contradictions: as `suspicious`, with `rating_gap`: the pairs whose ratings contradict their label.
        examples: as `suspicious`, of each trait that the labels want, the pairs that show it most.
    """
    deciles = result["buckets"]
    labels = [str(i + 1) for i in range(len(deciles))]
    figures = [
        (
            "Strength",
            "Mean difference of rewards; below 0 the vote contradicts the label.",
            histogram({"pairs": means}, x="mean"),
        ),
        (
            "Probability that the label is wrong",
            "By tenths of strength, weakest first.",
            bars(labels, [row["probability_wrong"] for row in deciles], x="tenth of the pairs", y="probability"),
        ),
    ]
    if any(deviations):  # all 0 where each pair has a single vote
        figures.insert(1, ("Disagreement among members", "", histogram({"pairs": deviations}, x="deviation")))
    page = render(
        "audit.html.jinja",
        title=f"Audit of {Path(result['pairs']).name}",
        result=result,
        verdict=_verdict(result),
        meter=meter_sentences(result["meter"]) if "meter" in result else [],
        second_look=second_look_sentences(result["second_look"]) if "second_look" in result else [],
        figures=[(title, note, Markup(svg)) for title, note, svg in figures],
        suspicious=[_marked(row) for row in suspicious],
        contradictions=[_marked(row) for row in contradictions],
        examples={name: [_marked(row) for row in rows] for name, rows in (examples or {}).items()},
        annotator_sentences=annotator_sentences(result["annotators"]),
        annotator_rows=annotator_rows(result["annotators"]),
        groups={name: table for name, table in result["by"].items() if table},
    )
    write_text(target, page)
    return target


def _marked(row: Mapping[str, object]) -> dict[str, object]:
    """Return a pair with the words marked in which its answers differ."""
    texts = mark(str(row["chosen"]), str(row["rejected"]))
    return {**row, "chosen": texts[0], "rejected": texts[1]}


def mark(first: str, second: str) -> tuple[Markup, Markup]:
    """Return both texts escaped, with the words that differ marked."""
    first, second = (
        text if len(text) <= MARKED_CHARACTERS else text[:MARKED_CHARACTERS] + " …" for text in (first, second)
    )
    first_words, second_words = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (first, second))
    marked: tuple[list[str], list[str]] = ([], [])
    for kind, a, b, c, d in difflib.SequenceMatcher(None, first_words, second_words, autojunk=False).get_opcodes():
        for parts, words in ((marked[0], first_words[a:b]), (marked[1], second_words[c:d])):
            text = str(escape("".join(words)))
            parts.append(text if kind == "equal" or not text.strip() else f"<mark>{text}</mark>")
    return Markup("".join(marked[0])), Markup("".join(marked[1]))


def _verdict(result: Facts) -> list[str]:
    noise, longer = result["vote"], result["length"]["longer_is_chosen"]
    sentences = [*before_verdicts(result), *wrong_labels(noise)]
    if noise["scale"] != 0:
        sentences.append(suspects(noise, len(result["suspicious"]), by_annotator=result.get("by_annotator", False)))
    sentences += worth(result)
    dropped = sum(result["dropped"].values())
    sentences.append(
        f"{dropped} of {result['rows']} rows were left out before the vote; the longer answer is the chosen one in "
        f"{longer:.0%} of the pairs."
    )
    sentences += wanted(result["wants"])
    contradictions, ties = len(result["contradictions"]), result["rating_ties"]
    if contradictions or ties:
        sentences.append(
            f"The file's own ratings contradict the label of {contradictions} pairs and are alike in {ties}."
        )
    if result["length"]["alarm"] is not None:
        sentences.append(result["length"]["alarm"])
    return sentences
