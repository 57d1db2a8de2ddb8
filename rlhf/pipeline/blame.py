"""`rlhf blame`: which labels made a run's reward model like a trait of answers, and the pairs without them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.data.conversations import conversation_keys
from rlhf.data.functions import load_function
from rlhf.data.rows import SIDES, Pair, pair_digest, sure_where_unsaid, told
from rlhf.data.traits import TRAITS, trait_table
from rlhf.errors import UserError
from rlhf.files import read_jsonl, write_jsonl, write_text
from rlhf.models.text import plain
from rlhf.objectives.influence import head_influence, pair_pull, trait_direction
from rlhf.objectives.selection import head_covariance
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.fit import training_rows
from rlhf.pipeline.training import quiet_libraries
from rlhf.recipe import load_recipe
from rlhf.recipe.objectives import OBJECTIVES
from rlhf.report.records import MANIFEST, read_record
from rlhf.report.result_file import check_new_folder
from rlhf.reward.load import load_reward_model
from rlhf.reward.model import RewardModel
from rlhf.reward.sides import side_features, side_scores
from rlhf.reward.weights import prompt_balanced
from rlhf.statistics import clustered_statistic

SHOWN = 20  # pairs in the file and on the terminal

Measure = Callable[[list[str], list[str]], list[float]]  # prompts and answers to how much of a trait each answer has


def blame(run: Path, feature: str, out: Path, *, share: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Find the pairs that made a run's last reward model like a trait, and write the others for another training.

    `blame.json`; `removed.jsonl`, the pairs that add most to the slope; `rest.jsonl`, all others, canonical rows in their order.

    Args:
        feature: the name of a trait (`rlhf.data.traits`), or FILE.py:function as `evaluate.gold` names one.
        share: of the pairs that are taken out, in (0, 1).

    Returns:
        what `blame.json` holds: `slope`, by how much the score rises, in nats, with a usual difference in the trait, and its
        interval over prompts; `influence_of_removed`, the share of all positive influence that the removed pairs have; `pairs`.

    Raises:
        UserError: no single reward model in the run; an unknown feature, or one that no pair differs in; a folder in use.
    """
    quiet_libraries()
    measure = _measure(feature)
    if not 0 < share < 1:
        raise UserError(f"--share {share}: must lie between 0 and 1, without them.")
    check_new_folder(out, "--out")

    # 1. The reward model, the pairs as it was trained on them, and what it reads and scores of both sides.
    context = _trained(run)
    pairs = training_rows(context).rows
    traits = _trait_differences(pairs, feature, measure)
    stage = context.folder.relative_to(run)
    say(f"blame: reading {len(pairs)} pairs by {stage} …")
    features, differences = _read(load_reward_model(context.folder / "model"), pairs)

    # 2. Every pair's part in the slope of the score on the trait.
    section = context.recipe.reward
    counted = prompt_balanced(pairs) if section.group_weight == "prompt" else pairs
    influence = _influence(counted, features, differences, traits, flip_rate=section.flip_rate)
    sums = torch.stack([traits * differences, traits.square()], dim=1).numpy()
    slope, interval = clustered_statistic(
        sums, conversation_keys([row["prompt"] for row in pairs]), lambda s: s[..., 0] / s[..., 1]
    )

    # 3. What goes, and what stays.
    order = torch.argsort(-influence, stable=True).tolist()
    removed = set(order[: max(1, round(share * len(pairs)))])
    labels = read_jsonl(context.pairs)  # as they were given: what corrects labels would correct those of `pairs` again
    blamed = {pair_digest(pairs[i]) for i in removed}
    without, rest = ([row for row in labels if (pair_digest(row) in blamed) is is_out] for is_out in (True, False))
    positive = influence.clamp(min=0)
    result = {
        "run": str(run),
        "stage": str(stage),
        "test_pairs": str(context.test_pairs),
        "feature": feature,
        "slope": slope,
        "slope_ci": interval,
        "kept": len(rest),
        "removed": len(without),
        "influence_of_removed": positive[sorted(removed)].sum().item() / max(positive.sum().item(), 1e-12),
        "pairs": [
            {
                "pair": i,
                "influence": influence[i].item(),
                "trait_difference": traits[i].item(),
                "strength": differences[i].item(),
                **_shown(pairs[i]),
            }
            for i in order[:SHOWN]
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "removed.jsonl", sure_where_unsaid(without))
    write_jsonl(out / "rest.jsonl", sure_where_unsaid(rest))
    write_text(out / "blame.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _trait_differences(pairs: Sequence[Pair], feature: str, measure: Measure) -> Tensor:
    """Return by how many usual differences the chosen answer has more of the trait, [n]; their mean square is 1.

    Raises:
        UserError: no pair differs in it.
    """
    last_turns = [row["prompt"][-1]["content"] for row in pairs]
    chosen, rejected = (
        torch.tensor(measure(last_turns, [told(row, side) for row in pairs]), dtype=torch.float64) for side in SIDES
    )
    differences = chosen - rejected
    if not bool((differences != 0).any()):
        raise UserError(f"--feature {feature}: no pair's two answers differ in it.")
    differences /= differences.abs().max()  # squares of tiny numbers are 0
    return differences / differences.square().mean().sqrt()


def _read(reward: RewardModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Return what the head reads of each pair, [n, h], and its reward, [n] nats, both chosen minus rejected."""
    features = side_features(reward, pairs, "chosen") - side_features(reward, pairs, "rejected")
    differences = side_scores(reward, pairs, "chosen") - side_scores(reward, pairs, "rejected")
    return features.double(), differences.double()


def _influence(
    pairs: Sequence[Pair], features: Tensor, differences: Tensor, traits: Tensor, *, flip_rate: float
) -> Tensor:
    """Return every pair's part in the direction of the trait, [n] (`head_influence`)."""
    columns = [
        _column(pairs, name, default) for name, default in (("confidence", 1.0), ("margin", 0.0), ("weight", 1.0))
    ]
    pull = pair_pull(differences, *columns, flip_rate=flip_rate)
    covariance = head_covariance(features.float(), differences.float(), ridge=_ridge(features)).double()
    return head_influence(features, pull, covariance, trait_direction(features, traits))


def _measure(feature: str) -> Measure:
    """Return the function that measures a trait of answers.

    Raises:
        UserError: there is no such trait, or no such function.
    """
    if ".py:" in feature:
        return load_function(feature, key="--feature")
    if feature not in TRAITS:
        raise UserError(
            f"--feature {feature}: no such trait; there are {', '.join(TRAITS)}, and FILE.py:function of your own."
        )
    place = list(TRAITS).index(feature)
    return lambda prompts, answers: np.asarray(trait_table(prompts, answers))[:, place].tolist()


def _trained(run: Path) -> StageContext:
    """Return the last reward stage of a run, as it was when it trained.

    Raises:
        UserError: there is none, it holds several models, or it learnt from something else than pairs.
    """
    stages = sorted(run.glob(f"round-*/reward/{MANIFEST}"), key=lambda file: int(file.parts[-3].removeprefix("round-")))
    if not stages:
        raise UserError(f"{run}: no finished reward stage in this folder.")
    manifest, recipe = read_record(stages[-1]), load_recipe(run / "recipe.yaml")
    assert manifest is not None, "its file is there"
    if recipe.reward.members > 1 or recipe.reward.experts is not None:
        raise UserError(f"{run}: its reward is several models, and blame reads the head of one; train with one.")
    elements = OBJECTIVES[recipe.reward.objective].loss.elements
    if elements != "pairs":
        raise UserError(
            f"{run}: reward.objective is {recipe.reward.objective}, which learns from {elements}; blame reads pairs."
        )
    parents = {role: run / parent["folder"] for role, parent in manifest["parents"].items()}
    return StageContext(recipe, stages[-1].parent, parents, lambda _: None)


def _shown(pair: Pair) -> dict[str, str]:
    """Return a pair as text."""
    return {"prompt": plain(pair["prompt"]), **{side: told(pair, side) for side in SIDES}}


def _column(pairs: Sequence[Pair], name: str, default: float) -> Tensor:
    """Return a column of the pairs, [n], as the pair loss reads it."""
    values: list[Any] = [row.get(name) for row in pairs]
    return torch.tensor([default if value is None else float(value) for value in values], dtype=torch.float64)


def _ridge(features: Tensor) -> float:
    """Return the prior's precision: as strong as one usual pair in every direction."""
    return features.square().mean().item()
