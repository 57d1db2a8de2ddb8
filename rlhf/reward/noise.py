"""How many labels are wrong, from out-of-fold votes."""

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from scipy.stats import beta
from torch import Tensor

from rlhf.data.rows import TIE
from rlhf.errors import UserError
from rlhf.objectives.second_look import DOUBTED
from rlhf.objectives.strength import nearest_line, scale_prior
from rlhf.statistics import best_temperature, clustered_mean

# Rates of which 0.1 % can be told from 0, and steps of 0.5 % above.
RATES = torch.cat(
    [torch.arange(0, 0.02, 0.0005, dtype=torch.float64), torch.linspace(0.02, 0.495, 96, dtype=torch.float64)]
)
STEPS = torch.gradient(RATES)[0]  # what each of them stands for
SCALES = 61
CHI_SQUARE_95 = 3.841
SHARES = 20  # steps of h
AT_ONCE = 2**20  # numbers, 8 MB of them
LEAST_WEIGHT = 1e-7  # what adds less to a mean over the grid is left out


@dataclass(frozen=True)
class NoiseEstimate:
    """Share of wrong labels, and how much a vote is worth.

    Attributes:
        flip_rate: ε, by confident learning, of labels and votes alone.
        fitted: ε of the nearest model to all that the labels leave likely, proved or not; 0 where votes and verdicts say nothing.
        scale: b of that model, so that σ(b d) is how often a vote of d has the true order.
        low: what sure votes, and verdicts where there are any, prove: the lower end of ε's likelihood interval.
        high: the upper end of the share of contradicted labels, as if every contradiction were the label's fault.
    """

    flip_rate: float
    fitted: float
    scale: float
    low: float
    high: float

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> "NoiseEstimate":
        """Return the estimate that a record holds, whatever else it holds."""
        return cls(**{field.name: facts[field.name] for field in fields(cls)})


