"""Recursive assistance (Leike et al. 2018, arXiv:1811.07871): an evaluator who hears a critic, and how far to trust it.

A critic claims which of two answers is the worse one, because it misses what was asked for. Its claim is one more observation of
which answer is better, wrong with probability e; Bayes adds its log-odds to what the evaluator thinks already.
"""

import math

import torch
from torch import Tensor


def assisted_probability(alone: Tensor, claims: Tensor, *, error_rate: float) -> Tensor:
    """Return P(an evaluator prefers the first answer) once a critic has spoken, [n].

        p' = σ( log(p / (1 - p)) + c log((1 - e) / e) )

    A critic that guesses (e = 1/2) changes nothing. An evaluator who knows nothing (p = 1/2) believes the critic as far as it
    is to be trusted: 1 - e. Of e = 0 nobody could be talked out, so it is refused.

    Args:
        alone: [n] p in [0, 1], without the critic.
        claims: [n] c: 1 where the critic speaks for the first answer, -1 for the second, 0 where it says nothing.
        error_rate: e in (0, 1), the share of wrong claims that the evaluator reckons with.

    >>> assisted_probability(torch.tensor([0.5, 0.8, 0.8]), torch.tensor([1, -1, 0]), error_rate=0.2)
    tensor([0.8000, 0.5000, 0.8000])
    """
    assert 0 < error_rate < 1, "an error rate between 0 and 1"
    return torch.sigmoid(torch.logit(alone) + claims * math.log((1 - error_rate) / error_rate))


def assisted_accuracy(alone: Tensor, *, error_rate: float, believed: float | None = None) -> Tensor:
    """Return the share of right labels with a critic, [n], of evaluators who are right with probability r without one.

        a = (1 - e) σ(logit r + L) + e σ(logit r - L),    L = log((1 - ê) / ê)

    With ê = e this is at least r, and r only where e = 1/2: what is weighed rightly does no harm, also where the critic is
    wrong more often than the evaluator. But then it is little: r = 0.75 becomes 0.893 by e = 0.1, 0.8 by e = 0.25 and 0.758
    by e = 0.4. With ê < e it may fall below r.

    Those who take whatever is likelier, knowing no more than r and e, have max(r, 1 - e): then a critic helps only where it is
    right more often than they are (arXiv:2605.27483).

    Args:
        alone: [n] r in [0, 1].
        error_rate: e in [0, 1], the share of wrong claims, independent of the evaluator's errors.
        believed: ê in (0, 1), what the evaluator reckons with; e itself if it is not given.

    >>> assisted_accuracy(torch.tensor([0.5, 0.75, 1.0]), error_rate=0.25)
    tensor([0.6250, 0.8000, 1.0000])
    """
    reckoned = error_rate if believed is None else believed
    heard, misled = (
        assisted_probability(alone, torch.full_like(alone, claim), error_rate=reckoned) for claim in (1.0, -1.0)
    )
    return (1 - error_rate) * heard + error_rate * misled
