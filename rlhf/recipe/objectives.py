"""The table of objectives: what each needs, what it does to the pairs, which loss it trains with; and the terms beside a loss.

The schema's values of `reward.objective` and `reward.extra`, the planning of a vote, the denoising step, the trainers in
Python and the guides' tables are all read from here. Functions are named, not imported, so that reading the table loads no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

Column = Literal["margin", "confidence", "weight"]
# What the general pair loss reads of a pair, each with the value that changes nothing.
PAIR_COLUMNS: Mapping[str, float] = {"margin": 0.0, "confidence": 1.0, "weight": 1.0}


@dataclass(frozen=True)
class Needs:
    """What an objective needs beside pairs.

    Attributes:
        vote: preference strength of every pair, and how many labels are wrong by it.
        column: a column of the file that every pair must have.
        or_rating_gap: a pair without that column may have `rating_gap` in its place.
        rankings: K answers to a prompt that were compared; a pair is a ranking of two.
        ratings: answers with a rating of each of several attributes; no pairs are needed.
        pairs: pairs beside the ratings, to which a gate is fitted.
    """

    vote: bool = False
    column: Column | None = None
    or_rating_gap: bool = False
    rankings: bool = False
    ratings: bool = False
    pairs: bool = False

    def __str__(self) -> str:
        if self.vote:
            return "a vote"
        if self.rankings or self.ratings:
            return "rankings" if self.rankings else f"ratings of attributes{' + pairs' if self.pairs else ''}"
        if self.column is None:
            return "nothing"
        return f"`{self.column}`{' or ratings' if self.or_rating_gap else ''}"


@dataclass(frozen=True)
class Loss:
    """A loss, what it is of, the columns that it reads, and the head whose scores it reads.

    Attributes:
        function: dotted name of the loss, unreduced, with a keyword for each column.
        elements: what is counted as one. Of pairs, the loss is `(chosen [b], rejected [b], *, columns [b]) -> [b]`, in nats, and
            takes `flip_rate` where a recipe sets it; of rankings, `(rewards [g, K], beats [g, K, K], *, columns [g]) -> [g]`; of
            ratings, `(predicted [b, k], ratings [b, k]) -> [b]`, from a head of k attributes.
        columns: the columns, each with the value that an element without one has.
        head: dotted name of the function that builds a model with that head, called as `build_reward_model` is.
    """

    function: str = "rlhf.objectives.pairwise.pair_loss"
    elements: Literal["pairs", "rankings", "ratings"] = "pairs"
    columns: Mapping[str, float] = field(default_factory=lambda: PAIR_COLUMNS)
    head: str = "rlhf.models.load.build_reward_model"


PAIR_LOSS = Loss()
RATINGS = Loss("rlhf.objectives.attributes.attribute_regression", "ratings", {})


@dataclass(frozen=True)
class Objective:
    """A row of the table.

    Attributes:
        name: its value in `reward.objective`.
        summary: what it does, in half a sentence.
        paper: where it is from; empty where it is our own.
        needs: what it needs beside pairs.
        apply: dotted name of the function that makes the pairs that it trains on, `(rows, config)`, or
            `(rows, config, strength, noise)` where it needs a vote, to `Denoised`; None where pairs stay as they are.
        loss: what it trains with.
        sets_confidence: whether that function says of each label how likely it is right.
    """

    name: str
    summary: str
    paper: str = ""
    needs: Needs = Needs()
    apply: str | None = None
    loss: Loss = PAIR_LOSS
    sets_confidence: bool = False


VOTE, RANKINGS = Needs(vote=True), Needs(rankings=True)
OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("bt", "Bradley-Terry on the pairs as they are", "arXiv:2203.02155 eq. 1"),
        Objective(
            "margin",
            "the file's margin, or the gap of its ratings",
            "arXiv:2307.09288 eq. 2",
            needs=Needs(column="margin", or_rating_gap=True),
            apply="rlhf.reward.denoise.margin_of_ratings",
        ),
        Objective(
            "scaled",
            "the gap of the ratings as weight",
            "arXiv:2410.01257",
            needs=Needs(column="weight", or_rating_gap=True),
            apply="rlhf.reward.denoise.weight_of_ratings",
        ),
        Objective(
            "smoothing",
            "P(label) = 1 - `smoothing` on all but ties",
            "arXiv:2401.06080 eq. 5",
            apply="rlhf.reward.denoise.smooth_all",
            sets_confidence=True,
        ),
        Objective("soft", "the file's confidence as P(label)", needs=Needs(column="confidence")),
        Objective(
            "flip",
            "the weakest tenth of the labels flipped",
            "arXiv:2401.06080 section 2.4",
            needs=VOTE,
            apply="rlhf.reward.denoise.flip",
        ),
        Objective(
            "adaptive_margin",
            "the mean strength as margin",
            "arXiv:2401.06080 eq. 6",
            needs=VOTE,
            apply="rlhf.reward.denoise.adaptive_margin",
        ),
        Objective(
            "flip_margin",
            "`flip` and `adaptive_margin`; flipped margins change sign",
            "arXiv:2401.06080 section 2.5",
            needs=VOTE,
            apply="rlhf.reward.denoise.flip_with_margin",
        ),
        Objective(
            "soft_margin",
            "smoothing where strength < 0, margin everywhere",
            "arXiv:2401.06080 section 2.5",
            needs=VOTE,
            apply="rlhf.reward.denoise.smooth_with_margin",
            sets_confidence=True,
        ),
        Objective(
            "vote_soft",
            "the share of votes that agree, as P(label)",
            needs=VOTE,
            apply="rlhf.reward.denoise.share_as_confidence",
            sets_confidence=True,
        ),
        Objective(
            "vote_sigmoid",
            "σ of the calibrated mean strength, as P(label)",
            needs=VOTE,
            apply="rlhf.reward.denoise.strength_as_confidence",
            sets_confidence=True,
        ),
        Objective(
            "posterior",
            "P(label) given the pair's votes and the share of wrong labels",
            needs=VOTE,
            apply="rlhf.reward.denoise.posterior_as_confidence",
            sets_confidence=True,
        ),
        Objective(
            "weight",
            "the posterior as weight",
            needs=VOTE,
            apply="rlhf.reward.denoise.posterior_as_weight",
        ),
        Objective(
            "drop",
            "the weakest tenth of the pairs left out",
            needs=VOTE,
            apply="rlhf.reward.denoise.drop",
        ),
        Objective(
            "plackett_luce",
            "the likelihood of each prompt's whole ranking; ties say nothing",
            "arXiv:2301.11270",
            needs=RANKINGS,
            loss=Loss("rlhf.objectives.rankings.plackett_luce", "rankings", {"weight": 1.0}),
        ),
        Objective(
            "kwise",
            "the likelihood of each prompt's best answer among the K",
            "arXiv:2301.11270",
            needs=RANKINGS,
            loss=Loss("rlhf.objectives.rankings.top_one", "rankings", {"weight": 1.0}),
        ),
        Objective(
            "regression",
            "each attribute's rating; the score is their weighted sum",
            "arXiv:2406.08673",
            needs=Needs(ratings=True),
            loss=RATINGS,
        ),
        Objective(
            "gated",
            "ArmoRM: free of length, weighed by a gate",
            "arXiv:2406.12845",
            needs=Needs(ratings=True, pairs=True),
            loss=RATINGS,
        ),
    )
}


@dataclass(frozen=True)
class Extra:
    """A term beside a pair loss, whichever that is.

    Attributes:
        name: its value in `reward.extra`.
        summary: what it does, in half a sentence.
        paper: where it is from.
        kind: which trainer trains with it.
        symbol, weight: what `reward.extra_weight` is in the paper, and the value that it has where a recipe sets none.
    """

    name: str
    summary: str
    paper: str
    kind: Literal["contrastive", "text", "length", "bottleneck", "critique"]
    symbol: str
    weight: float


EXTRAS: dict[str, Extra] = {
    extra.name: extra
    for extra in (
        Extra("simcse", "two views of an answer alike, answers apart", "arXiv:2401.06080", "contrastive", "β", 1.0),
        Extra("simcse_diff", "the same of differences of pairs", "arXiv:2401.06080", "contrastive", "β", 1.0),
        Extra("swav", "each view predicts the other's cluster", "arXiv:2401.06080", "contrastive", "β", 0.1),
        Extra("swav_diff", "the same of differences of pairs", "arXiv:2401.06080", "contrastive", "β", 0.5),
        Extra("text", "GRM: the states must go on writing the chosen answer", "arXiv:2406.10216", "text", "α", 0.01),
        Extra(
            "length",
            "ODIN: a second head takes up the length, and is dropped",
            "arXiv:2402.07319",
            "length",
            "λ",
            1.0,
        ),
        Extra("bottleneck", "InfoRM: the score is read from a noisy code", "arXiv:2402.09345", "bottleneck", "β", 0.01),
        Extra("critique", "CLoud: a critique is written, then scored", "arXiv:2408.11791", "critique", "λ", 1.25),
    )
}
# A type checker reads no values, so to it such a name is any string; pydantic accepts exactly the names above.
if TYPE_CHECKING:
    ObjectiveName = str
    ExtraName = str
else:
    ObjectiveName, ExtraName = Literal[tuple(OBJECTIVES)], Literal[tuple(EXTRAS)]


def resolve(name: str) -> Callable[..., Any]:
    """Return the function that a dotted name of the table stands for, importing its module."""
    module, _, attribute = name.rpartition(".")
    function: Callable[..., Any] = getattr(import_module(module), attribute)
    return function


def objectives_table() -> str:
    """Write the table of objectives in Markdown, as `recipes/guides/noisy_labels.md` shows it."""
    lines = ["| `reward.objective` | needs | what it does | from |", "|---|---|---|---|"]
    for objective in OBJECTIVES.values():
        lines.append(f"| `{objective.name}` | {objective.needs} | {objective.summary} | {objective.paper or 'here'} |")
    return "\n".join(lines) + "\n"


def extras_table() -> str:
    """Write the table of extra terms in Markdown, as `recipes/guides/reward_models.md` shows it."""
    lines = ["| `reward.extra` | what it does | `extra_weight` | from |", "|---|---|---|---|"]
    for extra in EXTRAS.values():
        lines.append(f"| `{extra.name}` | {extra.summary} | {extra.symbol} = {extra.weight:g} | {extra.paper} |")
    return "\n".join(lines) + "\n"
