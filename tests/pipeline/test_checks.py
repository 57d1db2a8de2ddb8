"""What is refused before anything is made."""

from pathlib import Path

import pytest
from trl import RewardConfig

from rlhf.errors import UserError
from rlhf.pipeline.checks import check_arguments, check_recipe_file, recipe_text
from rlhf.recipe import load_recipe


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_made(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: x\nlab: {}\nreward: {report_to: neptune}\n")
    with pytest.raises(UserError, match=r"reward.report_to: neptune is not installed \(pip install neptune\)"):
        check_arguments(load_recipe(file))


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
