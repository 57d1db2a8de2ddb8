"""What is known of labels by themselves, by a vote and by experts' verdicts, before and after a second look."""

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from rlhf.data.conversations import conversation_keys
from rlhf.data.rows import TIE, Pair, pair_digest
from rlhf.models.load import build_reward_model, load_tokenizer
from rlhf.models.scalar_head import score_head
from rlhf.objectives.annotators import fit_accuracy
from rlhf.objectives.second_look import (
    expected_change,
    least_wrong,
    log_odds_of_verdicts,
    posterior_of_observations,
    shared_error,
    verdicts_in_labels,
    with_least_wrong,
    with_verdicts,
    worth_in_sure_labels,
)
from rlhf.pipeline.looked import Looked
from rlhf.reward.annotators import labels_of_rows, pair_numbers
from rlhf.reward.denoise import flip_pair
from rlhf.reward.model import RewardModel
from rlhf.reward.noise import (
    SURE,
    Foreseen,
    Grid,
    NoiseEstimate,
    estimate_noise,
    evidence,
    foresee_contradictions,
    vote_grid,
)
from rlhf.reward.sides import side_features

SUREST = 1e-6  # P(wrong) that voters learn lies between this and 1 minus this
LEAST_RATE = 0.01  # no label is taken to be beyond doubt, or no expert could contradict it


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


def label_rates(
    pairs: Sequence[Pair], strength: Tensor, noise: NoiseEstimate, verdicts: Tensor, is_tie: Tensor
) -> Tensor:
    """Return how often whoever gave each label is wrong, [n]: the annotator, or the source, where two rates can be told apart.

    Elsewhere it is `believed_rate` for all. Accuracies are those that `posterior` takes, fitted to the vote and the verdicts.

    Args:
        strength: [n] of the vote, nats.
        noise: what the vote is worth where annotators differ (`noise_by_names`).
        verdicts: [n] log-odds of the verdicts that each label is right, nats; 0 where there are none.
        is_tie: [n] answers that experts call equal, of which no label is right or wrong.
    """
    labelled = labels_of_rows(pairs, strength, replace(noise, scale=0.0))
    labels, odds = labelled.labels, noise.scale * strength.double() + verdicts.double()
    if labelled.groups < 2 or not odds.any():
        return torch.full((len(pairs),), believed_rate(noise), dtype=torch.float64)
    prior = labels.prior.index_add(0, labels.pair, labelled.side * odds) / torch.bincount(labels.pair)
    fitted = fit_accuracy(labels._replace(prior=prior, sign=labels.sign * ~is_tie), labelled.groups)
    return (1 - fitted).clamp(LEAST_RATE, 1 - LEAST_RATE)[labels.annotator]


def noise_by_names(pairs: Sequence[Pair], strength: Tensor, noise: NoiseEstimate) -> NoiseEstimate:
    """Return the noise with what the vote is worth where annotators, or sources, differ; as it is where they can't be told apart.

    One rate for all takes it for a blunt vote that some labels are contradicted more often than others (`vote_worth`).
    """
    return replace(noise, scale=labels_of_rows(pairs, strength, noise).scale)


def other_labels(pairs: Sequence[Pair], noise: NoiseEstimate, rates: Tensor) -> Tensor:
    """Return what all labels of a pair say beyond one label at the believed rate, [n] nats: log-odds that each row's is right.

    Where all have that rate, it is what the other labels of the same two answers say.

    Args:
        rates: [n] how often whoever gave each label is wrong (`label_rates`).
    """
    numbers, sides = pair_numbers(pairs)
    pair, side = torch.tensor(numbers), torch.tensor(sides, dtype=torch.float64)
    rate = believed_rate(noise)
    odds = torch.zeros(len(pairs), dtype=torch.float64).index_add(0, pair, side * torch.logit(1 - rates))
    return side * odds[pair] - math.log((1 - rate) / rate)


