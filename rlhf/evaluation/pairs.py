"""How well a reward model orders labelled answers: one report for a run's held-out pairs and for `rlhf evaluate` alike."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import kendalltau

from rlhf.data.conversations import conversation_keys
from rlhf.data.rankings import Ranking
from rlhf.data.rows import SIDES, Pair, Prompt, answer, asked, assistant_turn, has_ended, told
from rlhf.evaluation.benchmarks import Item
from rlhf.evaluation.best_of_n import best_of_n_kl, best_of_n_values
from rlhf.models.batching import batches_by_length, run_batches
from rlhf.models.score import Scorer
from rlhf.models.text import plain
from rlhf.statistics import (
    Array,
    PairedDifference,
    best_temperature,
    brier_score,
    calibration_table,
    clustered_mean,
    clustered_share,
    expected_calibration_error,
    length_controlled_accuracy,
    pair_nll,
    paired_difference,
)

LENGTH_BINS = 5
MOST_DIFFICULTIES = 6
CHUNK = 128


@dataclass
class ScoredPairs:
    """Canonical pairs with their scores, in the order given.

    Attributes:
        rows: the pairs.
        prompts: [n] their prompts as plain text.
        scores_chosen, scores_rejected: [n] raw scores.
    """

    rows: Sequence[Pair]
    prompts: list[str]
    scores_chosen: Array
    scores_rejected: Array

    @cached_property
    def clusters(self) -> list[str]:
        """Return which pairs are of one conversation, [n]: they are not independent of each other."""
        return conversation_keys([row["prompt"] for row in self.rows])

    @property
    def right(self) -> Array:
        """Return 1 where the chosen answer has the higher score and 0 elsewhere, [n]; a tie is wrong."""
        return (self.scores_chosen > self.scores_rejected).astype(float)

    @property
    def labels(self) -> Array:
        """Return the probability that the chosen answer is better, as labelled, [n]; 1 where the label is sure."""
        return np.array([row.get("confidence", 1.0) for row in self.rows], dtype=float)

    @property
    def agreement(self) -> Array:
        """Return the probability, as labelled, that the answer with the higher score is better, [n]; 0.5 for a tie."""
        differences = self.scores_chosen - self.scores_rejected
        return np.where(differences > 0, self.labels, np.where(differences < 0, 1 - self.labels, 0.5))

    @property
    def longer_is_right(self) -> Array:
        """Return how often "the longer answer wins" is right, [n]; half where both are as long."""
        lengths = self.length_differences
        return (lengths > 0) + 0.5 * (lengths == 0)

    @property
    def length_differences(self) -> Array:
        """Return the characters of the chosen answer minus those of the rejected one, [n]."""
        return np.array([len(told(row, "chosen")) - len(told(row, "rejected")) for row in self.rows], dtype=float)

    def samples(self) -> list[dict[str, Any]]:
        """Return every pair as texts with its scores, for people."""
        columns = zip(self.rows, self.prompts, self.scores_chosen, self.scores_rejected, strict=True)
        return [
            {
                "prompt": prompt,
                "chosen": told(row, "chosen"),
                "rejected": told(row, "rejected"),
                "score_chosen": float(chosen),
                "score_rejected": float(rejected),
            }
            for row, prompt, chosen, rejected in columns
        ]


def score_pairs(reward: Scorer, rows: Sequence[Pair], *, label: str = "score") -> ScoredPairs:
    """Score both sides of every pair, each behind its own conversation; an answer that stands in several pairs is scored once.

    Args:
        label: what the progress bar says.
    """
    texts: list[tuple[Prompt, str]] = [(asked(row, side), answer(row, side)) for side in SIDES for row in rows]
    ended = [has_ended(row[side]) for side in SIDES for row in rows]
    scores = score_answers(reward, texts, ended=ended, label=label)
    return ScoredPairs(rows, [plain(row["prompt"]) for row in rows], scores[: len(rows)], scores[len(rows) :])


def score_items(reward: Scorer, items: Sequence[Item], *, label: str = "score") -> list[Array]:
    """Score the answers of each item of a benchmark, [K] an item."""
    texts = [(item.prompt, text) for item in items for text in item.answers]
    return np.split(score_answers(reward, texts, label=label), np.cumsum([len(item.answers) for item in items])[:-1])


def pairs_of_items(items: Sequence[Item], scores: Sequence[Array]) -> ScoredPairs:
    """Return the comparisons of a benchmark's items as scored pairs."""
    rows: list[Pair] = []
    chosen, rejected = [], []
    for item, values in zip(items, scores, strict=True):
        for better, worse in item.pairs:
            sides = {"chosen": assistant_turn(item.answers[better]), "rejected": assistant_turn(item.answers[worse])}
            rows.append({"prompt": item.prompt, "chosen": sides["chosen"], "rejected": sides["rejected"]})
            if item.subset:
                rows[-1]["subset"] = item.subset
            chosen.append(values[better])
            rejected.append(values[worse])
    return ScoredPairs(rows, [plain(row["prompt"]) for row in rows], np.array(chosen), np.array(rejected))


