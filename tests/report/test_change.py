"""A rise, a fall and neither are told apart by the paired interval, and in the same words everywhere."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf.pipeline.summary import _change_from_start
from rlhf.report.cards import write_cards
from rlhf.report.page import write_report
from rlhf.report.terminal import show_summary

PROMPTS = 200
NOBODY: dict[str, Any] = {"gold": None, "gold_ci": None, "kl": None}


def judged(shift: float, scatter: float = 0.1) -> list[dict[str, Any]]:
    """Answers whose score lies `shift` beside the start's on the same prompt; prompts differ by far more than that."""
    rng = random.Random(0)
    starts = [rng.gauss(1.4, 2.0) for _ in range(PROMPTS)]
    scores = [start + rng.gauss(shift, scatter) for start in starts]
    answers = {"sft": "a", "policy": "b", "ended_sft": True, "ended_policy": True, "kl": 1.0}
    return [
        {"prompt": str(i), "proxy_sft": start, "proxy_policy": score, "gold_sft": None, "gold_policy": None, **answers}
        for i, (start, score) in enumerate(zip(starts, scores, strict=True))
    ]


def write_run(run: Path, rows: list[dict[str, Any]], *, stages: tuple[str, ...]) -> None:
    """Write what pages, cards and terminal read of a run without a true reward."""
    start, policy = (sum(row[f"proxy_{who}"] for row in rows) / len(rows) for who in ("sft", "policy"))
    sft = {"gold": None, "gold_ci": None, "proxy": start, "proxy_ci": [start - 0.3, start + 0.3]}
    of_policy = {
        **NOBODY,
        "proxy": policy,
        "proxy_ci": [policy - 0.3, policy + 0.3],
        "kl": 1.0,
        "kl_ci": [0.9, 1.1],
        "win_rate": None,
        "win_tie_lose": None,
        **_change_from_start(rows, "proxy"),
        **_change_from_start([], "gold"),
    }
    summary = {
        "recipe": "r", "seed": 0, "seconds": dict.fromkeys(stages, 1.0), "lab": {"flip_rate": None}, "sft": sft, "best_round": 1,
        "rounds": [{"round": 1, "policy": of_policy, "reward": {"accuracy": None}, "labels": {}, "change_in_gold": None}],
        "best_of_16": {"by_reward": NOBODY, "by_gold": NOBODY}, "gold_gap_closed": None, "evaluated_prompts": PROMPTS,
        "stopped": None,
    }  # fmt: skip
    common: dict[str, Any] = {"settings": {}, "parents": {}, "code": None, "key": "k" * 64, "seed": 0, "seconds": 1.0}
    common["versions"] = dict.fromkeys(
        ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "rlhf-pipeline"), "1"
    )
    facts: dict[str, Any] = {"round-0/data": {"read": []}, "round-1/ppo": {}, "round-1/evaluate": {"sft": sft}}
    for folder, values in facts.items():
        (run / folder).mkdir(parents=True)
        (run / folder / "manifest.json").write_text(json.dumps({**common, "facts": values}))
    (run / "round-1/ppo/model").mkdir()
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "recipe.yaml").write_text("name: r\n")
    (run / "round-1/evaluate/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("shift", "word"), [(-0.1, "falls from"), (0.1, "rises from"), (0.0, "shows no clear change from")]
)
def test_the_word_is_that_of_the_paired_interval_in_terminal_page_and_card(
    tmp_path: Path, shift: float, word: str
) -> None:
    """A shift of 0.1 where prompts scatter by 2: the intervals of the two means overlap nearly whole, the paired one is clear."""
    write_run(tmp_path, judged(shift), stages=("data", "reward", "ppo", "evaluate"))
    screen = io.StringIO()
    show_summary(tmp_path, Console(file=screen, width=140))
    (card,) = write_cards(tmp_path)
    texts = [write_report(tmp_path).read_text(), card.read_text(), screen.getvalue()]
    policy = json.loads((tmp_path / "summary.json").read_text())["rounds"][0]["policy"]
    low, high = policy["proxy_change_ci"]
    assert policy["proxy_change"] == pytest.approx(shift, abs=0.02)
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / PROMPTS**0.5, rel=0.15), "of the differences, not of the scores"
    figures = f"{policy['proxy_change']:+.2f} [{low:+.2f}, {high:+.2f}], paired on the same prompts."
    for text in texts:
        plain = " ".join(text.replace("&#39;", "'").split())
        assert f"The reward model's score {word} " in plain
        assert figures in plain
        assert "does not clearly" not in plain


@pytest.mark.parametrize("has_sft", [True, False])
def test_sft_is_said_only_where_there_was_one(tmp_path: Path, has_sft: bool) -> None:
    write_run(tmp_path, judged(0.1), stages=("data", *(("sft",) if has_sft else ()), "reward", "ppo", "evaluate"))
    screen = io.StringIO()
    show_summary(tmp_path, Console(file=screen, width=140))
    (card,) = write_cards(tmp_path)
    for text in (write_report(tmp_path).read_text(), card.read_text(), screen.getvalue()):
        assert ("SFT" in text) == has_sft
        assert ("the backbone" in text) != has_sft


def test_a_summary_from_before_the_test_claims_no_direction(tmp_path: Path) -> None:
    write_run(tmp_path, judged(-0.1), stages=("sft",))
    file = tmp_path / "summary.json"
    summary = json.loads(file.read_text())
    del summary["rounds"][0]["policy"]["proxy_change"], summary["rounds"][0]["policy"]["proxy_change_ci"]
    file.write_text(json.dumps(summary))
    page = write_report(tmp_path).read_text()
    assert "the same `rlhf run` again tests whether that is a change" in page
