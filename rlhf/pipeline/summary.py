"""`summary.json`: the run in numbers. What a run does not know is null, never invented."""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.files import read_jsonl, write_text
from rlhf.invariants.checks import Check, CheckEntry
from rlhf.pipeline.stopping import change_since_last_round, conversations_of, is_worse, win_tie_lose
from rlhf.pipeline.store import Stage, Store
from rlhf.recipe.schema import Recipe
from rlhf.report.records import sealed_summary
from rlhf.statistics import paired_difference

GOLD_MAX_OF_LAB = 1.0
LOOK_KEYS = ("looked_at", "asked", "agree", "contradict", "ties", "skipped", "flipped", "wrong", "worth", "flip_rate")
REWARD_KEYS = (
    "accuracy", "accuracy_ci", "accuracy_true", "accuracy_true_ci", "ece", "length_baseline", "length_baseline_ci",
    "over_length", "over_length_ci",
)  # fmt: skip


def write_summary(
    recipe: Recipe, stages: Sequence[Stage], store: Store, *, stopped: str | None = None
) -> dict[str, Any]:
    """Collect the manifests of all stages done so far into `RUN/summary.json` (its keys are a contract).

    Args:
        stopped: why the run ended before its last stage, where a rule or missing labels ended it.
    """
    # 1. Facts of all stages done so far, by folder; the rounds that have a reward model at least.
    facts: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    for stage in stages:
        manifest = store.manifest(stage)
        if manifest is not None:
            facts[stage.folder] = manifest["facts"]
            seconds[stage.name] = round(seconds.get(stage.name, 0.0) + manifest["seconds"], 3)
    numbers = sorted({int(folder.split("/")[0].removeprefix("round-")) for folder in facts} - {0}) or [1]
    rounds = [_round(number, facts, stages, store) for number in numbers]
    evaluated = [number for number in numbers if f"round-{number}/evaluate" in facts]

    # 2. The last policy that was evaluated, and SFT beside it.
    last = facts.get(f"round-{evaluated[-1]}/evaluate", {}) if evaluated else {}
    sft, best = last.get("sft", {}), last.get("best_of_16", {})
    by_gold, by_reward = best.get("by_gold", {}), best.get("by_reward", {})
    lab = facts.get("round-0/lab", {})
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
        "rounds": rounds,
        "best_round": _best(rounds),
        "best_of_16": {
            "by_reward": {**_with_intervals(by_reward, ("gold",)), "kl": by_reward.get("kl")},
            "by_gold": _with_intervals(by_gold, ("gold",)),
        },
        "gold_gap_closed": last.get("gold_gap_closed"),
        "gold_gap_closed_ci": last.get("gold_gap_closed_ci"),
        "evaluated_prompts": last.get("n"),
        "sampling_temperature": recipe.sampling.temperature,
        "stopped": stopped,
        "checks": joined_checks({folder: values.get("checks") or {} for folder, values in facts.items()}),
    }
    write_text(store.root / "summary.json", json.dumps(sealed_summary(summary), indent=1) + "\n")
    _link_best(store.root, _best(rounds))
    return summary


def joined_checks(by_stage: Mapping[str, Mapping[str, CheckEntry]]) -> dict[str, dict[str, object]]:
    """Join the checks of all stages by name: the figures of the one that came nearest to its bound, or beyond it.

    Args:
        by_stage: entries of each stage's check book, by the stage's folder.

    Returns:
        `statistic`, `low`, `bound`, `unit` and `held` of the worst entry, the `stage` that it is from, and `times`, how often
        all stages together looked. A statistic that is not finite is null.
    """
    checks: dict[str, dict[str, object]] = {}
    worst: dict[str, float] = {}
    times: dict[str, int] = {}
    for stage, entries in by_stage.items():
        for name, entry in entries.items():
            times[name] = times.get(name, 0) + entry["times"]
            statistic = entry["statistic"]
            check = Check(name, statistic, entry["bound"], entry["unit"], entry["sentence"], entry["low"])
            if name not in checks or check.closeness > worst[name]:
                worst[name] = check.closeness
                checks[name] = {
                    "statistic": statistic if math.isfinite(statistic) else None,
                    **{key: entry[key] for key in ("low", "bound", "unit", "held")},
                    "stage": stage,
                }
    return {name: {**values, "times": times[name]} for name, values in checks.items()}


