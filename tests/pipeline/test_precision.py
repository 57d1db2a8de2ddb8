"""`bf16: auto` takes what is fast, whatever that is on the machine of these tests, and leaves every other value alone."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import RewardConfig

from rlhf.errors import UserError
from rlhf.pipeline import precision
from rlhf.pipeline.plan import plan
from rlhf.pipeline.precision import resolve_bf16, warn_of_4_bit
from rlhf.pipeline.training import training_arguments
from rlhf.recipe import load_recipe
from tests.pipeline.small import RECIPE


@pytest.fixture(autouse=True)
def _forgets_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    precision._choice.cache_clear()
    precision._cost_of_4_bit.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


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


def test_a_layer_is_timed_in_both() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert 0 < precision.measure(dtype) < 60


def test_4_bit_weights_on_a_cpu_warn_with_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cost_of_4_bit", lambda: 12.34)
    with pytest.warns(UserWarning, match=r"takes 12\.3 times as long as in float32 \(measured\)"):
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
