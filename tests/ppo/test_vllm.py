"""Rollouts by another engine, with a stand-in for vLLM: when it gets the weights, what it is asked, how its tokens count."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from rlhf.errors import TrainingError, UserError
from rlhf.models.generate import generate, pad_left
from rlhf.models.logprobs import response_logprobs
from rlhf.objectives.ppo import truncated_importance
from rlhf.ppo import vllm
from tests.ppo.test_ppo import PROMPTS, make


class Engine:
    """TRL's interface on the policy itself; says of every token that it was e^`shift` times less likely than it was."""

    shift: ClassVar[float] = 0.0
    broken: ClassVar[str | None] = None
    made: ClassVar[list["Engine"]] = []

    def __init__(self, model: Any, processing_class: Any, **settings: Any):
        self.model, self.tokenizer, self.settings = model, processing_class, settings
        self.syncs, self.asked = 0, list[list[int]]()
        type(self).made.append(self)

    def sync_weights(self) -> None:
        self.syncs += 1

    def generate(self, prompts: list[list[int]], images: None, num_generations: int) -> tuple[Any, ...]:
        assert images is None
        assert num_generations == 1
        assert self.syncs > 0
        self.asked += prompts
        ids, mask = pad_left(prompts, self.tokenizer.pad_token_id)
        texts = self.tokenizer.batch_decode([i[m.bool()] for i, m in zip(ids, mask, strict=True)])
        self.model.eval()
        found = generate(self.model, self.tokenizer, texts, max_new_tokens=self.settings["max_completion_length"])
        keep = found.response_mask.bool()
        both = torch.cat([ids, found.response_ids], dim=1), torch.cat([mask, found.response_mask], dim=1)
        with torch.no_grad():
            said = response_logprobs(self.model, *both, keep.shape[1], 1.0) - self.shift
        answers = [row[k].tolist() for row, k in zip(found.response_ids, keep, strict=True)]
        logprobs = [[[x] for x in row[k].tolist()] for row, k in zip(said, keep, strict=True)]
        if self.broken == "late":  # it goes on behind the end token
            more = [[9, 8] if has_ended else [] for has_ended in found.ended]
            answers = [answer + rest for answer, rest in zip(answers, more, strict=True)]
            logprobs = [row + [[-9.0]] * len(rest) for row, rest in zip(logprobs, more, strict=True)]
        if self.broken == "empty":
            answers[0], logprobs[0] = [], []
        return prompts, answers, None if self.broken == "silent" else logprobs, None


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    monkeypatch.setattr(vllm, "vllm_generation", lambda merged_weights: Engine)
    Engine.shift, Engine.broken, Engine.made = 0.0, None, []
    return Engine


