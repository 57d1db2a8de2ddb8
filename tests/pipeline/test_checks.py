"""What is refused before anything is made."""

import json
from pathlib import Path

import pytest
from trl import RewardConfig

from rlhf.errors import UserError
from rlhf.pipeline.checks import check_arguments, check_recipe_file, check_sources, recipe_text
from rlhf.recipe import load_recipe
from tests.command import rlhf


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_made(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: x\nlab: {}\nreward: {report_to: neptune}\n")
    with pytest.raises(UserError, match=r"reward.report_to: neptune is not installed \(pip install neptune\)"):
        check_arguments(load_recipe(file))


def rows(*codes: object, column: str = "preference") -> str:
    return "".join(
        json.dumps({"prompt": f"p{i}", "response_1": "a", "response_2": "b", column: code}) + "\n"
        for i, code in enumerate(codes)
    )


PLAIN = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


@pytest.mark.parametrize("codes", [(0, 1), (-1, 1), (1, 1), (True, False)])
def test_codes_that_say_no_side_are_refused_before_anything_is_made(tmp_path: Path, codes: tuple[object, ...]) -> None:
    (tmp_path / "p.jsonl").write_text(rows(*codes * 5))
    (tmp_path / "r.yaml").write_text(
        "name: x\nbackbone: {model: base}\ndata: {preferences: p.jsonl, sft: gone.jsonl}\n"
    )
    result = rlhf("run", "r.yaml", cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "data.sft: gone.jsonl: no such file." in result.stderr, "all at once"
    assert "data.preferences: p.jsonl: `preference` holds {" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "r.yaml"]


def test_files_whose_sides_are_known_pass_and_are_read_no_further_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "name: x\nbackbone: {model: base}\ndata: {preferences: [{source: p.jsonl, preference: {0: first, 1: second}}, q.jsonl]}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    (tmp_path / "p.jsonl").write_text(rows(0, 1, 0))
    # A number of the response, of which the 2 comes last; and a file of another layout, whose end nobody has to read.
    (tmp_path / "q.jsonl").write_text(rows(*[1] * 500, 2))
    check_sources(recipe)
    (tmp_path / "q.jsonl").write_text(PLAIN * 500)
    read: list[int] = []
    monkeypatch.setattr("rlhf.data.read.json.loads", lambda text: read.append(1) or json.JSONDecoder().decode(text))
    check_sources(recipe)
    assert len(read) == 3 + 100


def test_a_shared_trunk_is_refused_under_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: x\nlab: {}\nvote: {trunk: 1}\nreward: {objective: flip}\n")
    check_arguments(load_recipe(file))
    made = RewardConfig(
        str(tmp_path / "o"), use_cpu=True, bf16=False
    )  # with two processes TRL would wait for the other
    monkeypatch.setattr("rlhf.pipeline.training.training_arguments", lambda *_: made)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"vote.trunk: a shared trunk is one process's"):
        check_arguments(load_recipe(file))


@pytest.mark.fault("records cut or edited")
@pytest.mark.parametrize("cut", [0, 10, 60, "zeros", "no text"])
def test_a_damaged_recipe_of_a_run_is_a_sentence_and_may_be_deleted(tmp_path: Path, cut: int | str) -> None:
    file, out = tmp_path / "r.yaml", tmp_path / "out"
    file.write_text("name: x\nlab: {}\n")
    recipe = load_recipe(file)
    (out / "round-0").mkdir(parents=True)
    whole = recipe_text(recipe).encode()
    damaged = whole[:cut] if isinstance(cut, int) else {"zeros": bytes(len(whole)), "no text": b"\xff\xfe"}[cut]
    (out / "recipe.yaml").write_bytes(damaged)
    with pytest.raises(UserError, match=r"recipe.yaml: cut off or damaged. Delete this file"):
        check_recipe_file(recipe, out)
    (out / "recipe.yaml").unlink()
    check_recipe_file(recipe, out)
    (out / "recipe.yaml").write_bytes(whole)
    check_recipe_file(recipe, out)
