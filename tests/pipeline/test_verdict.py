"""`rlhf verdict`: what a file says becomes a rate with its intervals, and what can't be is a sentence."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from rlhf import cli
from rlhf.errors import UserError
from rlhf.pipeline.verdict import read_verdicts, verdict


def written(tmp_path: Path, rows: list[object]) -> str:
    file = tmp_path / "verdicts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def verdicts(count: int, labelled: int, *, seed: int = 0) -> list[dict[str, object]]:
    """The first answer wins in 0.7 of the rows; the judge agrees in 0.9; the first rows, in random order, have labels."""
    rng = random.Random(seed)
    rows: list[dict[str, object]] = []
    for i in range(count):
        wins = rng.random() < 0.7
        says = wins if rng.random() < 0.9 else not wins
        label = {"label": "first" if wins else "second"} if i < labelled else {"label": ""}
        rows.append({"judge": "first" if says else "second", **label})
    return rows


def test_the_rate_and_what_it_rests_on(tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "verdict.json"
    result = verdict(written(tmp_path, verdicts(2000, 100)), out, say=said.append)
    assert result == json.loads(out.read_text())
    assert (result["labels"], result["rows"]) == (100, 2000)
    low, high = result["win_rate_ci"]
    assert low < 0.7 < high
    assert result["win_rate"] == pytest.approx(0.7, abs=0.07)
    people_low, people_high = result["people"]["rate_ci"]
    assert high - low < 0.75 * (people_high - people_low)
    any_low, any_high = result["win_rate_any_look_ci"]
    assert any_low < low < high < any_high, "looking as often as you like costs"
    assert said[0].startswith(f"The first answer wins {result['win_rate']:.3f} [{low:.3f}, {high:.3f}]: 2000 verdicts")
    assert "corrected by 100 labels of people" in said[0]
    assert said[2].startswith(f"The interval is {(high - low) / (people_high - people_low):.2f} times")
    assert "for these rows" in said[3]


def test_rows_of_one_prompt_are_taken_together(tmp_path: Path) -> None:
    said: list[str] = []
    rows = verdicts(400, 100)
    alone = verdict(written(tmp_path, rows), None, say=lambda _: None)
    named = [{**row, "prompt": [{"role": "user", "content": f"q{i % 20}"}]} for i, row in enumerate(rows)]
    together = verdict(written(tmp_path, named), None, say=said.append)
    assert said[0].startswith("400 rows have 20 prompts: the intervals for one look take rows of one prompt together")
    assert together["win_rate"] == pytest.approx(alone["win_rate"])
    assert together["win_rate_ci"] != alone["win_rate_ci"]
    other = verdict(
        written(tmp_path, [{**row, "prompt": f"q{i}"} for i, row in enumerate(rows)]), None, say=said.append
    )
    assert other == alone


def test_labels_that_balance_within_each_prompt_make_no_point(tmp_path: Path) -> None:
    """Every pair in both orders, labelled consistently: each prompt's labels add up to the same, and nothing is left to vary."""
    said: list[str] = []
    rows: list[dict[str, object]] = [
        {"judge": side, "label": side, "prompt": f"q{i}"} for i in range(10) for side in ("first", "second")
    ]
    rows += [{"judge": "first" if i % 2 else "second", "prompt": f"r{i}"} for i in range(100)]
    result = verdict(written(tmp_path, rows), None, say=said.append)
    assert result["people"]["rate"] == 0.5
    assert result["people"]["rate_ci"] is None
    assert any("those of every prompt together do" in line for line in said)


def test_all_forms_of_a_verdict(tmp_path: Path) -> None:
    rows = [
        {"judge": "first", "label": "tie"},
        {"judge": 0.25, "label": "second"},
        {"judge": " Tie ", "label": 1},
        {"judge": 1, "label": "skip"},
        {"judge": 0},
        {"judge": "second", "label": None},
    ]
    found = read_verdicts(written(tmp_path, rows))
    assert found.human == [0.5, 0.0, 1.0]
    assert found.judge == [1.0, 0.25, 0.5]
    assert found.judge_alone == [1.0, 0.0, 0.0]


