"""`rlhf blame` names the labels that were planted for a trait, and training without them undoes the trait."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf.data.rows import SIDES, assistant_turn, user_turn
from rlhf.data.traits import TRAITS
from rlhf.files import read_jsonl, write_jsonl
from rlhf.objectives.influence import pair_pull
from rlhf.pipeline import blame as blame_module
from rlhf.report.terminal import blame_lines
from rlhf.reward.denoise import flip_pair
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
    overrides = ["data.preferences=b/rest.jsonl", "data.test=x/round-0/data/data/test_pairs.jsonl", "data.leakage=drop"]
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


@pytest.mark.parametrize("unit", [1.0, 1e-200, 1e200])
def test_a_trait_may_have_any_unit(unit: float) -> None:
    """Squares of tiny numbers are 0 and of large ones infinite: influences were NaN, and the first pairs of the file blamed."""
    rows: list[Any] = [
        {"prompt": user_turn("x"), "chosen": assistant_turn("a" * (i + 1)), "rejected": assistant_turn("")}
        for i in range(3)
    ]
    differences = blame_module._trait_differences(rows, "f", lambda _, texts: [unit * len(text) for text in texts])
    expected = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) / (14 / 3) ** 0.5
    torch.testing.assert_close(differences, expected)


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


def test_a_label_is_blamed_as_it_was_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of a crowded prompt count less, and with `flip_rate` a label that the model is sure is wrong pulls hardly at all."""
    told = ["short", "a long answer", "a longer answer still", "an answer that is the longest of all"]
    rows: list[Any] = [
        {"prompt": user_turn(prompt), "chosen": assistant_turn(told[i % 3 + 1]), "rejected": assistant_turn(told[0])}
        for i, prompt in enumerate(["p", "p", "p", "q"])
    ]
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    differences = torch.tensor([0.5, -8.0, 1.0, 0.2]).double()

    # The first label was given the other way round, and corrected before it was trained on.
    given = [flip_pair(rows[0]), *rows[1:]]
    write_jsonl(tmp_path / "pairs.jsonl", given)

    def influence(name: str, **section: Any) -> dict[int, float]:
        reward = SimpleNamespace(**{"group_weight": None, "flip_rate": 0.0, **section})
        recipe, folder = SimpleNamespace(reward=reward), tmp_path / "round-1/reward"
        places = {"folder": folder, "pairs": tmp_path / "pairs.jsonl", "test_pairs": tmp_path / "test.jsonl"}
        context = SimpleNamespace(recipe=recipe, **places)
        monkeypatch.setattr(blame_module, "_trained", lambda _: context)
        monkeypatch.setattr(blame_module, "training_rows", lambda _: SimpleNamespace(rows=rows))
        monkeypatch.setattr(blame_module, "load_reward_model", lambda _: None)
        monkeypatch.setattr(blame_module, "_read", lambda *_: (features, differences))
        result = blame_module.blame(tmp_path, "length", tmp_path / name, share=0.25, say=lambda _: None)
        return {row["pair"]: row["influence"] for row in result["pairs"]}

    plain, balanced, robust = influence("a"), influence("b", group_weight="prompt"), influence("c", flip_rate=0.2)
    # Three pairs of one prompt share the weight that the one of the other has.
    assert [balanced[i] / plain[i] / (balanced[3] / plain[3]) for i in range(3)] == pytest.approx([1 / 3] * 3)
    one, zero = torch.ones(4).double(), torch.zeros(4).double()
    pulls = [pair_pull(differences, one, zero, one, flip_rate=rate) for rate in (0.2, 0.0)]
    assert [robust[i] / plain[i] for i in range(4)] == pytest.approx((pulls[0] / pulls[1]).tolist())
    assert abs(robust[1]) < 0.01 * abs(plain[1]), "of which the model is sure that it is wrong"
    (first,) = read_jsonl(tmp_path / "a/removed.jsonl")
    assert read_jsonl(tmp_path / "a/rest.jsonl") == [row for row in given if row != first], "labels as they were given"


def test_what_it_writes_can_be_trained_on_where_some_pairs_are_ties(run: Path) -> None:
    """A layout gives a confidence to ties alone; a file of pairs has one for all or for none."""
    rows = read_jsonl(run / "pairs.jsonl")[:60]
    arena = [
        {
            f"conversation_{x}": user_turn(row["prompt"]) + assistant_turn(row[side])
            for x, side in zip("ab", SIDES, strict=True)
        }
        | {"winner": winner}
        for row, winner in zip(rows, ["model_a", "model_b", "tie"] * 20, strict=True)
    ]
    write_jsonl(run / "arena.jsonl", arena)
    trained = rlhf("reward", "r.yaml", "--out", "ties", "data.preferences=arena.jsonl", cwd=run)
    assert trained.returncode == 0, trained.stderr[-2000:]
    blamed = rlhf("blame", "ties", "--feature", "length", "--out", "of-ties", cwd=run)
    assert blamed.returncode == 0, blamed.stderr[-2000:]
    rest = read_jsonl(run / "of-ties/rest.jsonl")
    assert {row["confidence"] for row in rest} == {0.5, 1.0}
    test = "data.test=ties/round-0/data/data/test_pairs.jsonl"
    checked = rlhf("check", "r.yaml", "data.preferences=of-ties/rest.jsonl", test, "data.leakage=drop", cwd=run)
    assert checked.returncode == 0, checked.stderr[-2000:]


def test_where_no_pair_pulls_the_score_up_that_is_said() -> None:
    """The strongest of those that pull it down were "of all that pulls it up 0 %"."""
    pair = {"prompt": "red", "chosen": "dog", "rejected": "cat"}
    facts = {
        "stage": "round-1/reward", "slope": -0.4, "slope_ci": None, "feature": "length", "removed": 2, "kept": 38,
        "influence_of_removed": 0.0, "pairs": [{**pair, "influence": -0.03}, {**pair, "influence": -0.05}], "test_pairs": "t.jsonl",
    }  # fmt: skip
    first, second, *_ = blame_lines(facts, Path("b"))
    assert first.endswith("the score falls by 0.40 with a usual difference in length (slope -0.40).")
    assert second == "No pair pulls it up; the 2 that pull it down least are taken out. The first:"
