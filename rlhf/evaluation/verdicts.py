"""How well the verdicts of a causal model agree with labelled pairs, and how much of them is the order of the answers."""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from rlhf.data.conversations import conversation_keys
from rlhf.data.rows import SIDES, Pair, told
from rlhf.errors import UserError
from rlhf.evaluation.pairs import ScoredPairs
from rlhf.models.verdicts import VerdictModel, Verdicts
from rlhf.objectives.verdicts import first_is_better, turns_with_order
from rlhf.statistics import clustered_mean, clustered_share, expected_calibration_error, paired_difference


class VerdictReport(TypedDict):
    """A model's verdicts on labelled pairs, both orders averaged; intervals resample conversations.

    Attributes:
        model: its name.
        n, ties, too_long: pairs; those with log-odds of exactly 0, which count as wrong; those that did not fit in its context.
        accuracy: share of the pairs whose chosen answer it calls the better one.
        ece: how far P(chosen is better) = σ(log-odds) is from how often it is right.
        turned: share of the pairs whose verdict turns with the order, that is, of which it says the same letter twice.
        says_a: share of all questions, two a pair, to which it says A; 0.5 without position bias.
        bias: mean bias towards A, nats.
        letter_share: mean share of the next-token probability that lies on A and B.
    """

    model: str
    n: int
    ties: int
    too_long: int
    accuracy: float
    accuracy_ci: list[float]
    ece: float
    turned: float
    turned_ci: list[float]
    says_a: float
    bias: float
    bias_ci: list[float] | None
    letter_share: float


def compare_pairs(model: VerdictModel, rows: Sequence[Pair], *, label: str | None = None) -> Verdicts:
    """Ask a model which side of every pair is better; the chosen one is called the first.

    Args:
        label: what the progress bar says.
    """
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = ([told(row, side) for row in rows] for side in ("chosen", "rejected"))
    return model.compare(prompts, chosen, rejected, label=label)


def check_room(model: VerdictModel, rows: Sequence[Pair]) -> None:
    """Refuse a model that can read none of some pairs, before anything is computed.

    Raises:
        UserError: no pair fits in its context.
    """
    chosen, rejected = ([told(row, side) for row in rows] for side in SIDES)
    if rows and not model.fit([row["prompt"] for row in rows], chosen, rejected).any():
        raise UserError(_no_room(model.name, len(rows)))


def _no_room(name: str, pairs: int) -> str:
    return f"{name}: none of the {pairs} pairs fits in its context, so it gives no verdict; take another model."


def verdicts_beside(model: VerdictModel, pairs: ScoredPairs, *, label: str | None = None) -> dict[str, Any]:
    """Report a causal model's verdicts on pairs that a reward model has scored, and how the two differ.

    Args:
        label: what the progress bar says.

    Raises:
        UserError: no pair fits in its context.
    """
    verdicts = compare_pairs(model, pairs.rows, label=label)
    difference = paired_difference(right_verdicts(verdicts), pairs.right.tolist(), pairs.clusters, span=1.0)
    return {**verdict_report(model.name, verdicts, pairs.rows), **difference}


def right_verdicts(verdicts: Verdicts) -> list[float]:
    """Return 1 where the chosen answer is called the better one and 0 elsewhere, [n]; a tie is wrong."""
    values: list[float] = (verdicts.orders.log_odds > 0).double().tolist()
    return values


def verdict_report(name: str, verdicts: Verdicts, rows: Sequence[Pair]) -> VerdictReport:
    """Report a model's verdicts on labelled pairs, of which the chosen answer was called the first.

    Pairs that are too long for it count as wrong; what is said of its verdicts is of those that it gave.

    Args:
        name: the model's.

    Raises:
        UserError: no pair fits in its context.
    """
    if not verdicts.fits.any():
        raise UserError(_no_room(name, len(rows)))
    clusters = conversation_keys([row["prompt"] for row in rows])
    log_odds, bias = verdicts.orders
    right, turned = right_verdicts(verdicts), turns_with_order(verdicts.orders).double()[verdicts.fits].tolist()
    sure, given = first_is_better(verdicts.orders).double()[verdicts.fits], verdicts.fits
    labels = np.array([row.get("confidence", 1.0) for row in rows])[given.numpy()]
    sides = log_odds[given].numpy()  # above 0 the chosen answer is called better; a tie agrees half with any label
    agreement = np.where(sides > 0, labels, np.where(sides < 0, 1 - labels, 0.5))
    read = [cluster for cluster, fits in zip(clusters, given.tolist(), strict=True) if fits]
    accuracy, accuracy_ci = clustered_share(right, clusters)
    turned_share, turned_ci = clustered_share(turned, read)
    mean_bias, bias_ci = clustered_mean(bias[given].double().tolist(), read)
    says_a = np.concatenate([(bias + log_odds > 0)[given].numpy(), (bias - log_odds > 0)[given].numpy()])
    return {
        "model": name,
        "n": len(rows),
        "ties": int((log_odds[given] == 0).sum()),
        "too_long": int((~verdicts.fits).sum()),
        "accuracy": accuracy,
        "accuracy_ci": accuracy_ci,
        "ece": expected_calibration_error(sure.maximum(1 - sure).tolist(), agreement.tolist()),
        "turned": turned_share,
        "turned_ci": turned_ci,
        "says_a": float(says_a.mean()),
        "bias": mean_bias,
        "bias_ci": bias_ci,
        "letter_share": float(verdicts.share[given].mean()),
    }
