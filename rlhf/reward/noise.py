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
from rlhf.few_labels import effective_count
from rlhf.objectives.second_look import DOUBTED
from rlhf.objectives.strength import nearest_line, scale_prior
from rlhf.statistics import best_temperature, clustered_share

# Rates of which 0.1 % can be told from 0, and steps of 0.5 % above.
RATES = torch.cat(
    [torch.arange(0, 0.02, 0.0005, dtype=torch.float64), torch.linspace(0.02, 0.495, 96, dtype=torch.float64)]
)
STEPS = torch.gradient(RATES)[0]  # what each of them stands for
SCALES = 61
CHI_SQUARE_95 = 3.841
SHARES = 20  # steps of h
AT_ONCE = 2**20  # numbers, 8 MB of them
SURE = 20  # to 1: odds by verdicts that make a vote count against half of the labels, or a first vote against a second
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
    differences: Tensor, clusters: Sequence[Hashable], verdicts: Tensor | None = None, *, grid: "Grid | None" = None
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

    Pairs of one conversation are not independent, so conversations are counted and resampled, not pairs: in the likelihood
    each label counts conversations / pairs, and each verdict what those with one are worth by themselves (`effective_count`).
    That is right where conversations have about as many pairs each. Where a few hold many near-copies of one pair it is not:
    of 400 with one pair and 8 with 50 alike, `low` was above 0 in 22 % of simulated files without a wrong label, not in 2.5 %.

    Votes that agree with labels no more than chance (`high` reaches 0.5, or the fit finds b = 0) say nothing, unless they
    foretell experts' verdicts: with odds of `SURE` to 1 against knowing no vote (`evidence`). Then the scale is 0, ε is what
    the verdicts alone say, 0 without any, which leaves every label as it is, and a warning.

    Experts' verdicts enter the likelihood of `low`, `fitted` and `scale`: with v = σ(verdicts) and q = σ(b d) a label and its
    verdicts have probability (1 - h) [ (1 - ε) q v + ε (1 - q) (1 - v) ] + h/2 [ (1 - ε) q + ε (1 - q) ], up to a factor, and
    h is integrated over its prior (`rlhf.objectives.second_look.shared_error`). Without h, sure votes whose labels experts
    contradict would be explained by votes that say nothing of any pair. Which pairs were asked about may depend on labels and
    votes, since both are in it. `flip_rate` and `high` read no verdicts; of voters who learnt them, their votes did.

    Args:
        differences: [n] mean difference of models that did not see the label, in nats.
        clusters: [n] what is equal for pairs that are not independent: the conversation of each.
        verdicts: [n] log-odds of the verdicts that the label is right, nats; 0 where there are none.
        grid: of these (`vote_grid`), where it is known already.
    """
    contradicted = ((differences < 0).double() + 0.5 * (differences == 0).double()).tolist()
    share, (_, high) = clustered_share(contradicted, clusters)
    high = max(high, _exact_end(share, len(set(clusters))))
    odds = torch.zeros_like(differences) if verdicts is None else verdicts
    grid = vote_grid(differences, clusters, odds) if grid is None else grid
    low, fitted, scale = _fit(differences, grid)
    agrees_with_all = not any(contradicted)
    if scale == 0 or (high >= 0.5 and not _foretells(grid, clusters, odds)):
        warnings.warn(
            "vote: the votes agree with the labels no more than chance, so they say nothing about them. Use a larger base model, "
            "more pairs, or another learning rate.",
            stacklevel=2,
        )
        if not odds.any():
            return NoiseEstimate(0.0, 0.0, 0.0, 0.0, high)
        nothing = torch.zeros_like(differences)
        low, fitted, _ = _fit(nothing, vote_grid(nothing, clusters, odds))
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


class Foreseen(NamedTuple):
    """How many labels verdicts contradict, as labels and votes foresee it.

    Attributes:
        contradict, deviation: its mean and standard deviation.
        chance: how likely as many as came are, or more.
    """

    contradict: float
    deviation: float
    chance: float


def foresee_contradictions(
    differences: Tensor, others: Tensor, sure: Tensor, contradicted: int, grid: "Grid"
) -> Foreseen:
    """Return how many labels verdicts contradict, as labels and votes foresee it, and how likely as many as came are.

    All is over the posterior of ε and b, and over verdicts given these: of few labels ε is known to a factor of two only, and
    pairs are looked at for the doubt that this very estimate leaves. Given ε and b a count N of unlike chances p_i has

        P(N < c) ≈ Φ(x) + γ (1 - x²) φ(x) / 6,   x = (c - 1/2 - μ) / s,   γ = Σ p_i (1 - p_i) (1 - 2 p_i) / s³

    (Volkova 1996).

    Args:
        differences: [n] as of `estimate_noise`.
        others: [n] log-odds of what else says that each label is right, nats.
        sure: [n] P(the verdict on a pair is right), 1/2 or more; 0 where there is none.
        contradicted: c, how many came.
        grid: of labels and votes alone.
    """
    values, judged = differences.double(), sure > 0
    if not judged.any():
        return Foreseen(0.0, 0.0, 1.0)
    posterior = _posterior(grid)
    strength, others, sure = values[judged], others.double()[judged], sure.double()[judged]
    mean = square = within = chance = torch.zeros((), dtype=torch.float64)
    for weights, scale in zip(posterior / posterior.sum(), grid.scales, strict=True):
        likely = weights.nonzero().flatten()
        right = torch.sigmoid(scale * strength + others + torch.logit(1 - RATES[likely])[:, None])  # [likely, judged]
        contradicts = right * (1 - sure) + (1 - right) * sure
        weight, count, variance = weights[likely], contradicts.sum(dim=1), contradicts * (1 - contradicts)
        mean, square = mean + (weight * count).sum(), square + (weight * count**2).sum()
        within = within + (weight * variance.sum(dim=1)).sum()
        deviation = variance.sum(dim=1).sqrt().clamp(min=1e-12)
        skew = (variance * (1 - 2 * contradicts)).sum(dim=1) / deviation**3
        x = ((contradicted - 0.5 - count) / deviation).clamp(-30, 30)
        fewer = torch.special.ndtr(x) + skew * (1 - x**2) * torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) / 6
        chance = chance + (weight * (1 - fewer.clamp(0, 1))).sum()
    return Foreseen(mean.item(), (within + square - mean**2).clamp(min=0).sqrt().item(), chance.item())


class Grid(NamedTuple):
    """What labels, votes and verdicts say of every pair of b and ε, in nats.

    Attributes:
        scales: [scales] b; the rates are `RATES`.
        prior: [scales, rates] up to a constant.
        labels: [scales, rates] log-likelihood of the labels, given the votes.
        verdicts: [scales, rates] that of the verdicts, given labels and votes, up to a constant; 0 where there are none.
    """

    scales: Tensor
    prior: Tensor
    labels: Tensor
    verdicts: Tensor

    def without_verdicts(self) -> "Grid":
        """Return what labels and votes say alone."""
        return self._replace(verdicts=torch.zeros_like(self.verdicts))


def vote_grid(differences: Tensor, clusters: Sequence[Hashable], verdicts: Tensor) -> Grid:
    """Return what labels, votes and verdicts say of ε and b, on a grid that fits the spread of the votes.

    Args:
        differences, clusters, verdicts: [n] as of `estimate_noise`.
    """
    values = differences.double()
    spread = values.abs().mean().clamp(min=1e-12)
    scales = torch.logspace(-1.5, 2, SCALES, dtype=torch.float64) / spread
    effective = len(set(clusters)) / len(values)  # of each pair, where those of a conversation are not independent
    judged = [cluster for cluster, odds in zip(clusters, verdicts.tolist(), strict=True) if odds]
    of_judged = effective_count(judged) / len(judged) if judged else 1.0
    likelihood = [_log_likelihood(scale * values, verdicts.double(), effective, of_judged) for scale in scales]
    labels, of_verdicts = (torch.stack(rows) for rows in zip(*likelihood, strict=True))
    return Grid(scales, scale_prior(scales, values)[:, None] + STEPS.log(), labels, of_verdicts)


def evidence(grid: Grid) -> float:
    """Return how well labels and votes foretell the verdicts: log p(verdicts | labels, votes), nats.

    It is up to a constant of the verdicts: which of two votes is better is said by their difference. How well they fit the
    labels is not counted: a vote that shares the labels' errors fits these better.
    """
    alone = (grid.prior + grid.labels).flatten()
    return (torch.logsumexp(alone + grid.verdicts.flatten(), 0) - torch.logsumexp(alone, 0)).item()


def _foretells(grid: Grid, clusters: Sequence[Hashable], verdicts: Tensor) -> bool:
    """Tell whether votes foretell verdicts surely better than no vote does."""
    if not verdicts.any():
        return False
    return evidence(grid) - evidence(vote_grid(torch.zeros_like(verdicts), clusters, verdicts)) > math.log(SURE)


def _posterior(grid: Grid) -> Tensor:
    """Return the posterior of b and ε, [scales, rates], to a sum of about 1; what adds little is 0."""
    likelihood = grid.prior + grid.labels + grid.verdicts
    posterior = torch.softmax(likelihood.flatten(), 0).view_as(likelihood)
    return torch.where(posterior < LEAST_WEIGHT, 0, posterior)


def _fit(differences: Tensor, grid: Grid) -> tuple[float, float, float]:
    """Return the ε from which on the profile likelihood is within 1.92 of the best, and ε and b nearest to the posterior's mean."""
    values, posterior = differences.double(), _posterior(grid)
    profile = (grid.labels + grid.verdicts).max(dim=0).values
    low = _first_reaching(RATES, profile, profile.max() - CHI_SQUARE_95 / 2)
    right = torch.zeros_like(values)
    for weights, scale in zip(posterior, grid.scales, strict=True):
        agree = torch.sigmoid(scale * values).clamp(1e-12, 1 - 1e-12)
        for likely in weights.nonzero().flatten().split(_rates_at_once(len(values))):
            odds = (RATES[likely] / (1 - RATES[likely]))[:, None] * ((1 - agree) / agree)
            right += (weights[likely, None] / (1 + odds)).sum(dim=0)
    constant, scale = nearest_line(values, right / posterior.sum())
    nearest = max(1 / (1 + math.exp(constant)), low)
    return low, min(nearest, 0.5), max(scale, 0.0)


