"""`report.html`: verdict, curves, distributions, samples. One file; opens without a network, prints, light and dark."""

import json
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from rlhf.errors import UserError
from rlhf.report.figures import curves, histogram

SAMPLES_SHOWN = 12


def write_report(run: Path) -> Path:
    """Write the page of a run from what lies in its folder.

    Raises:
        UserError: the folder holds no run.
    """
    file = run / "summary.json"
    if not file.is_file():
        raise UserError(f"{run}: no summary.json; this folder holds no run.")
    summary = json.loads(file.read_text(encoding="utf-8"))
    last = summary["rounds"][-1]
    folder = f"round-{last['round']}"
    ppo = _rows(run / folder / "ppo" / "metrics.jsonl")
    judged = _rows(run / folder / "evaluate" / "samples.jsonl")
    pairs = _rows(run / folder / "reward" / "samples.jsonl")
    environment = Environment(loader=PackageLoader("rlhf", "report"), autoescape=select_autoescape(["jinja", "html"]))
    page = environment.get_template("page.html.jinja").render(
        summary=summary,
        last=last,
        verdict=verdict(summary, ppo),
        tiles=_tiles(summary),
        figures=[(title, note, Markup(svg)) for title, note, svg in _figures(run, folder, ppo, judged, pairs)],
        samples=judged[:SAMPLES_SHOWN],
        worst_pairs=sorted(pairs, key=lambda row: row["score_chosen"] - row["score_rejected"])[:5],
    )
    target = run / "report.html"
    beside = target.with_name(f"report.html.tmp-{os.getpid()}")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, target)
    return target


def verdict(summary: dict[str, Any], ppo: list[dict[str, Any]]) -> list[str]:
    """What a colleague should know after three sentences, from intervals and not from hopes."""
    last = summary["rounds"][-1]
    policy, reward, sft = last["policy"], last["reward"], summary["sft"]
    sentences = []
    if policy["proxy"] is None:
        return ["This run is not finished: no policy has been judged yet."]
    if policy["gold"] is not None:
        low, high = policy["win_rate_ci"]
        direction = "better than" if low > 0.5 else "worse than" if high < 0.5 else "not distinguishable from"
        sentences.append(
            f"By the true reward the policy is {direction} SFT: {policy['gold']:.2f} against {sft['gold']:.2f}, "
            f"winning {policy['win_rate']:.0%} of {summary['evaluated_prompts']} held-out prompts, "
            f"at {policy['kl']:.1f} nats from SFT."
        )
    else:
        rises = policy["proxy_ci"][0] > sft["proxy_ci"][1]
        sentences.append(
            f"The reward model's score {'rises' if rises else 'does not clearly rise'} from {sft['proxy']:.2f} (SFT) to "
            f"{policy['proxy']:.2f}, at {policy['kl']:.1f} nats from SFT; no true reward is known here, so read the samples."
        )
    if reward["accuracy"] is not None:
        baseline = max(reward["length_baseline"], 1 - reward["length_baseline"])
        low, high = reward["accuracy_ci"]
        beats = "beats" if low > baseline else "does not clearly beat"
        sentences.append(
            f"The reward model orders {reward['accuracy']:.1%} [{low:.1%}, {high:.1%}] of held-out pairs as labelled and "
            f"{beats} judging by length alone ({baseline:.1%})."
        )
    sentences.append(_overoptimised(ppo))
    return sentences


def _overoptimised(ppo: list[dict[str, Any]]) -> str:
    """Thirds of training: does gold fall below its best while the proxy still rises?"""
    rows = [row for row in ppo if row.get("reward_gold") is not None]
    if len(rows) < 6:
        return "Whether the reward was over-optimised can't be said without a true reward over training."
    third = len(rows) // 3
    thirds = [rows[:third], rows[third : 2 * third], rows[2 * third :]]
    proxy = [sum(r["reward_proxy"] for r in part) / len(part) for part in thirds]
    gold = [sum(r["reward_gold"] for r in part) / len(part) for part in thirds]
    if proxy[2] > proxy[1] and gold[2] < max(gold[:2]):
        return (
            f"The reward was over-optimised: in the last third of PPO the proxy rose from {proxy[1]:.2f} to {proxy[2]:.2f} "
            f"while the true reward fell to {gold[2]:.2f} from {max(gold[:2]):.2f}."
        )
    return f"No over-optimisation over training: true reward by thirds {gold[0]:.2f}, {gold[1]:.2f}, {gold[2]:.2f}."


