"""KL agrees with evaluation: does PPO's own log end at the distance from the reference that the evaluation measures?

Both are means over answers of Σ_t (log π - log π_ref), of two samples of answers to two samples of prompts. PPO's last rollout was
sampled before its own update, so one update lies between the two.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist, fmean, variance

from rlhf.invariants.checks import Check

FALSE_ALARMS = 1e-4  # of evaluations whose two KLs agree, this share is noted


def kl_agrees(logged: Sequence[float], last_rollout: Sequence[float], evaluated: Sequence[float]) -> Check:
    """Compare the mean KL of an evaluation with that of PPO's last rollout.

    The bound is b·√(s₁²(1 + 2g²)/(n₁-3) + s₂²/(n₂-3)) + g·Δ on either side, index 1 for PPO's answers, 2 for the evaluation's.
    b is the normal's quantile for one false alarm in ten thousand; n - 3 in place of n gives each mean the variance of
    Student's t. g·Δ is how far one update may move the KL: while the policy moves in one direction by equal steps, its KL
    grows with the square of their number (it is quadratic near the reference), so the change after the n-th rollout is
    g = (2n - 1) / (2n - 3) times that before it. Δ is the largest change in the log; each is a difference of two means of
    rollouts, whence 2g². Prompts of another kind than those that PPO trained on may move the KL by more.

    Args:
        logged: the mean KL of each logged rollout, in order, two or more, nats an answer.
        last_rollout: KL of each answer of the last rollout, eight or more.
        evaluated: KL of each answer of the evaluation, eight or more.
    """
    rollouts = len(logged)
    step = max(abs(after - before) for before, after in pairwise(logged))
    growth = (2 * rollouts - 1) / (2 * rollouts - 3)
    first, second = (variance(values) / (len(values) - 3) for values in (last_rollout, evaluated))
    error = math.sqrt(first * (1 + 2 * growth**2) + second)
    bound = NormalDist().inv_cdf(1 - FALSE_ALARMS / 2) * error + growth * step
    return Check(
        name="KL agrees with evaluation",
        statistic=fmean(evaluated) - fmean(last_rollout),
        bound=bound,
        low=-bound,
        unit="nats an answer",
        sentence=f"PPO's last rollout is at a KL of {fmean(last_rollout):.2f} nats an answer, the evaluation measures "
        f"{fmean(evaluated):.2f}. Likely causes: the reference moved with the policy while PPO trained (then its log is too "
        "low); the policy that was saved is not the one that was trained; or the held-out prompts are of another kind than "
        "those that PPO trained on. Compare the answers in ppo/samples.jsonl and evaluate/samples.jsonl.",
    )
