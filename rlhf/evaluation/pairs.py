"""How well a reward model orders labelled answers: one report for a run's held-out pairs and for `rlhf evaluate` alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import kendalltau
from tqdm.auto import tqdm

from rlhf.data.rankings import Ranking
from rlhf.data.rows import Prompt
from rlhf.evaluation.benchmarks import reward_bench, reward_bench_2
from rlhf.models.score import Scorer
from rlhf.models.text import plain
from rlhf.statistics import (
    Array,
    PairedDifference,
    best_of_n_kl,
    best_of_n_values,
    best_temperature,
    brier_score,
    calibration_table,
    clustered_mean,
    expected_calibration_error,
    length_controlled_accuracy,
    pair_nll,
    paired_difference,
)

LENGTH_BINS = 5
MOST_DIFFICULTIES = 6
CHUNK = 512


@dataclass
class ScoredPairs:
    """Canonical pairs with their scores, in the order given.

    Attributes:
        rows: canonical pairs.
        prompts: their prompts as plain text: the clusters.
        scores_chosen, scores_rejected: [n] raw scores.
    """

    rows: list[dict[str, Any]]
    prompts: list[str]
    scores_chosen: Array
    scores_rejected: Array

    @classmethod
    def unscored(cls, rows: list[dict[str, Any]]) -> "ScoredPairs":
        """Pairs that nobody has judged yet: all scores 0."""
        return cls(rows, [plain(row["prompt"]) for row in rows], np.zeros(len(rows)), np.zeros(len(rows)))

    @property
    def right(self) -> Array:
        """1 where the chosen answer has the higher score; a tie is wrong."""
        return (self.scores_chosen > self.scores_rejected).astype(float)

    @property
    def length_differences(self) -> Array:
        """Characters of the chosen answer minus those of the rejected one."""
        return np.array([len(_text(row, "chosen")) - len(_text(row, "rejected")) for row in self.rows], dtype=float)

    def samples(self) -> list[dict[str, Any]]:
        """Every pair with its scores, for people."""
        columns = zip(self.rows, self.prompts, self.scores_chosen, self.scores_rejected, strict=True)
        return [
            {
                "prompt": prompt,
                "chosen": _text(row, "chosen"),
                "rejected": _text(row, "rejected"),
                "score_chosen": float(chosen),
                "score_rejected": float(rejected),
            }
            for row, prompt, chosen, rejected in columns
        ]


def score_pairs(reward: Scorer, rows: list[Any], *, label: str = "score") -> ScoredPairs:
    """Score both sides of every pair; an answer that stands in several pairs is scored once."""
    keys: dict[tuple[str, str], int] = {}
    unique: list[tuple[Prompt, str]] = []

    def place(row: dict[str, Any], prompt: str, side: str) -> int:
        key = (prompt, _text(row, side))
        if key not in keys:
            keys[key] = len(unique)
            unique.append((row["prompt"], key[1]))
        return keys[key]

    prompts = [plain(row["prompt"]) for row in rows]
    chosen = [place(row, prompt, "chosen") for row, prompt in zip(rows, prompts, strict=True)]
    rejected = [place(row, prompt, "rejected") for row, prompt in zip(rows, prompts, strict=True)]
    scores = _scores(reward, unique, label)
    return ScoredPairs(rows, prompts, scores[chosen], scores[rejected])


def pair_report(judged: ScoredPairs, *, gold_differences: Sequence[float] | None = None) -> dict[str, Any]:
    """How well scores order labelled pairs. All intervals resample prompts.

    `accuracy` counts ties as wrong (strict inequality, as RewardBench does) and says how many there were.
    `length_baseline` is the accuracy of "the longer answer wins", ties half; `accuracy_length_controlled` gives a model
    that looks at length alone exactly 0.5. The predicted side has probability σ|d|, and `ece` compares that with how
    often it agrees with the label; `brier` and `nll` are of P(chosen) = σ(d); `temperature` is the T whose σ(d/T) fits
    these labels best. `accuracy_true` compares with the sign of the true reward's difference, pairs without one left out.
    `by` has the accuracy by subset, source and difficulty where the rows name them, `by_length` by length difference.
    """
    right, differences = judged.right, judged.scores_chosen - judged.scores_rejected
    accuracy, interval = clustered_mean(right.tolist(), judged.prompts)
    lengths = judged.length_differences
    confidence = (1 / (1 + np.exp(-np.minimum(np.abs(differences), 50.0)))).tolist()
    controlled, controlled_interval = length_controlled_accuracy(right.tolist(), lengths.tolist(), judged.prompts)
    temperature = best_temperature(differences.tolist())
    report: dict[str, Any] = {
        "n": int(right.size),
        "prompts": len(set(judged.prompts)),
        "accuracy": accuracy,
        "accuracy_ci": interval,
        "ties": int((differences == 0).sum()),
        "length_baseline": float(((lengths > 0) + 0.5 * (lengths == 0)).mean()),
        "accuracy_length_controlled": controlled,
        "accuracy_length_controlled_ci": controlled_interval,
        "ece": expected_calibration_error(confidence, right.tolist()),
        "brier": brier_score(differences.tolist()),
        "nll": pair_nll(differences.tolist()),
        "temperature": temperature,
        "nll_at_temperature": None if temperature is None else pair_nll(differences.tolist(), temperature),
        "accuracy_true": None,
        "accuracy_true_ci": None,
        "calibration": calibration_table(confidence, right.tolist()),
        "by": {name: _by(judged, *grouping) for name, grouping in _groupings(judged.rows).items()},
        "by_length": _by_length(judged, lengths),
    }
    if gold_differences is not None:
        gold = np.asarray(gold_differences, dtype=float)
        decided = gold != 0
        if decided.any():
            agrees = (np.sign(differences) == np.sign(gold))[decided].astype(float)
            kept = [prompt for prompt, keep in zip(judged.prompts, decided, strict=True) if keep]
            report["accuracy_true"], report["accuracy_true_ci"] = clustered_mean(agrees.tolist(), kept)
    subsets = report["by"].get("subset", {})
    report["reward_bench"] = reward_bench({name: (entry["n"], entry["accuracy"]) for name, entry in subsets.items()})
    return report


def compare(first: ScoredPairs, second: ScoredPairs) -> PairedDifference:
    """`first` against `second` on the same pairs: the difference in accuracy, its interval, a paired test."""
    return paired_difference(first.right.tolist(), second.right.tolist(), first.prompts)


def ranking_report(reward: Scorer, rankings: Sequence[Ranking], *, label: str = "score") -> dict[str, Any]:
    """K-wise data by prompt.

    `best_of_k` is how often every best answer is scored above every other, strictly, so a tie is wrong (RewardBench 2);
    chance is 1 / C(K, number of best ones). `tau_b` is the mean rank correlation. `best_of_n` is what choosing the best
    of n with this model gives, in the unit of the labels, at which KL: the unbiased estimator over all subsets, beside
    choosing by the labels themselves, on the prompts that have n answers.
    """
    flat: list[tuple[Prompt, str]] = [(r.prompt, answer.content) for r in rankings for answer in r.answers]
    scores = _scores(reward, flat, label)
    ends = np.cumsum([len(ranking.answers) for ranking in rankings])
    proxies = np.split(scores, ends[:-1])
    golds = [np.array([answer.score for answer in ranking.answers]) for ranking in rankings]
    best = [float(p[g == g.max()].min() > p[g < g.max()].max()) for p, g in zip(proxies, golds, strict=True)]
    taus = [tau for p, g in zip(proxies, golds, strict=True) if not np.isnan(tau := kendalltau(p, g).statistic)]
    accuracy, interval = clustered_mean(best)
    report: dict[str, Any] = {
        "prompts": len(rankings),
        "best_of_k": accuracy,
        "best_of_k_ci": interval,
        "best_of_k_by_chance": float(np.mean([1 / math.comb(len(g), int((g == g.max()).sum())) for g in golds])),
        "tau_b": float(np.mean(taus)) if taus else None,
        "best_of_n": _best_of_n(proxies, golds),
    }
    subsets, ids = ([str(ranking.extras.get(name, "")) for ranking in rankings] for name in ("subset", "id"))
    report["reward_bench_2"] = reward_bench_2(list(zip(subsets, ids, proxies, golds, strict=True)))
    return report


def _best_of_n(proxies: Sequence[Array], golds: Sequence[Array]) -> list[dict[str, float]]:
    """The curve over n = 1, 2, 4, … for the prompts that have as many answers as most have."""
    most = int(np.median([len(g) for g in golds]))
    kept = [(p, g) for p, g in zip(proxies, golds, strict=True) if len(g) >= most]
    rows = []
    for n in (1, 2, 4, 8, 16, 32, 64):
        if n > most:
            break
        by_model, _ = clustered_mean([best_of_n_values([p], [g], n)[0] for p, g in kept])
        by_label, _ = clustered_mean([best_of_n_values([g], [g], n)[0] for _, g in kept])
        rows.append({"n": n, "kl": best_of_n_kl(n), "by_model": by_model, "by_label": by_label, "prompts": len(kept)})
    return rows


def _scores(reward: Scorer, texts: Sequence[tuple[Prompt, str]], label: str) -> Array:
    """Scores of (prompt, answer), in chunks so that a bar can move; similar lengths together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][1]) + len(plain(texts[i][0])))
    scores = np.empty(len(texts))
    for start in tqdm(range(0, len(order), CHUNK), desc=label, disable=None):
        index = order[start : start + CHUNK]
        part = reward.score([texts[i][0] for i in index], [texts[i][1] for i in index])
        scores[index] = part.numpy().astype(float)
    return scores