@dataclass(frozen=True)
class Known:
    """What is known of every row without and with the experts' verdicts.

    Attributes:
        noise: estimated with the verdicts, from `strength`.
        strength: [n] of the vote that all else is by, nats: the one that knew verdicts, unless the other surely foretells them
            better.
        rates: [n] how often whoever gave each label is wrong, by all that is known.
        low: the share of wrong labels that is proved, by the votes or by the verdicts alone, whichever is more.
        before, after: [n] P(chosen is better), before there was any verdict and with all; no order is believed of answers that
            experts call equal.
        shared: h of `shared_error`, by the pairs that have verdicts, and applied to these alone.
        foreseen: how many of the pairs that have a verdict label and vote expected experts to contradict; None where the votes
            said nothing before the verdicts, so that nothing was foreseen.
    """

    noise: NoiseEstimate
    strength: Tensor
    rates: Tensor
    low: float
    before: Tensor
    after: Tensor
    shared: float
    foreseen: Foreseen | None

    @property
    def says_something(self) -> bool:
        """Tell whether votes say something of the labels, before the verdicts or by them, so that voters may vote again."""
        return self.foreseen is not None or self.noise.scale > 0


def weigh_verdicts(
    pairs: Sequence[Pair], strength: Tensor, looked: Looked, *, expert_error: float, again: Tensor | None = None
) -> Known:
    """Estimate the noise with the verdicts, and join labels, vote and verdicts.

    h is not applied to pairs without a verdict: those that are asked about are chosen for their doubt, and tell little of the
    rest.

    Args:
        pairs: [n] as they were labelled, no ties.
        strength: [n] of the vote that knew no verdict, nats.
        expert_error: how often experts are wrong.
        again: [n] strength of the vote that knew them (`what_voters_learn`), in place of the other in what is known after them,
            unless the other foretells them better by odds of `SURE`. Neither has seen the verdicts on a pair that it votes on.
    """
    # 1. What labels and vote say. A pair that experts call equal has no label that could be wrong.
    conversations = conversation_keys([pair["prompt"] for pair in pairs])
    decided = ~looked.is_tie if not looked.is_tie.all() else torch.ones_like(looked.is_tie)
    clusters = [conversations[i] for i in decided.nonzero().flatten().tolist()]
    verdicts = log_odds_of_verdicts(looked.agree, looked.contradict, error_rate=expert_error).double()
    first = vote_grid(strength[decided], clusters, verdicts[decided])
    noise = _quiet_noise(strength[decided], clusters, None, first.without_verdicts())
    noise = noise_by_names(pairs, strength, noise)
    rates = label_rates(pairs, strength, noise, torch.zeros_like(strength), looked.is_tie)
    others = other_labels(pairs, noise, rates)
    before = beliefs(strength.double(), noise, others)

    # 2. How many contradictions these foresee, and how many wrong labels the verdicts prove.
    answered = looked.is_first & (verdicts != 0)
    sure = torch.sigmoid(verdicts.abs()) * answered  # what the verdicts on a pair say together is right
    contradicted = answered & (verdicts < 0)
    foreseen = None
    if noise.scale > 0:
        foreseen = foresee_contradictions(
            strength[decided], others[decided], sure[decided], int(contradicted.sum()), first.without_verdicts()
        )
    proved = least_wrong(int(contradicted.sum()), int(answered.sum()), error_rate=expert_error)

    # 3. The noise with the verdicts, by the second vote unless the first surely foretells them better; how far they bear label
    # and vote out.
    latest, grid = strength, first
    if again is not None:
        second = vote_grid(again[decided], clusters, verdicts[decided])
        if evidence(first) - evidence(second) <= math.log(SURE):
            latest, grid = again, second
    if answered.any():
        noise = _quiet_noise(latest[decided], clusters, verdicts[decided].to(latest), grid)
        noise = noise_by_names(pairs, latest, noise)
    rates = label_rates(pairs, latest, noise, verdicts, looked.is_tie)
    right = beliefs(latest.double(), noise, other_labels(pairs, noise, rates))
    shared = shared_error(right[answered], verdicts[answered])

    # 4. Each row. Doubt in label and vote turns no verdict into its opposite, and no fewer labels are wrong than are proved.
    doubted = torch.where(looked.agree + looked.contradict > 0, (1 - shared) * right + shared / 2, right)
    after = with_verdicts(doubted, verdicts)
    after = torch.where(verdicts > 0, torch.maximum(after, right), after)
    after = torch.where(verdicts < 0, torch.minimum(after, right), after)
    after = _as_proved(pairs, after, contradicted, proved - (1 - after)[answered & ~contradicted].sum().item())
    after[looked.is_tie] = TIE
    low = max(noise.low, proved / len(clusters))
    return Known(noise, latest, rates, low, before.to(strength), after.to(strength), shared, foreseen)


