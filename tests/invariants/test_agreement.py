"""KL agrees with evaluation: no alarm where the two are of one policy, an alarm where the reference moved."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.files import write_jsonl
from rlhf.invariants.agreement import kl_agrees
from rlhf.invariants.checks import CheckBook
from rlhf.pipeline.agreement import compare_kl
from rlhf.recipe import load_recipe


def answers(rng: random.Random, kl: float, count: int) -> list[float]:
    """k1 of an answer scatters with about the variance 2 KL, and has a tail."""
    return [rng.gauss(kl, (2 * kl) ** 0.5) + rng.expovariate(1) - 1 for _ in range(count)]


@pytest.mark.parametrize("rollouts", [2, 3, 5, 20])
@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize("growth", ["steady", "quadratic", "none"])
def test_no_false_alarm_while_the_kl_grows_as_it_may(rollouts: int, size: int, growth: str) -> None:
    rng = random.Random(0)
    true = {"steady": lambda i: 0.5 * i, "quadratic": lambda i: 0.05 * i * i, "none": lambda i: 0.1}[growth]
    alarms = 0
    for _ in range(300):
        rows = [answers(rng, true(i), size) for i in range(rollouts)]
        logged = [sum(row) / size for row in rows]
        alarms += not kl_agrees(logged, rows[-1], answers(rng, true(rollouts), 256)).held
    assert alarms == 0


def test_one_update_may_move_the_kl_however_many_answers_there_are() -> None:
    """Without scatter what is left of the bound is the change of the next rollout, here at quadratic growth."""
    logged = [0.0, 1.0, 4.0, 9.0]
    check = kl_agrees(logged, [9.0] * 8, [16.0] * 8)
    assert check.bound == pytest.approx(7 / 5 * 5)
    assert check.held
    assert not kl_agrees(logged, [9.0] * 8, [16.1] * 8).held


def test_a_reference_that_moves_with_the_policy_is_noted() -> None:
    """The figures of issue 25: the log ends at 0.95 where the evaluation measures 3.66."""
    rng = random.Random(0)
    last, evaluated = answers(rng, 0.95, 64), answers(rng, 3.66, 64)
    check = kl_agrees([0.0, 0.2, 0.5, 0.7, 0.95], last, evaluated)
    assert not check.held
    assert "the reference moved with the policy" in check.sentence


def context(tmp_path: Path, overrides: tuple[str, ...], number: int, said: list[str]) -> Any:
    (tmp_path / "r.yaml").write_text("name: x\nlab: {}\n")
    recipe = load_recipe(tmp_path / "r.yaml", overrides)
    return SimpleNamespace(
        recipe=recipe, round=number, say=said.append, parent=lambda role: tmp_path, start_name="the backbone"
    )


PREVIOUS = ("rounds.count=2", "rounds.reference=previous")


@pytest.mark.parametrize(
    ("overrides", "number", "reason"),
    [
        ((), 1, None),
        (PREVIOUS, 1, None),
        (("rounds.count=2",), 2, None),
        (PREVIOUS, 2, "the policy of the round before, the evaluation's is the backbone"),
        (("ppo.temperature=0.7",), 1, "a temperature of 0.7, the evaluation at 1"),
        (("sampling.temperature=0.7",), 1, None),
        (("sampling.temperature=0.7", "ppo.temperature=1"), 1, "a temperature of 1, the evaluation at 0.7"),
        (("ppo.reference_mixup=0.5",), 1, "moves the reference"),
    ],
)
def test_what_can_not_be_compared_is_said(
    tmp_path: Path, overrides: tuple[str, ...], number: int, reason: str | None
) -> None:
    rows: list[dict[str, object]] = [{"kl": 0.1 * i} for i in range(8)]
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "kl": 0.0}, {"resumed_from": 1}, {"step": 2, "kl": 0.3}])
    write_jsonl(tmp_path / "samples.jsonl", rows)
    said: list[str] = []
    book = CheckBook()
    compare_kl(context(tmp_path, overrides, number, said), rows, book)
    assert (list(book.entries) == ["KL agrees with evaluation"]) == (reason is None)
    assert [reason in line for line in said if reason] == [True] * bool(reason)


def test_answers_to_one_prompt_are_one_observation(tmp_path: Path) -> None:
    """Four equal answers to each of eight prompts say no more than one: the bound is that of eight answers."""
    kls = [0.1 * i for i in range(8)]
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "kl": 0.0}, {"step": 2, "kl": 0.3}])
    write_jsonl(tmp_path / "samples.jsonl", [{"kl": kl} for kl in kls])
    bounds = []
    for answers in (1, 4):
        book = CheckBook()
        rows = [{"kl": kl} for _ in range(answers) for kl in kls]
        compare_kl(context(tmp_path, (f"evaluate.answers={answers}",), 1, []), rows, book)
        bounds.append(book.entries["KL agrees with evaluation"]["bound"])
    assert bounds[0] == pytest.approx(bounds[1])


def test_one_rollout_says_nothing_and_a_difference_is_a_note(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"kl": 0.1 * i} for i in range(8)]
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "kl": 0.0}])
    write_jsonl(tmp_path / "samples.jsonl", rows)
    said: list[str] = []
    book = CheckBook()
    compare_kl(context(tmp_path, (), 1, said), rows, book)
    assert not book.entries
    assert "two logged rollouts" in said[0]
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "kl": 0.0}, {"step": 2, "kl": 0.3}])
    with pytest.warns(UserWarning, match="evaluate: check 'KL agrees with evaluation' failed: 9"):
        compare_kl(context(tmp_path, (), 1, said), [{"kl": 9.5 + 0.1 * i} for i in range(8)], book)
    assert not book.entries["KL agrees with evaluation"]["held"]
