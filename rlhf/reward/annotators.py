"""Who labels how well: every annotator's accuracy, tastes and drift, from a vote on the pairs and from labels that overlap."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Literal, NamedTuple, TypedDict

import torch
from scipy.stats import binomtest
from torch import Tensor

from rlhf.data.conversations import conversation_keys
from rlhf.data.labels import Question, Verdict, shows_second_on_the_left
from rlhf.data.rows import TIE, Pair, pair_digest, told
from rlhf.objectives.annotators import (
    MOST_SURE,
    Interval,
    PairLabels,
    accuracy_interval,
    fit_accuracy,
    others_log_odds,
    pair_log_odds,
    vote_worth,
)
from rlhf.reward.noise import NoiseEstimate
from rlhf.reward.overlap import told_by_others
from rlhf.reward.tastes import CONFIDENCE, TASTES, Taste, all_together, find_tastes
from rlhf.reward.wants import trait_differences
from rlhf.statistics import unpaired_difference

ENOUGH = 20  # labels, ties left out; who gave fewer is not judged, and shares one error rate with all others who did
UNNAMED = "(not named)"
SIGN = {"first": 1.0, "second": -1.0}


class AnnotatorReport(TypedDict):
    """What is known of one annotator; None where it is not.

    Attributes:
        labels, ties: how many labels, and how many of them are ties.
        accuracy: share of labels that are right where the votes are sure, ties left out, with its 95 % likelihood interval; on
            close pairs everybody errs more.
        error_rate: what posterior labels take: 1 - accuracy, drawn towards that of all labels.
        left: share of labels that choose the answer on the left, ties left out, with its 95 % interval.
        drift: accuracy in the later half of the labels minus that in the earlier, with its 95 % interval.
        tastes: by feature.
        flags: `few` labels; `coin`; `left` or `right`; `more` or `less` of a feature; `worse` or `better` later.
    """

    labels: int
    ties: int
    accuracy: float | None
    accuracy_ci: list[float] | None
    error_rate: float
    left: float | None
    left_ci: list[float] | None
    drift: float | None
    drift_ci: list[float] | None
    tastes: dict[str, Taste]
    flags: list[str]


class Labelled(NamedTuple):
    """Labels with the names behind them.

    Attributes:
        labels: `annotator` numbers the groups that share an error rate.
        side: [n] 1 where the pair's first answer is chosen, -1 where it is not, also in a tie.
        names: [n] who gave each label.
        conversation: [n] int64, equal for labels that are not independent: on pairs of one conversation.
        groups: how many error rates there are.
        scale: b, what a vote is worth; 0 where it says nothing.
    """

    labels: PairLabels
    side: Tensor
    names: Sequence[str]
    conversation: Tensor
    groups: int
    scale: float = 0.0


def labels_of_rows(rows: Sequence[Pair], strength: Tensor, noise: NoiseEstimate) -> Labelled:
    """Return canonical pairs as labels, each "first" or "second" of its pair, with what the vote says of the pair before.

    Rows of the same two answers are labels of one pair, whichever is chosen. What a vote is worth is fitted with an accuracy for
    each annotator, where two can be told apart; votes that say nothing of the labels (`noise.scale` 0) stay so.

    Args:
        strength: [n] mean out-of-fold difference of each row.
        noise: whose `scale` is what a vote is worth with one accuracy for all, in nats.
    """
    numbers, sides = pair_numbers(rows)
    pair, side = torch.tensor(numbers), torch.tensor(sides, dtype=torch.float64)
    is_tie = torch.tensor([row.get("confidence") == TIE for row in rows])
    votes = torch.bincount(pair)
    conversation = numbered(conversation_keys([row["prompt"] for row in rows]))
    prior = torch.zeros(len(votes), dtype=torch.float64)
    labelled = grouped(pair, side, side * ~is_tie, who_labelled(rows), conversation, prior)
    scale = noise.scale
    if scale > 0 and labelled.groups > 1 and not is_tie.all():
        scale = vote_worth(strength[~is_tie], labelled.labels.annotator[~is_tie], labelled.groups)
    prior = labelled.labels.prior.index_add(0, pair, scale * strength.double() * side) / votes
    return labelled._replace(labels=labelled.labels._replace(prior=prior), scale=scale)


def who_labelled(rows: Sequence[Pair]) -> list[str]:
    """Return who gave each label: its annotator, or where no row names one its source."""
    column: Literal["annotator", "source"] = "annotator" if any(row.get("annotator") for row in rows) else "source"
    return [row.get(column) or UNNAMED for row in rows]


def pair_numbers(rows: Sequence[Pair]) -> tuple[list[int], list[float]]:
    """Return which distinct pair each row is a label of, numbered as they come, and 1 where its first answer is chosen, else -1.

    The first answer is that of the pair's first row that is chosen there.
    """
    numbers: dict[str, tuple[int, str]] = {}
    pair, sign = [], []
    for row in rows:
        chosen = told(row, "chosen")
        number, first = numbers.setdefault(pair_digest(row), (len(numbers), chosen))
        pair.append(number)
        sign.append(1.0 if chosen == first else -1.0)
    return pair, sign


def numbered(names: Sequence[str]) -> Tensor:
    """Return a number for each name, as they come, [n] int64: equal ones have the same."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names], dtype=torch.long)