def _as_proved(pairs: Sequence[Pair], right: Tensor, contradicted: Tensor, proved: float) -> Tensor:
    """Return P(label is right) of every row, no fewer of the contradicted ones expected to be wrong than are proved, [n].

    Args:
        contradicted: [n] first rows of the pairs whose label experts contradict.
        proved: how many of these are wrong at least.
    """
    if (1 - right[contradicted]).sum() >= proved:
        return right
    numbers, sides = pair_numbers(pairs)
    pair, side = torch.tensor(numbers), torch.tensor(sides, dtype=right.dtype)
    of_first = torch.where(side > 0, right, 1 - right)  # P(the pair's first answer is better)
    of_pair = torch.zeros_like(right)
    of_pair[pair[contradicted]] = with_least_wrong(right[contradicted], proved)
    is_moved = torch.zeros(len(right), dtype=torch.bool)
    is_moved[pair[contradicted]] = True
    moved = torch.where(is_moved[pair], of_pair[pair], of_first)
    return torch.where(side > 0, moved, 1 - moved)


def _quiet_noise(strength: Tensor, clusters: Sequence[Hashable], verdicts: Tensor | None, grid: Grid) -> NoiseEstimate:
    """Estimate the noise, and leave it to the vote to say that it says nothing: that was said before anybody looked again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return estimate_noise(strength, clusters, verdicts, grid=grid)


def what_voters_learn(
    pairs: Sequence[Pair], looked: Looked, noise: NoiseEstimate, rates: Tensor, *, expert_error: float
) -> list[float]:
    """Return P(label is wrong) of every row by labels and verdicts, without votes, [n]: what voters learn who vote again.

    A pair's first row holds what all its labels and verdicts say; its further rows, and answers that experts call equal, say
    nothing: 1/2.

    Args:
        rates: [n] how often whoever gave each label is wrong (`label_rates`).
    """
    rate = believed_rate(noise)
    verdicts = log_odds_of_verdicts(looked.agree, looked.contradict, error_rate=expert_error)
    right = math.log((1 - rate) / rate) + other_labels(pairs, noise, rates) + verdicts
    wrong = torch.sigmoid(-right).clamp(SUREST, 1 - SUREST)
    wrong[~looked.is_first | looked.is_tie] = 0.5
    # What processes and resumed stages compute alike but for rounding is one and the same: votes are kept by it.
    return [round(value, 6) for value in wrong.tolist()]


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
        `wrong`, by all that is known, of the rows that experts do not call equal {`file`: as labelled, and no fewer than are
        proved, `before`: each flipped to the side that is likelier without the verdicts, `after`: with them}; `worth` {`before`,
        `after`} of these, in which a pair counts once however many labels it has; `foreseen` {`contradict`, `deviation`,
        `chance`}, `shared`: as of `Known`. `before` of `worth` and `foreseen` are None where votes said nothing before the
        verdicts.
    """
    decided = known.after[~looked.is_tie]
    flipped = known.before[~looked.is_tie] < TIE
    counted = looked.is_first & ~looked.is_tie
    before, after = (worth_in_sure_labels(right)[counted].sum().item() for right in (known.before, known.after))
    return {
        "wrong": {
            "file": max((1 - decided).sum().item(), known.low * len(decided)),
            "before": torch.where(flipped, decided, 1 - decided).sum().item(),
            "after": torch.minimum(decided, 1 - decided).sum().item(),
        },
        "worth": {"before": None if known.foreseen is None else before, "after": after},
        "foreseen": None if known.foreseen is None else known.foreseen._asdict(),
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
    return side_features(reward, pairs, "chosen") - side_features(reward, pairs, "rejected")


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
