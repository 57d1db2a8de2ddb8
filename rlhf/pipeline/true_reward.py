"""The true reward of a run, where one is known: of the lab, or of the file that `evaluate.gold` names."""

from collections.abc import Sequence

from rlhf.data.rows import SIDES, TIE, Pair, answer, asked
from rlhf.evaluation.gold import GoldFunction, load_gold
from rlhf.lab.worlds import WORLDS
from rlhf.models.text import plain
from rlhf.recipe.schema import Recipe


def load_true_reward(recipe: Recipe) -> GoldFunction | None:
    """Return the function from prompts and answers, as texts, to their true rewards, or None where none is known."""
    if recipe.evaluate.gold is not None:
        return load_gold(recipe.evaluate.gold)
    return WORLDS[recipe.lab.world].gold if recipe.lab is not None else None


def gold_differences(rows: Sequence[Pair], gold: GoldFunction | None) -> list[float] | None:
    """Return the true reward of each pair's chosen answer minus that of the rejected one, or None where none is known."""
    if gold is None:
        return None
    chosen, rejected = (
        gold([plain(asked(row, side)) for row in rows], [answer(row, side) for row in rows]) for side in SIDES
    )
    return [a - b for a, b in zip(chosen, rejected, strict=True)]


def wrong_labels(pairs: Sequence[Pair], gold: GoldFunction | None) -> float | None:
    """Return the share of labels that contradict the true reward, of pairs where both say which answer is better.

    None where no true reward is known, or no pair is left.
    """
    labelled = [pair for pair in pairs if pair.get("confidence") != TIE]
    if not labelled:  # a function of somebody's own need not take nothing
        return None
    decided = [difference for difference in gold_differences(labelled, gold) or [] if difference != 0]
    return sum(difference < 0 for difference in decided) / len(decided) if decided else None