def grouped(
    pair: Tensor, side: Tensor, sign: Tensor, names: Sequence[str], conversation: Tensor, prior: Tensor
) -> Labelled:
    """Return labels with their annotators numbered; those with fewer than `ENOUGH` labels that are no tie are one group."""
    decided = Counter(name for name, value in zip(names, sign.tolist(), strict=True) if value)
    known = sorted(name for name in set(names) if decided[name] >= ENOUGH)
    number = {name: place for place, name in enumerate(known)}
    group = [number.get(name, len(known)) for name in names]
    groups = len(known) + (len(known) in group)
    return Labelled(PairLabels(pair, torch.tensor(group), sign, prior), side, names, conversation, groups)


class LabelPosterior(NamedTuple):
    """What the vote and all labels say of each pair, for its rows.

    Attributes:
        right: [n] P(chosen is better).
        rows: indices of one row a pair: its first that is no tie, or its first.
    """

    right: Tensor
    rows: list[int]


def posterior_by_annotator(rows: Sequence[Pair], strength: Tensor, noise: NoiseEstimate) -> LabelPosterior | None:
    """Return P(chosen is better) by the vote and all labels of a pair, each with the error rate of who gave it.

    Returns:
        None where the error rate of the whole says as much: no pair has labels of several annotators, and fewer than two error
        rates can be told apart (one annotator, or none with `ENOUGH` labels).
    """
    labelled = labels_of_rows(rows, strength, noise)
    labels = labelled.labels
    given = set(zip(labels.pair.tolist(), labelled.names, strict=True))
    if labelled.groups < 2 and len(given) == len(labels.prior):
        return None
    odds = pair_log_odds(labels, fit_accuracy(labels, labelled.groups))[labels.pair]
    first: dict[int, int] = {}
    for i in sorted(range(len(rows)), key=lambda i: rows[i].get("confidence") == TIE):
        first.setdefault(int(labels.pair[i]), i)
    return LabelPosterior(torch.sigmoid(labelled.side * odds).to(strength), sorted(first.values()))


def report_rows(rows: Sequence[Pair], strength: Tensor, noise: NoiseEstimate) -> dict[str, AnnotatorReport]:
    """Report the annotators that canonical pairs name, or their sources, by a vote and by pairs that several labelled.

    Args:
        strength: [n] mean out-of-fold difference of each row.

    Returns:
        an entry a name; empty where nobody is named and all are of one source.
    """
    if not any(row.get("annotator") for row in rows) and len(set(who_labelled(rows))) < 2:
        return {}
    features = {trait: trait_differences(rows, trait) for trait in TASTES}
    return report_annotators(labels_of_rows(rows, strength, noise), features)


def report_verdicts(
    verdicts: Sequence[Verdict], *, right: Mapping[str, str], questions: Sequence[Question] = ()
) -> dict[str, AnnotatorReport]:
    """Report the annotators of verdicts, oldest first, by gold questions and those that several answered; skips are left out.

    Places are those of the labelling page. A verdict that was read from a file was given elsewhere: its place is as good as
    drawn, and says nothing.

    Args:
        right: the right label of each gold question, by its id.
        questions: what the verdicts are on; one that is not among them counts as a conversation of its own.
    """
    verdicts = [verdict for verdict in verdicts if verdict.label != "skip"]
    if not verdicts:
        return {}
    numbers = {name: number for number, name in enumerate(dict.fromkeys(verdict.id for verdict in verdicts))}
    sign = torch.tensor([SIGN.get(verdict.label, 0.0) for verdict in verdicts]).double()
    swapped = torch.tensor([shows_second_on_the_left(verdict.annotator, verdict.id) for verdict in verdicts])
    pair = torch.tensor([numbers[verdict.id] for verdict in verdicts])
    known = torch.tensor([SIGN.get(right.get(name, ""), 0.0) for name in numbers], dtype=torch.float64)
    prior = known * torch.logit(torch.tensor(MOST_SURE, dtype=torch.float64))
    keys = conversation_keys([question.prompt for question in questions])
    of = dict(zip([question.id for question in questions], keys, strict=True))
    conversation = numbered([of.get(verdict.id, verdict.id) for verdict in verdicts])
    labelled = grouped(pair, sign, sign, [verdict.annotator for verdict in verdicts], conversation, prior)
    return report_annotators(labelled, {}, left=torch.where(swapped, -sign, sign))


