"""What stops training before an update, and what is left behind."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerControl, TrainerState
from trl import RewardConfig, SFTConfig

from rlhf import PPOConfig
from rlhf.errors import TrainingError
from rlhf.invariants.checks import Check, CheckBook
from rlhf.models.load import model_settings
from rlhf.pipeline import callbacks
from rlhf.pipeline.callbacks import FiniteGradients
from rlhf.pipeline.trainers import StagePairRewardTrainer, StagePPOTrainer, StageSFTTrainer
from rlhf.pipeline.training import checks_of, require_all_trained, train
from tests.conftest import PROMPTS
from tests.unit_scale import build_reward_model


def silent(_: str) -> None:
    pass


def poison_gradient(parameter: torch.nn.Parameter, at_backward: int) -> None:
    """From this backward on, the parameter's gradient is infinite."""
    count = [0]

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        count[0] += 1
        return gradient * (math.inf if count[0] >= at_backward else 1.0)

    parameter.register_hook(hook)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.fault("not finite")
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_gradient_that_is_not_finite_stops_before_the_update_with_the_batch_saved(
    stage: str, base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    """The third of five steps (of two micro-batches each) is poisoned: weights stay those of step 2."""
    arguments = {
        **cpu_arguments,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
    }
    torch.manual_seed(0)
    trainer: Any
    if stage == "reward":
        model: Any = build_reward_model(base_folder, pad_token_id=tokenizer.pad_token_id)
        trainer = StagePairRewardTrainer(
            model, RewardConfig(**arguments), train_dataset=pairs, processing_class=tokenizer
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(base_folder)
        demos = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs])
        trainer = StageSFTTrainer(model, SFTConfig(**arguments), train_dataset=demos, processing_class=tokenizer)
    snapshots: list[dict[str, torch.Tensor]] = []
    original = trainer.training_step

    def remember(*positional: Any, **named: Any) -> Any:
        snapshots.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        return original(*positional, **named)

    trainer.training_step = remember
    poison_gradient(next(trainer.model.parameters()), at_backward=5)
    with pytest.raises(TrainingError, match="the gradient is not finite at step 3; nothing was updated") as error:
        train(trainer, tmp_path, label=stage, say=silent)
    assert "failed_batch.jsonl" in str(error.value)
    assert len(snapshots) == 6
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, snapshots[4][name]), name
    saved = rows(tmp_path / "failed_batch.jsonl")
    assert len(saved) == (16 if stage == "reward" else 8), "both micro-batches of the step, both sides of a pair"
    assert all(any(word in row["text"] for word in ("yes", "no")) for row in saved)
    tensors = load_file(tmp_path / "failed_batch.safetensors")
    assert {"0.input_ids", "1.input_ids"} <= set(tensors)


