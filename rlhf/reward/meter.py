"""The meter: what some labels are worth, and what more of them would bring, from voters trained on parts of them."""

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.data.conversations import conversation_keys
from rlhf.data.rows import Prompt
from rlhf.objectives.learning_curve import (
    TRAINING_SPREAD,
    Curves,
    expect,
    expect_accuracy,
    fit_curves,
    mix_curves,
)
from rlhf.objectives.second_look import expected_change, verdicts_in_labels, worth_in_sure_labels
from rlhf.objectives.strength import scale_prior
from rlhf.reward.vote import Train, VotePlan

PARTS = (0.125, 0.25, 0.5)  # of what a voter trains on, each within the next
FEWEST = 25  # labels in the smallest part
MORE = (0.5, 1.0, 3.0)  # times the labels that there are
LOOKED_AT = 0.05  # share of the pairs that experts would look at again
DRAWS = 200
SCALES = torch.logspace(-1.2, 1.5, 181, dtype=torch.float64)  # of b times the mean |difference|
RATES = torch.linspace(0.0, 0.45, 37, dtype=torch.float64)  # shares of wrong labels, all as likely before the vote
LEAST_SHARE = 1e-3  # of a rate's probability; what is less likely is left out


class Measured(NamedTuple):
    """What voters say that were trained on parts of the labels.

    Attributes:
        sizes: [s] labels that a voter was trained on, rising.
        differences: [s, n] its reward difference on every pair that it was not trained on, nats.
        voters: how many of them share the pairs of each row.
    """

    sizes: list[float]
    differences: Tensor
    voters: int


def too_few_labels(pairs: int, folds: int) -> str | None:
    """Say that the smallest part would hold too few labels to learn from, where that is so."""
    fewest = round(FEWEST / (PARTS[0] * (1 - 1 / folds)))
    if pairs >= fewest:
        return None
    return f"{pairs} labels are too few to say what more would bring; the meter needs {fewest}."


def measure_parts(plan: VotePlan, prompts: Sequence[Prompt], votes: Tensor, train: Train) -> Measured:
    """Train voters on parts of what the first voter of each fold was trained on, and let them vote on the pairs it votes on.

    A part is the pairs of the first conversations in an order by their keys, so that parts lie within each other.

    Args:
        plan: of a vote out of fold.
        prompts: [n] of each pair.
        votes: [M, n] of that vote.
        train: as `collect_votes` takes it; parts' voters have numbers from M on.
    """
    folds = len(set(plan.folds))
    keys = conversation_keys(prompts)
    differences = torch.full((len(PARTS) + 1, len(prompts)), torch.nan)
    sizes = [0.0] * (len(PARTS) + 1)
    for fold in range(folds):
        judged = plan.votes_on(fold)
        trained = sorted(plan.trains_on(fold), key=keys.__getitem__)
        for row, share in enumerate(PARTS):
            part = trained[: round(share * len(trained))]
            differences[row, judged] = train(len(votes) + row * folds + fold, part, judged)
            sizes[row] += len(part) / folds
        differences[-1, judged] = votes[fold, judged]
        sizes[-1] += len(trained) / folds
    return Measured(sizes, differences, folds)


