"""`report.html`: verdict, policy, reward model, data, lineage, how to reproduce. One file that can be sent to a colleague."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from markupsafe import Markup
from scipy.stats import t

from rlhf.errors import UserError
from rlhf.files import write_text
from rlhf.report.change import GOLD, SCORE, change_sentence
from rlhf.report.checks import check_rows, checks_line
from rlhf.report.figures import curves, histogram
from rlhf.report.records import (
    JUDGED_KEYS,
    SCORED_KEYS,
    Facts,
    JudgedPrompt,
    Manifest,
    Metrics,
    Summary,
    read_json,
    read_manifests,
    read_recipe,
    read_rows,
    read_summary,
    start_name,
)
from rlhf.report.render import Figure, render, reward_facts, reward_figures, worst
from rlhf.report.rounds import last_evaluated, rounds_section, rounds_verdict

SAMPLES_SHOWN = 12
SURE = 0.99865  # that a fall or a rise is no chance, before the page calls it one: three deviations of a normal one


def write_report(run: Path) -> Path:
    """Write the page of a run from what lies in its folder; return its path.

    Raises:
        UserError: the folder holds no run, or one of its records is damaged.
    """
    summary = read_summary(run)
    last = last_evaluated(summary)
    folder = f"round-{last['round']}"
    ppo: list[Metrics] = read_rows(run / folder / "ppo" / "metrics.jsonl")
    answers: list[JudgedPrompt] = read_rows(run / folder / "evaluate" / "samples.jsonl", JUDGED_KEYS)
    manifests = read_manifests(run)
    facts = {name: manifest["facts"] for name, manifest in manifests.items()}
    reward = facts.get(f"{folder}/reward")
    held_out = run / folder / "reward" / "samples.jsonl"
    pairs: list[Facts] = read_rows(held_out, SCORED_KEYS) if reward else []
    if reward and not pairs:
        raise UserError(f"{held_out}: holds no pair; delete the stage's folder to make it again.")
    origin, _ = _origin(run / "origin.json"), read_recipe(run)  # damaged ones are said before anything is written
    page = render(
        "page.html.jinja",
        title=f"{summary['recipe']}, seed {summary['seed']}",
        summary=summary,
        start=start_name(summary),
        verdict=verdict(summary, ppo) + rounds_verdict(summary) + facts.get(f"{folder}/ppo", {}).get("warnings", []),
        tiles=_tiles(summary),
        rounds=rounds_section(run, summary),
        policy_figures=_policy_figures(
            ppo,
            answers,
            facts.get(f"{folder}/evaluate", {}),
            start_name(summary),
            follows=_follows(manifests, f"{folder}/ppo"),
        ),
        samples=answers[:SAMPLES_SHOWN],
        reward_facts=reward_facts(reward) if reward else [],
        reward_figures=reward_figures(reward, pairs) if reward else [],
        worst_pairs=worst(pairs),
        training_figures=_training_figures(run, folder),
        checks=check_rows(summary, facts),
        checks_line=checks_line(summary),
        data=[_reader_row(report) for report in facts.get("round-0/data", {}).get("read", [])],
        lineage=[_lineage_row(name, manifest) for name, manifest in manifests.items()],
        settings_title=f"Settings that differ from {origin['base']}"
        if origin["base"]
        else "Settings changed on the command line",
        differences=origin["differences"],
        recipe=(run / "recipe.yaml").read_text(encoding="utf-8") if (run / "recipe.yaml").is_file() else "",
        reproduce=_reproduce(origin, manifests),
    )
    write_text(run / "report.html", page)
    return run / "report.html"


def verdict(summary: Summary, ppo: Sequence[Metrics]) -> list[str]:
    """Return the sentences that a colleague should know, by intervals: policy, reward model, over-optimisation."""
    last, start = last_evaluated(summary), start_name(summary)
    policy, reward, sft = last["policy"], last["reward"], summary["sft"]
    sentences = []
    if policy["proxy"] is None:
        sentences.append("No policy has been judged in this run (yet).")
    elif policy["gold"] is not None:
        low, high = policy["win_rate_ci"]
        wins, ties, losses = policy["win_tie_lose"]
        sentences += [
            f"{change_sentence(GOLD, policy, sft, 'gold', start_name=start)} By it the policy wins {wins:.0%} of "
            f"its comparisons with {start} on {summary['evaluated_prompts']} held-out prompts, ties {ties:.0%} and loses "
            f"{losses:.0%} (win rate {policy['win_rate']:.2f} [{low:.2f}, {high:.2f}], ties half), at {policy['kl']:.1f} nats.",
            change_sentence(SCORE, policy, sft, "proxy", start_name=start),
        ]
    else:
        sentences.append(
            f"{change_sentence(SCORE, policy, sft, 'proxy', start_name=start)} The policy is {policy['kl']:.1f} nats from {start}; "
            "no true reward is known here, so read the samples."
        )
    if reward["accuracy"] is not None:
        baseline = max(reward["length_baseline"], 1 - reward["length_baseline"])
        low, high = reward["accuracy_ci"]
        orders = (
            f"The reward model orders {reward['accuracy']:.1%} [{low:.1%}, {high:.1%}] of held-out pairs as labelled"
        )
        above = reward.get("over_length_ci")
        if above is None:  # all pairs are of one conversation, or an earlier version scored them
            sentences.append(f"{orders}; judging by length alone has {baseline:.1%}.")
        else:
            sentences.append(
                f"{orders} and {'beats' if above[0] > 0 else 'does not clearly beat'} judging by length alone ({baseline:.1%}, "
                f"{100 * reward['over_length']:+.1f} points [{100 * above[0]:+.1f}, {100 * above[1]:+.1f}] on the same pairs)."
            )
    if ppo:
        sentences.append(_overoptimised(ppo))
    return sentences


def _overoptimised(ppo: Sequence[Metrics]) -> str:
    """Say whether gold ends below its best third of training, and the proxy above it, by more than rollouts scatter."""
    proxies, golds = _series(ppo, "reward_proxy", "reward_gold")
    if not golds:
        return "Whether the reward was over-optimised can't be said without a true reward over training."
    if len(golds) < 6:
        return f"{len(golds)} logged rollouts are too few to say whether the reward was over-optimised."
    third = len(golds) // 3
    proxy, gold = ([values[:third], values[third : 2 * third], values[2 * third :]] for values in (proxies, golds))
    means = f"{fmean(gold[0]):.2f}, {fmean(gold[1]):.2f}, {fmean(gold[2]):.2f}"
    best = 0 if fmean(gold[0]) >= fmean(gold[1]) else 1
    if not _is_above(gold[best], gold[2]):
        return f"No over-optimisation is seen over training: true reward by thirds {means}."
    fell = f"from the {('first', 'second')[best]} to the last third of PPO"
    true = f"the true reward fell from {fmean(gold[best]):.2f} to {fmean(gold[2]):.2f}"
    proxies_then = f"from {fmean(proxy[best]):.2f} to {fmean(proxy[2]):.2f}"
    if _is_above(proxy[2], proxy[best]):
        return f"The reward was over-optimised: {fell} the proxy rose {proxies_then} while {true}."
    return f"{true[0].upper()}{true[1:]} {fell}, and the proxy did not clearly rise ({proxies_then})."


def _is_above(values: Sequence[float], others: Sequence[float]) -> bool:
    """Tell whether rollouts have a higher mean than others, by more than they scatter."""
    error = math.sqrt(sum(variance(part) / len(part) for part in (values, others)))
    sure = float(t.ppf(SURE, len(values) + len(others) - 2))  # standard errors
    return fmean(values) > fmean(others) + sure * error


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """Return the numbers on top of the page: label, value, interval."""
    last, start = last_evaluated(summary), start_name(summary)
    policy, reward = last["policy"], last["reward"]

    def number(section: Facts, name: str, form: str = ".2f") -> tuple[str, str]:
        value, interval = section.get(name), section.get(f"{name}_ci")
        if value is None:
            return "-", "not known in this run"
        return f"{value:{form}}", f"95 %: {interval[0]:{form}} to {interval[1]:{form}}" if interval else ""

    tiles = [
        ("true reward of the policy", *number(policy, "gold")),
        ("reward model's score", *number(policy, "proxy")),
        (f"KL to {start}, nats an answer", *number(policy, "kl")),
        (f"win rate against {start}", *number(policy, "win_rate")),
        ("reward model accuracy", *number(reward, "accuracy", ".3f")),
    ]
    if summary["gold_gap_closed"] is not None:
        value, span = number({**summary}, "gold_gap_closed")
        meaning = f"0 is {start}, 1 is best of 16 by true reward"
        tiles.append(("gold gap closed", value, f"{span}; {meaning}" if span else meaning))
    return tiles


def _follows(manifests: Mapping[str, Manifest], stage: str) -> bool:
    """Return whether PPO's KL is to the policy of the round before, and the evaluation's to that at the very start."""
    manifest = manifests.get(stage)
    return (
        manifest is not None and "policy" in manifest["parents"] and manifest["settings"].get("reference") == "previous"
    )


def _policy_figures(
    ppo: Sequence[Metrics], answers: Sequence[JudgedPrompt], evaluation: Facts, start: str, *, follows: bool
) -> list[Figure]:
    figures = _training_curves(ppo, evaluation, start, follows=follows) if ppo else []
    figures += _answer_histograms(answers, start.removeprefix("the ")) if answers else []
    return [(title, note, Markup(svg)) for title, note, svg in figures]


def _training_curves(
    ppo: Sequence[Metrics], evaluation: Facts, start: str, *, follows: bool
) -> list[tuple[str, str, str]]:
    """Draw PPO's rewards, KL, length and health over its episodes: title, note, SVG.

    Args:
        follows: PPO's KL is to the policy of the round before; best of n, whose KL is to `start`, has no place beside it.
    """
    start = "the policy of the round before" if follows else start
    figures = []
    series = {"reward model (proxy)": _series(ppo, "episodes", "reward_proxy")}
    by_kl = {"PPO, reward model (proxy)": _series(ppo, "kl", "reward_proxy", sort=True)}
    points = {}
    if any(row.get("reward_gold") is not None for row in ppo):
        series["true reward (gold)"] = _series(ppo, "episodes", "reward_gold")
        by_kl = {"PPO, true reward": _series(ppo, "kl", "reward_gold", sort=True)}
        curve = evaluation.get("best_of_n", [])
        points = {
            name: ([row["kl"] for row in curve], [row[key] for row in curve])
            for name, key in (("best of n by reward model", "by_reward"), ("best of n by true reward", "by_gold"))
            if curve and not follows
        }
    note = "A proxy that rises while gold falls is over-optimised."
    figures.append(("Reward over PPO", note, curves(series, x="episodes", y="reward")))
    note = f"What each nat away from {start} buys{'; best of n beside it' if points else ''}."
    svg = curves(by_kl, x=f"KL to {start}, nats an answer", y="reward", points=points)
    figures.append(("Reward against KL", note, svg))
    kl = curves({"kl": _series(ppo, "episodes", "kl")}, x="episodes", y="nats an answer")
    figures.append(("KL over PPO", "Σ over an answer's tokens.", kl))
    length = curves({"length": _series(ppo, "episodes", "length")}, x="episodes", y="tokens an answer")
    figures.append(("Length over PPO", "Growth or collapse is the first sign of a hacked reward.", length))
    health = {
        name: _series(ppo, "episodes", key)
        for name, key in (
            ("explained variance of the critic", "explained_variance"),
            ("clip fraction", "clip_fraction"),
            ("share without end", "share_without_eos"),
        )
    }
    note = "A good critic explains most of the variance; few answers are cut off."
    figures.append(("Health of PPO", note, curves(health, x="episodes", y="")))
    return figures


def _answer_histograms(answers: Sequence[JudgedPrompt], start: str) -> list[tuple[str, str, str]]:
    """Draw the distributions of both rewards over held-out prompts, before and after PPO: title, note, SVG."""
    proxy = {start: [row["proxy_sft"] for row in answers], "policy": [row["proxy_policy"] for row in answers]}
    note = "Before and after PPO."
    figures = [("Reward model's score, held-out prompts", note, histogram(proxy, x="raw score"))]
    gold = {
        start: [row["gold_sft"] for row in answers if row["gold_sft"] is not None],
        "policy": [row["gold_policy"] for row in answers if row["gold_policy"] is not None],
    }
    if gold["policy"]:
        figures.append(("True reward, held-out prompts", note, histogram(gold, x="true reward")))
    return figures


def _training_figures(run: Path, folder: str) -> list[Figure]:
    figures = []
    for stage, stage_folder, label in (
        ("SFT", "round-0/sft", "nats a token"),
        ("Reward model", f"{folder}/reward", "nats a pair"),
    ):
        rows = read_rows(run / stage_folder / "metrics.jsonl")
        if rows:
            svg = curves({"loss": _series(rows, "step", "loss")}, x="step", y=label)
            figures.append((stage, "", Markup(svg)))
    return figures


def _reader_row(report: Facts) -> dict[str, Any]:
    sentences = [f"{count} left out: {reason}" for reason, count in report["dropped"].items()]
    return {**report, "sentences": sentences + [f"{count}: {note}" for note, count in report["noted"].items()]}


def _lineage_row(folder: str, manifest: Manifest) -> dict[str, object]:
    versions = manifest["versions"]
    code = manifest["code"] or f"rlhf-pipeline {versions['rlhf-pipeline']}"
    return {
        "folder": folder,
        "reads": ", ".join(parent["folder"] for parent in manifest["parents"].values()) or "-",
        "key": manifest["key"][:12],
        "seconds": manifest["seconds"],
        "made_with": f"code {code}, trl {versions['trl']}, transformers {versions['transformers']}, torch {versions['torch']}",
    }


def _reproduce(origin: Mapping[str, Any], manifests: Mapping[str, Manifest]) -> str:
    """Return the commands that lead to the same weights (bit for bit on one kind of CPU)."""
    if not manifests:
        return ""
    last = list(manifests.values())[-1]
    names = ("torch", "trl", "transformers", "peft", "accelerate", "datasets")
    pins = " ".join(f"{name}=={last['versions'][name].partition('+')[0]}" for name in names)  # of no index of its own
    code = f"git checkout {last['code'].removesuffix('-dirty')}\n" if last["code"] else ""
    dirty = "# the code had uncommitted changes\n" if last["code"] and last["code"].endswith("-dirty") else ""
    overrides = "".join(f" {shlex.quote(override)}" for override in origin["overrides"])
    return (
        f"{code}{dirty}pip install {pins} . && rlhf run {shlex.quote(origin['file'])} --out NEW{overrides}\n"
        "# or, in the folder where the run was started: rlhf run THIS_FOLDER/recipe.yaml --out NEW"
    )


def _series(rows: Sequence[Metrics], x: str, y: str, *, sort: bool = False) -> tuple[list[float], list[float]]:
    values = [(row.get(x), row.get(y)) for row in rows]
    points = [(at, value) for at, value in values if at is not None and value is not None]
    points = sorted(points) if sort else points
    return [p[0] for p in points], [p[1] for p in points]


def _origin(path: Path) -> dict[str, Any]:
    """Return which file and overrides the recipe came from; a folder that does not say is its own recipe.

    Raises:
        UserError: the file is damaged.
    """
    unknown: dict[str, Any] = {"file": "recipe.yaml", "base": None, "overrides": [], "differences": []}
    if not path.is_file():
        return unknown
    origin = read_json(path)
    if not isinstance(origin, dict) or not unknown.keys() <= origin.keys():
        raise UserError(f"{path}: cut off or damaged. Delete this file, and the same `rlhf run` writes it again.")
    return origin
