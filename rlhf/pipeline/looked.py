"""What a second look of an audit and one of a round have in common: blind questions, their verdicts, what is known after them."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from rlhf.data.labelbook import BOOK
from rlhf.data.labels import Question, Verdict, all_alike, question_id
from rlhf.data.rows import SIDES, TIE, Pair, answer, asked, told
from rlhf.errors import UserError
from rlhf.models.load import build_reward_model, load_tokenizer
from rlhf.models.scalar_head import score_head
from rlhf.objectives.second_look import (
    expected_change,
    posterior_of_observations,
    verdicts_in_labels,
    worth_in_sure_labels,
)
from rlhf.reward.denoise import flip_pair
from rlhf.reward.model import RewardModel
from rlhf.reward.noise import NoiseEstimate

LEAST_RATE = 0.01  # no label is taken to be beyond doubt, or no expert could contradict it
EXPERT_ERROR = 0.05  # how often an expert is taken to be wrong where nobody says it, and in the lab is


# ---- Questions ----


def _question(pair: Pair, look: int, *, swapped: bool) -> Question:
    """Return a pair as a blind question: nothing in it says which answer was labelled the better one."""
    first, second = (told(pair, side) for side in (reversed(SIDES) if swapped else SIDES))
    return Question(question_id(look, pair["prompt"], [first, second]), look, pair["prompt"], first, second)


def blind_questions(pairs: Sequence[Pair], chosen: Sequence[int], look: int, *, seed: str) -> list[Question]:
    """Return the chosen pairs as questions, pairs and sides in random order.

    Args:
        chosen: indices of pairs.
        look: how many times pairs were chosen, this one included; or the round.
    """
    rng = random.Random(f"{seed} {look}")
    return [_question(pairs[i], look, swapped=rng.random() < 0.5) for i in rng.sample(chosen, len(chosen))]


def open_pairs(pairs: Sequence[Pair], is_asked: Tensor) -> Tensor:
    """Tell which pairs may be asked about, [n] bool: not asked yet, and of a pair that stands in several rows the first."""
    seen: set[str] = set()
    is_open = ~is_asked
    for i, pair in enumerate(pairs):
        name = _question(pair, 1, swapped=False).id
        is_open[i] &= name not in seen
        seen.add(name)
    return is_open


# ---- Verdicts ----


@dataclass(frozen=True)
class Looked:
    """What experts said of some pairs.

    Attributes:
        agree, contradict, equal: [n] verdicts that agree with the label, contradict it, or call the answers equal.
        is_asked: [n] whether a pair was asked about.
        is_first: [n] whether no earlier row is of the same two answers, which one question is about.
        verdicts: all of them, skips among them.
        asked, skipped, looks: questions, those with nothing but skips, and batches of them.
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


def count_opinions(pairs: Sequence[Pair], questions: Iterable[Question], verdicts: Sequence[Verdict]) -> Looked:
    """Count the verdicts on each pair, an annotator's last one each."""
    agree, contradict, equal = (torch.zeros(len(pairs)) for _ in range(3))
    is_asked, is_first = (torch.zeros(len(pairs), dtype=torch.bool) for _ in range(2))
    seen: set[str] = set()
    by_name = {question.id.partition("-")[2]: question for question in questions}
    labels: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for verdict in verdicts:
        labels[verdict.id.partition("-")[2]][verdict.label] += 1
    for i, pair in enumerate(pairs):
        question = _question(pair, 1, swapped=False)
        name = question.id.partition("-")[2]
        is_first[i] = name not in seen
        seen.add(name)
        if name in by_name:
            same, other = ("first", "second") if by_name[name].first == question.first else ("second", "first")
            is_asked[i], counts = True, labels[name]
            agree[i], contradict[i], equal[i] = counts[same], counts[other], counts["tie"]
    skipped = sum(name in by_name and set(counts) == {"skip"} for name, counts in labels.items())
    looks = len({question.round for question in by_name.values()})
    return Looked(agree, contradict, equal, is_asked, is_first, verdicts, len(by_name), skipped, looks)


def check_verdicts(looked: Looked, folder: Path) -> None:
    """Refuse verdicts from which nothing can be learnt.

    Args:
        folder: the one that `rlhf label` takes.

    Raises:
        UserError: there are none, or none on these pairs; all are ties, or all are for the same of two random sides.
    """
    labels = Counter(verdict.label for verdict in looked.verdicts if verdict.label != "skip")
    if not labels:
        raise UserError(
            f"{folder}: none of the {looked.asked} pairs has a verdict yet: `rlhf label {folder}`; then run the same command "
            "again."
        )
    if looked.counts()["answered"] == 0:
        raise UserError(
            f"{folder / BOOK}: its {labels.total()} verdicts are on other pairs than the {looked.asked} asked about; label these."
        )
    if set(labels) == {"tie"}:
        raise UserError(
            f"{folder}: all {labels['tie']} verdicts are ties, so they say of no label that it is wrong; label more."
        )
    alike = all_alike(looked.verdicts)
    if alike is not None:
        raise UserError(f"{folder}: {alike} Label again.")


