"""Verdicts against labels: counts by hand on planted log-odds, and the JSON and sentence of `rlhf evaluate --verdicts`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rlhf.cli import app
from rlhf.data.rows import Pair, assistant_turn, user_turn
from rlhf.errors import UserError
from rlhf.evaluation.verdicts import compare_pairs, verdict_report
from rlhf.models.verdicts import Verdicts, load_verdict_model
from rlhf.objectives.verdicts import TwoOrders
from tests.conftest import PROMPTS, WORDS


def pair(i: int) -> Pair:
    words = f"yes {WORDS[i % 9]}", f"no {WORDS[i % 7]}"
    return {"prompt": user_turn(f"list {i}"), "chosen": assistant_turn(words[0]), "rejected": assistant_turn(words[1])}


def test_counts_are_those_made_by_hand() -> None:
    """Six pairs: right and firm, right and turned, wrong and firm, wrong and turned the other way, too long, right and firm."""
    log_odds, bias = torch.tensor([2.0, 0.5, -2.0, -0.5, 0.0, 2.0]), torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0, 1.0])
    fits, share = log_odds != 0, torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0, 0.5])
    report = verdict_report("m", Verdicts(fits, TwoOrders(log_odds, bias), share), [pair(i) for i in range(6)])
    assert (report["n"], report["ties"], report["too_long"]) == (6, 0, 1)
    assert report["accuracy"] == pytest.approx(3 / 6), "what is too long counts as wrong"
    # Of the five verdicts that there are, letters of both orders, bias ± log-odds: AB, AA, BA, BB, AB.
    assert report["turned"] == pytest.approx(2 / 5)
    assert report["says_a"] == pytest.approx(5 / 10)
    assert report["bias"] == pytest.approx(3 / 5)
    assert report["letter_share"] == pytest.approx(0.5)


def test_calibration_is_of_the_verdicts_that_were_given() -> None:
    """Sure by 0.731 (log-odds of 1) and right in 731 of 1,000; as many more pairs are too long, of which nothing was said."""
    log_odds = torch.cat([torch.ones(731), -torch.ones(269), torch.zeros(1000)])
    fits = torch.arange(2000) < 1000
    verdicts = Verdicts(fits, TwoOrders(log_odds, torch.zeros(2000)), torch.ones(2000))
    report = verdict_report("m", verdicts, [pair(i) for i in range(2000)])
    assert report["ece"] == pytest.approx(0, abs=1e-3)
    assert report["accuracy"] == pytest.approx(0.3655)


def test_calibration_takes_labels_as_sure_as_they_are_and_a_tie_for_half() -> None:
    """A judge that says the label's own probability is calibrated, one that is twice as sure is not; a tie is right half the time."""
    confidence = torch.linspace(0.55, 0.95, 400)
    rows: list[Any] = [{**pair(i), "confidence": p} for i, p in enumerate(confidence.tolist())]
    exact = confidence.logit()

    def ece(log_odds: torch.Tensor, of: list[Any]) -> float:
        count = len(of)
        verdicts = Verdicts(torch.ones(count).bool(), TwoOrders(log_odds, torch.zeros(count)), torch.ones(count))
        report: float = verdict_report("m", verdicts, of)["ece"]
        return report

    assert ece(exact, rows) == pytest.approx(0, abs=1e-6)
    assert ece(-exact, rows) == pytest.approx(2 * (confidence.mean().item() - 0.5), abs=1e-6), (
        "the other answers as surely"
    )
    assert ece(2 * exact, rows) > 0.1
    assert ece(torch.zeros(50), [pair(i) for i in range(50)]) == pytest.approx(0, abs=1e-6)


def test_a_model_that_no_pair_fits_in_is_refused() -> None:
    nothing = torch.zeros(2)
    with pytest.raises(UserError, match=r"^m: none of the 2 pairs fits in its context"):
        verdict_report("m", Verdicts(nothing.bool(), TwoOrders(nothing, nothing), nothing), [pair(i) for i in range(2)])


def test_a_model_that_no_pair_fits_in_is_refused_before_anything_is_scored(
    reward_folder: Path, verdict_folder: Path, tmp_path: Path
) -> None:
    """It was said after every reward model had scored everything, and their figures were lost with it."""
    file, out = tmp_path / "pairs.jsonl", tmp_path / "e.json"
    long = " ".join(WORDS * 40)
    rows = [{"prompt": p, "chosen": f"{long} yes", "rejected": long} for p in PROMPTS[:8]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["evaluate", str(reward_folder), str(file), "--verdicts", str(verdict_folder), "--out", str(out)]
    outcome = CliRunner().invoke(app, arguments)
    assert isinstance(outcome.exception, UserError)
    assert "none of the 8 pairs fits in its context" in str(outcome.exception)
    assert "scored with" not in outcome.output


def test_evaluate_has_verdicts_beside_the_models(reward_folder: Path, verdict_folder: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": p, "chosen": f"yes {WORDS[i % 9]}", "rejected": f"no {i}"} for i, p in enumerate(PROMPTS[:8])
    ]
    file, out = tmp_path / "pairs.jsonl", tmp_path / "e.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["evaluate", str(reward_folder), str(file), "--verdicts", str(verdict_folder), "--out", str(out)]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    report = json.loads(out.read_text())["data"]["pairs"]
    pairs: list[Pair] = [
        {"prompt": r["prompt"], "chosen": assistant_turn(r["chosen"]), "rejected": assistant_turn(r["rejected"])}
        for r in rows
    ]
    verdicts = compare_pairs(load_verdict_model(str(verdict_folder)), pairs)
    right = (verdicts.orders.log_odds > 0).float().mean().item()
    assert report["verdicts"]["accuracy"] == pytest.approx(right)
    assert report["verdicts"]["difference"] == pytest.approx(right - report["accuracy"])
    shown = " ".join(outcome.output.split())
    assert f"verdicts of {verdict_folder}: accuracy {right:.3f}" in shown.replace("\n", "")
    assert "of the verdicts turn with the order" in shown
    assert "verdicts that turn with the order" in out.with_suffix(".html").read_text()


def test_a_model_that_gives_no_verdicts_is_told_before_anything_is_scored(
    reward_folder: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "pairs.jsonl", tmp_path / "e.json"
    file.write_text(json.dumps({"prompt": PROMPTS[0], "chosen": "yes", "rejected": "no"}) + "\n")
    arguments = ["evaluate", str(reward_folder), str(file), "--verdicts", str(encoder_folder), "--out", str(out)]
    outcome = CliRunner().invoke(app, arguments)
    assert isinstance(outcome.exception, UserError)
    assert not out.exists()
