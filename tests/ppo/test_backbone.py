"""Four roles on one base: the same numbers as separate models, with and without checkpointing, saved and resumed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from rlhf import PPOConfig, PPOTrainer, load_reward_model
from rlhf.errors import UserError
from rlhf.models.load import load_policy, load_scorer, model_settings
from rlhf.models.logprobs import response_logprobs
from rlhf.models.save import save_model
from rlhf.ppo.roles import AdapterHead
from rlhf.reward.load import RewardModel, save_reward_model
from tests.conftest import PROMPTS
from tests.ppo.conftest import LORA, moved
from tests.unit_scale import build_reward_model

DATA = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])


def make(policy: Any, reward: Any, tokenizer: Any, arguments: dict[str, Any], **settings: Any) -> PPOTrainer:
    usual = {
        "per_device_train_batch_size": 8, "num_mini_batches": 2, "num_ppo_epochs": 2, "total_episodes": 32,
        "learning_rate": 1e-3, "max_completion_length": 8, "max_grad_norm": 1e9,
    }  # fmt: skip
    args = PPOConfig(**{**usual, **arguments, **settings})
    return PPOTrainer(policy, reward, args, DATA, processing_class=tokenizer)


def container(trainer: PPOTrainer) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)


@pytest.mark.parametrize("lineage", ["lora_sft", "full_sft"])
def test_shared_and_separate_roles_make_the_same_run(
    lineage: str,
    base_folder: Path,
    sft_adapter: Path,
    reward_adapter: Path,
    tokenizer: Any,
    cpu_arguments: dict[str, Any],
) -> None:
    """Two rollouts, eight updates: same metrics, same policy. One base is in memory instead of three."""
    start = sft_adapter if lineage == "lora_sft" else base_folder
    found = []
    for reward in (str(reward_adapter), load_reward_model(reward_adapter)):
        torch.manual_seed(0)
        policy = load_policy(start, model_settings(LORA))
        trainer = make(policy, reward, tokenizer, cpu_arguments)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "episodes" in row]
        found.append((trainer, rows))
    (shared, rows), (separate, expected) = found
    assert container(shared).shares_backbone
    assert not container(separate).shares_backbone
    assert len(rows) == len(expected) == 2
    for row, other in zip(rows, expected, strict=True):
        for key in ("loss", "reward_proxy", "reward", "kl", "policy_loss", "value_loss", "grad_norm", "grad_norm_critic",
                    "explained_variance", "entropy", "ratio_first", "approx_kl"):  # fmt: skip
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), key
    weights = dict(container(separate).policy.named_parameters())
    for name, parameter in container(shared).policy.named_parameters():
        if ".default." in name:
            torch.testing.assert_close(parameter, weights[name], atol=2e-4, rtol=1e-3)

    def base_parameters(trainer: PPOTrainer) -> int:
        modules = [container(trainer).policy, container(trainer).critic, trainer.rewards.sources[0].function.model]  # type: ignore[union-attr]
        return len({id(p) for m in modules for n, p in m.named_parameters() if "embed_tokens" in n})

    assert base_parameters(shared) == 1
    assert base_parameters(separate) == 3


def test_gradients_of_both_roles_with_checkpointing_equal_those_without(
    sft_adapter: Path, reward_adapter: Path, tokenizer: Any, cpu_arguments: dict[str, Any]
) -> None:
    """The recomputation in the backward must use the adapter of its own role."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = load_policy(sft_adapter, model_settings(LORA))
        arguments = {**cpu_arguments, "gradient_checkpointing": checkpointing}
        trainer = make(policy, str(reward_adapter), tokenizer, arguments)
        if checkpointing:
            container(trainer).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        rollout = trainer.rollout(trainer.prompts_of(0))
        batch = rollout.rows(torch.arange(8))
        trainer.accelerator.sync_gradients = True
        trainer.training_step(trainer.model, batch, batch["response_mask"].sum())
        gradients = {name: p.grad for name, p in container(trainer).named_parameters() if p.grad is not None}
        found.append(gradients)
    plain, checkpointed = found
    assert set(plain) == set(checkpointed)
    roles = {name.split(".")[-2] for name in plain}
    assert roles == {"default", "critic", "head"}, "the reference and the reward model are not trained"
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4)
        assert gradient.abs().max() > 0, name


def test_reward_on_the_backbone_scores_as_the_saved_model_does(
    sft_adapter: Path, reward_adapter: Path, tokenizer: Any, cpu_arguments: dict[str, Any]
) -> None:
    trainer = make(load_policy(sft_adapter, model_settings(LORA)), str(reward_adapter), tokenizer, cpu_arguments)
    source: Any = trainer.rewards.sources[0].function
    answers = ["yes", "no no", "apple pear plum", "please", "dog"]
    expected = load_reward_model(reward_adapter).score(PROMPTS[:5], answers)
    before = container(trainer).policy.training
    torch.testing.assert_close(source.score(PROMPTS[:5], answers), expected, atol=1e-5, rtol=1e-5)
    # What its head reads: a bottleneck's cloud and `adversarial_coef` are made of that.
    read = load_reward_model(reward_adapter).features(PROMPTS[:5], answers)
    torch.testing.assert_close(source.features(PROMPTS[:5], answers), read, atol=1e-5, rtol=1e-4)
    assert container(trainer).policy.training == before
    trainer.train()
    torch.testing.assert_close(source.score(PROMPTS[:5], answers), expected, atol=1e-5, rtol=1e-5)
    assert (source.mean, source.std) == (load_reward_model(reward_adapter).mean, load_reward_model(reward_adapter).std)