def _groupings(rows: list[dict[str, Any]]) -> dict[str, tuple[list[str | None], list[str]]]:
    """The labels by which accuracy is broken down, where rows carry them and they differ, and the order of the labels."""
    found: dict[str, tuple[list[str | None], list[str]]] = {}
    for name in ("subset", "source"):
        labels = [row.get(name) for row in rows]
        if len(set(labels)) > 1:
            found[name] = (labels, sorted({label for label in labels if label is not None}))
    for name in ("rating_gap", "margin", "agree"):
        values = [row.get(name) for row in rows]
        if all(value is not None for value in values) and len(set(values)) > 1:
            found["difficulty"] = _binned(name, np.array(values, dtype=float))
            break
    return found


def _binned(name: str, values: Array) -> tuple[list[str | None], list[str]]:
    """Few values as they are, many in quarters, hardest first: the smaller the gap, the harder the pair."""
    distinct = sorted(set(values.tolist()))
    if len(distinct) <= MOST_DIFFICULTIES:
        return [f"{name} {value:g}" for value in values], [f"{name} {value:g}" for value in distinct]
    edges = sorted(set(np.quantile(values, [0.25, 0.5, 0.75]).tolist()))
    names = [f"{name} ≤ {edge:.3g}" for edge in edges] + [f"{name} > {edges[-1]:.3g}"]
    index = np.searchsorted(edges, values, side="left")
    return [names[int(i)] for i in index], [names[i] for i in sorted(set(index.tolist()))]


