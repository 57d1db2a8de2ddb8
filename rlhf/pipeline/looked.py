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
    log_odds_of_verdicts,
    posterior_of_observations,
    shared_error,
    verdicts_in_labels,
    with_verdicts,
    worth_in_sure_labels,
)
from rlhf.reward.annotators import pair_numbers
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
    if not asks_more and not labels and looked.skipped == looked.asked:
        raise UserError(
            f"{folder}: all {looked.asked} pairs were skipped; ask about more of them with a larger --budget."
        )
    if not asks_more and not labels:
        raise UserError(
            f"{folder}: none of the {looked.asked} pairs has a verdict yet: `rlhf label {folder}`; then run the same command "
            "again."
        )
    if not asks_more and set(labels) == {"tie"}:
        raise UserError(
            f"{folder}: all {labels['tie']} verdicts are ties, so they say of no label that it is wrong; ask about more pairs with "
            "a larger --budget."
        )
    alike = all_alike(looked.verdicts)
    if alike is not None and set(labels) != {"tie"}:
        raise UserError(f"{folder}: {alike} Label again.")


# ---- What is known after them ----


def beliefs(strength: Tensor, noise: NoiseEstimate, others: Tensor) -> Tensor:
    """Return P(chosen is better) of every row by its label, the vote and what else is known, [n], at the likeliest rate of wrong
    labels.

    Args:
        strength: [n] of the vote, nats.
        others: [n] log-odds of what else says that the label is right, nats: other labels of the same pair, or verdicts.
    """
    return posterior_of_observations(strength, others, flip_rate=_flip_rate(noise), scale=noise.scale)


def other_labels(pairs: Sequence[Pair], noise: NoiseEstimate) -> Tensor:
    """Return the log-odds that each label is right by the other labels of the same two answers, [n] nats; each errs alike."""
    numbers, sides = pair_numbers(pairs)
    pair, side = torch.tensor(numbers), torch.tensor(sides)
    rate = _flip_rate(noise)
    others = side * torch.zeros(len(pairs)).index_add(0, pair, side)[pair] - 1
    return others * math.log((1 - rate) / rate)


@dataclass(frozen=True)
class Known:
    """What is known of every row without and with the experts' verdicts.

    Attributes:
        before, after: [n] P(chosen is better); no order is believed of answers that experts call equal.
        shared: h of `shared_error`, by the pairs that have verdicts, and applied to these alone.
        foreseen: how many of the pairs that have a verdict label and vote expect experts to contradict, and its deviation.
    """

    before: Tensor
    after: Tensor
    shared: float
    foreseen: tuple[float, float]


def weigh_verdicts(
    pairs: Sequence[Pair], strength: Tensor, noise: NoiseEstimate, looked: Looked, *, expert_error: float
) -> Known:
    """Join labels, vote and verdicts.

    Without and with the verdicts by the same noise and the same h, or what verdicts teach of these would count as what they
    changed. h is not applied to other pairs: those that are asked about are chosen for their doubt, and tell little of the rest.

    Args:
        pairs: [n] as they were labelled, no ties.
        strength: [n] of the vote, nats.
        noise: estimated with the verdicts.
        expert_error: how often experts are wrong.
    """
    verdicts = log_odds_of_verdicts(looked.agree, looked.contradict, error_rate=expert_error).double()
    right = beliefs(strength.double(), noise, other_labels(pairs, noise))
    answered = looked.is_first & (looked.agree != looked.contradict)
    agrees = (right * (1 - expert_error) + (1 - right) * expert_error)[answered]
    foreseen = (1 - agrees).sum().item(), (agrees * (1 - agrees)).sum().sqrt().item()
    shared = shared_error(right[answered], verdicts[answered])
    doubted = torch.where(looked.agree + looked.contradict > 0, (1 - shared) * right + shared / 2, right)
    after = with_verdicts(doubted, verdicts)
    after[looked.is_tie] = TIE
    return Known(doubted.to(strength), after.to(strength), shared, foreseen)


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


def gains(known: Known, looked: Looked) -> dict[str, Any]:
    """Return what verdicts changed: how many labels are expected to be wrong, and how many sure ones all pairs are worth.

    Returns:
        `wrong` {`file`: as labelled, by all that is known, `before`, `after`: each flipped to the likelier side}, where no label
        of a pair that experts call equal is wrong; `worth` {`before`, `after`}, in which a pair counts once however many labels
        it has; `foreseen` {`contradict`, `deviation`}, `shared`: as of `Known`.
    """
    decided = known.after[~looked.is_tie]
    before, after = (worth_in_sure_labels(right)[looked.is_first].sum().item() for right in (known.before, known.after))
    return {
        "wrong": {
            "file": (1 - decided).sum().item(),
            "before": _still_wrong(known.before),
            "after": _still_wrong(decided),
        },
        "worth": {"before": before, "after": after},
        "foreseen": {"contradict": known.foreseen[0], "deviation": known.foreseen[1]},
        "shared": known.shared,
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

    A margin or rating gap m of a label that is right with probability p becomes its mean (2p - 1) m, so that neither teaches an
    order that is not believed any more.

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
        believed = _believed(pair, right[i].item())
        flipped += believed["confidence"] < TIE
        made.append(flip_pair(believed) if believed["confidence"] < TIE else believed)
    return made, flipped


def _believed(pair: Pair, right: float) -> Pair:
    """Return a pair whose label is right with this probability, its order kept."""
    made: Pair = {**pair, "confidence": right}
    if pair.get("margin") is not None:
        made["margin"] = (2 * right - 1) * pair["margin"]
    if pair.get("rating_gap") is not None:
        made["rating_gap"] = (2 * right - 1) * pair["rating_gap"]
    return made
