"""Regression, then pairs (HelpSteer2-Preference, arXiv:2410.01257): a first model learns ratings, the second goes on from it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.invariants.checks import CheckBook
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.fit import fit_and_keep, kept_model, training_rows
from rlhf.pipeline.store import METRICS

FIRST_METRICS = "first_metrics.jsonl"
# What of the reward section is for the pairs alone.
FOR_PAIRS: dict[str, Any] = {
    "ratings_first": False,
    "extra": None,
    "meta": False,
    "flip_rate": 0.0,
    "group_weight": None,
    "center_rewards_coefficient": None,
}


class FirstModel(NamedTuple):
    """A model of the ratings: where it is kept, and how many rated answers it was trained on."""

    start: Path
    ratings: int


def first_on_ratings(context: StageContext, book: CheckBook) -> FirstModel:
    """Train a first model on the rated answers, with the settings of the reward stage; one that lies there is taken.

    Its score is the weighted sum of its attributes, which lies on the scale of the ratings and not in nats; the pairs set
    that right in a few steps, for only differences count there.
    """
    reward = context.recipe.reward.model_copy(update={"objective": "regression", **FOR_PAIRS})
    first = replace(context, recipe=context.recipe.model_copy(update={"reward": reward}))
    rows = training_rows(first).rows
    context.say(f"reward: a first model learns {len(rows)} rated answers; the pairs go on from it.")
    dropped = fit_and_keep(first, rows, "first", "first model", context.recipe.seed, book)
    start = kept_model(context, "first")
    if (start.parent / METRICS).is_file():  # training may end before it logs
        shutil.copy(start.parent / METRICS, context.folder / FIRST_METRICS)
    return FirstModel(start, len(rows) - dropped)