def _round(
    number: int, facts: Mapping[str, Mapping[str, Any]], stages: Sequence[Stage], store: Store
) -> dict[str, Any]:
    """Describe one round in numbers."""
    folder = f"round-{number}"
    reward, evaluation, label, look, ppo = (
        facts.get(f"{folder}/{name}", {}) for name in ("reward", "evaluate", "label", "second_look", "ppo")
    )
    stage = next((s for s in stages if s.folder == f"{folder}/evaluate"), None)
    change = change_since_last_round(stage, stages, store) if stage is not None and evaluation else None
    samples = store.root / folder / "evaluate" / "samples.jsonl"
    rows = read_jsonl(samples) if evaluation else []
    texts = [row["policy"] for row in rows]
    known = bool(rows) and rows[0]["gold_policy"] is not None
    lengths = [len(text.split()) for text in texts]
    return {
        "round": number,
        "pairs": reward.get("pairs"),
        "flipped": reward.get("flipped"),
        "labels": {
            "fresh": label.get("fresh"),
            "flip_rate": label.get("flip_rate"),
            **_with_intervals(label, ("fresh_accuracy",)),
        },
        "second_look": {key: look[key] for key in LOOK_KEYS} if look else None,
        "reward": {key: reward.get(key) for key in REWARD_KEYS},
        "policy": {
            **_with_intervals(evaluation.get("policy", {}), ("proxy", "gold", "kl", "win_rate")),
            **_change_from_start(rows, "proxy"),
            **_change_from_start(rows if known else [], "gold"),
            "win_tie_lose": win_tie_lose(*([row[f"gold_{who}"] for row in rows] for who in ("policy", "sft")))
            if known
            else None,
            "gold_gap_closed": evaluation.get("gold_gap_closed"),
            "gold_gap_closed_ci": evaluation.get("gold_gap_closed_ci"),
            "words": sum(lengths) / len(lengths) if lengths else None,
            "different_answers": len(set(texts)) / len(texts) if texts else None,
            "warnings": ppo.get("warnings"),
        },
        "change_in_gold": change,
        "hindsight": facts.get(f"round-{number + 1}/reward", {}).get("hindsight"),
    }


def _change_from_start(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, object]:
    """Return by how much a reward of the policy's answers lies above that of the start's on the same prompts, and its interval.

    Args:
        rows: of `samples.jsonl`; none where the reward is not known.
        name: "proxy" or "gold".
    """
    if not rows:
        return {f"{name}_change": None, f"{name}_change_ci": None}
    policy, start = ([row[f"{name}_{who}"] for row in rows] for who in ("policy", "sft"))
    change = paired_difference(policy, start, conversations_of(rows))
    return {f"{name}_change": change["difference"], f"{name}_change_ci": change["difference_ci"]}


def _best(rounds: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the round whose policy has the highest true reward; where none is known, the last one that the reward model after it
    does not find worse than the one before. None where no policy was evaluated."""
    evaluated = [entry for entry in rounds if entry["policy"]["proxy"] is not None]
    if not evaluated:
        return None
    known = [entry for entry in evaluated if entry["policy"]["gold"] is not None]
    not_worse = [entry for entry in evaluated if entry["hindsight"] is None or not is_worse(entry["hindsight"])]
    best = max(known, key=lambda entry: entry["policy"]["gold"]) if known else (not_worse or evaluated)[-1]
    return int(best["round"])


def _link_best(root: Path, number: int | None) -> None:
    """Link `RUN/best` to the best round's policy; a file system without links goes without."""
    link = root / "best"
    beside = root / f"best.tmp-{os.getpid()}"
    if number is None:
        return
    if link.is_dir() and not link.is_symlink():
        warnings.warn(
            f"{link}: a folder and no link, as copies of a run have it, so it keeps an older policy; delete it, and the same "
            f"command links it to round {number}'s.",
            stacklevel=2,
        )
        return
    try:
        beside.symlink_to(Path(f"round-{number}") / "ppo" / "model", target_is_directory=True)
        os.replace(beside, link)
    except OSError:
        beside.unlink(missing_ok=True)


def _with_intervals(values: Mapping[str, object], names: tuple[str, ...]) -> dict[str, object]:
    """Take some values and their 95 % intervals out of facts; None where there are none."""
    return {key: values.get(key) for name in names for key in (name, f"{name}_ci")}
