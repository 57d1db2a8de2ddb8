"""`summary.json`: the run in numbers. What a run does not know is null, never invented."""

import json
from typing import Any

from rlhf.pipeline.store import Stage, Store, write_text
from rlhf.recipe.schema import Recipe

GOLD_MAX_OF_LAB = 1.0
REWARD_KEYS = ("accuracy", "accuracy_ci", "accuracy_true", "accuracy_true_ci", "ece", "length_baseline")


def write_summary(recipe: Recipe, stages: list[Stage], store: Store) -> dict[str, Any]:
    """Collect the manifests of all stages done so far into `RUN/summary.json` (contract: design §6)."""
    facts: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    for stage in stages:
        manifest = store.manifest(stage)
        if manifest is not None:
            facts[stage.name], seconds[stage.name] = manifest["facts"], manifest["seconds"]
    judged = facts.get("evaluate", {})
    sft, policy, best = (judged.get(name, {}) for name in ("sft", "policy", "best_of_16"))
    by_gold, by_reward = best.get("by_gold", {}), best.get("by_reward", {})
    reward = facts.get("reward", {})
    lab = facts.get("lab", {})
    summary = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "seconds": seconds,
        "lab": {
            "flip_rate": lab.get("flip_rate"),
            "annotator_agreement": lab.get("annotator_agreement"),
            "gold_sft": sft.get("gold") if lab else None,
            "gold_best_of_16": by_gold.get("gold") if lab else None,
            "gold_max": GOLD_MAX_OF_LAB if lab else None,
        },
        "sft": _with_intervals(sft, ("gold", "proxy")),
        "rounds": [
            {
                "round": 1,
                "pairs": reward.get("pairs"),
                "flipped": reward.get("flipped"),
                "reward": {key: reward.get(key) for key in REWARD_KEYS},
                "policy": _with_intervals(policy, ("proxy", "gold", "kl", "win_rate")),
            }
        ],
        "best_of_16": {
            "by_reward": {**_with_intervals(by_reward, ("gold",)), "kl": by_reward.get("kl")},
            "by_gold": _with_intervals(by_gold, ("gold",)),
        },
        "gold_gap_closed": judged.get("gold_gap_closed"),
        "evaluated_prompts": judged.get("n"),
    }
    write_text(store.root / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _with_intervals(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: values.get(key) for name in names for key in (name, f"{name}_ci")}