def score_answers(
    reward: Scorer, texts: Sequence[tuple[Prompt, str]], *, ended: Sequence[bool] | None = None, label: str = "score"
) -> Array:
    """Score (prompt, answer), [n]; what stands there several times is scored once. Similar lengths go together.

    Args:
        ended: whether each answer came to its end; None if all did.
        label: what the progress bar says.
    """
    places: dict[tuple[str, str, bool], int] = {}
    unique: list[tuple[Prompt, str, bool]] = []
    index = []
    flags = [True] * len(texts) if ended is None else ended
    for (prompt, text), flag in zip(texts, flags, strict=True):
        key = (json.dumps(prompt), text, flag)
        if key not in places:
            places[key] = len(unique)
            unique.append((prompt, text, flag))
        index.append(places[key])

    def score(chunk: list[int]) -> list[float]:
        prompts, answers, ends = zip(*(unique[i] for i in chunk), strict=True)
        return reward.score(prompts, answers, ended=ends).tolist()

    lengths = [len(text) + len(plain(prompt)) for prompt, text, _ in unique]
    scores = run_batches(score, batches_by_length(lengths, CHUNK), label=label)
    return np.array(scores, dtype=float)[index]


def pair_report(scored: ScoredPairs, *, gold_differences: Sequence[float] | None = None) -> dict[str, Any]:
    """Report how well scores order labelled pairs. All intervals resample conversations.

    `accuracy` counts ties as wrong (strict inequality, as RewardBench does) and says how many there were.
    `length_baseline` is the accuracy of "the longer answer wins", ties half; `accuracy_length_controlled` gives a model
    that looks at length alone exactly 0.5; `over_length` is how far the accuracy lies above the better of "longer wins" and
    "shorter wins" on the same pairs. The predicted side has probability σ|d|, and `ece` compares that with how often it
    agrees with the label, half for a tie; `brier` and `nll` are of P(chosen) = σ(d); `temperature` is the T whose σ(d/T)
    fits these labels best. A label that is not sure (`confidence` below 1, `soft_labels` of them) counts in these as both
    outcomes, each by its probability. `accuracy_true` compares with the sign of the true reward's difference, pairs without
    one left out. `by` has the accuracy by subset, source and difficulty where the rows name them, `by_length` by length difference.

    Args:
        gold_differences: [n] true reward of the chosen answer minus that of the rejected one, where it is known.
    """
    right, differences = scored.right, scored.scores_chosen - scored.scores_rejected
    accuracy, interval = clustered_share(right.tolist(), scored.clusters)
    lengths = scored.length_differences
    confidence = (1 / (1 + np.exp(-np.minimum(np.abs(differences), 50.0)))).tolist()
    controlled, controlled_interval = length_controlled_accuracy(right.tolist(), lengths.tolist(), scored.clusters)
    labels, agreement = scored.labels.tolist(), scored.agreement.tolist()
    temperature = best_temperature(differences.tolist(), labels)
    longer = scored.longer_is_right
    rule = longer if longer.mean() >= 0.5 else 1 - longer
    above = paired_difference(right.tolist(), rule.tolist(), scored.clusters, span=1.0)
    baseline, baseline_interval = clustered_share(longer.tolist(), scored.clusters)
    report: dict[str, Any] = {
        "n": int(right.size),
        "prompts": len(set(scored.prompts)),
        "accuracy": accuracy,
        "accuracy_ci": interval,
        "ties": int((differences == 0).sum()),
        "soft_labels": int((scored.labels < 1).sum()),
        "length_baseline": baseline,
        "length_baseline_ci": baseline_interval,
        "over_length": above["difference"],
        "over_length_ci": above["difference_ci"],
        "accuracy_length_controlled": controlled,
        "accuracy_length_controlled_ci": controlled_interval,
        "ece": expected_calibration_error(confidence, agreement),
        "brier": brier_score(differences.tolist(), labels),
        "nll": pair_nll(differences, 1.0, labels),
        "temperature": temperature,
        "nll_at_temperature": None if temperature is None else pair_nll(differences, temperature, labels),
        "accuracy_true": None,
        "accuracy_true_ci": None,
        "calibration": calibration_table(confidence, agreement),
        "by": {name: _by(scored, grouping) for name, grouping in _groupings(scored.rows).items()},
        "by_length": _by_length(scored, lengths),
    }
    if gold_differences is not None:
        gold = np.asarray(gold_differences, dtype=float)
        decided = gold != 0
        if decided.any():
            agrees = (np.sign(differences) == np.sign(gold))[decided].astype(float)
            kept = [cluster for cluster, keep in zip(scored.clusters, decided, strict=True) if keep]
            report["accuracy_true"], report["accuracy_true_ci"] = clustered_share(agrees.tolist(), kept)
    return report


