"""What a second look of an audit and one of a round have in common: blind questions, their verdicts, what is known after them."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from rlhf.data.conversations import conversation_keys
from rlhf.data.labelbook import BOOK
from rlhf.data.labels import Question, Verdict, all_alike, question_id
from rlhf.data.rows import SIDES, TIE, Pair, answer, answers_digest, asked, pair_digest, told
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
from rlhf.reward.noise import NoiseEstimate, estimate_noise

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
    """Count the verdicts on each pair, an annotator's last one each."""
    of_question = {question.id: question for question in questions}
    names = {question.id: answers_digest(question.prompt, (question.first, question.second)) for question in questions}
    better: defaultdict[str, Counter[str]] = defaultdict(Counter)
    others: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for verdict in (verdict for verdict in verdicts if verdict.id in of_question):
        question, name = of_question[verdict.id], names[verdict.id]
        if verdict.label in ("tie", "skip"):
            others[name][verdict.label] += 1
        else:
            better[name][question.first if verdict.label == "first" else question.second] += 1
    agree, contradict, equal = (torch.zeros(len(pairs)) for _ in range(3))
    is_asked, is_first = (torch.zeros(len(pairs), dtype=torch.bool) for _ in range(2))
    seen: set[str] = set()
    about = set(names.values())
    for i, pair in enumerate(pairs):
        name = pair_digest(pair)
        is_first[i], is_asked[i] = name not in seen, name in about
        seen.add(name)
        agree[i], contradict[i] = (better[name][told(pair, side)] for side in SIDES)
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


# ---- What is known after them ----


def beliefs(strength: Tensor, noise: NoiseEstimate, others: Tensor) -> Tensor:
    """Return P(chosen is better) of every row by its label, the vote and what else is known, [n], at the estimated noise.

    Args:
        strength: [n] of the vote, nats.
        others: [n] log-odds of what else says that the label is right, nats: other labels of the same pair, or verdicts.
    """
    return posterior_of_observations(strength, others, flip_rate=believed_rate(noise), scale=noise.scale)


def believed_rate(noise: NoiseEstimate) -> float:
    """Return the share of wrong labels that pairs are weighed by: as estimated, but no less than lets experts contradict a label,
    as far as the votes leave that possible."""
    return min(max(noise.fitted, min(LEAST_RATE, noise.high)), 0.5)


def other_labels(pairs: Sequence[Pair], noise: NoiseEstimate) -> Tensor:
    """Return the log-odds that each label is right by the other labels of the same two answers, [n] nats; each errs alike."""
    numbers, sides = pair_numbers(pairs)
    pair, side = torch.tensor(numbers), torch.tensor(sides)
    rate = believed_rate(noise)
    others = side * torch.zeros(len(pairs)).index_add(0, pair, side)[pair] - 1
    return others * math.log((1 - rate) / rate)


@dataclass(frozen=True)
class Known:
    """What is known of every row without and with the experts' verdicts.

    Attributes:
        noise: estimated with the verdicts.
        before, after: [n] P(chosen is better); no order is believed of answers that experts call equal.
        shared: h of `shared_error`, by the pairs that have verdicts, and applied to these alone.
        foreseen: how many of the pairs that have a verdict label and vote expect experts to contradict, and its deviation.
    """

    noise: NoiseEstimate
    before: Tensor
    after: Tensor
    shared: float
    foreseen: tuple[float, float]