def _by(judged: ScoredPairs, labels: list[str | None], order: list[str]) -> dict[str, dict[str, Any]]:
    """Accuracy of each group that has a label, with its interval and length baseline."""
    right, lengths = judged.right, judged.length_differences
    report = {}
    for label in order:
        here = [i for i, other in enumerate(labels) if other == label]
        accuracy, interval = clustered_mean(right[here].tolist(), [judged.prompts[i] for i in here])
        longer = float(((lengths[here] > 0) + 0.5 * (lengths[here] == 0)).mean())
        report[label] = {"n": len(here), "accuracy": accuracy, "accuracy_ci": interval, "length_baseline": longer}
    return report


def _by_length(judged: ScoredPairs, lengths: Array) -> list[dict[str, Any]]:
    """Accuracy over equally many pairs each, from "chosen much shorter" to "chosen much longer"."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTH_BINS + 1)))
    index = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(0, len(edges) - 2))
    right = judged.right
    report = []
    for b in sorted(set(index.tolist())):
        here = np.nonzero(index == b)[0]
        accuracy, interval = clustered_mean(right[here].tolist(), [judged.prompts[i] for i in here])
        low, high = float(lengths[here].min()), float(lengths[here].max())
        report.append({"low": low, "high": high, "n": len(here), "accuracy": accuracy, "accuracy_ci": interval})
    return report


def _text(row: dict[str, Any], side: str) -> str:
    text: str = row[side][0]["content"]
    return text
