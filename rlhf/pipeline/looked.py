"""What a second look of an audit and one of a round have in common: blind questions and their verdicts.

What is known of labels after them is in `rlhf.pipeline.known`.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlhf.data.labelbook import BOOK
from rlhf.data.labels import Question, Verdict, all_alike, is_asked_in_this_order, question_id
from rlhf.data.rows import SIDES, Pair, answers_digest, has_ended, marked, pair_digest, told
from rlhf.errors import UserError

EXPERT_ERROR = 0.05  # how often an expert is taken to be wrong where nobody says it, and in the lab is


# ---- Questions ----


def _question(pair: Pair, look: int) -> Question:
    """Return a pair as a blind question: nothing in it says which answer was labelled the better one."""
    answers = [marked(pair, side) for side in SIDES]
    name = question_id(look, pair["prompt"], answers)
    first, second = SIDES if is_asked_in_this_order(name, *answers) else SIDES[::-1]
    return Question(
        name,
        look,
        pair["prompt"],
        told(pair, first),
        told(pair, second),
        first_ended=None if has_ended(pair[first]) else False,
        second_ended=None if has_ended(pair[second]) else False,
    )


def blind_questions(pairs: Sequence[Pair], chosen: Sequence[int], look: int, *, seed: str) -> list[Question]:
    """Return the chosen pairs as questions, pairs and sides in random order.

    Args:
        chosen: indices of pairs.
        look: how many times pairs were chosen, this one included; or the round.
    """
    rng = random.Random(f"{seed} {look}")
    return [_question(pairs[i], look) for i in rng.sample(chosen, len(chosen))]


# ---- Verdicts ----


@dataclass(frozen=True)
class Looked:
    """What experts said of some pairs.

    Attributes:
        agree, contradict, equal: [n] verdicts that agree with the label, contradict it, or call the answers equal.
        is_asked: [n] whether a pair was asked about.
        is_first: [n] whether no earlier row is of the same two answers, which one question is about.
        verdicts: all of them, skips among them.
        asked, skipped, looks: pairs asked about, those with nothing but skips, and batches of questions.
    """

    agree: Tensor
    contradict: Tensor
    equal: Tensor
    is_asked: Tensor
    is_first: Tensor
    verdicts: Sequence[Verdict]
    asked: int
    skipped: int
    looks: int

    @property
    def is_tie(self) -> Tensor:
        """Tell which pairs experts called equal and nothing else, [n] bool."""
        return (self.equal > 0) & (self.agree + self.contradict == 0)

    @property
    def teaches(self) -> bool:
        """Tell whether experts call one of the two answers of some pair the better one."""
        return bool((self.agree != self.contradict).any())

    @property
    def is_open(self) -> Tensor:
        """Tell which rows may be asked about, [n] bool: of every pair that was not asked about the first."""
        return self.is_first & ~self.is_asked

    def counts(self) -> dict[str, int]:
        """Count questions by what became of them; `agree` and `contradict` are about the label of a pair's first row."""
        answered = int(((self.agree + self.contradict + self.equal > 0) & self.is_first).sum())
        return {
            "asked": self.asked,
            "answered": answered,
            "open": self.asked - answered - self.skipped,
            "skipped": self.skipped,
            "ties": int((self.is_tie & self.is_first).sum()),
            "agree": int(((self.agree > self.contradict) & self.is_first).sum()),
            "contradict": int(((self.contradict > self.agree) & self.is_first).sum()),
        }


def count_opinions(pairs: Sequence[Pair], questions: Sequence[Question], verdicts: Sequence[Verdict]) -> Looked:
    """Count the verdicts on each pair."""
    of_question = {question.id: question for question in questions}
    names = {question.id: answers_digest(question.prompt, question.marked) for question in questions}
    better: defaultdict[str, Counter[str]] = defaultdict(Counter)
    others: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for verdict in (verdict for verdict in verdicts if verdict.id in of_question):
        question, name = of_question[verdict.id], names[verdict.id]
        if verdict.label in ("tie", "skip"):
            others[name][verdict.label] += 1
        else:
            better[name][question.marked[verdict.label == "second"]] += 1
    agree, contradict, equal = (torch.zeros(len(pairs)) for _ in range(3))
    is_asked, is_first = (torch.zeros(len(pairs), dtype=torch.bool) for _ in range(2))
    seen: set[str] = set()
    about = set(names.values())
    for i, pair in enumerate(pairs):
        name = pair_digest(pair)
        is_first[i], is_asked[i] = name not in seen, name in about
        seen.add(name)
        agree[i], contradict[i] = (better[name][marked(pair, side)] for side in SIDES)
        equal[i] = others[name]["tie"]
    skipped = sum(others[name]["skip"] > 0 and not better[name] and not others[name]["tie"] for name in about)
    looks = len({question.round for question in questions})
    return Looked(agree, contradict, equal, is_asked, is_first, verdicts, len(about), skipped, looks)


def check_verdicts(looked: Looked, folder: Path, *, asks_more: bool) -> None:
    """Refuse verdicts from which nothing can be learnt.

    Args:
        folder: the one that `rlhf label` takes.
        asks_more: further pairs are asked about, so that it is no end to have learnt nothing of these.

    Raises:
        UserError: they are on other pairs, or all for the same of two random sides; where nothing more is asked, also: there are
            none, all are skips, or all are ties.
    """
    labels = Counter(verdict.label for verdict in looked.verdicts if verdict.label != "skip")
    if labels and looked.counts()["answered"] == 0:
        raise UserError(
            f"{folder / BOOK}: its {labels.total()} verdicts are on other pairs than the {looked.asked} asked about; label these."
        )
    more = "ask about more of them with a larger --budget."
    if looked.asked == int(looked.is_first.sum()):
        more = "there are no others to ask about."
    if not asks_more and not labels and looked.skipped == looked.asked:
        raise UserError(f"{folder}: all {looked.asked} pairs were skipped; {more}")
    if not asks_more and not labels:
        raise UserError(
            f"{folder}: none of the {looked.asked} pairs has a verdict yet: `rlhf label {folder}`; then run the same command "
            "again."
        )
    if not asks_more and set(labels) == {"tie"}:
        raise UserError(
            f"{folder}: all {labels['tie']} verdicts are ties, so they say of no pair's label that it is wrong; {more}"
        )
    alike = all_alike(looked.verdicts)
    if alike is not None and set(labels) != {"tie"}:
        raise UserError(f"{folder}: {alike} Label again.")