# ---- What is known after them ----


def beliefs(strength: Tensor, noise: NoiseEstimate, verdicts: Tensor) -> Tensor:
    """Return P(chosen is better) of every pair, [n], at the likeliest rate of wrong labels.

    Args:
        strength: [n] of the vote, nats.
        verdicts: [n] their log-odds that the label is right, nats.
    """
    return posterior_of_observations(strength, verdicts, flip_rate=_flip_rate(noise), scale=noise.scale)


def _flip_rate(noise: NoiseEstimate) -> float:
    """Return the likeliest share of wrong labels, proved or not: a look asks where they may be wrong."""
    return min(max(noise.likeliest, LEAST_RATE), 0.5)


def expected_gain(
    strength: Tensor, noise: NoiseEstimate, right: Tensor, chosen: Sequence[int], *, expert_error: float
) -> dict[str, Any]:
    """Return what verdicts on the chosen pairs are expected to add.

    Args:
        strength: [n] of the vote, nats.
        right: [n] P(chosen is better).
        chosen: indices of pairs.
        expert_error: how often experts are wrong.

    Returns:
        how many `pairs`; `worth`, in sure labels; `labels`, in more labels like these, None where such labels say nothing.
    """
    asked, better, rate = right[chosen], torch.sigmoid(noise.scale * strength), _flip_rate(noise)
    worth = 4 * expected_change(asked, error_rate=expert_error).sum().item()
    labels = verdicts_in_labels(asked, better, error_rate=expert_error, flip_rate=rate).item()
    return {"pairs": len(chosen), "worth": worth, "labels": labels if math.isfinite(labels) else None}


def gains(before: Tensor, after: Tensor, is_tie: Tensor) -> dict[str, dict[str, float]]:
    """Return what verdicts changed: how many labels are expected to be wrong, and how many sure ones all are worth.

    Args:
        before, after: [n] P(chosen is better) without and with the verdicts.
        is_tie: [n] pairs whose answers experts call equal: no label of theirs is wrong.

    Returns:
        `wrong` {`file`: as labelled, `before`, `after`: each flipped to the likelier side}, and `worth` {`before`, `after`}.
    """
    return {
        "wrong": {
            "file": (1 - before).sum().item(),
            "before": _still_wrong(before),
            "after": _still_wrong(after[~is_tie]),
        },
        "worth": {
            "before": worth_in_sure_labels(before).sum().item(),
            "after": worth_in_sure_labels(after).sum().item(),
        },
    }


def _still_wrong(right: Tensor) -> float:
    """Return how many labels are expected to be wrong where each is flipped to the likelier side: Σ min(p, 1 - p)."""
    return torch.minimum(right, 1 - right).sum().item()


def pair_features(model: str | Path, pairs: Sequence[Pair]) -> Tensor:
    """Return what a reward head on this model would read of each pair, chosen minus rejected, [n, h].

    An encoder has no such head; there all features are 1, and pairs are taken by their labels' doubt alone.
    """
    set_seed(0)
    tokenizer = load_tokenizer(model, conversational=True)
    assert isinstance(tokenizer.pad_token_id, int)
    network = build_reward_model(model, pad_token_id=tokenizer.pad_token_id)
    if score_head(network) is None:
        return torch.ones(len(pairs), 1)
    reward = RewardModel(network.eval(), tokenizer, conversational=True)
    chosen, rejected = (
        reward.features([asked(pair, side) for pair in pairs], [answer(pair, side) for pair in pairs]) for side in SIDES
    )
    return chosen - rejected


def relabelled(
    read: Sequence[Pair], pairs: Sequence[Pair], right: Tensor, looked: Looked, *, proved: bool
) -> tuple[list[Pair], int]:
    """Return all pairs, the likelier answer as the chosen one, with P(chosen is better) as `confidence`.

    Args:
        read: all pairs; those that are not in `pairs`, which their annotators call ties, are kept as they are.
        pairs: [n] the very objects of `read` that have a label.
        right: [n] P(chosen is better).
        proved: some labels are known to be wrong; else only the pairs that were looked at get a confidence below 1.

    Returns:
        the pairs, and how many labels are flipped.
    """
    place = {id(pair): i for i, pair in enumerate(pairs)}
    is_answered = (looked.agree + looked.contradict + looked.equal) > 0
    made: list[Pair] = []
    flipped = 0
    for pair in read:
        i = place.get(id(pair))
        if i is None or not (proved or is_answered[i]):  # with a confidence too, or the file could not be trained on
            made.append(pair if pair.get("confidence") is not None else {**pair, "confidence": 1.0})
            continue
        believed: Pair = {**pair, "confidence": right[i].item()}
        flipped += believed["confidence"] < TIE
        made.append(flip_pair(believed) if believed["confidence"] < TIE else believed)
    return made, flipped