def weigh_verdicts(pairs: Sequence[Pair], strength: Tensor, looked: Looked, *, expert_error: float) -> Known:
    """Estimate the noise with the verdicts, and join labels, vote and verdicts.

    Without and with the verdicts by the same noise and the same h, or what verdicts teach of these would count as what they
    changed. h is not applied to other pairs: those that are asked about are chosen for their doubt, and tell little of the rest.

    Args:
        pairs: [n] as they were labelled, no ties.
        strength: [n] of the vote, nats.
        expert_error: how often experts are wrong.
    """
    # 1. The noise. A pair that experts call equal has no label that could be wrong.
    verdicts = log_odds_of_verdicts(looked.agree, looked.contradict, error_rate=expert_error).double()
    decided = ~looked.is_tie if not looked.is_tie.all() else torch.ones_like(looked.is_tie)
    conversations = conversation_keys([pair["prompt"] for pair in pairs])
    clusters = [conversations[i] for i in decided.nonzero().flatten().tolist()]
    noise = estimate_noise(strength[decided], clusters, verdicts[decided].to(strength))

    # 2. How far experts bear label and vote out.
    right = beliefs(strength.double(), noise, other_labels(pairs, noise))
    answered = looked.is_first & (looked.agree != looked.contradict)
    sure = torch.sigmoid(verdicts.abs())  # what the verdicts on a pair say together is right
    agrees = (right * sure + (1 - right) * (1 - sure))[answered]
    foreseen = (1 - agrees).sum().item(), (agrees * (1 - agrees)).sum().sqrt().item()
    shared = shared_error(right[answered], verdicts[answered])

    # 3. Each row.
    doubted = torch.where(looked.agree + looked.contradict > 0, (1 - shared) * right + shared / 2, right)
    after = with_verdicts(doubted, verdicts)
    after[looked.is_tie] = TIE
    return Known(noise, doubted.to(strength), after.to(strength), shared, foreseen)


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
    asked, better, rate = right[chosen], torch.sigmoid(noise.scale * strength), believed_rate(noise)
    worth = 4 * expected_change(asked, error_rate=expert_error).sum().item()
    labels = verdicts_in_labels(asked, better, error_rate=expert_error, flip_rate=rate).item()
    return {"pairs": len(chosen), "worth": worth, "labels": labels if math.isfinite(labels) else None}


def gains(known: Known, looked: Looked) -> dict[str, Any]:
    """Return what verdicts changed: how many labels are expected to be wrong, and how many sure ones all pairs are worth.

    Returns:
        `wrong`, by all that is known, of the rows that experts do not call equal {`file`: as labelled, `before`: each flipped to
        the side that is likelier without the verdicts, `after`: with them}; `worth` {`before`, `after`}, in which a pair counts
        once however many labels it has; `foreseen` {`contradict`, `deviation`}, `shared`: as of `Known`.
    """
    decided = known.after[~looked.is_tie]
    flipped = known.before[~looked.is_tie] < TIE
    before, after = (worth_in_sure_labels(right)[looked.is_first].sum().item() for right in (known.before, known.after))
    return {
        "wrong": {
            "file": (1 - decided).sum().item(),
            "before": torch.where(flipped, decided, 1 - decided).sum().item(),
            "after": torch.minimum(decided, 1 - decided).sum().item(),
        },
        "worth": {"before": before, "after": after},
        "foreseen": {"contradict": known.foreseen[0], "deviation": known.foreseen[1]},
        "shared": known.shared,
    }


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


@dataclass(frozen=True)
class Relabelled:
    """Pairs as they are trained on after a second look.

    Attributes:
        pairs: one row a pair.
        flipped: how many of these have the other answer as the chosen one.
        joined: how many rows are left out, as a further label of a pair whose row holds what all its labels say.
    """

    pairs: list[Pair]
    flipped: int
    joined: int


def relabelled(read: Sequence[Pair], pairs: Sequence[Pair], right: Tensor) -> Relabelled:
    """Return the likelier answer of every pair as the chosen one, with P(chosen is better) as `confidence`, in its first row.

    A margin or rating gap m of a label that is right with probability p becomes its mean (2p - 1) m, so that neither teaches an
    order that is not believed any more.

    Args:
        read: all pairs; of those that are not in `pairs`, which their annotators call ties, one with no other label is kept as
            it is.
        pairs: [n] the very objects of `read` that have a label.
        right: [n] P(chosen is better).
    """
    place = {id(pair): i for i, pair in enumerate(pairs)}
    seen: set[str] = set()
    labelled = {pair_digest(pair) for pair in pairs}
    made: list[Pair] = []
    flipped = 0
    for pair in read:
        name, i = pair_digest(pair), place.get(id(pair))
        if name in seen or (i is None and name in labelled):
            continue
        seen.add(name)
        believed = pair if i is None else _believed(pair, right[i].item())
        is_flipped = i is not None and believed["confidence"] < TIE
        flipped += is_flipped
        made.append(flip_pair(believed) if is_flipped else believed)
    return Relabelled(made, flipped, len(read) - len(made))


def _believed(pair: Pair, right: float) -> Pair:
    """Return a pair whose label is right with this probability, its order kept."""
    made: Pair = {**pair, "confidence": right}
    if pair.get("margin") is not None:
        made["margin"] = (2 * right - 1) * pair["margin"]
    if pair.get("rating_gap") is not None:
        made["rating_gap"] = (2 * right - 1) * pair["rating_gap"]
    return made