def _tiles(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The five numbers on top: label, value, what beside it."""
    last = summary["rounds"][-1]
    policy, reward = last["policy"], last["reward"]

    def number(section: dict[str, Any], name: str, form: str = ".2f") -> tuple[str, str]:
        value, interval = section.get(name), section.get(f"{name}_ci")
        if value is None:
            return "-", "not known in this run"
        return f"{value:{form}}", f"95 %: {interval[0]:{form}} to {interval[1]:{form}}" if interval else ""

    tiles = [
        ("true reward of the policy", *number(policy, "gold")),
        ("reward model's score", *number(policy, "proxy")),
        ("KL to SFT, nats an answer", *number(policy, "kl")),
        ("win rate against SFT", *number(policy, "win_rate")),
        ("reward model accuracy", *number(reward, "accuracy", ".3f")),
    ]
    if summary["gold_gap_closed"] is not None:
        tiles.append(
            ("gold gap closed", f"{summary['gold_gap_closed']:.2f}", "0 is SFT, 1 is best of 16 by true reward")
        )
    return tiles


def _figures(
    run: Path, folder: str, ppo: list[dict[str, Any]], judged: list[dict[str, Any]], pairs: list[dict[str, Any]]
) -> list[tuple[str, str, str]]:
    figures: list[tuple[str, str, str]] = []
    if ppo:
        series = {"reward model (proxy)": _series(ppo, "episodes", "reward_proxy")}
        by_kl = {"reward model (proxy)": _series(ppo, "kl", "reward_proxy", sort=True)}
        if any(row.get("reward_gold") is not None for row in ppo):
            series["true reward (gold)"] = _series(ppo, "episodes", "reward_gold")
            by_kl["true reward (gold)"] = _series(ppo, "kl", "reward_gold", sort=True)
        figures.append(
            (
                "Reward over PPO",
                "A proxy that rises while gold falls is over-optimised.",
                curves(series, x="episodes", y="reward"),
            )
        )
        figures.append(
            (
                "Reward against KL",
                "What each nat away from SFT buys.",
                curves(by_kl, x="KL to SFT, nats an answer", y="reward"),
            )
        )
        figures.append(
            (
                "KL over PPO",
                "Σ over an answer's tokens.",
                curves({"kl": _series(ppo, "episodes", "kl")}, x="episodes", y="nats an answer"),
            )
        )
        health = {
            name: _series(ppo, "episodes", key)
            for name, key in (
                ("explained variance of the critic", "explained_variance"),
                ("clip fraction", "clip_fraction"),
                ("share without end", "share_without_eos"),
            )
        }
        figures.append(
            (
                "Health of PPO",
                "A good critic explains most of the variance; few answers are cut off.",
                curves(health, x="episodes", y=""),
            )
        )
    if judged:
        scores = {"SFT": [r["proxy_sft"] for r in judged], "policy": [r["proxy_policy"] for r in judged]}
        figures.append(
            ("Reward model's score, held-out prompts", "Before and after PPO.", histogram(scores, x="reward"))
        )
        if judged[0]["gold_policy"] is not None:
            gold = {"SFT": [r["gold_sft"] for r in judged], "policy": [r["gold_policy"] for r in judged]}
            figures.append(("True reward, held-out prompts", "Before and after PPO.", histogram(gold, x="true reward")))
    if pairs:
        sides = {"chosen": [r["score_chosen"] for r in pairs], "rejected": [r["score_rejected"] for r in pairs]}
        figures.append(
            (
                "Reward model on held-out pairs",
                "The more they overlap, the less it knows.",
                histogram(sides, x="reward"),
            )
        )
    for stage, where, key, label in (
        ("SFT", "round-0/sft", "loss", "nats a token"),
        ("Reward model", f"{folder}/reward", "loss", "nats a pair"),
    ):
        rows = _rows(run / where / "metrics.jsonl")
        if rows:
            figures.append(
                (f"{stage}: training loss", "", curves({key: _series(rows, "step", key)}, x="step", y=label))
            )
    return figures


def _series(rows: list[dict[str, Any]], x: str, y: str, *, sort: bool = False) -> tuple[list[float], list[float]]:
    points = [(row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]
    points = sorted(points) if sort else points
    return [p[0] for p in points], [p[1] for p in points]


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [row for line in file if "resumed_from" not in (row := json.loads(line))]
