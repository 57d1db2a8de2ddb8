"""Model cards: `README.md` in the folders of the reward model and of the policy, with the numbers that were measured."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from rlhf.files import write_text
from rlhf.report.page import verdict
from rlhf.report.records import (
    Facts,
    Manifest,
    Round,
    Summary,
    read_manifests,
    read_recipe,
    read_rows,
    read_summary,
    start_name,
)
from rlhf.report.render import render, reward_facts

USE_REWARD = """from rlhf import load_reward_model

reward = load_reward_model("FOLDER")
reward.score(["Name three fruits."], ["apple, pear and plum."])  # raw scores [n]
# on answers of {start}: mean {mean:.3f}, deviation {std:.3f}"""
USE_PLAIN_REWARD = """

# or with transformers alone (the text must be that of the saved chat template; no sigmoid: problem_type is regression)
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained("FOLDER")"""
USE_POLICY = """from {package} import {loader}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = {loader}.from_pretrained("FOLDER")"""


def write_cards(run: Path) -> list[Path]:
    """Write the card of every model that a run has finished and that is there; the policy's once it has been evaluated.

    Raises:
        UserError: the folder holds no run.
    """
    summary, manifests = read_summary(run), read_manifests(run)
    written = []
    for entry in summary["rounds"]:
        folder = f"round-{entry['round']}"
        evaluation = manifests[f"{folder}/evaluate"]["facts"] if f"{folder}/evaluate" in manifests else {}
        up_to_round = _with_round_alone(summary, entry, evaluation)
        if f"{folder}/reward" in manifests and (run / folder / "reward/model").is_dir():
            written.append(_reward_card(run, up_to_round, manifests, f"{folder}/reward"))
        if f"{folder}/ppo" in manifests and evaluation and (run / folder / "ppo/model").is_dir():
            written.append(_policy_card(run, up_to_round, manifests, folder))
    return written


def _with_round_alone(summary: Summary, entry: Round, evaluation: Facts) -> Summary:
    """Return the summary as if there were one round, with what that round's evaluation measured of SFT."""
    single: Summary = {**summary, "rounds": [entry]}
    if "sft" in evaluation:
        single["sft"] = evaluation["sft"]
    if "best_of_16" in evaluation:
        single["best_of_16"] = evaluation["best_of_16"]
    return single


def _reward_card(run: Path, summary: Summary, manifests: Mapping[str, Manifest], stage: str) -> Path:
    facts = manifests[stage]["facts"]
    adapter = (run / stage / "model" / "adapter_config.json").is_file()
    settings = manifests[stage]["settings"]
    objective, members = settings.get("objective", "bt"), settings.get("members", 1)
    sentences = [
        f"A scalar reward model trained on {_trained_on(facts)} (objective `{objective}`). Its score is a raw "
        "number; only differences between answers to one prompt mean anything.",
        *([f"It is one of {members} members; what follows was measured of their mean."] if members > 1 else []),
        *[sentence for sentence in verdict(summary, []) if sentence.startswith("The reward model orders")],
    ]
    return _write(
        run,
        stage,
        summary,
        manifests,
        kind="reward model",
        adapter=adapter,
        sentences=sentences,
        facts=reward_facts(facts),
        use=USE_REWARD.format(start=start_name(summary), **facts)
        + (USE_PLAIN_REWARD if is_plain(settings, adapter=adapter) else ""),
    )


def is_plain(settings: Mapping[str, object], *, adapter: bool) -> bool:
    """Return whether transformers alone gives a reward model's scores.

    A gate, a critique before the score and experts' adapters are no part of what it loads.

    Args:
        settings: of the stage that trained it.
        adapter: whether its folder holds an adapter alone.
    """
    needs_more = settings.get("objective") == "gated" or settings.get("extra") == "critique" or settings.get("experts")
    return not adapter and not needs_more


def _trained_on(facts: Mapping[str, object]) -> str:
    """Say what a reward model was trained on: pairs, which may be rankings, or rated answers."""
    if "ratings" in facts:
        return f"the ratings of {facts['ratings']} answers"
    rankings = f" of {facts['rankings']} rankings" if "rankings" in facts else ""
    return f"{facts['pairs']} preference pairs{rankings}"


def _policy_card(run: Path, summary: Summary, manifests: Mapping[str, Manifest], folder: str) -> Path:
    policy, sft, best = summary["rounds"][-1]["policy"], summary["sft"], summary["best_of_16"]
    start = start_name(summary)
    rows = [
        (
            "true reward",
            _value(policy, "gold"),
            f"{start} {_value(sft, 'gold')}, best of 16 by it {_value(best['by_gold'], 'gold')}",
        ),
        ("reward model's score", _value(policy, "proxy"), f"{start} {_value(sft, 'proxy')}"),
        (f"KL to {start}, nats an answer", _value(policy, "kl"), ""),
        (f"win rate against {start}, by the true reward", _value(policy, "win_rate"), ""),
    ]
    adapter = (run / folder / "ppo" / "model" / "adapter_config.json").is_file()
    package, loader = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    return _write(
        run,
        f"{folder}/ppo",
        summary,
        manifests,
        kind="policy",
        adapter=adapter,
        sentences=verdict(summary, read_rows(run / folder / "ppo" / "metrics.jsonl")),
        facts=[row for row in rows if not row[1].startswith("not known")],
        use=USE_POLICY.format(package=package, loader=loader),
    )


def _write(run: Path, stage: str, summary: Summary, manifests: Mapping[str, Manifest], **values: object) -> Path:
    manifest = manifests[stage]
    text = render(
        "card.md.jinja",
        recipe=summary["recipe"],
        base=(read_recipe(run).get("backbone") or {}).get("model"),
        data=manifests["round-0/data"]["facts"]["read"] if "round-0/data" in manifests else [],
        flip_rate=summary["lab"]["flip_rate"],
        settings=yaml.safe_dump(manifest["settings"], sort_keys=False, allow_unicode=True).strip(),
        code=manifest["code"] or manifest["versions"]["rlhf-pipeline"],
        seed=manifest["seed"],
        versions=manifest["versions"],
        key=manifest["key"][:12],
        **values,
    )
    card = run / stage / "model" / "README.md"
    write_text(card, text)
    return card


def _value(section: Facts, name: str) -> str:
    value, interval = section.get(name), section.get(f"{name}_ci")
    if value is None:
        return "not known"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
