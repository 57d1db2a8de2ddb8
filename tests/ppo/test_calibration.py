"""Values on the line that takes them nearest to the returns, before advantages are made of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.objectives.advantage import nearest_line
from rlhf.ppo import experience
from tests.ppo.test_ppo import make


def slope(values: torch.Tensor, returns: torch.Tensor) -> float:
    return float(nearest_line(*(x.var(correction=0) for x in (values, returns, values + returns))))


def test_slopes_that_are_known() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0, -1.0], dtype=torch.float64)
    assert slope(returns, returns) == pytest.approx(1)
    assert slope(4 * returns - 7, returns) == pytest.approx(0.25)
    assert slope(returns / 4, returns) == 1, "a timid critic is not made bolder: its errors would grow with it"
    assert slope(-returns, returns) == 0, "a critic that is worse than a constant gives way to one"
    assert slope(torch.full_like(returns, 3.0), returns) == 0
    noise = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    values = returns + noise
    assert slope(values, returns) == pytest.approx(np.polyfit(values, returns, 1)[0])


def caught(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, ...]]:
    """The rewards, values and masks of which a trainer makes advantages."""
    seen: list[tuple[torch.Tensor, ...]] = []
    original = experience.generalized_advantage

    def watching(rewards: Any, values: Any, mask: Any, *, gamma: float, lam: float) -> Any:
        seen.append((rewards.clone(), values.clone(), mask.clone(), torch.tensor(lam)))
        return original(rewards, values, mask, gamma=gamma, lam=lam)

    monkeypatch.setattr(experience, "generalized_advantage", watching)
    return seen


@pytest.mark.parametrize("boldness", [1.0, 0.25])
def test_advantages_are_made_of_the_nearest_line(
    boldness: float,
    base_folder: Path,
    reward_folder: Path,
    cpu_arguments: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fitted by numpy on the plain sums of later rewards; the unit of the critic's values makes no difference."""
    settings = {"missing_eos_penalty": None, "calibrate_values": True}
    trainer, _ = make(base_folder, str(reward_folder), cpu_arguments, **settings)
    container = trainer.accelerator.unwrap_model(trainer.model)
    container.value_std *= boldness
    seen = caught(trainer, monkeypatch)
    rollout = trainer.rollout(trainer.prompts_of(0))
    rewards, baseline, mask, lam = seen[-1]
    assert float(lam) == pytest.approx(trainer.args.lam)
    keep = mask.bool()
    later = torch.where(keep, rewards, torch.zeros_like(rewards)).flip(1).cumsum(1).flip(1)
    found, offset = np.polyfit(rollout.values_old[keep].double(), later[keep].double(), 1)
    if not 0 <= found <= 1:
        found = min(max(found, 0.0), 1.0)
        offset = float(later[keep].mean() - found * rollout.values_old[keep].mean())
    np.testing.assert_allclose(baseline[keep], found * rollout.values_old[keep] + offset, atol=1e-4)
    assert trainer.metrics.take()["value_slope"] == pytest.approx(found, abs=1e-4)


def test_without_it_values_are_the_critics(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = make(base_folder, str(reward_folder), cpu_arguments)
    seen = caught(trainer, monkeypatch)
    rollout = trainer.rollout(trainer.prompts_of(0))
    assert len(seen) == 1
    assert torch.equal(seen[0][1], rollout.values_old)
    assert "value_slope" not in trainer.metrics.take()


def test_a_critic_that_knows_nothing_costs_no_variance(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of wild values the raw advantages are mostly the critic's errors; calibrated, the returns never vary less than they."""
    spread = {}
    for calibrate in (False, True):
        settings = {"calibrate_values": calibrate, "whiten_advantages": False, "lam": 1.0}
        trainer, _ = make(base_folder, str(reward_folder), cpu_arguments, **settings)
        trainer.accelerator.unwrap_model(trainer.model).value_std *= 0.02
        seen = caught(trainer, monkeypatch)
        rollout = trainer.rollout(trainer.prompts_of(0))
        keep = rollout.response_mask.bool()
        rewards = torch.where(keep, seen[-1][0], torch.zeros_like(seen[-1][0]))
        returns = rewards.flip(1).cumsum(1).flip(1)[keep]
        spread[calibrate] = float(rollout.advantages[keep].var() / returns.var())
    assert spread[False] > 10
    assert spread[True] <= 1 + 1e-5