def compare(first: ScoredPairs, second: ScoredPairs) -> PairedDifference:
    """Compare the accuracies of two models on the same pairs: `first` minus `second`, its interval, a paired test."""
    return paired_difference(first.right.tolist(), second.right.tolist(), first.clusters, span=1.0)


def score_rankings(reward: Scorer, rankings: Sequence[Ranking], *, label: str = "score") -> list[Array]:
    """Score the answers of every ranking, [K] a ranking."""
    texts: list[tuple[Prompt, str]] = [(r.prompt, ranked.content) for r in rankings for ranked in r.answers]
    ended = [ranked.ended for ranking in rankings for ranked in ranking.answers]
    ends = np.cumsum([len(ranking.answers) for ranking in rankings])
    return np.split(score_answers(reward, texts, ended=ended, label=label), ends[:-1])


def ranking_report(
    labels: Sequence[Sequence[float]], scores: Sequence[Array], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Report how well a model orders the answers of K-wise data, ranking by ranking. The interval resamples conversations.

    `best_of_k` is how often every best answer is scored above every other, strictly, so a tie is wrong; chance is
    1 / C(K, number of best ones). `tau_b` is the mean rank correlation, 0 where all scores are alike. `best_of_n` is what choosing
    the best of n with this model gives, in the unit of the labels, at which KL: the unbiased estimator over all subsets, beside
    choosing by the labels themselves, on the prompts that have n answers.

    Args:
        labels: of each prompt's answers [K], higher is better, not all alike.
        scores: of the same answers [K].
        prompts: what each ranking's answers answer.
    """
    golds = [np.asarray(values, dtype=float) for values in labels]
    best = [float(p[g == g.max()].min() > p[g < g.max()].max()) for p, g in zip(scores, golds, strict=True)]
    taus = [0.0 if len(set(p)) == 1 else kendalltau(p, g).statistic for p, g in zip(scores, golds, strict=True)]
    accuracy, interval = clustered_share(best, conversation_keys(prompts))
    return {
        "prompts": len(golds),
        "best_of_k": accuracy,
        "best_of_k_ci": interval,
        "best_of_k_by_chance": float(np.mean([1 / math.comb(len(g), int((g == g.max()).sum())) for g in golds])),
        "tau_b": float(np.mean(taus)),
        "best_of_n": _best_of_n(scores, golds),
    }


def _best_of_n(proxies: Sequence[Array], golds: Sequence[Array]) -> list[dict[str, float]]:
    """Compute the curve over n = 1, 2, 4, … for the prompts that have at least the median number of answers."""
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


class _Grouping(NamedTuple):
    """The label of each pair by which accuracy is broken down, None where it has none; and the labels in their order."""

    labels: Sequence[str | None]
    order: list[str]


def _groupings(rows: Sequence[Pair]) -> dict[str, _Grouping]:
    """Collect the groupings that the rows name, where their labels differ: subset, source, difficulty."""
    groupings = {}
    for name, labels in (
        ("subset", [row.get("subset") for row in rows]),
        ("source", [row.get("source") for row in rows]),
    ):
        if len(set(labels)) > 1:
            groupings[name] = _Grouping(labels, sorted({label for label in labels if label is not None}))
    for name, values in (
        ("rating_gap", [row.get("rating_gap") for row in rows]),
        ("margin", [row.get("margin") for row in rows]),
        ("agree", [row.get("agree") for row in rows]),
    ):
        if all(value is not None for value in values) and len(set(values)) > 1:
            groupings["difficulty"] = _binned(name, np.array(values, dtype=float))
            break
    return groupings


def _binned(name: str, values: Array) -> _Grouping:
    """Group pairs by value, hardest first (the smaller the gap, the harder the pair): few values as they are, many in quarters."""
    distinct = sorted(set(values.tolist()))
    if len(distinct) <= MOST_DIFFICULTIES:
        return _Grouping([f"{name} {value:g}" for value in values], [f"{name} {value:g}" for value in distinct])
    edges = sorted(set(np.quantile(values, [0.25, 0.5, 0.75]).tolist()))
    digits = next(n for n in range(3, 18) if len({f"{edge:.{n}g}" for edge in edges}) == len(edges))
    names = [f"{name} ≤ {edge:.{digits}g}" for edge in edges] + [f"{name} > {edges[-1]:.{digits}g}"]
    index = np.searchsorted(edges, values, side="left")
    return _Grouping([names[int(i)] for i in index], [names[i] for i in sorted(set(index.tolist()))])


def _by(scored: ScoredPairs, grouping: _Grouping) -> dict[str, dict[str, Any]]:
    """Report the accuracy of each group that has a label, with its interval and length baseline."""
    right, lengths = scored.right, scored.length_differences
    report = {}
    for label in grouping.order:
        group = [i for i, other in enumerate(grouping.labels) if other == label]
        accuracy, interval = clustered_share(right[group].tolist(), [scored.clusters[i] for i in group])
        longer = float(((lengths[group] > 0) + 0.5 * (lengths[group] == 0)).mean())
        report[label] = {"n": len(group), "accuracy": accuracy, "accuracy_ci": interval, "length_baseline": longer}
    return report


def _by_length(scored: ScoredPairs, lengths: Array) -> list[dict[str, Any]]:
    """Report the accuracy over bins of equally many pairs, from "chosen much shorter" to "chosen much longer"."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTH_BINS + 1)))
    bins = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(0, len(edges) - 2))
    right = scored.right
    report = []
    for number in sorted(set(bins.tolist())):
        group = np.nonzero(bins == number)[0]
        accuracy, interval = clustered_share(right[group].tolist(), [scored.clusters[i] for i in group])
        low, high = float(lengths[group].min()), float(lengths[group].max())
        report.append({"low": low, "high": high, "n": len(group), "accuracy": accuracy, "accuracy_ci": interval})
    return report