@pytest.mark.fault("not finite")
def test_a_reward_that_is_not_finite_stops_with_the_answers_saved(
    base_folder: Path, tokenizer: Any, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    calls = [0]

    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        calls[0] += 1
        return [math.nan if calls[0] == 2 and i == 3 else 0.5 for i in range(len(prompts))]

    torch.manual_seed(0)
    args = PPOConfig(
        **cpu_arguments,
        total_episodes=24,
        per_device_train_batch_size=8,
        num_mini_batches=1,
        num_ppo_epochs=1,
        max_completion_length=6,
        logging_steps=1,
    )
    trainer = StagePPOTrainer(
        AutoModelForCausalLM.from_pretrained(base_folder),
        reward,
        args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
        critic=build_reward_model(base_folder, pad_token_id=tokenizer.pad_token_id),
    )
    with pytest.raises(TrainingError, match="returned nan for 1 of 8 answers"):
        train(trainer, tmp_path, label="ppo", say=silent)
    saved = rows(tmp_path / "failed_batch.jsonl")
    assert len(saved) == 8
    assert [row["score"] for row in saved].count("nan") == 1
    assert saved[0]["prompt"] in PROMPTS
    assert trainer.state.global_step == 1, "the first rollout was learnt from, the second was not"


def test_checks_of_trainers_models_and_ensembles_are_joined() -> None:
    """The worse entry of each name stays, and its looks are added; what keeps no book has none."""
    first, second = CheckBook(), CheckBook()
    first.record(Check("score alone = in a batch", 0.1, 1.0, "points", "Because."))
    second.record(Check("score alone = in a batch", 0.9, 1.0, "points", "Because."))
    ensemble = SimpleNamespace(members=[SimpleNamespace(checks=first), SimpleNamespace(checks=second)])
    joined = checks_of(ensemble, len, SimpleNamespace(checks=None))
    assert joined["score alone = in a batch"]["statistic"] == 0.9
    assert joined["score alone = in a batch"]["times"] == 2


def test_only_a_check_that_did_not_hold_has_a_sentence() -> None:
    held, failed = (Check("ratio one", statistic, 1.0, "1", "Because.") for statistic in (0.5, 2.0))
    book, resumed = CheckBook(), CheckBook()
    resumed.record(held)
    assert resumed.entries["ratio one"]["sentence"] == ""
    for check in (held, failed, held):
        book.record(check)
    resumed.merge(book.entries)
    assert book.entries["ratio one"]["sentence"] == resumed.entries["ratio one"]["sentence"] == "Because."
    assert not resumed.entries["ratio one"]["held"]


def test_the_seconds_of_two_attempts_are_noted_together(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    """The second attempt goes on from a checkpoint that is said to have taken a thousand seconds."""
    arguments = {**cpu_arguments, "output_dir": str(tmp_path / "checkpoints"), "save_strategy": "steps"}
    args = RewardConfig(**arguments, num_train_epochs=1, per_device_train_batch_size=8, save_steps=3)

    def attempt() -> None:
        torch.manual_seed(0)
        model: Any = build_reward_model(base_folder, pad_token_id=tokenizer.pad_token_id)
        trainer = StagePairRewardTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)
        train(trainer, tmp_path, label="reward", say=silent)

    attempt()
    noted = tmp_path / "checkpoints/seconds.json"
    assert 0 < json.loads(noted.read_text()) < 60
    shutil.rmtree(tmp_path / "checkpoints/checkpoint-5")
    noted.write_text("1000")
    attempt()
    assert 1000 < json.loads(noted.read_text()) < 1060


@pytest.mark.fault("not finite")
@pytest.mark.parametrize("fp16", [False, True])
def test_an_overflow_under_fp16_is_its_scalers_business(fp16: bool) -> None:
    """The first scale is 65,536: it overflows in the first steps, which the scaler passes over."""
    layer = torch.nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    layer.weight.grad.fill_(math.inf)
    callback, state = FiniteGradients("sft"), SimpleNamespace(global_step=3)
    arguments: Any = (SimpleNamespace(fp16=fp16), state, None)
    if fp16:
        callback.on_pre_optimizer_step(*arguments, model=layer)
        return
    with pytest.raises(TrainingError, match="sft: the gradient is not finite at step 4; nothing was updated"):
        callback.on_pre_optimizer_step(*arguments, model=layer)


@pytest.mark.fault("not finite")
def test_one_shard_with_an_overflow_stops_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of all shards decides, and not that of the process's own, which is finite here."""
    layer = torch.nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    monkeypatch.setattr(callbacks, "whole", lambda norm: norm + math.inf)
    arguments: Any = (SimpleNamespace(fp16=False), SimpleNamespace(global_step=3), None)
    with pytest.raises(TrainingError, match="not finite at step 4"):
        FiniteGradients("sft").on_pre_optimizer_step(*arguments, model=layer)


@pytest.mark.fault("refused after hours")
def test_training_that_ends_early_unasked_is_no_finished_stage(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    """A callback of somebody stops the Trainer, which returns as if it were done; and weights of 16 bits are said."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: object) -> None:
            control.should_training_stop = state.global_step == 2

    arguments = {**cpu_arguments, "num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-7}
    model = build_reward_model(base_folder, pad_token_id=tokenizer.pad_token_id).bfloat16()
    trainer = StagePairRewardTrainer(
        model, RewardConfig(**arguments), train_dataset=pairs, processing_class=tokenizer, callbacks=[Stop()]
    )
    said: list[str] = []
    with pytest.raises(TrainingError, match=r"reward: training ended at step 2 of \d+, and nothing here asked for it"):
        train(trainer, tmp_path, label="reward", say=said.append)
    assert any("reward: the trained weights are bfloat16, in which most steps of the size of" in line for line in said)


def test_a_model_of_which_a_part_would_stay_is_not_trained(base_folder: Path, tokenizer: Any) -> None:
    """After a LoRA SFT the base was frozen and the head alone was trained. Adapters freeze it on purpose."""
    model = build_reward_model(base_folder, pad_token_id=tokenizer.pad_token_id)
    require_all_trained(model, "reward")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "score.weight")
    with pytest.raises(
        TrainingError, match=r"reward: 20 tensors .* would stay as they are, first model.embed_tokens.weight"
    ):
        require_all_trained(model, "reward")
    lora = model_settings({"use_peft": True, "lora_r": 4})
    require_all_trained(build_reward_model(base_folder, lora, pad_token_id=tokenizer.pad_token_id), "reward")
