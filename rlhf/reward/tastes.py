"""What annotators follow in an answer beside which one is better: its length, its flattery."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from scipy.stats import norm
from torch import Tensor

from rlhf.objectives.annotators import label_slopes

CONFIDENCE = 0.95
LARGEST = 3.0  # a difference counts as this many usual ones at most, so that a few odd answers do not decide
TASTES = ("length", "flattery")  # of `rlhf.data.traits`


class Taste(TypedDict):
    """How far one annotator's choices follow a feature of the answers, beside which answer is better.

    Attributes:
        slope: nats that a usual difference in the feature (root of the mean square) adds to the log-odds of being chosen.
        slope_ci: its 95 % interval.
        beyond: slope minus that of all other annotators together.
        beyond_ci: its interval, which holds for all annotators and features together (Bonferroni).
    """

    slope: float
    slope_ci: list[float]
    beyond: float
    beyond_ci: list[float]


def find_tastes(
    others: Tensor, features: Mapping[str, Sequence[float]], judged: Mapping[str, Tensor], conversation: Tensor
) -> dict[str, dict[str, Taste]]:
    """Return the tastes of every judged annotator, by name and feature; features that never differ are left out.

    Beside the features the regression has tanh(o / 2), what the others' log-odds o say of which answer is better: it lies
    between -1 and 1, as the choices of an annotator who is careless now and then do not follow it beyond a point.

    Args:
        others: [n] o.
        features: by name, [n] what the chosen answer has more of.
        judged: by name, which of the n labels the annotator gave.
        conversation: [n] int64, equal for labels that are not independent.
    """
    # 1. Every feature in usual differences.
    columns = {}
    for name, values in features.items():
        column = torch.tensor(values, dtype=torch.float64)
        usual = column.square().mean().sqrt()
        if usual > 0:
            columns[name] = (column / usual).clamp(-LARGEST, LARGEST)
    if not columns or not judged:
        return {}
    table = torch.stack([torch.tanh(others.double() / 2), *columns.values()], dim=1)

    # 2. Every annotator against all others.
    everybody = torch.cat(list(judged.values()))
    z, z_together = _quantile(CONFIDENCE), _quantile(all_together(len(judged) * len(columns)))
    tastes: dict[str, dict[str, Taste]] = {}
    for name, rows in judged.items():
        elsewhere = everybody[~torch.isin(everybody, rows)]
        mine, rest = (label_slopes(table[part], conversation[part]) for part in (rows, elsewhere))
        tastes[name] = {}
        for place, feature in enumerate(columns, start=1):
            slope, variance = mine.slope[place].item(), mine.covariance[place, place].item()
            beyond = slope - rest.slope[place].item()
            half, wide = z * variance**0.5, z_together * (variance + rest.covariance[place, place].item()) ** 0.5
            tastes[name][feature] = {
                "slope": slope,
                "slope_ci": [slope - half, slope + half],
                "beyond": beyond,
                "beyond_ci": [beyond - wide, beyond + wide],
            }
    return tastes


def all_together(tests: int) -> float:
    """Return the confidence of each of some intervals that hold all together (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(1, tests)


def _quantile(confidence: float) -> float:
    return float(norm.ppf((1 + confidence) / 2))