def test_a_resumed_run_ends_bit_for_bit_and_the_critic_is_an_ordinary_adapter(
    sft_adapter: Path, reward_adapter: Path, tokenizer: Any, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    arguments = {**cpu_arguments, "save_strategy": "epoch", "output_dir": str(tmp_path), "total_episodes": 64}

    def fresh() -> PPOTrainer:
        return make(load_policy(sft_adapter, model_settings(LORA)), str(reward_adapter), tokenizer, arguments)

    through = fresh()
    through.train()
    resumed = fresh()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    for name, parameter in container(through).named_parameters():
        assert torch.equal(parameter, container(resumed).get_parameter(name)), name
    first, second = (load_file(tmp_path / f"checkpoint-{n}/critic/adapter_model.safetensors") for n in (4, 16))
    assert all((first[name] - second[name]).abs().max() > 0 for name in first), "all of the critic is trained"

    critic = container(through).critic
    assert isinstance(critic, AdapterHead)
    tokenizer.save_pretrained(tmp_path / "checkpoint-16/critic")
    alone = RewardModel(load_scorer(tmp_path / "checkpoint-16/critic"), tokenizer, conversational=True)
    ids = alone.encode(PROMPTS[:1], ["yes"], None)
    with torch.no_grad(), critic.active():
        tokens = torch.tensor(ids)
        values = critic.token_scores(tokens, torch.ones_like(tokens))
    torch.testing.assert_close(values[0, -1], alone.score(PROMPTS[:1], ["yes"])[0], atol=1e-5, rtol=1e-5)


def test_what_cannot_share_says_why_and_runs_apart(
    base_folder: Path, reward_folder: Path, tokenizer: Any, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="not shared with critic and reward model: the reward model is a whole model"):
        trainer = make(load_policy(base_folder, model_settings(LORA)), str(reward_folder), tokenizer, cpu_arguments)
    assert not container(trainer).shares_backbone

    other = tmp_path / "other"
    torch.manual_seed(5)
    model = load_policy(base_folder, model_settings({}))
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    save_model(model, tokenizer, other)
    scorer = moved(build_reward_model(other, model_settings(LORA), pad_token_id=tokenizer.pad_token_id))
    save_reward_model(tmp_path / "rm", copy.deepcopy(scorer), tokenizer, samples=[(p, "yes") for p in PROMPTS[:9]])
    with pytest.warns(UserWarning, match="trained on another base than the policy's"):
        make(load_policy(base_folder, model_settings(LORA)), str(tmp_path / "rm"), tokenizer, cpu_arguments)


def test_a_reference_adapter_follows_and_a_bare_base_cannot(
    base_folder: Path, sft_adapter: Path, reward_adapter: Path, tokenizer: Any, cpu_arguments: dict[str, Any]
) -> None:
    policy = load_policy(sft_adapter, model_settings(LORA))
    trainer = make(policy, str(reward_adapter), tokenizer, cpu_arguments, reference_mixup=1.0)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "episodes" in row]
    assert [row["kl_k3"] for row in rows] == [0.0, 0.0]
    fresh = load_policy(base_folder, model_settings(LORA))
    args = PPOConfig(**cpu_arguments, reference_mixup=0.1)
    with pytest.raises(UserError, match="start from an SFT adapter"):
        PPOTrainer(fresh, str(reward_adapter), args, DATA, processing_class=tokenizer, adapter_was_trained=False)
    whole = load_policy(base_folder, model_settings({"dtype": "bfloat16"}))
    with pytest.raises(UserError, match="moves weights of 16 bits, in which such small steps are rounded away"):
        PPOTrainer(whole, str(reward_adapter), args, DATA, processing_class=tokenizer)


def test_a_server_is_not_looked_for_on_the_disk(
    sft_adapter: Path, tokenizer: Any, cpu_arguments: dict[str, Any]
) -> None:
    policy = load_policy(sft_adapter, model_settings(LORA))
    with pytest.raises(UserError, match="is no model to copy the critic from; pass `critic=`"):
        make(policy, "http://127.0.0.1:9/get_reward", tokenizer, cpu_arguments)


def test_a_reference_may_be_another_adapter_than_the_start(
    sft_adapter: Path, reward_adapter: Path, tokenizer: Any, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    """A round goes on from the last policy while its KL is to SFT."""
    save_model(moved(load_policy(sft_adapter, model_settings(LORA)), seed=5), tokenizer, tmp_path)
    trainer = make(load_policy(tmp_path, model_settings(LORA)), str(reward_adapter), tokenizer, cpu_arguments)
    ids, mask = torch.arange(5, 25).view(2, 10), torch.ones(2, 10, dtype=torch.long)
    of_start = trainer.reference.logprobs(ids, mask, 4, 1.0)
    trainer.reference.load(sft_adapter)
    sft = load_policy(sft_adapter, model_settings(LORA)).eval()
    with torch.no_grad():
        expected = response_logprobs(sft, ids, mask, 4, 1.0)
    torch.testing.assert_close(trainer.reference.logprobs(ids, mask, 4, 1.0), expected, atol=1e-5, rtol=1e-5)
    assert (of_start - expected).abs().max() > 1e-3