def test_what_nought_and_one_mean_is_said(tmp_path: Path) -> None:
    """`rlhf label --import` takes 0 and 1 as places of answers; here they are probabilities."""
    rows = [{"judge": "first", "label": i % 2} for i in range(8)]
    for values, names in (
        (rows, "`label`"),
        ([{"judge": i % 2, "label": i % 2} for i in range(8)], "`judge` and `label`"),
        ([{"judge": "first", "label": 0.5}, *rows], None),
        (verdicts(20, 8), None),
    ):
        said: list[str] = []
        verdict(written(tmp_path, values), None, say=said.append)
        assert said[0].startswith(f"{names}: 1 is read as 'the first answer is better'") == (names is not None)


def test_labels_that_were_picked_are_said_to_be(tmp_path: Path) -> None:
    """People labelled what the judge called wins: no interval holds for that."""
    rows = verdicts(400, 0)
    wins = [row for row in rows if row["judge"] == "first"]
    for row in wins[:60]:
        row["label"] = "first"
    said: list[str] = []
    result = verdict(written(tmp_path, rows), None, say=said.append)
    assert result["draw_z"] > 3
    assert "no interval here holds" in said[0]


def test_labels_that_are_all_equal_make_no_certainty_at_any_look(tmp_path: Path) -> None:
    """20 labels, all wins, and a judge that agrees: the interval for any look still holds what 20 labels can't exclude."""
    rows = [{"judge": "first", "label": "first" if i < 20 else ""} for i in range(500)]
    said: list[str] = []
    result = verdict(written(tmp_path, rows), None, say=said.append)
    assert result["win_rate_ci"] is result["people"]["rate_ci"] is None, "no spread, no interval for one look"
    assert "All labels say the same" in said[2]
    low, high = result["win_rate_any_look_ci"]
    assert low < 0.8
    assert high == 1.0
    assert np.isfinite(result["win_rate"])


def test_bad_files_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 of its rows have a `label`; at least 3 are needed"):
        verdict(written(tmp_path, verdicts(50, 2)), None, say=print)
    rows = [*verdicts(10, 5), {"label": "first"}, {"judge": "first", "label": "left"}, {"judge": 1.5}, "text"]
    with pytest.raises(UserError) as error:
        verdict(written(tmp_path, rows), None, say=print)
    text = "\n".join(error.value.problems)
    assert "row 11 has no `judge`" in text
    assert "row 12: `label` is 'left'" in text
    with pytest.raises(UserError, match=r"row 11: `judge` is 1000\d+; it must"):
        verdict(written(tmp_path, [*verdicts(10, 5), {"judge": 10**400, "label": "first"}]), None, say=print)
    many = [{"judge": "left"}] * 25
    with pytest.raises(UserError) as error:
        verdict(written(tmp_path, many), None, say=print)
    assert len(error.value.problems) == 11
    assert error.value.problems[-1].endswith("15 more rows like these.")
    assert "row 11 has no `judge`, which is first, second, tie or a number from 0 to 1" in text
    assert "row 13: `judge` is 1.5; it must be first, second, tie or a number from 0 to 1" in text
    with pytest.raises(UserError):
        verdict(str(tmp_path / "nowhere.jsonl"), None, say=print)


def test_the_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = written(tmp_path, verdicts(300, 40))
    monkeypatch.setattr(sys, "argv", ["rlhf", "verdict", file, "--out", str(tmp_path / "v.json")])
    assert cli._exit_code() == 0
    assert "300 verdicts of the judge" in capsys.readouterr().out
    assert (tmp_path / "v.json").is_file()
    assert cli._exit_code() == 0, "with more labels the result is written anew"


