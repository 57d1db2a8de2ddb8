"""When rounds should end before their number is up: rules on what the manifests say, so that a resumed run decides alike."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from rlhf.files import read_jsonl
from rlhf.pipeline.store import Stage, Store
from rlhf.recipe.schema import RoundsSection
from rlhf.report.change import FALLS, direction
from rlhf.statistics import paired_difference


def reason_to_stop(rounds: RoundsSection, stage: Stage, stages: Sequence[Stage], store: Store) -> str | None:
    """Return why nothing after this stage should run, or None. The same files give the same answer whenever it is asked.

    | after | stops where |
    |---|---|
    | label | the reward model so far orders the policy's new answers worse than `min_fresh_accuracy`, by the interval's upper end |
    | vote, second_look | more labels are wrong than `max_noise`, by the interval's lower end |
    | reward | no true reward is known, and this reward model finds the last policy worse than the one before (`hindsight`) |
    | evaluate | the true reward fell from the round before (paired on the same prompts, interval below 0); KL above `kl_limit` |
    """
    manifest = store.manifest(stage)
    if manifest is None or stage is stages[-1]:
        return None
    facts: dict[str, Any] = manifest["facts"]
    folder = stage.folder.partition("/")[0]
    match stage.name:
        case "label" if rounds.min_fresh_accuracy is not None and facts.get("fresh_accuracy") is not None:
            high = facts["fresh_accuracy_ci"][1]
            if high < rounds.min_fresh_accuracy:
                chosen = f" They are those that rounds.select={rounds.select} chose, of which a good one orders few more than half."
                return (
                    f"{folder}: stopped. The reward model so far orders {facts['fresh_accuracy']:.1%} of its own policy's new "
                    f"pairs as labelled, at most {high:.1%}: below rounds.min_fresh_accuracy={rounds.min_fresh_accuracy:g}."
                    + (chosen if rounds.select != "random" else "")
                )
        case "vote" | "second_look" if rounds.max_noise is not None and facts["noise"]["low"] > rounds.max_noise:
            return (
                f"{folder}: stopped. At least {facts['noise']['low']:.1%} of the labels are wrong (95 % interval), above "
                f"rounds.max_noise={rounds.max_noise:g}: look at the labels (`rlhf audit`)."
            )
        case "reward" if rounds.stop_when_worse and facts.get("hindsight") is not None:
            hindsight = facts["hindsight"]
            if is_worse(hindsight) and not _knows_gold(hindsight["round"], stages, store):
                return (
                    f"{folder}: stopped. By this round's reward model, which has seen labels of such answers, the policy of round "
                    f"{hindsight['round']} wins {hindsight['win_rate']:.1%} of the comparisons with the one before it, ties half, "
                    f"and at most {hindsight['win_rate_ci'][1]:.1%}; no true reward is known that says otherwise."
                )
        case "evaluate":
            kl = facts["policy"]["kl"]
            if rounds.kl_limit is not None and kl > rounds.kl_limit:
                start = "SFT" if "sft" in stage.parents else "the backbone"
                return f"{folder}: stopped. The policy is {kl:.1f} nats from {start}, over rounds.kl_limit={rounds.kl_limit:g}."
            change = change_since_last_round(stage, stages, store)
            if rounds.stop_when_worse and change is not None and direction(change["difference_ci"]) == FALLS:
                low, high = change["difference_ci"]
                return (
                    f"{folder}: stopped. On the same prompts the true reward fell by {-change['difference']:.3f} "
                    f"[{-high:.3f}, {-low:.3f}] from the round before."
                )
    return None


def is_worse(hindsight: Mapping[str, Any]) -> bool:
    """Return whether a later reward model finds a policy worse than the one before it, beyond chance."""
    return bool(hindsight["win_rate_ci"][1] < 0.5)


def _knows_gold(number: int, stages: Sequence[Stage], store: Store) -> bool:
    """Return whether the true reward of a round's policy is known."""
    evaluation = next(stage for stage in stages if stage.folder == f"round-{number}/evaluate")
    manifest = store.manifest(evaluation)
    return manifest is not None and manifest["facts"]["policy"]["gold"] is not None


def change_since_last_round(stage: Stage, stages: Sequence[Stage], store: Store) -> dict[str, Any] | None:
    """Compare the true rewards of two rounds' policies on the same prompts.

    Returns:
        the paired difference, and how often the later one's answer is better, as good, or worse (`win_tie_lose`); None where
        there is no round before, or no true reward.
    """
    evaluations = [other for other in stages if other.name == "evaluate"]
    place = evaluations.index(stage)
    if place == 0:
        return None
    columns: list[list[Any]] = []
    clusters: list[Hashable] = []
    for evaluation in (stage, evaluations[place - 1]):
        file = store.path(evaluation) / "samples.jsonl"
        if store.manifest(evaluation) is None or not file.is_file():
            return None
        rows = read_jsonl(file)
        columns.append([row["gold_policy"] for row in rows])
        clusters = conversations_of(rows)
    if any(value is None for column in columns for value in column):
        return None
    return paired_difference(columns[0], columns[1], clusters) | {"win_tie_lose": win_tie_lose(columns[0], columns[1])}


def conversations_of(samples: Sequence[Mapping[str, Any]]) -> list[Hashable]:
    """Return which rows of an evaluation's `samples.jsonl` are of one conversation; of earlier versions', of one prompt."""
    return [row.get("conversation", row["prompt"]) for row in samples]


def win_tie_lose(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Return the shares of prompts on which the first is above, equal to and below the second.

    >>> win_tie_lose([1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.5, 1.0])
    [0.5, 0.25, 0.25]
    """
    signs = [(a > b) - (a < b) for a, b in zip(first, second, strict=True)]
    return [signs.count(sign) / len(signs) for sign in (1, 0, -1)]
