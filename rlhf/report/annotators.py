"""What is known of those who label, in sentences."""

from collections.abc import Mapping
from typing import Any

from rlhf.report.records import Facts

NAMED = 10  # of many annotators, so many are named


def annotator_sentences(report: Mapping[str, Any], *, has_gold: bool = False) -> list[str]:
    """Return what a person should know of the annotators, the gravest first; nothing where nobody is named.

    Args:
        report: by name, as `rlhf.reward.annotators.AnnotatorReport`.
        has_gold: there were gold questions, so that one annotator alone can be judged too.

    >>> annotator_sentences({"ann": {"labels": 9, "ties": 0, "flags": ["few"]}})
    ['All labels are by one annotator, ann: there is nobody to compare with.']
    """
    if len(report) == 1 and not has_gold:
        return [f"All labels are by one annotator, {next(iter(report))}: there is nobody to compare with."]
    sentences = []
    coins = [name for name, entry in report.items() if "coin" in entry["flags"]]
    if coins:
        sentences.append(
            f"Worse than the others, and not shown to be better than a coin: {', '.join(coins)} ({len(coins)} of {len(report)})."
        )
    for name, entry in report.items():
        sentences += [f"{name} {_habit(flag, entry)}." for flag in entry["flags"] if flag not in ("coin", "few")]
    few = [name for name, entry in report.items() if "few" in entry["flags"]]
    if few:
        names = ", ".join(few[:NAMED]) + (", …" if len(few) > NAMED else "")
        sentences.append(f"Too few labels to be judged: {names} ({len(few)} of {len(report)}).")
    unknown = [name for name, entry in report.items() if entry["accuracy"] is None and "few" not in entry["flags"]]
    if unknown:
        sentences.append(
            f"Accuracy not known, as too little else is known of the pairs that they labelled: {', '.join(unknown)}."
        )
    return sentences


def control_sentences(gold: Mapping[str, Any], repeats: Mapping[str, Any]) -> list[str]:
    """Return what control questions tell of each annotator.

    Args:
        gold, repeats: by name, as `rlhf.reward.controls` reports them.

    >>> control_sentences({"ann": {"answered": 4, "right": 0.75, "right_ci": [0.19, 0.99]}}, {})
    ['ann: 75% of 4 gold questions right [0.19, 0.99].']
    """
    sentences = []
    for name, entry in gold.items():
        low, high = entry["right_ci"]
        sentences.append(
            f"{name}: {entry['right']:.0%} of {entry['answered']} gold questions right [{low:.2f}, {high:.2f}]."
        )
    for name, entry in repeats.items():
        low, high = entry["alike_ci"]
        sentences.append(
            f"{name}: {entry['alike']:.0%} of {entry['answered']} repeated questions answered alike [{low:.2f}, {high:.2f}], so an "
            f"accuracy of {entry['most_accuracy']:.2f} at most."
        )
    return sentences


def annotator_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a table's row for each annotator: name, labels, accuracy, drift, length beyond the others, flags."""
    return [
        (
            name,
            str(entry["labels"]),
            _estimate(entry, "accuracy"),
            _estimate(entry, "drift"),
            _estimate(entry["tastes"].get("length", {}), "beyond"),
            ", ".join(entry["flags"]),
        )
        for name, entry in report.items()
    ]


def _estimate(entry: Facts, name: str) -> str:
    """Return a number with its interval, or a dash where it is not known."""
    if entry.get(name) is None:
        return "-"
    low, high = entry[f"{name}_ci"]
    return f"{entry[name]:.2f}  [{low:.2f}, {high:.2f}]"


def _habit(flag: str, entry: Facts) -> str:
    """Return what an annotator does, as the rest of a sentence."""
    if flag in ("left", "right"):
        return f"chooses the answer on the left in {entry['left']:.0%} of the pairs"
    if flag in ("worse", "better"):
        return f"is {flag} in the later half of the labels: accuracy {entry['drift']:+.2f}"
    amount, _, feature = flag.partition(" ")
    return f"follows {feature} more than the others do: {amount} of it is chosen whichever answer is better"
