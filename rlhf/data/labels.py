"""Questions for annotators and their verdicts: asked, collected, checked and turned into pairs."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from rlhf.data.rows import CUT, Messages, Pair, assistant_turn
from rlhf.files import read_jsonl

VERDICTS = ("first", "second", "tie", "skip")
FEWEST_ALIKE = 8


@dataclass(frozen=True)
class Question:
    """Two answers to one prompt, in a random order, of which an annotator says which is better.

    Attributes:
        id: names the question, whoever answers it and whenever.
        round: for which round it is asked.
        prompt: as messages.
        first, second: the answers' texts.
        source: what the pair is made of, where that is known.
        difference: what the round's reward model so far thinks: reward(first) - reward(second), where there is one.
        first_ended, second_ended: False for an answer that was cut off before its end; else None.
    """

    id: str
    round: int
    prompt: Messages
    first: str
    second: str
    source: str | None = None
    difference: float | None = None
    first_ended: bool | None = None
    second_ended: bool | None = None

    @property
    def marked(self) -> tuple[str, str]:
        """Return what the answers are known by (`rlhf.data.rows.marked`)."""
        cuts = (self.first_ended is False, self.second_ended is False)
        return self.first + CUT * cuts[0], self.second + CUT * cuts[1]

    def as_shown(self, *, first: str) -> "Question":
        """Return the question with this answer as the first one."""
        if first == self.first:
            return self
        return replace(
            self,
            first=self.second,
            second=self.first,
            difference=None if self.difference is None else -self.difference,
            first_ended=self.second_ended,
            second_ended=self.first_ended,
        )

    def as_row(self) -> dict[str, Any]:
        """Return the question as a row of `questions.jsonl`, without what is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Verdict:
    """One annotator's answer to one question.

    Attributes:
        label: first, second, tie, or skip (cannot say).
        seconds: how long it took, where that was measured.
        confidence: P(the answer that the label calls the better one is better), where the annotator says it; else it counts as 1.
    """

    id: str
    label: str
    annotator: str
    seconds: float | None = None
    confidence: float | None = None

    @property
    def share(self) -> float:
        """Return P(the first answer is better) by this verdict, which must not be a skip; a tie has 1/2."""
        sure = 1.0 if self.confidence is None else self.confidence
        return {"first": sure, "tie": 0.5, "second": 1 - sure}[self.label]


@dataclass
class Tally:
    """The pairs that a round's questions became, and what happened to all verdicts.

    Attributes:
        rows: canonical pairs, with `confidence` below 1 where annotators disagree or are not sure, and 1/2 for a tie.
        counts: questions labelled, unlabelled, skipped, tied, contested; verdicts counted, quarantined by reason.
        quarantine: the verdicts that were not counted, each with its reason.
    """

    rows: list[Pair] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    quarantine: list[dict[str, Any]] = field(default_factory=list)


class PairAgreement(TypedDict):
    """How far two annotators agree: on how many questions, the share of equal verdicts, Cohen's κ."""

    annotators: list[str]
    questions: int
    agree: float
    kappa: float | None


class Agreement(TypedDict):
    """Verdicts by annotator (skips left out), and the agreement of every two of them."""

    annotators: dict[str, int]
    pairs: list[PairAgreement]


def question_id(round_number: int, prompt: Messages, answers: Sequence[str]) -> str:
    """Return the name of a question: the same for the same pair in the same round, whatever the order of its answers.

    >>> question_id(2, [{"role": "user", "content": "a"}], ["x", "y"])[:2]
    'r2'
    """
    text = json.dumps([list(prompt), sorted(answers)], ensure_ascii=False)
    return f"r{round_number}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def is_asked_in_this_order(question: str, one: str, other: str) -> bool:
    """Tell which of two answers is the first of a question, by its id: the same pair has the same one first in every folder."""
    first, second = (
        hashlib.sha256(f"{question}\x1f{answer}".encode("utf-8", "surrogatepass")).digest() for answer in (one, other)
    )
    return first < second


def shows_second_on_the_left(annotator: str, question: str) -> bool:
    """Tell whether the labelling page swaps the sides of a question, by its id.

    It is drawn for every annotator and question, and the same when a page is loaded again.
    """
    return hashlib.sha256(f"{annotator}\x1f{question}".encode()).digest()[0] % 2 == 1


def read_questions(path: Path) -> list[Question]:
    """Read the questions of a round, as this pipeline wrote them."""
    return [Question(**row) for row in read_jsonl(path)]


