"""Edges of PPO: rewards that are no numbers or all the same, answers without a token, prompts that fill the context."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from rlhf import PPOConfig, PPOTrainer, load_reward_model
from rlhf.errors import TrainingError, UserError
from rlhf.ppo.experience import shape_scores
from rlhf.ppo.reporting import cuts_of_all, warn_of_unread_answers
from rlhf.ppo.state import PPOState
from tests.conftest import PROMPTS
from tests.ppo.test_ppo import make, weights_after


@pytest.mark.fault("not finite")
@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_reward_that_is_no_number_stops_before_the_update(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], bad: Any
) -> None:
    critic = load_reward_model(reward_folder).model.requires_grad_(True)
    trainer, _ = make(
        base_folder, lambda completions, **_: [0.0] * (len(completions) - 1) + [bad], cpu_arguments, critic=critic
    )
    before = weights_after(trainer)
    with pytest.raises(TrainingError, match="nothing was updated"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_wrong_number_of_rewards(base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]) -> None:
    critic = load_reward_model(reward_folder).model.requires_grad_(True)
    trainer, _ = make(base_folder, lambda completions, **_: [0.0], cpu_arguments, critic=critic)
    with pytest.raises(TrainingError, match="returned 1 scores for 16 answers"):
        trainer.train()


@pytest.mark.fault("edges of PPO")
def test_a_constant_reward_moves_nothing_by_itself(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    critic = load_reward_model(reward_folder).model.requires_grad_(True)
    trainer, rows = make(
        base_folder,
        lambda completions, **_: [1.0] * len(completions),
        cpu_arguments,
        critic=critic,
        missing_eos_penalty=None,
    )
    trainer.train()
    assert all(math.isfinite(row["loss"]) for row in rows.rows)


@pytest.mark.fault("edges of PPO")
def test_empty_answers_are_answers(base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]) -> None:
    """A policy that ends at once: texts without a character, one token each, finite everything."""
    trainer, rows = make(base_folder, str(reward_folder), cpu_arguments)
    end = torch.tensor([trainer.processing_class.eos_token_id])
    for model in (trainer.model.policy, trainer.reference.model):
        model.get_output_embeddings().register_forward_hook(lambda _, __, out: out.index_fill(-1, end, 30.0))
    trainer.train()
    assert {sample.completion for sample in trainer.latest_samples} == {""}
    assert [row["length"] for row in rows.rows] == [1.0] * 3
    assert all(math.isfinite(value) for row in rows.rows for value in row.values())
    assert rows.rows[0]["share_without_eos"] == 0


def test_prompts_that_fill_the_context_are_cut_and_counted(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    context = AutoModelForCausalLM.from_pretrained(base_folder).config.max_position_embeddings
    room = 12
    trainer, _ = make(
        base_folder, str(reward_folder), cpu_arguments, max_completion_length=context - room, total_episodes=16,
        num_mini_batches=1, per_device_train_batch_size=16, num_ppo_epochs=1,
    )  # fmt: skip
    long = [[{"role": "user", "content": "list three apple pear plum " * 20}]] * 2 + [PROMPTS[0]] * 14
    completions = trainer.sample([{"prompt": prompt} for prompt in long])
    lengths = completions.prompt_mask.sum(dim=1).tolist()
    assert lengths[:2] == [room, room]
    assert max(lengths) == room
    with pytest.raises(UserError, match="leaves no room for a prompt in the model's context"):
        make(base_folder, str(reward_folder), cpu_arguments, max_completion_length=context)


@pytest.mark.fault("rows too long")
def test_answers_that_the_reward_model_reads_without_their_beginning_are_counted_and_told_once(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    """Two that end alike get one score, so PPO learns that the beginning of an answer does not matter."""
    settings: dict[str, Any] = {**cpu_arguments, "max_completion_length": 48, "total_episodes": 32}
    rows = {}
    for limit in (32, 128):
        reward = load_reward_model(reward_folder)
        reward.max_length = limit
        trainer, log = make(base_folder, reward, settings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        rows[limit] = [row["rewards_cut"] for row in log.rows]
        told = [str(x.message) for x in caught if "tokens that the reward model reads" in str(x.message)]
        assert told == [x for x in trainer.progress.health.sentences if "the reward model reads" in x]
        if limit == 128:
            assert (told, cuts_of_all(trainer)) == ([], [])
            continue
        assert len(told) == 1
        assert told[0].startswith("ppo, rollout 1: answers are longer than the 32 tokens that the reward model reads.")
        whole, own = cuts_of_all(trainer)
        assert whole.startswith(f"ppo: reward model 1: {round(16 * sum(rows[32]))} texts are longer than 32 tokens")
        assert "answers alone are longer than that" in own
        trainer.progress.save(Path(cpu_arguments["output_dir"]))
        resumed, _ = make(base_folder, reward, settings)
        resumed.progress = PPOState.load(Path(cpu_arguments["output_dir"]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_unread_answers(resumed)
        assert caught == [], "a resumed run does not say it again"
    assert min(rows[32]) > 0.5
    assert rows[128] == [0.0, 0.0]


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_a_prompt_of_no_tokens_is_refused_before_anything_is_trained(
    base_folder: Path, reward_folder: Path, tokenizer: Any, cpu_arguments: dict[str, Any], name: str
) -> None:
    """The first token of its answer would be read behind another row's last; with one row a batch nothing notices."""
    data = {key: Dataset.from_list([{"prompt": "list"}]) for key in ("train_dataset", "eval_dataset")}
    data[name] = Dataset.from_list([{"prompt": text} for text in ("list red", "name blue", "")])
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    with pytest.raises(UserError, match=rf"row 2 of {name} has a prompt of no tokens \(''\)"):
        PPOTrainer(
            model, str(reward_folder), PPOConfig(**cpu_arguments, max_completion_length=8), processing_class=tokenizer, **data
        )  # fmt: skip


@pytest.mark.fault("cut or ended answer")
def test_missing_end_is_penalised_exactly_there(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    from rlhf.models.generate import Completions

    reward = load_reward_model(reward_folder)
    trainer, _ = make(base_folder, reward, cpu_arguments, missing_eos_penalty=2.0, reward_clip=None)
    ids = torch.tensor([[10, 1], [10, 11]])
    completions = Completions(
        ids, torch.ones_like(ids), ids, torch.ones_like(ids), torch.tensor([True, False]), ["yes", "yes"]
    )
    raw, total, dense, _ = trainer.rewards([{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[0]}], completions)
    expected = (raw - reward.mean) / reward.std - torch.tensor([0.0, 2.0])
    torch.testing.assert_close(shape_scores(total, completions.ended, trainer.args, trainer.progress), expected)
    assert dense.abs().max() == 0
    assert raw[0] != raw[1], "the reward model sees that one answer did not end"


def test_a_callable_alone_needs_a_critic(base_folder: Path, cpu_arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="pass `critic=`"):
        make(base_folder, lambda completions, **_: [0.0] * len(completions), cpu_arguments)


def test_texts_that_were_cut_are_counted_over_a_resume(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    """The last sentence of a stage counted from its last start."""
    settings = {**cpu_arguments, "save_strategy": "epoch", "output_dir": str(tmp_path)}

    def trained(**resume: Any) -> list[str]:
        reward = load_reward_model(reward_folder)
        reward.max_length = 12
        trainer, _ = make(base_folder, reward, settings)
        trainer.train(**resume)
        return cuts_of_all(trainer)

    whole = trained()
    assert len(whole) == 2
    assert trained(resume_from_checkpoint=str(tmp_path / "checkpoint-8")) == whole