def test_an_engine_that_is_the_policy_changes_nothing(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    trainer, rows = make(base_folder, str(reward_folder), cpu_arguments, use_vllm=True)
    rollout = trainer.rollout(trainer.prompts_of(0))
    keep = rollout.response_mask.bool()
    torch.testing.assert_close(rollout.sampler_weights[keep], torch.ones(int(keep.sum())), atol=1e-4, rtol=0)
    assert rollout.logprobs_old[keep].max() < 0
    special, end = set(trainer.processing_class.all_special_ids), trainer.processing_class.eos_token_id
    response_ids = rollout.input_ids[:, -keep.shape[1] :]
    rows_of_ids = [row[k].tolist() for row, k in zip(response_ids, keep, strict=True)]
    inside = [bool(special & set(row[:-1] if row[-1] == end else row)) for row in rows_of_ids]
    assert trainer.metrics.take()["special_tokens"] == pytest.approx(sum(inside) / len(inside))
    trainer, rows = make(base_folder, str(reward_folder), cpu_arguments, use_vllm=True)
    trainer.train()
    (used,) = Engine.made[1:]
    assert used.syncs == 3, "once a rollout"
    assert used.settings["top_p"] == 1.0
    assert used.settings["top_k"] == 0
    assert used.settings["min_p"] == 0
    assert used.settings["repetition_penalty"] == 1
    template = trainer.processing_class.apply_chat_template(PROMPTS[0], add_generation_prompt=True, tokenize=False)
    expected = trainer.processing_class(template, add_special_tokens=False)["input_ids"]
    assert expected in used.asked, "ids of the rendered conversation, not padded"
    assert all(row["sampler_difference"] < 1e-4 for row in rows.rows)
    assert rows.rows[0]["ratio_first"] == pytest.approx(1, abs=1e-5)


def test_what_an_engine_samples_behind_an_end_token_is_left_out(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    """It is told at which tokens to stop; one that goes on all the same gives the rollout of one that stops."""
    trainer, _ = make(base_folder, str(reward_folder), cpu_arguments, use_vllm=True, max_completion_length=48)
    found = {}
    for broken in (None, "late"):
        Engine.broken = broken
        torch.manual_seed(3)
        found[broken] = trainer.vllm((PROMPTS * 8)[:64], version=0, max_prompt_length=None)
    stops, goes_on = found[None], found["late"]
    assert 0 < stops.ended.sum() < len(stops.ended)
    assert Engine.made[0].settings["generation_kwargs"] == {"stop_token_ids": [trainer.processing_class.eos_token_id]}
    assert goes_on.texts == stops.texts
    for name in ("response_ids", "response_mask", "ended", "logprobs_sampler"):
        assert torch.equal(getattr(goes_on, name), getattr(stops, name)), name


def test_tokens_of_an_engine_that_rounds_count_by_how_likely_they_were(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    """μ = π / 3 on every token: weights of 3, or of the limit; the policy's loss and gradient are multiplied by them."""
    Engine.shift = torch.tensor(3.0).log().item()
    trainer, _ = make(
        base_folder, str(reward_folder), cpu_arguments, use_vllm=True, vllm_importance_sampling_clip_max=10.0
    )
    rollout = trainer.rollout(trainer.prompts_of(0))
    batch = rollout.rows(torch.arange(8))
    keep = batch["response_mask"].bool()
    torch.testing.assert_close(batch["sampler_weights"][keep], torch.full((int(keep.sum()),), 3.0), atol=1e-3, rtol=0)
    ones = {**batch, "sampler_weights": torch.ones_like(batch["sampler_weights"])}
    weighted, plain = (trainer._policy_losses(batch["logprobs_old"], x)[keep] for x in (batch, ones))
    torch.testing.assert_close(weighted, 3 * plain, atol=1e-4, rtol=1e-3)
    assert truncated_importance(torch.zeros(2), torch.tensor([-5.0, 5.0]), limit=2.0)[0] == 2.0


def test_an_engine_that_drifts_is_recorded_with_one_warning_and_not_stopped(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It samples at temperature 0.8 what PPO reads at 1; every token is weighted, so training goes on."""
    monkeypatch.setattr(f"{__name__}.generate", lambda *a, own=generate, **k: own(*a, temperature=0.8, **k))
    settings = {"per_device_train_batch_size": 64, "max_completion_length": 24, "total_episodes": 256}
    trainer, rows = make(base_folder, str(reward_folder), cpu_arguments, use_vllm=True, num_mini_batches=1, **settings)
    with pytest.warns(UserWarning, match=r"'sampler true' failed.* weighted by π / π_vLLM") as warned:
        trainer.train()
    assert sum("sampler true" in str(warning.message) for warning in warned) == 1
    assert len(rows.rows) == 4
    assert all(row["sampler_z"] < -5 for row in rows.rows)
    assert not trainer.checks.entries["sampler true"]["held"]


@pytest.mark.parametrize(("broken", "said"), [("empty", "or an empty one"), ("silent", "without the log-probability")])
def test_an_engine_that_fails_stops_before_the_update(
    broken: str, said: str, base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    Engine.broken = broken
    trainer, _ = make(base_folder, str(reward_folder), cpu_arguments, use_vllm=True)
    with pytest.raises(TrainingError, match=said):
        trainer.train()
    assert trainer.state.global_step == 0


def test_without_vllm_it_is_said(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(merged_weights: Any) -> Any:
        raise ImportError("vLLM is not available")

    monkeypatch.setattr(vllm, "vllm_generation", absent)
    with pytest.raises(UserError, match=r"use_vllm: vLLM is not available \(how to install it"):
        make(base_folder, str(reward_folder), cpu_arguments, use_vllm=True)
