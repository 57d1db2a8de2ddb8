"""When rounds stop, which of them was best, and what is said of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf.pipeline.plan import plan
from rlhf.pipeline.stopping import change_since_last_round, reason_to_stop
from rlhf.pipeline.store import Store
from rlhf.pipeline.summary import _best
from rlhf.recipe.schema import RoundsSection
from rlhf.report.cards import write_cards
from rlhf.report.records import read_record, sealed
from tests.pipeline.two_rounds import again, recipe, rows, start


def test_rules_stop_a_run_for_what_the_manifests_say(two_rounds: Path, tmp_path: Path) -> None:
    run = tmp_path / "x"
    shutil.copytree(two_rounds / "x", run, symlinks=True)
    store, stages = Store(run), plan(recipe(tmp_path, "rounds.count=3"))
    by_folder = {stage.folder: stage for stage in stages}

    def reason(folder: str, **rules: Any) -> str | None:
        return reason_to_stop(RoundsSection(**rules), by_folder[folder], stages, store)

    for folder in ("round-1/evaluate", "round-2/label", "round-2/evaluate"):
        assert reason(folder, stop_when_worse=False) is None
    assert "below rounds.min_fresh_accuracy=0.99" in str(reason("round-2/label", min_fresh_accuracy=0.99))
    assert "over rounds.kl_limit=1e-06" in str(reason("round-2/evaluate", kl_limit=1e-6))
    manifest = run / "round-2/vote/manifest.json"
    known: Any = read_record(manifest)
    known["facts"]["noise"] |= {"low": 0.3, "flip_rate": 0.35}
    manifest.write_text(json.dumps(sealed(known)))
    assert "At least 30.0% of the labels are wrong" in str(reason("round-2/vote", max_noise=0.2))
    manifest = run / "round-2/reward/manifest.json"
    known = read_record(manifest)
    known["facts"]["hindsight"] |= {"win_rate": 0.3, "win_rate_ci": [0.2, 0.4]}
    manifest.write_text(json.dumps(sealed(known)))
    assert reason("round-2/reward") is None, "the true reward is known, and decides"
    judged = run / "round-1/evaluate/manifest.json"
    unknown: Any = read_record(judged)
    gold = unknown["facts"]["policy"].pop("gold")
    judged.write_text(json.dumps(sealed({**unknown, "facts": unknown["facts"] | {"policy": {"gold": None}}})))
    assert "wins 30.0% of the comparisons with the one before it, ties half, and at most 40.0%" in str(
        reason("round-2/reward")
    )
    assert reason("round-2/reward", stop_when_worse=False) is None
    unknown["facts"]["policy"]["gold"] = gold
    judged.write_text(json.dumps(sealed(unknown)))
    file = run / "round-2/evaluate/samples.jsonl"
    before = [row["gold_policy"] for row in rows(run / "round-1/evaluate/samples.jsonl")]
    worse = [{**row, "gold_policy": gold - 0.5} for row, gold in zip(rows(file), before, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in worse))
    assert "the true reward fell by 0.500 [0." in str(reason("round-2/evaluate"))
    change = change_since_last_round(by_folder["round-2/evaluate"], stages, store)
    assert change is not None
    assert change["difference"] == pytest.approx(-0.5)


def test_a_page_is_drawn_where_a_models_folder_was_deleted(two_rounds: Path, tmp_path: Path) -> None:
    run = tmp_path / "x"
    shutil.copytree(two_rounds / "x", run, symlinks=True)
    shutil.rmtree(run / "round-1/reward/model")
    shutil.rmtree(run / "round-2/ppo/model")
    written = [str(card.parent.parent.relative_to(run)) for card in write_cards(run)]
    assert written == ["round-1/ppo", "round-2/reward"]


def test_without_a_true_reward_the_best_round_is_the_last_that_nobody_found_worse() -> None:
    def entry(number: int, win_rate: float | None, proxy: float | None = 1.0) -> dict[str, Any]:
        found = None if win_rate is None else {"win_rate_ci": [win_rate - 0.05, win_rate + 0.05]}
        return {"round": number, "hindsight": found, "policy": {"proxy": proxy, "gold": None}}

    assert _best([entry(1, 0.7), entry(2, 0.6), entry(3, None)]) == 3
    assert _best([entry(1, 0.7), entry(2, 0.3), entry(3, None, proxy=None)]) == 1
    assert _best([entry(1, 0.7), entry(2, 0.47), entry(3, None, proxy=None)]) == 2
    assert _best([entry(1, 0.2), entry(2, None, proxy=None)]) == 1, "there is no other"


def test_a_run_that_a_rule_stops_is_finished_and_says_why(two_rounds: Path, tmp_path: Path) -> None:
    run = again(two_rounds, tmp_path)
    for stage in ("sample", "select"):
        shutil.copytree(two_rounds / "x/round-2" / stage, run / "round-2" / stage)
    said = start(recipe(tmp_path, "rounds.min_fresh_accuracy=0.99"), run)
    assert said[-1].startswith("round-2: stopped. The reward model so far orders")
    assert not (run / "round-2/vote").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stopped"] == said[-1]
    last = summary["rounds"][-1]
    assert last["labels"]["fresh"] == 24
    assert last["policy"]["gold"] is None
    assert (run / "best").resolve() == (run / "round-1/ppo/model").resolve()
    assert "Round by round" in (run / "report.html").read_text()