def estimate_accuracies(differences: Tensor, clusters: Sequence[Hashable], flip_rate: float) -> tuple[Tensor, Tensor]:
    """Return how often voters have the true order, [s], and the covariance of these estimates, [s, s].

    Of labels of which a share ε is wrong, one has probability (1 - ε) σ(b d) + ε σ(-b d), and a voter is right in the mean of
    σ(b |d|), of which the mean over the posterior of b (`scale_prior`) is taken. This has a smaller error than counting how often
    it agrees, which sure and unsure votes enter alike. Covariance by a bootstrap of prompts, the same draws for all voters.

    Args:
        differences: [s, n] nats, out of fold.
        clusters: [n] the prompt of each pair.
        flip_rate: ε in [0, 0.5).
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    place = torch.tensor([names[name] for name in clusters])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(names), (DRAWS, len(names)), generator=generator)
    counts = torch.zeros(DRAWS + 1, len(names), dtype=torch.float64)
    counts[0] = 1
    counts[1:].scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    weights = counts[:, place]
    weights = weights / weights.sum(dim=1, keepdim=True)
    estimates = []
    for row in differences.double():
        scales = _scales(row)
        agree = torch.sigmoid(scales[:, None] * row).clamp(1e-12, 1 - 1e-12)
        likelihood = len(names) * (weights @ ((1 - flip_rate) * agree + flip_rate * (1 - agree)).log().T)
        right = weights @ torch.maximum(agree, 1 - agree).T
        estimates.append((torch.softmax(likelihood + scale_prior(scales, row), dim=1) * right).sum(dim=1))
    table = torch.stack(estimates)
    return table[:, 0], torch.cov(table[:, 1:])


def _scales(differences: Tensor) -> Tensor:
    """Return what votes of these differences may be worth: b on the grid, per nat."""
    return SCALES / differences.abs().mean().clamp(min=1e-12)


class Rates(NamedTuple):
    """How likely each share of wrong labels in `RATES` is, and what the vote is worth if it is so.

    Attributes:
        log_likelihood: [r] with b integrated over its prior, nats, up to a constant.
        scales: [r] b, so that σ(b d) is how often a vote of d has the true order: the geometric mean of its posterior.
    """

    log_likelihood: Tensor
    scales: Tensor


def fit_rates(strength: Tensor, clusters: Sequence[Hashable]) -> Rates:
    """Find how likely each share of wrong labels is, and what the vote is worth under it, b having the prior `scale_prior`.

    Where no vote is sure, contradictions are as likely the votes' fault as the labels', and all rates are about as likely.

    Args:
        strength: [n] mean difference of an independent vote, nats.
        clusters: [n] the prompt of each pair; prompts are counted, not pairs.
    """
    values = strength.double()
    scales = _scales(values)
    agree = torch.sigmoid(scales[:, None] * values).clamp(1e-12, 1 - 1e-12)
    fits = torch.stack([((1 - rate) * agree + rate * (1 - agree)).log().mean(dim=1) for rate in RATES])
    posterior = fits * len(set(clusters)) + scale_prior(scales, values)
    typical = (torch.softmax(posterior, dim=1) * scales.log()).sum(dim=1).exp()
    return Rates(torch.logsumexp(posterior, dim=1) - math.log(len(scales)), typical)


def fit_meter(measured: Measured, strength: Tensor, clusters: Sequence[Hashable]) -> Curves:
    """Return the learning curves that the voters on parts leave possible, under every share of wrong labels that there may be.

    Args:
        strength: [n] mean difference of the whole vote, nats.
        clusters: [n] the prompt of each pair.
    """
    shares = torch.softmax(fit_rates(strength, clusters).log_likelihood, dim=0)
    likely = shares > LEAST_SHARE
    luck = TRAINING_SPREAD**2 / measured.voters * torch.eye(len(measured.sizes), dtype=torch.float64)
    fits = []
    for rate in RATES[likely].tolist():
        accuracies, covariance = estimate_accuracies(measured.differences, clusters, rate)
        fits.append(fit_curves(torch.tensor(measured.sizes), accuracies, covariance + luck, flip_rate=rate))
    return mix_curves(fits, shares[likely] / shares[likely].sum())


def price_verdicts(strength: Tensor, clusters: Sequence[Hashable], count: int, *, expert_error: float) -> Tensor:
    """Return how many more labels do what verdicts on the pairs in most doubt do, under each share of wrong labels, [r].

    Args:
        strength: [n] mean difference of the whole vote, nats.
        clusters: [n] the conversation of each pair; conversations are counted, not pairs.
        count: how many verdicts.
        expert_error: how often they are wrong.
    """
    believed = fit_rates(strength, clusters).scales[:, None] * strength.double()
    right = torch.sigmoid(believed + torch.logit(1 - RATES)[:, None])
    doubted = expected_change(right, error_rate=expert_error).topk(count, dim=1).indices
    return verdicts_in_labels(
        right.gather(1, doubted), torch.sigmoid(believed), error_rate=expert_error, flip_rate=RATES[:, None]
    )


def read_meter(
    curves: Curves,
    strength: Tensor,
    clusters: Sequence[Hashable],
    *,
    verdicts: int,
    expert_error: float,
    more: Sequence[float] = MORE,
) -> dict[str, Any]:
    """Return what labels are worth and what more would bring, each figure with its interval: the key `meter` of `audit.json`.

    A label counts as (1 - 2ε)² clean ones. The verdicts are on the pairs in most doubt, and count as the labels that say as much
    (`verdicts_in_labels`).

    Args:
        strength: [n] mean difference of the whole vote on each label, nats.
        clusters: [n] the conversation of each pair.
        verdicts: how many pairs experts would look at again.
        expert_error: how often they are wrong.
        more: how many labels are added, in times those that there are.
    """
    pairs, worth = len(strength), worth_in_sure_labels(1 - curves.flip_rate)
    place = torch.searchsorted(RATES, curves.flip_rate)
    instead = price_verdicts(strength, clusters, verdicts, expert_error=expert_error)[place]
    return {
        "labels": pairs,
        "wrong": list(expect(curves.weight, curves.flip_rate)),
        "worth": list(expect(curves.weight, pairs * worth)),
        "accuracy": list(expect_accuracy(curves, float(pairs))),
        "limit": list(expect(curves.weight, curves.limit)),
        "more": [
            {"labels": round(times * pairs), "accuracy": list(expect_accuracy(curves, pairs * (1 + times)))}
            for times in more
        ],
        "second_look": {
            "verdicts": verdicts,
            "expert_error": expert_error,
            "labels": list(expect(curves.weight, instead)),
            "accuracy": list(expect_accuracy(curves, pairs + instead)),
        },
    }
