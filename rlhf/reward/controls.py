"""What control questions tell of those who label: how often they are right, and how often they agree with themselves."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypedDict

from rlhf.data.controls import Repeat
from rlhf.data.labels import Verdict
from rlhf.objectives.annotators import most_accuracy
from rlhf.reward.annotators import share_interval


class GoldReport(TypedDict):
    """How many gold questions one annotator answered, ties and skips left out, and the share of right answers with its interval."""

    answered: int
    right: float
    right_ci: list[float]


class RepeatReport(TypedDict):
    """How many questions one annotator answered twice, skips left out, and what that shows.

    Attributes:
        alike: the share of equal answers, with its 95 % interval.
        most_accuracy: the largest accuracy that the interval's upper end leaves possible.
    """

    answered: int
    alike: float
    alike_ci: list[float]
    most_accuracy: float


def report_gold(verdicts: Sequence[Verdict], right: Mapping[str, str]) -> dict[str, GoldReport]:
    """Report every annotator's answers to gold questions, in the order of their names.

    Args:
        right: the right label of each gold question, by its id.
    """
    decided = [v for v in verdicts if v.id in right and v.label in ("first", "second")]
    answered = Counter(v.annotator for v in decided)
    hits = Counter(v.annotator for v in decided if v.label == right[v.id])
    report: dict[str, GoldReport] = {}
    for name in sorted(answered):
        share = share_interval(hits[name], answered[name])
        report[name] = {"answered": answered[name], "right": share.best, "right_ci": [share.low, share.high]}
    return report


def report_repeats(repeats: Sequence[Repeat]) -> dict[str, RepeatReport]:
    """Report how often every annotator agrees with themselves where both times one answer was better, in the order of names."""
    twice = [repeat for repeat in repeats if not {repeat.label, repeat.label_again} & {"skip", "tie"}]
    answered = Counter(repeat.annotator for repeat in twice)
    alike = Counter(repeat.annotator for repeat in twice if repeat.label == repeat.label_again)
    report: dict[str, RepeatReport] = {}
    for name in sorted(answered):
        share = share_interval(alike[name], answered[name])
        report[name] = {
            "answered": answered[name],
            "alike": share.best,
            "alike_ci": [share.low, share.high],
            "most_accuracy": most_accuracy(share.high),
        }
    return report
