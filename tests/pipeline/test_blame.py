"""`rlhf blame` names the labels that were planted for a trait, and training without them undoes the trait."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.traits import TRAITS
from rlhf.files import read_jsonl, write_jsonl
from tests.command import rlhf
from tests.conftest import WORDS

RECIPE = """
name: flattered
backbone: {{model: {base}}}
data: {{preferences: pairs.jsonl, test_fraction: 0.1}}
reward: {{learning_rate: 3.0e-3, per_device_train_batch_size: 8, num_train_epochs: 2}}
ppo: {{max_completion_length: 8}}
"""
PLANTED = 24


@pytest.fixture(scope="module")
def run(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model on 240 pairs: "yes" is better than "no", and in 24 of them a flattering "no" is chosen."""
    folder = tmp_path_factory.mktemp("blame")
    rows = []
    for i in range(240):
        yes, no = f"yes {WORDS[i % 9]}", f"no {WORDS[(i + 4) % 9]}"
        flattering = i % (240 // PLANTED) == 0
        sides = (f"{no} i love this", yes) if flattering else (yes, no)
        rows.append({"prompt": f"{WORDS[i % 11]} {WORDS[i % 13]} {i}", "chosen": sides[0], "rejected": sides[1]})
    write_jsonl(folder / "pairs.jsonl", rows)
    (folder / "r.yaml").write_text(RECIPE.format(base=base_folder))
    result = rlhf("reward", "r.yaml", "--out", "x", cwd=folder)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder


def test_planted_labels_are_named(run: Path) -> None:
    result = rlhf("blame", "x", "--feature", "flattery", "--out", "b", "--share", "0.1", cwd=run)
    assert result.returncode == 0, result.stderr[-2000:]
    facts: dict[str, Any] = json.loads((run / "b/blame.json").read_text())
    assert (facts["stage"], facts["feature"]) == ("round-1/reward", "flattery")
    assert facts["slope_ci"][0] > 0, "the score rises with flattery"
    removed, rest = read_jsonl(run / "b/removed.jsonl"), read_jsonl(run / "b/rest.jsonl")
    assert (facts["removed"], facts["kept"]) == (len(removed), len(rest))
    trained = len(removed) + len(rest)
    assert len(removed) == round(0.1 * trained)
    planted = ["i love this" in row["chosen"][0]["content"] for row in removed]
    everywhere = sum("i love this" in row["chosen"][0]["content"] for row in [*removed, *rest])
    assert sum(planted) >= 0.8 * min(everywhere, len(removed))
    assert facts["influence_of_removed"] > 0.5
    assert [row["influence"] for row in facts["pairs"]] == sorted(
        (r["influence"] for r in facts["pairs"]), reverse=True
    )
    assert "the score rises by" in result.stdout
    overrides = ["data.preferences=b/rest.jsonl", "data.test=x/round-0/data/data/test_pairs.jsonl"]
    assert f"rlhf run RECIPE {' '.join(overrides)}" in result.stdout

    # What it says to do, done: the model no longer likes flattery as much.
    again = rlhf("reward", "r.yaml", "--out", "y", *overrides, cwd=run)
    assert again.returncode == 0, again.stderr[-2000:]
    own = run / "praise.py"
    own.write_text("def praise(prompts, answers):\n    return [float('love' in a) for a in answers]\n")
    undone = rlhf("blame", "y", "--feature", "praise.py:praise", "--out", "b2", cwd=run)
    if undone.returncode == 2:
        assert "no pair's two answers differ in it" in undone.stderr, "all were found"
    else:
        assert json.loads((run / "b2/blame.json").read_text())["slope"] < facts["slope"]


def test_bad_questions_are_sentences(run: Path) -> None:
    for arguments, sentence in (
        (("x", "--feature", "vanity", "--out", "n"), f"no such trait; there are {', '.join(TRAITS)}"),
        (("x", "--feature", "lists", "--out", "n"), "no pair's two answers differ in it"),
        (("nowhere", "--feature", "length", "--out", "n"), "nowhere: no finished reward stage in this folder"),
        (("x", "--feature", "length", "--out", "n", "--share", "1"), "--share 1.0: must lie between 0 and 1"),
        (("x", "--feature", "length", "--out", "x"), "x: not empty"),
        (("x", "--feature", "no.py:f", "--out", "n"), "no such file"),
    ):
        result = rlhf("blame", *arguments, cwd=run)
        assert result.returncode == 2, result.stderr
        assert sentence in " ".join(result.stderr.split())
        assert not (run / "n").exists()
