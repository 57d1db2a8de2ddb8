"""Control questions of the labelling page: hidden among the others, so that they tell how reliable a person is.

A gold question has a right answer that somebody is sure of. A repeated question is one that the same person has answered before.
Neither becomes a training label: their verdicts are kept apart (`rlhf.data.labelbook`). Which comes when is drawn from names and
counts alone, so a page that is loaded again shows the same, and two people never see the same order.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from rlhf.data.labels import Question, Verdict, is_asked_in_this_order, question_id
from rlhf.data.rows import TIE, Pair, told
from rlhf.errors import UserError

Kind = Literal["gold", "repeat"]
GOLD_SHARE = 0.1  # of the questions that somebody answers, so many gold ones beside them, until all were asked
REPEATED_AFTER = 10  # answers later, at the soonest


@dataclass(frozen=True)
class Gold:
    """A question whose right answer is known: `first` or `second`."""

    question: Question
    label: str


class Control(NamedTuple):
    """A control question as it is asked, under a name of its own, and the name of the question that it is about."""

    question: Question
    of: str


class Repeat(NamedTuple):
    """What one person said of a question the first time, and when it came again."""

    annotator: str
    label: str
    label_again: str


class History(NamedTuple):
    """What one person has answered in a round, oldest first: ordinary questions, and which control questions.

    Attributes:
        verdicts: on ordinary questions.
        gold: ids of gold questions.
        repeated: ids of ordinary questions that came again.
    """

    verdicts: Sequence[Verdict]
    gold: Sequence[str]
    repeated: Sequence[str]


def gold_questions(rows: Sequence[Pair], asked: Sequence[Question], round_number: int) -> list[Gold]:
    """Return pairs as gold questions of a round, the chosen answer the right one, first or second as it is drawn.

    Pairs that the round asks about anyway are left out: their verdicts are labels.

    Raises:
        UserError: a tie, which has no right answer; nothing left.
    """
    ordinary = {question.id for question in asked}
    gold: dict[str, Gold] = {}
    for number, row in enumerate(rows, start=1):
        if row.get("confidence") == TIE:
            raise UserError(f"--gold: pair {number} is a tie, and a gold question needs a right answer; leave it out.")
        right, other = told(row, "chosen"), told(row, "rejected")
        name = question_id(round_number, row["prompt"], [right, other])
        is_first = is_asked_in_this_order(name, right, other)
        answers = (right, other) if is_first else (other, right)
        one = Gold(Question(name, round_number, row["prompt"], *answers), "first" if is_first else "second")
        if name not in ordinary:
            gold[name] = one
    if not gold:
        raise UserError(
            f"--gold: none of its {len(rows)} pairs can be a control question, as this round asks about them anyway; take others."
        )
    return list(gold.values())


def next_control(
    annotator: str, history: History, gold: Sequence[Gold], questions: Mapping[str, Question], *, repeat: float
) -> Control | None:
    """Return the control question that is due now for a person, or None.

    Args:
        questions: the round's ordinary ones by id.
        repeat: of the questions that somebody answers, the share that comes again.
    """
    count = len(history.verdicts)
    if len(history.gold) < controls_due(annotator, "gold", count, GOLD_SHARE):
        left = [one.question for one in gold if one.question.id not in history.gold]
        if left:
            question = min(left, key=lambda question: _draw(annotator, question.id))
            return Control(question, question.id)
    if len(history.repeated) < controls_due(annotator, "repeat", count, repeat):
        older = [v.id for v in history.verdicts[: max(0, count - REPEATED_AFTER)] if v.label != "skip"]
        again = [name for name in older if name in questions and name not in history.repeated]
        if again:
            return repeated(questions[min(again, key=lambda name: _draw(annotator, name))])
    return None


def repeated(question: Question) -> Control:
    """Return a question as it is asked a second time: under another name, from which its sides are drawn anew."""
    name = f"r{question.round}-{hashlib.sha256(f'{question.id} again'.encode()).hexdigest()[:16]}"
    return Control(replace(question, id=name), question.id)


def controls_due(annotator: str, kind: Kind, answered: int, share: float) -> int:
    """Return how many control questions of a kind are due after so many ordinary answers: each brings one with chance `share`.

    >>> controls_due("ann", "repeat", 100, 0.0), controls_due("ann", "repeat", 100, 1.0)
    (0, 100)
    """
    return sum(_draw(annotator, kind, str(number)) < share for number in range(answered))


def controls_expected(annotator: str, answered: int, gold: int, *, repeat: float) -> int:
    """Return how many control questions a person meets who answers so many ordinary ones, of `gold` gold questions."""
    before_the_last = max(0, answered - 1)
    golden = min(gold, controls_due(annotator, "gold", before_the_last, GOLD_SHARE))
    again = controls_due(annotator, "repeat", before_the_last, repeat)
    return golden + min(again, max(0, before_the_last - REPEATED_AFTER))


def _draw(*parts: str) -> float:
    """Return a number in [0, 1) that is drawn once for these texts."""
    return int.from_bytes(hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).digest()[:6]) / 2**48
