"""Rewards that PPO makes itself, against the same numbers from plain transformers and from the reward model alone."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf import load_reward_model
from rlhf.errors import UserError
from rlhf.ppo.token_rewards import _like_demonstrations
from rlhf.ppo.trainer import PPOTrainer
from tests.ppo.test_ppo import make

QUIET = {"total_episodes": 16, "max_completion_length": 10}


def answers(trainer: PPOTrainer) -> tuple[Any, list[Any], list[list[int]]]:
    """A rollout's experience, the prompts, and the answers' tokens."""
    rows = trainer.prompts_of(0)
    experience = trainer.experience(rows)
    mask = experience.response_mask.bool()
    ids = experience.input_ids[:, -mask.shape[1] :]
    return (
        experience,
        [row["prompt"] for row in rows],
        [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)],
    )


def test_shaping_pays_what_the_reward_model_gained(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    trainer, _ = make(
        base_folder, str(reward_folder), cpu_arguments, **QUIET, shaping_coef=0.5, shaping_tokens=3, gamma=0.9
    )
    experience, prompts, ids = answers(trainer)
    assert max(map(len, ids)) > 6, "of one segment nothing is seen"
    reward = load_reward_model(reward_folder)
    for row, (prompt, tokens) in enumerate(zip(prompts, ids, strict=True)):
        texts = [trainer.processing_class.decode(tokens[:end], skip_special_tokens=True) for end in (0, 3, 6, 9)]
        scores = [(reward.score([prompt], [text], ended=[False]).item() - reward.mean) / reward.std for text in texts]
        before = [scores[place // 3] for place in range(len(tokens))] + [0.0]
        expected = [0.5 * (0.9 * after - now) for now, after in pairwise(before)]
        found = experience.dense[row]
        assert found[: len(tokens)].tolist() == pytest.approx(expected, abs=1e-4)
        assert (found[len(tokens) :] == 0).all()


def test_self_certainty_and_novelty_are_those_of_plain_transformers(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    """At the first rollout policy and reference are the base; one answer at a time, without padding, in float64."""
    found = {}
    for name in ("self_certainty_coef", "novelty_coef"):
        trainer, _ = make(base_folder, str(reward_folder), cpu_arguments, **QUIET, temperature=0.8, **{name: 2.0})
        experience, _, ids = answers(trainer)
        found[name] = experience.dense.sum(dim=1).tolist()
        last = experience.response_mask.sum(dim=1, keepdim=True) - 1
        assert experience.dense.gather(1, last).squeeze(1).tolist() == found[name], "at the last token alone"
    model, mask = AutoModelForCausalLM.from_pretrained(base_folder).eval(), experience.attention_mask.bool()
    for row, tokens in enumerate(ids):
        whole = experience.input_ids[row][mask[row]]
        with torch.no_grad():
            logits = model(input_ids=whole[None]).logits[0, -len(tokens) - 1 : -1].double() / 0.8
        log_p = logits - logits.logsumexp(dim=-1, keepdim=True)
        uniform = 1 / log_p.shape[-1]
        certainty = (uniform * (torch.tensor(uniform).double().log() - log_p)).sum(dim=-1).mean()
        surprise = -log_p[torch.arange(len(tokens)), whole[-len(tokens) :]].mean()
        assert found["self_certainty_coef"][row] == pytest.approx(2 * certainty.item(), rel=1e-4)
        assert found["novelty_coef"][row] == pytest.approx(2 * surprise.item(), rel=1e-4)


def test_without_them_nothing_is_added(base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]) -> None:
    trainer, _ = make(base_folder, str(reward_folder), cpu_arguments, **QUIET)
    assert (answers(trainer)[0].dense == 0).all()
    assert "self_certainty" not in trainer.metrics.take()


def test_shaping_wants_a_reward_model(base_folder: Path, cpu_arguments: dict[str, Any], reward_folder: Path) -> None:
    def brief(completions: list[Any], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(UserError, match=r"shaping_coef needs scores of answers that are not finished.*'brief' may not"):
        make(base_folder, [brief, str(reward_folder)], cpu_arguments, shaping_coef=1.0)
    with pytest.raises(ValueError, match="novelty_coef=-1 must not be negative"):
        make(base_folder, str(reward_folder), cpu_arguments, novelty_coef=-1)


def test_the_discriminator_scores_each_half_by_the_other() -> None:
    """No answer takes part in what it, or another one of its half, is scored by."""
    generator = torch.Generator().manual_seed(0)
    demonstrations, features = torch.randn(12, 3, generator=generator) + 1, torch.randn(12, 3, generator=generator)
    rows: Any = [{"prompt": f"p{i}"} for i in range(12)]

    def log_odds(of_answers: torch.Tensor) -> torch.Tensor:
        known = {"demonstration": demonstrations, "answer": of_answers}
        reward = SimpleNamespace(
            conversational=True,
            features=lambda _, texts, *, ended: known[texts[0]] - 9 * ~torch.tensor(ended)[:, None],
        )
        drawn = SimpleNamespace(draw_texts=lambda count: [("p", "demonstration", True)] * count)
        trainer: Any = SimpleNamespace(
            rewards=SimpleNamespace(sources=[SimpleNamespace(function=reward)]), demonstrations=drawn
        )
        # With the blank behind a plain prompt they would be told from demonstrations by that alone.
        texts = [" answer"] * len(rows)
        completions: Any = SimpleNamespace(texts=texts, blank=" ", ended=torch.tensor(ended))
        return _like_demonstrations(trainer, rows, completions)

    ended = [True] * len(rows)
    before, changed = log_odds(features), features.clone()
    changed[0] += 3
    after = log_odds(changed)
    assert torch.equal(after[2::2], before[2::2])
    assert ((after[1::2] - before[1::2]).abs() > 1e-3).all()
    assert before.mean() < 0, "the policy's answers are told from demonstrations"
    ended = [False] * len(rows)
    assert log_odds(features).mean() < before.mean() - 1, "the features are those of answers that were cut off"