def report_annotators(
    labelled: Labelled, features: Mapping[str, Sequence[float]], *, left: Tensor | None = None
) -> dict[str, AnnotatorReport]:
    """Report every annotator, in the order of their names.

    Args:
        features: by name, of each label, what its chosen answer has more of than the rejected one; for a tie it is not read.
        left: [n] 1 where the answer on the left was chosen, -1 the right one; None where places are not known.
    """
    # 1. Accuracy, by maximum likelihood given what all others say, and by the fit that posterior labels take.
    accuracy = fit_accuracy(labelled.labels, labelled.groups)
    others = others_log_odds(labelled.labels, accuracy)
    told = told_by_others(labelled.labels, labelled.names)
    others[torch.tensor([name not in told for name in labelled.names])] = 0.0
    by_name, counts, conversation = _decided(labelled), Counter(labelled.names), labelled.conversation
    group_of = dict(zip(labelled.names, labelled.labels.annotator.tolist(), strict=True))
    report = {
        name: _entry(counts[name], others[mine], conversation[mine], error_rate=1 - accuracy[group_of[name]].item())
        for name, mine in by_name.items()
    }

    # 2. Places, drift and tastes, of those who gave enough labels.
    judged = {name: mine for name, mine in by_name.items() if len(mine) >= ENOUGH}
    tastes = find_tastes(others, features, judged, conversation) if len(judged) > 1 else {}
    for name, mine in judged.items():
        entry = report[name]
        entry["tastes"] = tastes.get(name, {})
        if left is not None:
            share = share_interval(int((left[mine] > 0).sum()), len(mine))
            entry["left"], entry["left_ci"] = share.best, [share.low, share.high]
        if entry["accuracy"] is not None:
            drift = _drift(others[mine], conversation[mine], CONFIDENCE)
            entry["drift"], entry["drift_ci"] = drift.best, [drift.low, drift.high]

    # 3. What a person should look at.
    for name, entry in report.items():
        labels = judged.get(name)
        entry["flags"] = (
            ["few"] if labels is None else _flags(report, name, others[labels], conversation[labels], len(judged))
        )
    return report


def _entry(count: int, others: Tensor, conversation: Tensor, *, error_rate: float) -> AnnotatorReport:
    """Return the report of an annotator of `count` labels, of whom only accuracy and error rate are known so far."""
    best, low, high = accuracy_interval(others, conversation)
    is_known = (low, high) != (0.0, 1.0)
    return {
        "labels": count,
        "ties": count - len(others),
        "accuracy": best if is_known else None,
        "accuracy_ci": [low, high] if is_known else None,
        "error_rate": error_rate,
        "left": None,
        "left_ci": None,
        "drift": None,
        "drift_ci": None,
        "tastes": {},
        "flags": [],
    }


def _decided(labelled: Labelled) -> dict[str, Tensor]:
    """Return the indices of every annotator's labels that are no tie, in their order, by name."""
    indices: dict[str, list[int]] = {name: [] for name in sorted(set(labelled.names))}
    for i, (name, sign) in enumerate(zip(labelled.names, labelled.labels.sign.tolist(), strict=True)):
        if sign:
            indices[name].append(i)
    return {name: torch.tensor(mine, dtype=torch.long) for name, mine in indices.items()}


def _drift(others: Tensor, conversation: Tensor, confidence: float) -> Interval:
    """Return the accuracy in the later half of an annotator's labels minus that in the earlier half, with its interval."""
    half = len(others) // 2
    parts = ((others[:half], conversation[:half]), (others[half:], conversation[half:]))
    earlier, later = (accuracy_interval(*part, confidence=confidence) for part in parts)
    return Interval(*unpaired_difference(later, earlier))


def _flags(
    report: Mapping[str, AnnotatorReport], name: str, others: Tensor, conversation: Tensor, judged: int
) -> list[str]:
    """Return what a person should look at, by intervals that hold for all judged annotators together, but for `coin`.

    - `coin`: not shown better than one, and shown worse than the median of those who are shown better.
    - `left`, `right`: how often one place is chosen.
    - `more`, `less` of a feature: beyond what all others do, and in the same direction by the annotator's own choices.
    - `worse`, `better`: in the later half of the labels.
    """
    entry = report[name]
    flags: list[str] = []
    better = [
        other["accuracy"]
        for other in report.values()
        if other["accuracy"] is not None and other["accuracy_ci"] is not None and other["accuracy_ci"][0] > 0.5
    ]
    if entry["accuracy_ci"] is not None and better:
        low, high = entry["accuracy_ci"]
        flags += ["coin"] * (low <= 0.5 and high < median(better))
    together = all_together(judged)
    if entry["left"] is not None:
        count = entry["labels"] - entry["ties"]
        _, low, high = share_interval(round(entry["left"] * count), count, together)
        flags += ["left"] * (low > 0.5) + ["right"] * (high < 0.5)
    for feature, taste in entry["tastes"].items():
        (low, high), slope = taste["beyond_ci"], taste["slope"]
        flags += [f"more {feature}"] * (low > 0 and slope > 0) + [f"less {feature}"] * (high < 0 and slope < 0)
    if entry["drift"] is not None:
        _, low, high = _drift(others, conversation, together)
        flags += ["worse"] * (high < 0) + ["better"] * (low > 0)
    return flags


def share_interval(count: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Return the share `count` of `total`, with its exact binomial interval.

    >>> share_interval(0, 1)
    Interval(best=0.0, low=0.0, high=0.975)
    """
    interval = binomtest(count, total).proportion_ci(confidence)
    return Interval(count / total, float(interval.low), float(interval.high))
