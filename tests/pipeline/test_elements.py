"""Rankings and rated answers through the command: checked, planned, and refused; `test_members` trains them."""

import json
from pathlib import Path

import pytest

from rlhf.cost.sizes import Sizes
from rlhf.pipeline.estimate import training_elements
from rlhf.recipe.schema import RewardSection
from tests.command import rlhf
from tests.conftest import WORDS
from tests.pipeline.test_members import rows, write

ELEMENTS = ("plackett_luce", "kwise", "regression", "gated")


@pytest.mark.parametrize("objective", ELEMENTS)
def test_it_is_checked_and_planned(base_folder: Path, tmp_path: Path, objective: str) -> None:
    write(tmp_path, base_folder, objective)
    checked = rlhf("check", "r.yaml", "--show", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert f"objective: {objective}" in checked.stdout
    planned = rlhf("plan", "r.yaml", "--until", "reward", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "round-1/reward" in planned.stdout
    pairs = ", margin_scale: 2.0, flip_rate: 0.1, meta: true, extra: simcse, group_weight: prompt"
    write(tmp_path, base_folder, objective, more=pairs)
    refused = rlhf("reward", "r.yaml", "--out", "x", cwd=tmp_path)
    assert refused.returncode == 2
    assert not (tmp_path / "x").exists()
    assert "margin_scale is 2.0, which is not used" in refused.stderr


def test_what_pairs_have_and_rankings_have_not_is_refused(base_folder: Path, tmp_path: Path) -> None:
    write(tmp_path, base_folder, "kwise", more=", flip_rate: 0.1, meta: true, extra: simcse, group_weight: prompt")
    refused = rlhf("reward", "r.yaml", "--out", "x", cwd=tmp_path)
    assert refused.returncode == 2
    for key in ("flip_rate", "meta", "extra", "group_weight"):
        assert f"reward.{key}: it is for pairs, and kwise trains on rankings" in refused.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (", rating_scale: [0, 3]", "helpfulness is 4"),
        (", rating_scale: [3, 0]", "[3, 0] is no scale"),
        (", members: 2, use_peft: true, experts: weights", "regression trains on ratings"),
    ],
)
def test_bad_ratings_are_one_sentence(base_folder: Path, tmp_path: Path, more: str, sentence: str) -> None:
    write(tmp_path, base_folder, "regression", more=more)
    refused = rlhf("reward", "r.yaml", "--out", "x", cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert sentence in refused.stderr
    assert not (tmp_path / "x/round-1").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (", members: 2", "every member would have a gate of its own"),
        (", attributes: {helpfulness: 1, verbosity: 0}", "verbosity has weight 0"),
        ("", "a gate is fitted to pairs, and no prompt has two answers"),
    ],
)
def test_a_gate_that_can_not_be_is_one_sentence(base_folder: Path, tmp_path: Path, more: str, sentence: str) -> None:
    write(tmp_path, base_folder, "gated", more=more)
    if "attributes" in more:
        recipe = (tmp_path / "r.yaml").read_text().replace(", attributes: {helpfulness: 1.0, verbosity: -0.5}", "")
        (tmp_path / "r.yaml").write_text(recipe)
    alone = [row for i, row in enumerate(rows("gated")) if i % 3 == 0]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text('{"prompt": "name", "chosen": "yes", "rejected": "no"}\n', encoding="utf-8")
    refused = rlhf("reward", "r.yaml", "--out", "x", "data.test=test.jsonl", cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert sentence in refused.stderr
    assert not (tmp_path / "x/round-1").exists()


def test_ratings_without_pairs_train_and_are_tested_on_pairs_of_another_file(base_folder: Path, tmp_path: Path) -> None:
    """One answer a prompt: nothing to compare in training, and `data.test` says what is held out."""
    write(tmp_path, base_folder, "regression")
    alone = [row for i, row in enumerate(rows("regression")) if i % 3 == 0]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone), encoding="utf-8")
    refused = rlhf("reward", "r.yaml", "--out", "untested", cwd=tmp_path)
    assert refused.returncode == 2
    assert "data: nothing is left for test_pairs" in refused.stderr
    assert "name a file under data.test" in " ".join(refused.stderr.split())
    pairs = [{"prompt": f"name {word}", "chosen": "yes", "rejected": "no"} for word in WORDS]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    result = rlhf("reward", "r.yaml", "--out", "x", "data.test=test.jsonl", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    facts = json.loads((tmp_path / "x/round-1/reward/manifest.json").read_text())["facts"]
    assert facts["ratings"] == len(alone)
    assert facts["n"] == len(WORDS)
    assert not (tmp_path / "x/round-0/data/data/pairs.jsonl").exists()


def test_the_plan_counts_rankings_and_ratings() -> None:
    """100 pairs that make 20 rankings of 70 answers; labels of rounds are rankings of two; on a hub nothing is known of rankings."""
    rows = {"pairs": 100, "ratings": 30}
    sizes = Sizes(rows=rows, prompts=[], answers=[], demonstrations=[], rankings=20, ranked_answers=70)
    assert training_elements("bt", 100, sizes) == (100, 2.0)
    assert training_elements("plackett_luce", 100, sizes) == (20, 3.5)
    assert training_elements("kwise", 150, sizes) == (70, 3.5)
    assert training_elements("regression", 100, sizes) == (30, 1.0)
    unknown = Sizes(rows=rows, prompts=[], answers=[], demonstrations=[])
    assert training_elements("kwise", 100, unknown) == (100, 2.0)


def test_keys_of_other_objectives_know_nothing_of_ratings() -> None:
    """A finished run of an earlier version is not made again."""
    assert not {"attributes", "rating_scale"} & set(RewardSection().model_dump())
    assert RewardSection(objective="regression").ratings() == {
        "names": ("helpfulness", "correctness", "coherence", "complexity", "verbosity"), "low": 0.0, "high": 4.0
    }  # fmt: skip
