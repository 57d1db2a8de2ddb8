"""What labels want: which traits of an answer, that anyone can count, predict which of two answers is chosen."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import t as students_t
from torch import Tensor, as_tensor

from rlhf.data.conversations import conversation_keys
from rlhf.data.rows import SIDES, Pair, told
from rlhf.data.traits import TRAITS, trait_table
from rlhf.models.text import plain
from rlhf.statistics import clustered_share

Array = NDArray[np.float64]

FEWEST = 20  # conversations with pairs whose answers differ in a trait, below which nothing is said about it
LARGEST = 3.0  # a difference counts as this many usual ones at most, so that a few odd answers do not decide
RIDGE = 1.0  # a standard normal prior on each effect: finite where a trait decides every label
FOLDS = 5
STEPS = 50
CONFIDENCE = 0.95  # of all intervals of effects together (Bonferroni)
EXAMPLES = 3


class Want(TypedDict):
    """What labels want of one trait.

    Attributes:
        meaning: what an answer with more of it does, for a person.
        pairs: how many pairs differ in it.
        more_is_chosen: of these, the share whose chosen answer has more of it, with its 95 % interval over prompts.
        effect: nats that a usual difference in this trait alone adds to the log-odds of being chosen, the other traits being
            equal, with an interval that holds for all traits together; None where too few pairs differ.
        wanted: `more` or `less` where that interval excludes 0, else None.
        examples: indices of pairs that show it most.
    """

    meaning: str
    pairs: int
    more_is_chosen: float | None
    more_is_chosen_ci: list[float] | None
    effect: float | None
    effect_ci: list[float] | None
    wanted: str | None
    examples: list[int]


class Wants(NamedTuple):
    """What the labels of some pairs want.

    Attributes:
        traits: by name.
        accuracy: share of labels that all traits together predict, on prompts that they were not fitted on, ties half; with
            its interval. None where no trait was tried.
        differences: [pairs, traits] chosen minus rejected, in usual differences (root of the mean square), bounded.
    """

    traits: dict[str, Want]
    accuracy: tuple[float, list[float]] | None
    differences: Array

    @property
    def wanted(self) -> list[str]:
        """Return the names of the traits that are wanted more or less, the strongest first."""
        effects = {name: want["effect"] for name, want in self.traits.items() if want["wanted"] is not None}
        return sorted(effects, key=lambda name: -abs(effects[name] or 0.0))


def find_wants(pairs: Sequence[Pair]) -> Wants:
    """Find which traits predict labels beyond chance, each with the others being equal.

    The model is that of Bradley and Terry on differences of traits x = (chosen - rejected) / usual difference:

        P(chosen is preferred) = σ(β · x)

    fitted with a standard normal prior on β. Its covariance is the sandwich over conversations, whose pairs are not
    independent, and its intervals are Student's, with a degree of freedom for each conversation beyond the traits. A want is
    no fault: labels may be right to want it.

    Args:
        pairs: labelled pairs without ties.
    """
    prompts = [row["prompt"][-1]["content"] for row in pairs]
    clusters = conversation_keys([row["prompt"] for row in pairs])
    raw = trait_table(prompts, [told(row, "chosen") for row in pairs])
    raw -= trait_table(prompts, [told(row, "rejected") for row in pairs])
    usual = np.sqrt((raw**2).mean(axis=0)) if len(pairs) else np.zeros(len(TRAITS))
    differences = np.clip(raw / np.where(usual > 0, usual, 1.0), -LARGEST, LARGEST)
    differ = (raw != 0).sum(axis=0)
    varied = [len({clusters[i] for i in np.flatnonzero(column).tolist()}) for column in raw.T]
    tried = np.flatnonzero(np.array(varied) >= FEWEST)

    effects, errors = fit_effects(differences[:, tried], clusters)
    freedom = max(1, len(set(clusters)) - len(tried))
    wide = float(students_t.ppf(1 - (1 - CONFIDENCE) / 2 / max(1, len(tried)), freedom))
    traits: dict[str, Want] = {}
    for k, (name, trait) in enumerate(TRAITS.items()):
        want = Want(
            meaning=trait.meaning,
            pairs=int(differ[k]),
            more_is_chosen=None,
            more_is_chosen_ci=None,
            effect=None,
            effect_ci=None,
            wanted=None,
            examples=[],
        )
        rows = np.flatnonzero(raw[:, k])
        if len(rows):
            share, interval = clustered_share((raw[rows, k] > 0).tolist(), [clusters[i] for i in rows.tolist()])
            want["more_is_chosen"], want["more_is_chosen_ci"] = share, interval
        if k in tried:
            place = int(np.searchsorted(tried, k))
            effect, margin = float(effects[place]), wide * float(errors[place])
            want["effect"], want["effect_ci"] = effect, [effect - margin, effect + margin]
            if abs(effect) > margin:
                want["wanted"] = "more" if effect > 0 else "less"
                liked = np.argsort(-np.sign(effect) * raw[:, k], kind="stable")[:EXAMPLES]
                want["examples"] = liked.tolist()
        traits[name] = want
    accuracy = held_out_accuracy(differences[:, tried], clusters) if len(tried) else None
    return Wants(traits, accuracy, differences)


def fit_effects(differences: Array, clusters: Sequence[Hashable]) -> tuple[Array, Array]:
    """Return β of P = σ(β · x) for pairs of which the first is always preferred, and its standard errors over clusters.

    Newton's method on Σ log σ(β · x) - |β|² / 2, which is concave. With H the negative Hessian and g_c the gradient of a
    cluster's pairs, the covariance is H⁻¹ (Σ_c g_c g_cᵀ) H⁻¹ · G / (G - 1) for G clusters.

    Args:
        differences: [pairs, traits].
        clusters: of each pair.

    Returns:
        two arrays [traits].
    """
    count = differences.shape[1]
    effects = np.zeros(count)
    for _ in range(STEPS):
        wrong = expit(-differences @ effects)
        hessian = (differences * (wrong * (1 - wrong))[:, None]).T @ differences + RIDGE * np.eye(count)
        step = np.linalg.solve(hessian, differences.T @ wrong - RIDGE * effects)
        effects += step
        if np.abs(step).max(initial=0.0) < 1e-9:
            break
    slopes = differences * expit(-differences @ effects)[:, None]
    names = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    summed = np.zeros((len(names), count))
    np.add.at(summed, [names[cluster] for cluster in clusters], slopes)
    bread, spread = np.linalg.inv(hessian), summed.T @ summed * len(names) / max(1, len(names) - 1)
    return effects, np.sqrt(np.diag(bread @ spread @ bread))


def held_out_accuracy(differences: Array, clusters: Sequence[Hashable]) -> tuple[float, list[float]]:
    """Return the share of labels that effects fitted on other clusters predict, ties half, and its interval."""
    order = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    fold = np.array([order[cluster] % FOLDS for cluster in clusters])
    right = np.zeros(len(differences))
    for held_out in range(FOLDS):
        train, test = np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)
        effects, _ = fit_effects(differences[train], [clusters[i] for i in train.tolist()])
        predicted = differences[test] @ effects
        right[test] = (predicted > 0) + 0.5 * (predicted == 0)
    return clustered_share(right.tolist(), clusters)


def without_wants(strength: Tensor, wants: Wants) -> Tensor:
    """Return the part of preference strengths that the wanted traits do not explain: the residual of least squares.

    Strength and differences both change sign when a pair is turned round, so there is no constant:

        residual = s - x · argmin_b Σ (s - x · b)²,   x the differences in wanted traits alone

    What remains is what the votes saw beside these traits; it is the strength itself where the labels want none of them.

    Args:
        strength: [pairs] mean difference of rewards, chosen minus rejected, in nats.
    """
    names = list(TRAITS)
    columns = [names.index(name) for name in wants.wanted]
    if not columns:
        return strength
    used = wants.differences[:, columns]
    values = strength.double().numpy()
    slopes = np.linalg.lstsq(used, values, rcond=None)[0]
    return as_tensor(values - used @ slopes).to(strength.dtype)


def trait_differences(rows: Sequence[Pair], trait: str) -> list[float]:
    """Return how much more of a trait the chosen answer has than the rejected one, [n]."""
    count = TRAITS[trait].count
    prompts = [plain(row["prompt"]).lower() for row in rows]
    chosen, rejected = (
        [count(prompt, told(row, side).lower()) for prompt, row in zip(prompts, rows, strict=True)] for side in SIDES
    )
    return [more - less for more, less in zip(chosen, rejected, strict=True)]
