"""Reward sources, KL controllers and the details of PPO-max: closed forms, planted rewards, what happens when something is down."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from rlhf import PPOConfig, load_reward_model
from rlhf.errors import TrainingError, UserError
from rlhf.models.generate import Completions
from rlhf.objectives.ensemble import combined
from rlhf.objectives.kl import adapted_kl_coef, kl_k2
from rlhf.objectives.ppo import clipped_policy
from rlhf.ppo.rewards import RewardSource, total_reward
from rlhf.ppo.state import PPOState
from tests.conftest import PROMPTS
from tests.ppo.test_ppo import make

# ---- Formulas ----


def test_ensembles_agree_where_members_do_and_know_their_limits() -> None:
    same = torch.full((4, 3), 1.7)
    for how in ("mean", "worst", "uncertainty", "soft_min"):
        torch.testing.assert_close(combined(same, how), torch.full((3,), 1.7))
    scores = torch.tensor([[1.0, 1.0], [1.2, 1.1], [2.6, 1.2]])
    torch.testing.assert_close(combined(scores, "mean"), torch.tensor([1.6, 1.1]))
    torch.testing.assert_close(combined(scores, "worst"), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(combined(scores, "uncertainty"), torch.tensor([1.3467, 1.0967]), atol=1e-4, rtol=0)
    wide, narrow = (combined(scores.double(), "soft_min", strength=b) for b in (1e5, 1e-3))
    torch.testing.assert_close(wide, combined(scores.double(), "mean"), atol=1e-5, rtol=0)
    torch.testing.assert_close(narrow, combined(scores.double(), "worst"), atol=2e-3, rtol=0)
    b = 20.0  # second order: mean - Var / (2b)
    expected = combined(scores.double(), "uncertainty", strength=1 / (2 * b))
    torch.testing.assert_close(combined(scores.double(), "soft_min", strength=b), expected, atol=1e-3, rtol=0)


def test_one_member_that_goes_astray_moves_each_ensemble_as_it_should() -> None:
    """Raised by t: mean +t/k, worst 0, uncertainty t/k - λ t² (k - 1) / k²."""
    k, t, strength = 5, 3.0, 0.5
    scores = torch.zeros(k, 1)
    scores[0] = t
    assert combined(scores, "mean").item() == pytest.approx(t / k)
    assert combined(scores, "worst").item() == 0.0
    expected = t / k - strength * t**2 * (k - 1) / k**2
    assert combined(scores, "uncertainty", strength=strength).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="none of mean, worst"):
        combined(scores, "median")


def test_the_controller_stays_on_target_and_moves_by_a_fifth_at_most() -> None:
    assert adapted_kl_coef(0.1, 6.0, target=6.0, horizon=100, episodes=100) == 0.1
    assert adapted_kl_coef(0.1, 6.6, target=6.0, horizon=100, episodes=100) == pytest.approx(0.11)
    assert adapted_kl_coef(0.1, 60.0, target=6.0, horizon=100, episodes=100) == pytest.approx(0.12)
    assert adapted_kl_coef(0.1, 0.0, target=6.0, horizon=100, episodes=50) == pytest.approx(0.09)


def test_k2_has_the_gradient_of_the_kl_by_enumeration() -> None:
    """E_π[∇ k2] = ∇ KL(π || π_ref), the sampling distribution held fixed."""
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.double, requires_grad=True)
    reference = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.double).log_softmax(0)
    policy = logits.log_softmax(0)
    kl = (policy.exp() * (policy - reference)).sum()
    (expected,) = torch.autograd.grad(kl, [logits], retain_graph=True)
    (found,) = torch.autograd.grad((policy.detach().exp() * kl_k2(policy, reference)).sum(), [logits])
    torch.testing.assert_close(found, expected)


def test_the_dual_clip_bounds_bad_tokens_alone() -> None:
    far, zero = torch.full((2,), math.log(100.0)), torch.zeros(2)
    advantages = torch.tensor([-1.0, 1.0])
    plain = clipped_policy(far, zero, advantages, cliprange=0.2)
    torch.testing.assert_close(plain, torch.tensor([100.0, -1.2]))
    dual = clipped_policy(far, zero, advantages, cliprange=0.2, cliprange_dual=3.0)
    torch.testing.assert_close(dual, torch.tensor([3.0, -1.2]))


def test_the_history_of_rewards_is_exact_in_any_portions() -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.double) * 3 + 5
    state = PPOState()
    assert state.reward_scale == (0.0, 1.0)
    for part in values.split([1, 30, 7, 62]):
        state.see_rewards(len(part), part.mean().item(), part.var(correction=0).item() * len(part))
    assert state.reward_scale == pytest.approx((values.mean().item(), values.std(correction=0).item()))


# ---- Sources ----


def completions(texts: list[str], lengths: list[int]) -> Completions:
    width = max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.arange(5, 5 + width).repeat(len(texts), 1)
    return Completions(ids, mask, ids, mask, torch.ones(len(texts), dtype=torch.bool), texts)


TWO = completions(["yes", "no no"], [2, 3])


def test_async_functions_and_functions_of_tokens() -> None:
    async def later(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(x[0]["content"])) for x in completions]

    scores, dense = RewardSource(later)(PROMPTS[:2], TWO, {})
    assert scores.tolist() == [3.0, 5.0]
    assert dense is None

    def each_token(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
        return [[0.5 * i for i in range(len(ids))] for ids in completion_ids]

    scores, dense = RewardSource(each_token)(PROMPTS[:2], TWO, {})
    assert scores.tolist() == [0.5, 1.5]
    assert dense is not None
    assert dense.tolist() == [[0.0, 0.5, 0.0], [0.0, 0.5, 1.0]], "padding has none"
    with pytest.raises(TrainingError, match="rewards for answers of"):
        RewardSource(lambda **_: [[1.0], [1.0]])(PROMPTS[:2], TWO, {})


def test_trls_own_rewards_are_sources() -> None:
    """TRL's penalty on answers that come near the limit, as it is: 0 up to 1 token of 3, -1 at 3."""
    from trl.rewards import get_soft_overlong_punishment

    scores, _ = RewardSource(get_soft_overlong_punishment(3, 2))(PROMPTS[:2], TWO, {})
    assert scores.tolist() == [-0.5, -1.0]