def decided_rows(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return which pairs have a label that may be wrong: all but ties, which call nobody better.

    Raises:
        UserError: all are ties.

    >>> decided_rows([{}, {"confidence": 0.5}, {"confidence": 0.7}])
    [0, 2]
    """
    decided = [i for i, row in enumerate(rows) if row.get("confidence") != TIE]
    if not decided:
        raise UserError("vote: all pairs are ties, so there is no label to vote on.")
    return decided


def estimate_noise(
    differences: Tensor, clusters: Sequence[Hashable], verdicts: Tensor | None = None, *, learnt: bool = False
) -> NoiseEstimate:
    """Estimate how many labels are wrong, as far as out-of-fold votes can tell.

    A vote contradicts a label because the label is wrong or because the vote is, and votes alone cannot say which, so
    `low` and `high` are bounds for both readings and not just for chance:

    - `low`: if a pair's true order is "chosen is better" with probability σ(b d), it has this label with probability (1 - ε)
      σ(b d) + ε σ(-b d): far from 0, where votes are sure, contradictions are ε. Profile likelihood on a grid, 95 % (χ² of
      one degree), between the points on a straight line; it misses noise that sits where votes are unsure. `fitted` and
      `scale` are those of which σ(b d + log((1 - ε) / ε)) is nearest to the mean over the posterior of both, with all ε
      equally likely and b as `scale_prior` says: some hundred labels leave many b likely, and the likeliest may be a hundred
      times too large, which makes every label sure. By them labels are denoised, also where `low` is 0: blunt votes prove
      nothing, and what they leave likely changes little. `fitted` is no more than `high`, but where verdicts prove more.
    - `flip_rate`: confident learning (Northcutt et al., arXiv:1911.00068): among pairs on which the vote is at least as
      sure as it is of an average label, the share that it contradicts; 0.5 at most.
    - `high`: the share of all labels contradicted, upper end of its 95 % bootstrap, or the exact one of as many conversations
      where that is higher (of few labels, none contradicted, a bootstrap knows only 0).

    Pairs of one conversation are not independent, so conversations are counted and resampled, not pairs. Votes that agree
    with labels no more than chance (`high` reaches 0.5, or the fit finds b = 0) say nothing: then the scale is 0, ε is what
    experts' verdicts alone say, 0 without any, which leaves every label as it is, and a warning.

    Experts' verdicts enter the likelihood of `low`, `fitted` and `scale`: with v = σ(verdicts) and q = σ(b d) a label and its
    verdicts have probability (1 - h) [ (1 - ε) q v + ε (1 - q) (1 - v) ] + h/2 [ (1 - ε) q + ε (1 - q) ], up to a factor, and
    h is integrated over its prior (`rlhf.objectives.second_look.shared_error`). Without h, sure votes whose labels experts
    contradict would be explained by votes that say nothing of any pair. Which pairs were asked about may depend on labels and
    votes, since both are in it. `flip_rate` and `high` read no verdicts; of voters who learnt them, their votes did.

    Args:
        differences: [n] mean difference of models that did not see the label, in nats.
        clusters: [n] what is equal for pairs that are not independent: the conversation of each.
        verdicts: [n] log-odds of the verdicts that the label is right, nats; 0 where there are none.
        learnt: the voters learnt the verdicts on other pairs. Then contradicting half of the labels is no sign that they say
            nothing: verdicts judge that, in the fit.
    """
    contradicted = ((differences < 0).double() + 0.5 * (differences == 0).double()).tolist()
    share, (_, high) = clustered_mean(contradicted, clusters)
    high = max(high, _exact_end(share, len(set(clusters))))
    odds = torch.zeros_like(differences) if verdicts is None else verdicts
    low, fitted, scale = _fit(differences, clusters, odds)
    agrees_with_all = not any(contradicted)
    if scale == 0 or (high >= 0.5 and not learnt):
        warnings.warn(
            "vote: the votes agree with the labels no more than chance, so they say nothing about them. Use a larger base model, "
            "more pairs, or another learning rate.",
            stacklevel=2,
        )
        if not odds.any():
            return NoiseEstimate(0.0, 0.0, 0.0, 0.0, high)
        low, fitted, _ = _fit(torch.zeros_like(differences), clusters, odds)
        return NoiseEstimate(0.0, fitted, 0.0, low, high)
    # Where contradicted votes are the surest no temperature fits all labels, and what a vote is worth says how sure it is.
    temperature = 1.0 if agrees_with_all else best_temperature(differences.tolist()) or 1 / scale
    agree = torch.sigmoid(differences.double() / temperature)
    average = agree.mean()
    surely_wrong, surely_right = int((1 - agree >= average).sum()), int((agree >= average).sum())
    scale = min(scale, 1.0) if agrees_with_all else scale  # no likelihood bounds it; voters are trained in nats
    flip_rate = 0.0 if agrees_with_all else min(surely_wrong / (surely_wrong + surely_right), 0.5)
    return NoiseEstimate(flip_rate, min(fitted, max(high, low)), scale, low, high)


def _exact_end(share: float, independent: int) -> float:
    """Return the upper end of the exact 95 % interval (Clopper-Pearson) of a share of so many independent units, at most 1."""
    count = share * independent
    return float(beta.ppf(0.975, count + 1, independent - count)) if count < independent else 1.0


def foreseen_contradictions(
    differences: Tensor, clusters: Sequence[Hashable], others: Tensor, sure: Tensor
) -> tuple[float, float]:
    """Return how many labels verdicts contradict, as labels and votes foresee it, and its standard deviation.

    Both are over the posterior of ε and b, and over verdicts given these: of few labels ε is known to a factor of two only, and
    pairs are looked at for the doubt that this very estimate leaves.

    Args:
        differences, clusters: [n] as of `estimate_noise`.
        others: [n] log-odds of what else says that each label is right, nats.
        sure: [n] P(the verdict on a pair is right), 1/2 or more; 0 where there is none.
    """
    values, judged = differences.double(), sure > 0
    if not judged.any():
        return 0.0, 0.0
    grid = _grid(values, clusters, torch.zeros_like(values))
    strength, others, sure = values[judged], others.double()[judged], sure.double()[judged]
    mean = square = within = torch.zeros((), dtype=torch.float64)
    for weights, scale in zip(grid.posterior / grid.posterior.sum(), grid.scales, strict=True):
        likely = weights.nonzero().flatten()
        right = torch.sigmoid(scale * strength + others + torch.logit(1 - RATES[likely])[:, None])  # [likely, judged]
        contradicts = right * (1 - sure) + (1 - right) * sure
        count, weight = contradicts.sum(dim=1), weights[likely]
        mean, square = mean + (weight * count).sum(), square + (weight * count**2).sum()
        within = within + (weight * (contradicts * (1 - contradicts)).sum(dim=1)).sum()
    return mean.item(), (within + square - mean**2).clamp(min=0).sqrt().item()


class Grid(NamedTuple):
    """What labels, votes and verdicts say of every pair of b and ε.

    Attributes:
        scales: [scales] b; the rates are `RATES`.
        likelihood: [scales, rates] nats.
        posterior: [scales, rates] to a sum of about 1; what adds little is 0.
    """

    scales: Tensor
    likelihood: Tensor
    posterior: Tensor


def _grid(values: Tensor, clusters: Sequence[Hashable], verdicts: Tensor) -> Grid:
    """Return likelihood and posterior of ε and b, on a grid that fits the spread of the votes."""
    spread = values.abs().mean().clamp(min=1e-12)
    scales = torch.logspace(-1.5, 2, SCALES, dtype=torch.float64) / spread
    effective = len(set(clusters)) / len(values)  # of each pair, where those of a conversation are not independent
    likelihood = torch.stack([_log_likelihood(scale * values, verdicts.double(), effective) for scale in scales])
    prior = scale_prior(scales, values)[:, None] + STEPS.log()
    posterior = torch.softmax((likelihood + prior).flatten(), 0).view_as(likelihood)
    posterior[posterior < LEAST_WEIGHT] = 0
    return Grid(scales, likelihood, posterior)


def _fit(differences: Tensor, clusters: Sequence[Hashable], verdicts: Tensor) -> tuple[float, float, float]:
    """Return the ε from which on the profile likelihood is within 1.92 of the best, and ε and b nearest to the posterior's mean."""
    values = differences.double()
    scales, likelihood, posterior = _grid(values, clusters, verdicts)
    profile = likelihood.max(dim=0).values
    low = _first_reaching(RATES, profile, profile.max() - CHI_SQUARE_95 / 2)
    right = torch.zeros_like(values)
    for weights, scale in zip(posterior, scales, strict=True):
        agree = torch.sigmoid(scale * values).clamp(1e-12, 1 - 1e-12)
        for likely in weights.nonzero().flatten().split(_rates_at_once(len(values))):
            odds = (RATES[likely] / (1 - RATES[likely]))[:, None] * ((1 - agree) / agree)
            right += (weights[likely, None] / (1 + odds)).sum(dim=0)
    constant, scale = nearest_line(values, right / posterior.sum())
    nearest = max(1 / (1 + math.exp(constant)), low)
    return low, min(nearest, 0.5), max(scale, 0.0)


def _log_likelihood(strength: Tensor, verdicts: Tensor, effective: float) -> Tensor:
    """Return the log-likelihood of labels and verdicts at each rate, [rates] nats, at one scale of the votes.

    Args:
        strength: [n] b d, nats.
        verdicts: [n] their log-odds that the label is right, nats; 0 where there are none.
        effective: what each pair counts.
    """
    agree, has_verdict = torch.sigmoid(strength).clamp(1e-12, 1 - 1e-12), verdicts != 0
    some = RATES.split(_rates_at_once(len(agree)))
    total = effective * torch.cat([torch.lerp(agree, 1 - agree, rate[:, None]).log().sum(dim=1) for rate in some])
    if not has_verdict.any():
        return total
    rates, agree, confirmed = RATES[:, None], agree[has_verdict], torch.sigmoid(verdicts[has_verdict])
    right, wrong = (1 - rates) * agree, rates * (1 - agree)  # [rates, answered]
    as_believed = (right * confirmed + wrong * (1 - confirmed)) / (right + wrong)
    # The prior of h is 0 at 1; where there is no vote, there is no error that labels could share with it.
    shares = torch.linspace(0, 1, SHARES + 1, dtype=torch.float64)[: SHARES if strength.any() else 1]
    joint = [
        DOUBTED * torch.log1p(-share) + effective * ((1 - share) * as_believed + share / 2).log().sum(dim=1)
        for share in shares
    ]
    return total + torch.logsumexp(torch.stack(joint), dim=0)


def _rates_at_once(pairs: int) -> int:
    """Return how many rates are computed together, of so many pairs: all of few, and one of millions, for memory."""
    return max(1, AT_ONCE // max(1, pairs))


def _first_reaching(grid: Tensor, values: Tensor, least: Tensor) -> float:
    """Return where values on a grid first reach the least, between two points on a straight line.

    >>> _first_reaching(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([-2.0, 0.0, 1.0]), torch.tensor(-1.0))
    0.25
    """
    first = int((values >= least).nonzero()[0])
    if first == 0:
        return grid[0].item()
    before, after = values[first - 1], values[first]
    return torch.lerp(grid[first - 1], grid[first], (least - before) / (after - before)).item()
