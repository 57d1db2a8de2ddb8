"""What the votes say of audited pairs, as tables: deciles, length, annotators and sources, wants, the rows of a file."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from scipy.stats import spearmanr
from scipy.stats import t as student

from rlhf.data.conversations import conversation_keys
from rlhf.data.rows import Pair, told
from rlhf.data.sources import Row
from rlhf.models.text import plain
from rlhf.objectives.strength import VoteStrength, posterior_confidence
from rlhf.objectives.worth import worth_on_close_pairs, worth_on_sure_pairs
from rlhf.reward.noise import NoiseEstimate, estimate_noise
from rlhf.reward.wants import Wants, without_wants
from rlhf.statistics import clustered_share

DECILES = 10
LENGTH_ALARM = 0.4
LENGTH_CHANCE = 0.01  # how often votes that know nothing of length may raise it


class Audited(NamedTuple):
    """What the votes say about each pair.

    Attributes:
        rows: the pairs, each with the line it was read from.
        strength: of every pair.
        wrong: [n] probability that the label is wrong.
        wrong_without_wants: [n] the same by what the votes see beside the traits that the labels want.
        suspicious: indices of the labels that are wrong rather than right.
    """

    rows: Sequence[Row]
    strength: VoteStrength
    wrong: torch.Tensor
    wrong_without_wants: torch.Tensor
    suspicious: frozenset[int]


def deciles(audited: Audited) -> list[dict[str, float]]:
    """Describe ten equally large groups of pairs, from the weakest to the strongest."""
    strength, wrong = audited.strength, audited.wrong
    order = torch.argsort(strength.mean, stable=True)
    return [
        {
            "from": strength.mean[part].min().item(),
            "to": strength.mean[part].max().item(),
            "n": len(part),
            "strength_mean": strength.mean[part].mean().item(),
            "strength_std": strength.std[part].mean().item(),
            "probability_wrong": wrong[part].mean().item(),
        }
        for part in torch.tensor_split(order, DECILES)
        if len(part)
    ]


def length_bias(pairs: Sequence[Pair], strength: VoteStrength) -> dict[str, Any]:
    """Measure how much of labels and votes length alone explains.

    Returns:
        how often the longer answer is the chosen one, ties half, with its interval; and Spearman's correlation of the strength
        with the difference in characters, None where either is the same for all pairs.
    """
    differences = np.array([len(told(row, "chosen")) - len(told(row, "rejected")) for row in pairs], float)
    mean, interval = clustered_share(
        ((differences > 0) + 0.5 * (differences == 0)).tolist(), conversation_keys([row["prompt"] for row in pairs])
    )
    votes = strength.mean.double().numpy()
    varied = differences.std() > 0 and votes.std() > 0
    correlation = float(spearmanr(differences, votes).statistic) if varied else None
    return {"longer_is_chosen": mean, "longer_is_chosen_ci": interval, "correlation_with_strength": correlation}


def length_alarm(correlation: float | None, pairs: int) -> str | None:
    """Say that the votes mostly follow length, where they do; they then call wrong what is merely long, or short.

    Returns:
        the sentences, or None where the correlation is small, not known, or what chance brings in one of a hundred such files.
    """
    if correlation is None or abs(correlation) < LENGTH_ALARM or pairs <= 2:
        return None
    by_chance = float(student.ppf(1 - LENGTH_CHANCE / 2, pairs - 2))  # of a rank correlation of nothing, as t
    if abs(correlation) < by_chance / math.sqrt(pairs - 2 + by_chance**2):
        return None
    liked = "longer" if correlation > 0 else "shorter"
    return (
        f"The votes prefer the {liked} answer (correlation {correlation:.2f}), so many suspicious pairs may only be those "
        f"whose chosen answer is not the {liked} one. Read them before dropping them; a stronger model looks at more than length."
    )


def worth_in_clean_labels(noise: NoiseEstimate, pairs: int) -> dict[str, float] | None:
    """Return how many clean labels these are worth; None where the votes say nothing.

    Returns:
        `low`, on pairs with a sure order if the share of wrong labels is `noise.high`; `high`, on close pairs if it is
        `noise.low`.
    """
    if noise.scale == 0:
        return None
    return {"low": pairs * worth_on_sure_pairs(noise.high), "high": pairs * worth_on_close_pairs(noise.low)}


def probability_wrong_without_wants(strength: torch.Tensor, wants: Wants, pairs: Sequence[Pair]) -> torch.Tensor:
    """Return the probability that each label is wrong, by the part of the votes that the labels' wants do not explain.

    It is 0 for all where that part agrees with the labels no more than chance, and so says nothing.
    """
    rest = without_wants(strength, wants)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        noise = estimate_noise(rest, conversation_keys([row["prompt"] for row in pairs]))
    if noise.flip_rate == 0:
        return torch.zeros(len(pairs))
    return 1 - posterior_confidence(rest, flip_rate=noise.flip_rate, scale=noise.scale)


def most_suspicious(audited: Audited) -> list[int]:
    """Return the rows whose labels are wrong rather than right without the wants, the most suspicious first."""
    wrong = audited.wrong_without_wants
    order = torch.argsort(wrong, descending=True, stable=True).tolist()
    return list(dict.fromkeys(audited.rows[i].number - 1 for i in order if wrong[i] > 0.5))


def wants_of_rows(wants: Wants, rows: Sequence[Row]) -> dict[str, Any]:
    """Return what the labels want as `audit.json` has it, its examples as rows of the file, from 0."""
    accuracy, interval = wants.accuracy or (None, None)
    traits = {
        name: {**want, "examples": [rows[i].number - 1 for i in want["examples"]]}
        for name, want in wants.traits.items()
    }
    return {"accuracy": accuracy, "accuracy_ci": interval, "wanted": wants.wanted, "traits": traits}


def agreement_by(audited: Audited, column: str) -> dict[str, dict[str, Any]]:
    """Measure how often the votes agree with the labels of every annotator, source or subset.

    Returns:
        an entry for each value of the column; empty where the rows name only one.
    """
    values: list[Any] = [row.values.get(column) for row in audited.rows]
    groups = sorted({value for value in values if value is not None})
    if len(groups) < 2:
        return {}
    mean_strength = audited.strength.mean
    agrees = (mean_strength > 0).double() + 0.5 * (mean_strength == 0).double()
    clusters = conversation_keys([row.values["prompt"] for row in audited.rows])
    report = {}
    for group in groups:
        members = [i for i, value in enumerate(values) if value == group]
        mean, interval = clustered_share(agrees[members].tolist(), [clusters[i] for i in members])
        likely = audited.wrong[members].mean().item()
        report[group] = {"n": len(members), "agreement": mean, "agreement_ci": interval, "probability_wrong": likely}
    return report


def shown_pair(audited: Audited, i: int) -> dict[str, Any]:
    """Return what the page says about one pair."""
    row, strength = audited.rows[i], audited.strength
    return {
        "row": row.number - 1,
        "prompt": plain(row.values["prompt"]),
        "chosen": told(row.values, "chosen"),
        "rejected": told(row.values, "rejected"),
        "strength_mean": strength.mean[i].item(),
        "strength_std": strength.std[i].item(),
        "strength_votes": int(strength.votes[i]),
        "probability_wrong": audited.wrong[i].item(),
        "rating_gap": row.values.get("rating_gap"),
    }


def write_parquet(file: Path, audited: Audited) -> None:
    """Write what the votes say about each pair, a row a pair."""
    rows, strength = audited.rows, audited.strength
    columns = {
        "row": [row.number - 1 for row in rows],
        "strength_mean": strength.mean.tolist(),
        "strength_std": strength.std.tolist(),
        "strength_votes": strength.votes.tolist(),
        "probability_wrong": audited.wrong.tolist(),
        "probability_wrong_without_wants": audited.wrong_without_wants.tolist(),
        "suspicious": [i in audited.suspicious for i in range(len(rows))],
    }
    parquet.write_table(pa.table(columns), file)