def test_rewards_of_tokens_lie_on_their_tokens(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    def first_token(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
        return [[2.0, *[0.0] * (len(ids) - 1)] for ids in completion_ids]

    trainer, _ = make(
        base_folder, [load_reward_model(reward_folder), first_token], cpu_arguments, reward_weights=[0.0, 3.0],
        gamma=1.0, lam=1.0, kl_coef=0.0, whiten_advantages=False, missing_eos_penalty=None,
    )  # fmt: skip
    rollout = trainer.rollout(trainer.prompts_of(0))
    returns = rollout.returns * rollout.response_mask
    torch.testing.assert_close(returns[:, 0], torch.full((16,), 6.0), atol=1e-5, rtol=0)
    assert returns[:, 1:].abs().max() < 1e-5, "what comes later is worth nothing"


def test_an_ensemble_in_ppo_is_on_one_scale(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    first, second = load_reward_model(reward_folder), load_reward_model(reward_folder)
    second.mean, second.std = first.mean + 1.0, first.std * 2
    trainer, _ = make(base_folder, [first, second], cpu_arguments, reward_ensemble="worst", reward_clip=None)
    rows = [{"prompt": prompt} for prompt in PROMPTS[:2]]
    raw, total, _, disagreement = trainer.rewards(rows, TWO)
    members = torch.stack([(raw - first.mean) / first.std, (raw - second.mean) / second.std])
    torch.testing.assert_close(total, members.amin(dim=0))
    torch.testing.assert_close(disagreement, (members[0] - members[1]).abs() / 2)
    torch.testing.assert_close(total_reward(list(members), [2.0, 0.5]), 2 * members[0] + 0.5 * members[1])


def test_an_ensemble_on_unknown_scales_is_refused(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    def brief(completions: list[Any], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    model = load_reward_model(reward_folder)
    for sources, settings, said in (
        ([model, brief], {}, "nobody knows the scale of 'brief'"),
        ([model], {}, "needs two reward models or more"),
        ([model, model], {"normalize_reward": False}, "leave normalize_reward on"),
    ):
        with pytest.raises(UserError, match=said):
            make(base_folder, sources, cpu_arguments, reward_ensemble="worst", **settings)


def test_a_baseline_takes_away_what_depends_on_the_prompt_alone(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    def of_the_prompt(prompts: list[Any], **_: Any) -> list[float]:
        return [float(sum(map(ord, prompt[0]["content"]))) for prompt in prompts]

    sources = [load_reward_model(reward_folder), of_the_prompt]
    settings = {"reward_weights": [0.0, 1.0], "reward_clip": None, "kl_coef": 0.0}
    for samples in (0, 3):
        trainer, _ = make(base_folder, sources, cpu_arguments, baseline_samples=samples, **settings)
        scores = trainer.experience(trainer.prompts_of(0)).scores
        assert (scores.abs() < 1e-3).all() == (samples == 3), samples


def test_a_reference_that_follows_and_one_that_stays(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    """At rate 1 every rollout is sampled from its own reference: KL 0. At 1/2 the run resumes bit for bit."""
    found = {}
    for rate in (0.0, 0.5, 1.0):
        arguments = {**cpu_arguments, "save_strategy": "epoch", "output_dir": str(tmp_path / str(rate))}
        trainer, rows = make(base_folder, str(reward_folder), arguments, reference_mixup=rate)
        trainer.train()
        found[rate] = [row["kl_k3"] for row in rows.rows]
    assert found[1.0] == [0.0, 0.0, 0.0]
    assert found[0.0][1] > found[0.5][1] > 0
    arguments = {**cpu_arguments, "output_dir": str(tmp_path / "0.5")}
    resumed, again = make(base_folder, str(reward_folder), arguments, reference_mixup=0.5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "0.5/checkpoint-8"))
    assert again.rows[-1]["kl_k3"] == found[0.5][-1]


def test_async_functions_in_a_notebook() -> None:
    """Where an event loop is running already."""

    async def later(completions: list[Any], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    async def cell() -> list[float]:
        scores: list[float] = RewardSource(later)(PROMPTS[:2], TWO, {})[0].tolist()
        return scores

    assert asyncio.run(cell()) == [1.0, 1.0]


# ---- PPO-max and KL ----


def test_the_kl_coefficient_adapts_and_comes_back_with_a_resume(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    arguments = {**cpu_arguments, "save_strategy": "epoch", "output_dir": str(tmp_path)}
    settings = {"kl_target": 0.01, "kl_horizon": 16, "kl_coef": 0.1, "running_reward_norm": True}
    trainer, rows = make(base_folder, str(reward_folder), arguments, **settings)
    trainer.train()
    found = [row["kl_coef"] for row in rows.rows]
    assert found[0] == pytest.approx(0.1)
    assert found[1] == pytest.approx(0.08), "the first rollout has no KL: down by a fifth, the horizon being its size"
    assert found[2] == pytest.approx(0.08 * 1.2), "after two epochs of updates it is far over the target"
    resumed, again = make(base_folder, str(reward_folder), arguments, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for key in ("kl_coef", "reward", "loss", "kl"):
        assert again.rows[-1][key] == rows.rows[-1][key], key
    assert resumed.progress == trainer.progress
    assert trainer.progress.reward_count == 48


@pytest.mark.fault("edges of PPO")
def test_a_kl_over_its_limit_ends_training_with_a_checkpoint(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    arguments = {**cpu_arguments, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1000}
    trainer, rows = make(base_folder, str(reward_folder), arguments, kl_limit=1e-4, total_episodes=480)
    with pytest.warns(
        UserWarning, match="stopped after 32 episodes: the KL, .* nats an answer, is over kl_limit=0.0001"
    ):
        trainer.train()
    assert trainer.state.global_step == 8, "the first rollout is at KL 0, the second is not"
    checkpoint = tmp_path / "checkpoint-8"
    assert (checkpoint / "ppo_state.json").is_file()
    assert rows.rows[-1]["kl"] > 1e-4

    # As if the process had died between the checkpoint and what its caller does next.
    again, _ = make(base_folder, str(reward_folder), arguments, kl_limit=1e-4, total_episodes=480)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert (again.state.global_step, again.episodes, again.stopped) == (8, 32, trainer.stopped)
    other, _ = make(base_folder, str(reward_folder), arguments, kl_limit=1e4, total_episodes=48)
    other.train(resume_from_checkpoint=str(checkpoint))
    assert (other.state.global_step, other.episodes, other.stopped) == (12, 48, None), "another limit was set since"


def test_a_warm_up_trains_the_critic_alone(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    trainer, rows = make(base_folder, str(reward_folder), cpu_arguments, critic_warmup=2)
    policy = {name: value.clone() for name, value in trainer.model.policy.state_dict().items()}
    critic = {name: value.clone() for name, value in trainer.model.critic.state_dict().items()}
    trainer.args.num_train_epochs = 2
    trainer.train()
    assert all(torch.equal(value, policy[name]) for name, value in trainer.model.policy.state_dict().items())
    assert any(not torch.equal(value, critic[name]) for name, value in trainer.model.critic.state_dict().items())
    assert [row["kl"] for row in rows.rows] == [0.0, 0.0]

    longer, rows = make(base_folder, str(reward_folder), cpu_arguments, critic_warmup=1)
    longer.train()
    assert [row["kl"] > 0 for row in rows.rows] == [False, False, True], (
        "the second rollout's update is the first of both"
    )


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for settings, said in (
        ({"kl_estimator": "k4"}, "kl_estimator='k4' is none of k1, k2, k3"),
        ({"reward_ensemble": "median"}, "none of None, mean, worst, uncertainty, soft_min"),
        ({"reward_ensemble": "worst", "reward_weights": [1.0, 2.0]}, "leave them out"),
        ({"kl_limit": -1.0}, "kl_limit=-1.0 must be above 0"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "must start above 0"),
        ({"cliprange_dual": 0.5}, "cliprange_dual=0.5 must be above 1"),
    ):
        with pytest.raises((ValueError, UserError), match=said.replace("[", r"\[")):
            PPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)  # type: ignore[arg-type]


DEMONSTRATIONS = [
    {"prompt": prompt, "completion": [{"role": "assistant", "content": "yes please"}]} for prompt in PROMPTS[:4]
]


def test_demonstrations_are_mixed_in_by_their_weight(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    """Loss(coef) - Loss(0) = coef times -log π of the completions, computed here token by token."""
    found = {}
    for coefficient in (0.0, 0.5):
        trainer, _ = make(
            base_folder,
            str(reward_folder),
            cpu_arguments,
            ptx_coef=coefficient,
            ptx_dataset=Dataset.from_list(DEMONSTRATIONS),
        )
        batch = trainer.rollout(trainer.prompts_of(0)).rows(torch.arange(8))
        torch.manual_seed(7)
        found[coefficient] = trainer.compute_loss(
            trainer.model, batch, num_items_in_batch=batch["response_mask"].sum()
        ).item()
    torch.manual_seed(7)
    chosen = torch.randint(4, (8,)).tolist()
    tokenizer, policy = trainer.processing_class, trainer.model.policy
    nll = []
    for i in chosen:
        ids = tokenizer.apply_chat_template(
            DEMONSTRATIONS[i]["prompt"] + DEMONSTRATIONS[i]["completion"], tokenize=True, return_dict=False
        )
        asked = tokenizer.apply_chat_template(
            DEMONSTRATIONS[i]["prompt"], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert ids[: len(asked)] == asked
        logprobs = policy(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        end = ids.index(tokenizer.eos_token_id, len(asked)) + 1
        nll += [-logprobs[t - 1, ids[t]].item() for t in range(len(asked), end)]
    assert found[0.5] - found[0.0] == pytest.approx(0.5 * sum(nll) / len(nll), rel=1e-4)

    with pytest.raises(UserError, match="ptx_dataset must have the columns `prompt` and `completion`"):
        make(base_folder, str(reward_folder), cpu_arguments, ptx_coef=0.5)


def test_demonstrations_keep_the_policy_at_them(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    losses = {}
    for coefficient in (1e-9, 1.0):
        trainer, seen = make(
            base_folder,
            str(reward_folder),
            cpu_arguments,
            ptx_coef=coefficient,
            ptx_dataset=Dataset.from_list(DEMONSTRATIONS),
        )
        trainer.train()
        losses[coefficient] = seen.rows[-1]["ptx_loss"]
    assert losses[1.0] < losses[1e-9] - 0.5


def test_a_critic_that_is_a_copy_has_the_copys_scale(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of several labels or of one expert says less than the whole; a critic of one's own is taken as it is."""
    reward = load_reward_model(reward_folder)
    monkeypatch.setattr(reward, "scale_of_copy", lambda mean, std: (mean + 3.0, 2 * std))
    for critic, shift, factor in (
        (None, 3.0, 2.0),
        (load_reward_model(reward_folder).model.requires_grad_(True), 0.0, 1.0),
    ):
        trainer, _ = make(base_folder, reward, cpu_arguments, critic=critic, total_episodes=16)
        container = trainer.accelerator.unwrap_model(trainer.model)
        assert (container.value_mean, container.value_std) == (reward.mean + shift, factor * reward.std)