@pytest.mark.fault("result files that are something else")
def test_peoples_labels_are_never_the_result(tmp_path: Path) -> None:
    file = Path(written(tmp_path, verdicts(30, 10)))
    before = file.read_bytes()
    with pytest.raises(UserError, match="is no earlier result of this command"):
        verdict(str(file), file, say=print)
    assert file.read_bytes() == before


def test_labels_that_are_sorted_have_no_interval_of_any_look(tmp_path: Path) -> None:
    """All first answers, then all second ones: no rate of the whole file fits what the first sixty say."""
    rows: list[object] = [{"judge": 0.5, "label": "first" if i < 100 else "second"} for i in range(200)]
    said: list[str] = []
    result = verdict(written(tmp_path, rows), tmp_path / "v.json", say=said.append)
    assert result["win_rate_any_look_ci"] is None
    assert json.loads((tmp_path / "v.json").read_text())["win_rate_any_look_ci"] is None
    assert said[-1].startswith("No rate is left that fits these labels in the order in which they stand")
    random.Random(0).shuffle(rows)
    low, high = verdict(written(tmp_path, rows), None, say=said.append)["win_rate_any_look_ci"]
    assert low <= 0.5 <= high


def test_labels_in_the_order_of_the_data_are_drawn_in_another(tmp_path: Path) -> None:
    """Two kinds of rows, one behind the other, half of each labelled: read in this order the interval misses the rate nearly always."""
    held = 0
    for seed in range(40):
        rng = random.Random(seed)
        wins = [rng.random() < (0.9 if i < 150 else 0.3) for i in range(300)]
        rows: list[object] = [
            {"judge": 0.5, "label": ("first" if win else "second") if rng.random() < 0.5 else ""} for win in wins
        ]
        said: list[str] = []
        interval = verdict(written(tmp_path, rows), None, say=said.append)["win_rate_any_look_ci"]
        held += interval is not None and interval[0] <= sum(wins) / 300 <= interval[1]
        assert "stand mixed" in said[0]
    assert held >= 34, "0.95 of 40 are 38; fewer than 34 have a chance of 0.003"
    said.clear()
    verdict(written(tmp_path, verdicts(100, 40)), None, say=said.append)
    assert not any("mixed" in sentence for sentence in said)
    skipped = verdicts(100, 40)
    skipped[10]["label"] = "skip"
    verdict(written(tmp_path, skipped), None, say=said.append)
    assert not any("mixed" in sentence for sentence in said), "who skips has seen the row in its turn"
    assert any(sentence.startswith("1 of the 40 rows that people saw were skipped") for sentence in said)


@pytest.mark.parametrize("by_prompt", [True, False])
def test_labels_that_are_given_prompt_by_prompt_have_no_interval_of_any_look(tmp_path: Path, by_prompt: bool) -> None:
    """50 prompts with ten rows each, all of a prompt alike: read with ten prompts labelled, the rate of all rows is seldom in it."""
    missed = refused = 0
    for seed in range(20):
        rng = random.Random(seed)
        wins = [rng.random() < 0.5 for _ in range(50)]
        order = [prompt for prompt in range(50) for _ in range(10)]
        if not by_prompt:
            rng.shuffle(order)
        rows: list[object] = [
            {
                "prompt": f"p{prompt}",
                "judge": 0.5,
                **({"label": "first" if wins[prompt] else "second"} if i < 100 else {}),
            }
            for i, prompt in enumerate(order)
        ]
        said: list[str] = []
        result = verdict(written(tmp_path, rows), None, say=said.append)
        interval, truth = result["win_rate_any_look_ci"], sum(wins) / 50
        refused += result["labelled_by_prompt"]
        assert result["labelled_by_prompt"] == any("prompt stand together more often" in sentence for sentence in said)
        missed += interval is not None and not interval[0] <= truth <= interval[1]
    assert refused == (20 if by_prompt else 0)
    assert missed <= 3, "0.05 of 20 is 1"