def _log_likelihood(
    strength: Tensor, verdicts: Tensor, effective: float, effective_judged: float
) -> tuple[Tensor, Tensor]:
    """Return the log-likelihood of labels, and of verdicts given these, at each rate, [rates] nats, at one scale of the votes.

    Args:
        strength: [n] b d, nats.
        verdicts: [n] their log-odds that the label is right, nats; 0 where there are none.
        effective: what the label of each pair counts.
        effective_judged: what the verdicts on each pair count.
    """
    agree, has_verdict = torch.sigmoid(strength).clamp(1e-12, 1 - 1e-12), verdicts != 0
    some = RATES.split(_rates_at_once(len(agree)))
    total = effective * torch.cat([torch.lerp(agree, 1 - agree, rate[:, None]).log().sum(dim=1) for rate in some])
    if not has_verdict.any():
        return total, torch.zeros_like(total)
    rates, agree, confirmed = RATES[:, None], agree[has_verdict], torch.sigmoid(verdicts[has_verdict])
    right, wrong = (1 - rates) * agree, rates * (1 - agree)  # [rates, answered]
    as_believed = (right * confirmed + wrong * (1 - confirmed)) / (right + wrong)
    # The prior of h is 0 at 1; where there is no vote, there is no error that labels could share with it.
    shares = torch.linspace(0, 1, SHARES + 1, dtype=torch.float64)[: SHARES if strength.any() else 1]
    prior = torch.log_softmax(DOUBTED * torch.log1p(-shares), dim=0)
    joint = [
        log_prior + effective_judged * ((1 - share) * as_believed + share / 2).log().sum(dim=1)
        for share, log_prior in zip(shares, prior, strict=True)
    ]
    return total, torch.logsumexp(torch.stack(joint), dim=0)


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
