"""`bf16: auto` takes what is fast, whatever that is on the machine of these tests, and leaves every other value alone."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import RewardConfig

from rlhf.errors import UserError
from rlhf.pipeline import precision
from rlhf.pipeline.launch import read_launch
from rlhf.pipeline.plan import plan
from rlhf.pipeline.precision import (
    LAUNCHER,
    in_float32,
    kept_precision,
    precision_of_stage,
    resolve_bf16,
    warn_of_4_bit,
)
from rlhf.pipeline.run import run
from rlhf.pipeline.store import MANIFEST, read_record
from rlhf.pipeline.training import training_arguments
from rlhf.recipe import load_recipe
from tests.pipeline.small import RECIPE


@pytest.fixture(autouse=True)
def _forgets_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    precision._choice.cache_clear()
    precision._cost_of_4_bit.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(LAUNCHER, raising=False)


def _machine_is_faster_in(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "measure", lambda asked: 1.0 if asked == dtype else 8.0)
    precision._choice.cache_clear()


@pytest.mark.parametrize(("plain", "half", "expected"), [(7.0, 1.0, True), (1.0, 8.0, False), (1.1, 1.0, False)])
def test_the_faster_precision_is_taken_and_said(
    plain: float, half: float, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times = {torch.float32: plain, torch.bfloat16: half}
    monkeypatch.setattr(precision, "measure", times.__getitem__)
    with pytest.warns(
        UserWarning, match=rf"bf16: auto is {str(expected).lower()}: .* {1000 * half:.1f} ms in bfloat16"
    ):
        args = training_arguments(RewardConfig, {"bf16": "auto"}, tmp_path, 0)
    assert args.bf16 is expected


def test_what_a_recipe_decides_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "measure", lambda _: pytest.fail("measured"))
    settings: list[dict[str, Any]] = [{}, {"bf16": False}, {"bf16": True, "learning_rate": 1.0}]
    for given in settings:
        assert resolve_bf16(given) == given
    assert resolve_bf16({"bf16": "auto", "fp16": True}) == {"fp16": True}, (
        "of two that can't both be, the one that was chosen"
    )


def test_a_layer_is_timed_in_both() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert 0 < precision.measure(dtype) < 60


def test_4_bit_weights_on_a_cpu_warn_with_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cost_of_4_bit", lambda: 12.34)
    with pytest.warns(
        UserWarning, match=r"takes 12\.3 times as long as in float32 \(measured\); they save memory, not time\.$"
    ):
        warn_of_4_bit(True)
    monkeypatch.setattr(precision, "_cost_of_4_bit", lambda: 0.5)
    with pytest.warns(UserWarning, match=r"takes 0\.5 times as long as in float32 \(measured\)\.$"):
        warn_of_4_bit(True)
    monkeypatch.setattr(precision, "_cost_of_4_bit", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_4_bit(True)
        warn_of_4_bit(False)


def test_a_recipe_may_say_auto_and_its_keys_do_not_depend_on_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    recipe = load_recipe(file, ["reward.bf16=auto"])
    assert recipe.resolved()["reward"]["bf16"] == "auto"
    (reward,) = (stage for stage in plan(recipe) if stage.name == "reward")
    assert reward.settings["bf16"] == "auto"
    for wrong in ("reward.bf16=automatic", "reward.fp16=auto"):
        with pytest.raises(UserError, match="must be"):
            load_recipe(file, [wrong])


def test_a_stage_goes_on_in_the_precision_that_it_began_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A resumed PPO changed its precision in the middle, and "reference fixed" stopped it for good."""
    auto, checkpoints = {"bf16": "auto", "learning_rate": 1.0}, tmp_path / "checkpoints"
    assert kept_precision(checkpoints) == {}
    _machine_is_faster_in(torch.bfloat16, monkeypatch)
    with pytest.warns(UserWarning, match="bf16: auto is true"):
        assert precision_of_stage(auto, checkpoints, decides=True) == {"bf16": True, "learning_rate": 1.0}
    _machine_is_faster_in(torch.float32, monkeypatch)
    with pytest.warns(UserWarning, match="began in bfloat16 and goes on in it, though float32 is faster here"):
        assert precision_of_stage(auto, checkpoints, decides=True)["bf16"] is True
    assert kept_precision(checkpoints) == {"bf16": True}

    # Another process takes what the first one kept, whatever it would measure; and what a recipe says is kept nowhere.
    monkeypatch.setattr(precision, "measure", lambda _: pytest.fail("measured"))
    precision._choice.cache_clear()
    assert precision_of_stage(auto, checkpoints, decides=False)["bf16"] is True
    assert precision_of_stage({"bf16": False}, tmp_path / "other", decides=True) == {"bf16": False}
    assert not (tmp_path / "other").exists()