def tally(questions: Sequence[Question], verdicts: Iterable[Verdict]) -> Tally:
    """Turn verdicts into pairs: each annotator's last verdict on a question counts, once; others are put aside, with reasons.

    P(chosen is better) is the share of annotators that say so, a tie being half a vote for each, and a verdict with a confidence
    that part of one; it is written down as `confidence` only where it is not 1, so that unanimous pairs stay ordinary ones.
    """
    asked = {question.id: question for question in questions}
    this_round = {question.round for question in questions}
    result = Tally()
    verdicts_on: defaultdict[str, dict[str, Verdict]] = defaultdict(dict)  # question → annotator → verdict
    reasons: Counter[str] = Counter()
    for verdict in verdicts:
        if verdict.id in asked:
            if verdict.annotator in verdicts_on[verdict.id]:
                reasons["superseded"] += 1
            verdicts_on[verdict.id][verdict.annotator] = verdict
            continue
        number = verdict.id.partition("-")[0].removeprefix("r")
        reason = "of another round" if number.isdigit() and int(number) not in this_round else "unknown id"
        reasons[reason] += 1
        result.quarantine.append({**asdict(verdict), "reason": reason})
    kinds: Counter[str] = Counter()
    for question in questions:
        given = verdicts_on.get(question.id, {})
        votes = {name: verdict for name, verdict in given.items() if verdict.label != "skip"}
        if not votes:
            kinds["skipped" if given else "unlabelled"] += 1
            continue
        share = sum(verdict.share for verdict in votes.values()) / len(votes)
        kinds["labelled"] += 1
        kinds["tied"] += share == 0.5
        kinds["contested"] += len({verdict.label for verdict in votes.values()}) > 1
        result.rows.append(_pair(question, share, sorted(votes)))
    names = ("labelled", "unlabelled", "skipped", "tied", "contested")
    result.counts = {name: kinds[name] for name in names} | {
        "verdicts": sum(map(len, verdicts_on.values())),
        **{f"quarantined: {reason}": count for reason, count in sorted(reasons.items()) if reason != "superseded"},
        "superseded": reasons["superseded"],
    }
    return result


def _pair(question: Question, share: float, annotators: Sequence[str]) -> Pair:
    first = assistant_turn(question.first, ended=question.first_ended is not False)
    second = assistant_turn(question.second, ended=question.second_ended is not False)
    best, other = (first, second) if share >= 0.5 else (second, first)
    row: Pair = {
        "prompt": question.prompt,
        "chosen": best,
        "rejected": other,
        "annotator": ", ".join(annotators),
        "round": question.round,
    }
    confidence = max(share, 1 - share)
    if confidence < 1:
        row["confidence"] = confidence
    if question.source is not None:
        row["source"] = question.source
    return row


def all_alike(verdicts: Iterable[Verdict]) -> str | None:
    """Say that all verdicts are one label, where that can hardly be chance; skips are left out.

    Which of two answers is the first says nothing, so as many verdicts for it as `FEWEST_ALIKE` are chance once in 2^8.

    >>> all_alike([Verdict(str(i), "first", "ann") for i in range(8)])
    'all 8 verdicts are for the first answer, though the order was random; was one key held down?'
    """
    counts = Counter(verdict.label for verdict in verdicts if verdict.label != "skip")
    if len(counts) != 1 or counts.total() < FEWEST_ALIKE:
        return None
    (only,) = counts
    if only == "tie":
        return f"all {counts.total()} verdicts are ties, so they say of no answer that it is better"
    return (
        f"all {counts.total()} verdicts are for the {only} answer, though the order was random; was one key held down?"
    )


def agreement(verdicts: Iterable[Verdict]) -> Agreement:
    """Measure Cohen's κ of every two annotators on the questions that both answered (skips left out).

        κ = (p_observed - p_chance) / (1 - p_chance)

    1 is perfect, 0 what chance would give; None where chance alone explains everything, or nothing is shared.

    >>> agreement([Verdict("a", "first", "x"), Verdict("a", "first", "y"), Verdict("b", "second", "x"),
    ...            Verdict("b", "second", "y")])["pairs"]
    [{'annotators': ['x', 'y'], 'questions': 2, 'agree': 1.0, 'kappa': 1.0}]
    """
    by_annotator: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for verdict in verdicts:
        if verdict.label != "skip":
            by_annotator[verdict.annotator][verdict.id] = verdict.label
    names = sorted(by_annotator)
    pairs: list[PairAgreement] = []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared = sorted(by_annotator[one].keys() & by_annotator[other].keys())
            if not shared:
                continue
            labels, other_labels = ([by_annotator[name][key] for key in shared] for name in (one, other))
            observed = sum(a == b for a, b in zip(labels, other_labels, strict=True)) / len(shared)
            chance = sum(labels.count(label) * other_labels.count(label) for label in VERDICTS) / len(shared) ** 2
            kappa = None if chance == 1 else (observed - chance) / (1 - chance)
            pairs.append({"annotators": [one, other], "questions": len(shared), "agree": observed, "kappa": kappa})
    return {"annotators": {name: len(by_annotator[name]) for name in names}, "pairs": pairs}