def test_another_process_waits_for_the_one_that_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(precision, "measure", lambda _: pytest.fail("measured"))
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            (tmp_path / precision.PRECISION).write_text('{"bf16": true}')

    monkeypatch.setattr(precision.time, "sleep", nap)
    assert precision_of_stage({"bf16": "auto"}, tmp_path, decides=False) == {"bf16": True}
    assert len(naps) == 3


@pytest.mark.parametrize(
    ("settings", "launched", "expected"),
    [
        ({}, "bf16", {"bf16": True}),
        ({"bf16": "auto"}, "bf16", {"bf16": True}),
        ({"bf16": "auto"}, "fp16", {"fp16": True}),
        ({"bf16": True}, "fp16", {"bf16": True}),
        ({"fp16": True}, "bf16", {"fp16": True}),
        ({"bf16": False}, "no", {"bf16": False}),
        ({}, "no", {}),
    ],
)
def test_a_launcher_decides_where_the_recipe_says_nothing(
    settings: dict[str, Any], launched: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It did so in silence: `bf16: auto is false` was said, `args.bf16` was False, and training was in bfloat16."""
    monkeypatch.setattr(precision, "measure", lambda _: pytest.fail("measured"))
    monkeypatch.setenv(LAUNCHER, launched)
    assert resolve_bf16(settings) == expected


def test_a_launchers_fp16_is_kept_for_the_next_model_and_the_other_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`bf16: false` was kept, and whoever read that was told that the recipe contradicts the launcher."""
    monkeypatch.setattr(precision, "measure", lambda _: pytest.fail("measured"))
    monkeypatch.setenv(LAUNCHER, "fp16")
    for decides in (True, True, False):
        settings = precision_of_stage({"bf16": "auto"}, tmp_path, decides=decides)
        assert settings == resolve_bf16(settings) == {"fp16": True}
    assert kept_precision(tmp_path) == {"fp16": True}


def test_a_launcher_that_contradicts_the_recipe_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(LAUNCHER, "bf16")
    with pytest.raises(UserError, match=r"bf16: false .* mixed_precision: bf16, which would win"):
        training_arguments(RewardConfig, {"bf16": False}, tmp_path, 0)
    assert training_arguments(RewardConfig, {}, tmp_path, 0).bf16


def test_both_are_timed_in_turn_and_one_bad_moment_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {torch.float32: iter([9.0, 2.0, 3.0] * 9), torch.bfloat16: iter([50.0, 1.0, 60.0] * 9)}
    monkeypatch.setattr(precision, "measure", lambda dtype: next(times[dtype]))
    assert precision.measure_both() == (2.0, 1.0)
    monkeypatch.setattr(precision, "ENOUGH_SECONDS", -1.0)
    times = {torch.float32: iter([9.0, 2.0]), torch.bfloat16: iter([50.0, 1.0])}
    assert precision.measure_both() == (9.0, 50.0), "a slow machine is not timed eight times"


def test_voters_on_a_trunk_compute_in_float32_and_a_precision_of_theirs_is_refused(tmp_path: Path) -> None:
    assert in_float32({"bf16": "auto", "fp16": True, "tf32": True}) == {"tf32": True}
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    voting = ["reward.objective=posterior", "vote.members=5", "vote.trunk=1"]
    assert load_recipe(file, voting).vote.trunk == 1
    with pytest.raises(UserError, match=r"vote\.bf16.*voters on a shared trunk"):
        load_recipe(file, [*voting, "vote.bf16=true"])


def test_a_manifest_says_what_auto_came_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _machine_is_faster_in(torch.bfloat16, monkeypatch)
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    recipe = load_recipe(file, ["sft.bf16=auto", "lab.demonstrations=100"])
    with pytest.warns(UserWarning, match="bf16: auto is true"):
        run(recipe, tmp_path / "run", until="sft", say=lambda _: None)
    manifest = read_record(tmp_path / "run/round-0/sft" / MANIFEST)
    assert manifest is not None
    assert manifest["facts"]["bf16"] is True
    assert manifest["settings"]["bf16"] == "auto"


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x00"])
def test_a_damaged_note_beside_checkpoints_is_a_sentence(tmp_path: Path, content: str) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for name in ("precision.json", "launch.json"):
        (checkpoints / name).write_text(content)
    for read in (kept_precision, read_launch, lambda place: precision_of_stage({"bf16": "auto"}, place, decides=True)):
        with pytest.raises(UserError, match=f"cut off or damaged; delete {tmp_path} to make the stage again"):
            read(checkpoints)
