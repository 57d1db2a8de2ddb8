"""What a reward trainer makes of a batch's scores, in numbers (losses, metrics, where an answer ends), and what it says first."""

import math
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from datasets import Dataset
from torch import tensor
from trl import RewardConfig

from rlhf.errors import UserError
from rlhf.models.load import model_settings
from rlhf.models.packing import LONG_ROW, GroupedByLength, order_by_length
from rlhf.objectives.pairwise import bradley_terry
from rlhf.reward.columns import RANGES, check_columns
from rlhf.reward.model import RewardModel
from rlhf.reward.trainer import PairRewardTrainer, Scored
from tests.unit_scale import build_reward_model


def losses(trainer: Any, chosen: list[float], rejected: list[float], **columns: Any) -> list[float]:
    scored = Scored.plain(tensor([*chosen, *rejected]), torch.ones(2 * len(chosen), 3, dtype=torch.long), None)
    result: list[float] = PairRewardTrainer.losses(trainer, scored, columns, {}).tolist()
    return result


@pytest.mark.parametrize("coefficient", [None, 0.01, 0.5])
def test_centring_adds_the_square_of_the_sum_of_a_pairs_scores(coefficient: float | None) -> None:
    """InstructGPT's Bradley-Terry loss and, beside it, coefficient · (chosen + rejected)², for each pair by itself."""
    args = SimpleNamespace(center_rewards_coefficient=coefficient)
    trainer = SimpleNamespace(loss_function=bradley_terry, flip_rate=0.0, args=args)
    chosen, rejected = [2.0, -1.0, 0.5], [1.0, 0.0, -0.5]
    expected = [
        math.log1p(math.exp(b - a)) + (coefficient or 0.0) * (a + b) ** 2 for a, b in zip(chosen, rejected, strict=True)
    ]
    assert losses(trainer, chosen, rejected) == pytest.approx(expected, abs=1e-6)


def test_an_answer_ends_at_its_last_token_on_either_side_of_the_padding() -> None:
    mask = tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    scored = Scored.plain(torch.zeros(4), mask, None)
    assert scored.ends.tolist() == [2, 0, 3, 3]
    assert scored.pairs.tolist() == [[0, 2], [1, 3]]
    assert scored.tokens == 10


def recorder(*, training: bool) -> Any:
    return SimpleNamespace(
        model=SimpleNamespace(training=training),
        accelerator=SimpleNamespace(gather_for_metrics=lambda x: x),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _evaluated_pairs=0,
    )


def test_a_tie_is_no_right_answer_and_tokens_add_up() -> None:
    trainer = recorder(training=True)
    for _ in range(2):
        PairRewardTrainer._record(trainer, tensor([1.0, 2.0, 0.0]), tensor([1.0, 0.0, 3.0]), tensor([7, 5]))
    metrics = trainer._metrics["train"]
    assert metrics["accuracy"] == pytest.approx([1 / 3, 1 / 3]), "one entry a batch"
    assert metrics["margin"] == pytest.approx([(0 + 2 - 3) / 3] * 2)
    assert metrics["mean_reward"] == pytest.approx([7 / 6] * 2)
    assert metrics["num_tokens"] == [24]


def test_in_evaluation_every_pair_counts_the_same_whatever_the_last_batch_holds() -> None:
    trainer = recorder(training=False)
    for chosen, rejected in (([1.0, 2.0, 3.0], [0.0, 0.0, 5.0]), ([1.0], [4.0])):
        PairRewardTrainer._record(trainer, tensor(chosen), tensor(rejected), tensor([9]))
    metrics = trainer._metrics["eval"]
    assert metrics["accuracy"] == pytest.approx([2 / 4])
    assert metrics["margin"] == pytest.approx([(1 + 2 - 2 - 3) / 4])
    assert metrics["num_tokens"] == [0], "tokens are those of training"
    metrics.clear()  # as TRL does at a log: the next evaluation begins anew
    PairRewardTrainer._record(trainer, tensor([1.0]), tensor([4.0]), tensor([9]))
    assert (metrics["accuracy"], metrics["margin"]) == ([0.0], [-3.0])


@pytest.mark.parametrize(
    ("epochs", "attention", "share", "said"),
    [
        (1, "sdpa", True, []),
        (2, "sdpa", True, ["overfit after one epoch"]),
        (1, "eager", True, ["answers don't share their prompt, so training is slower: attn_implementation is eager"]),
        (1, "eager", False, []),
    ],
)
def test_what_is_said_before_training(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], epochs: int, attention: str,
    share: bool, said: list[str],
) -> None:  # fmt: skip
    model: Any = build_reward_model(base_folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    model.set_attn_implementation(attention)
    args = RewardConfig(**{**cpu_arguments, "num_train_epochs": epochs})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PairRewardTrainer(
            model, args, share_prompts=share, train_dataset=pairs.select(range(4)), processing_class=tokenizer
        )
    ours = [str(warning.message) for warning in caught if "epochs=" in str(warning.message) or "reward: " in str(warning.message)]  # fmt: skip
    assert len(ours) == len(said)
    assert all(sentence in warning for sentence, warning in zip(said, ours, strict=True))


def test_a_value_out_of_its_range_is_refused_as_soon_as_the_trainer_is_made(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    model: Any = build_reward_model(base_folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    data = pairs.add_column("weight", [1.0] * (len(pairs) - 1) + [-1.0])
    with pytest.raises(UserError, match=f"row {len(pairs) - 1}, column 'weight': -1.0"):
        PairRewardTrainer(model, RewardConfig(**cpu_arguments), train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize(("column", "low", "high"), [(name, *limits) for name, limits in RANGES.items()])
def test_the_ends_of_a_columns_range_are_in_it(pairs: Dataset, column: str, low: float, high: float) -> None:
    few = pairs.select(range(2))
    check_columns(few.add_column(column, [float(low), min(high, 1e6)]), columns=(column,))
    with pytest.raises(UserError, match=f"row 1, column '{column}'"):
        check_columns(few.add_column(column, [float(low), low - 1e-6]), columns=(column,))


def test_one_vote_is_enough_and_none_is_not(pairs: Dataset) -> None:
    few = pairs.select(range(2))
    check_columns(few.add_column("strength_votes", [1, 2]), columns=("strength_votes",))
    with pytest.raises(UserError, match="row 1, column 'strength_votes': 0 is not a finite number in"):
        check_columns(few.add_column("strength_votes", [1, 0]), columns=("strength_votes",))


def test_a_head_keeps_its_precision_and_rows_are_long_by_the_models_width(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    settings = model_settings({"dtype": "bfloat16"})
    model: Any = build_reward_model(base_folder, settings, pad_token_id=tokenizer.pad_token_id)
    trainer = PairRewardTrainer(
        model, RewardConfig(**cpu_arguments), train_dataset=pairs.select(range(4)), processing_class=tokenizer
    )
    assert trainer.model.score.weight.dtype == torch.bfloat16, "only on 4-bit weights is it made wider"
    assert trainer.data_collator.long_row == LONG_ROW * model.config.hidden_size


@pytest.mark.parametrize("share", [True, False])
def test_training_keeps_no_keys_and_values(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], share: bool
) -> None:
    model: Any = build_reward_model(base_folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    args = RewardConfig(**{**cpu_arguments, "max_steps": 1})
    trainer = PairRewardTrainer(
        model, args, share_prompts=share, train_dataset=pairs.select(range(4)), processing_class=tokenizer
    )
    kept: list[Any] = []
    model.model.register_forward_hook(lambda _, __, output: kept.append(getattr(output, "past_key_values", None)))
    trainer.train()
    assert kept
    assert all(cache is None for cache in kept)


@pytest.mark.parametrize("size", [1, 4, 5, 40])
def test_the_loss_of_an_evaluation_is_the_mean_of_its_pairs(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], size: int
) -> None:
    """13 pairs in batches of `size`, the last one ragged."""
    held_out = pairs.select(range(13))
    model: Any = build_reward_model(base_folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    args = RewardConfig(**cpu_arguments, per_device_eval_batch_size=size)
    trainer = PairRewardTrainer(model, args, train_dataset=pairs, eval_dataset=held_out, processing_class=tokenizer)
    reward = RewardModel(model, tokenizer, conversational=True)
    chosen, rejected = (
        reward.score(held_out["prompt"], [answer[-1]["content"] for answer in held_out[side]])
        for side in ("chosen", "rejected")
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(bradley_terry(chosen, rejected).mean().item(), abs=1e-5)


def test_without_arguments_it_trains_one_epoch_into_a_folder_of_the_models_name(
    base_folder: Path, tokenizer: Any, pairs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's own defaults want a GPU, so they are told here that there is none."""
    monkeypatch.chdir(tmp_path)
    on_cpu = partial(RewardConfig, use_cpu=True, bf16=False, report_to="none")
    monkeypatch.setattr("rlhf.reward.trainer.RewardConfig", on_cpu)
    model: Any = build_reward_model(base_folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    model.config._name_or_path = "some/where/model"
    trainer = PairRewardTrainer(model, train_dataset=pairs.select(range(4)), processing_class=tokenizer)
    assert (trainer.args.output_dir, trainer.args.num_train_epochs) == ("model-Reward", 1)


@pytest.mark.parametrize(("steps", "is_said"), [(-1, True), (0, True), (1, False)])
def test_more_epochs_than_one_are_no_matter_where_steps_are_counted(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], steps: int, is_said: bool
) -> None:
    model: Any = build_reward_model(base_folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    args = RewardConfig(**{**cpu_arguments, "num_train_epochs": 2, "max_steps": steps})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PairRewardTrainer(model, args, train_dataset=pairs.select(range(4)), processing_class=tokenizer)
    assert any("overfit after one epoch" in str(warning.message) for warning in caught) == is_said


def test_conversations_without_a_prompt_are_read_as_trl_reads_them(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    """The prompt is what both sides begin with; the ids are those of the same pair with a prompt of its own."""
    few = pairs.select(range(4))
    whole = few.map(lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")})
    ids = []
    for dataset in (few, whole.remove_columns("prompt")):
        model: Any = build_reward_model(base_folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
        trainer = PairRewardTrainer(
            model, RewardConfig(**cpu_arguments), train_dataset=dataset, processing_class=tokenizer
        )
        assert trainer.dropped_too_long == 0
        ids.append([trainer.train_dataset["chosen_ids"][:], trainer.train_dataset["rejected_ids"][:]])
    assert ids[0] == ids[1]


def test_the_first_batch_alone_is_scored_twice(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[float] = []
    monkeypatch.setattr("rlhf.reward.trainer.largest_difference", lambda *_, **__: compared.append(0.0) or 0.0)
    model: Any = build_reward_model(base_folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    args = RewardConfig(**{**cpu_arguments, "max_steps": 3, "per_device_train_batch_size": 4})
    PairRewardTrainer(model, args, train_dataset=pairs, processing_class=tokenizer).train()
    assert len(compared) == 1


def test_one_of_several_processes_goes_on_within_a_later_epoch_with_its_rows(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate hides the sampler behind two wrappers then, and nobody reached it: the first epoch's rows came again."""

    def shard(self: Any, *arguments: Any) -> Any:
        loader = original(self, *arguments)
        return DataLoaderShard(
            loader.dataset, batch_sampler=BatchSamplerShard(loader.batch_sampler, 2, 0), collate_fn=loader.collate_fn
        )

    seen: list[list[int]] = []
    original, compute = PairRewardTrainer.get_train_dataloader, PairRewardTrainer.compute_loss

    def noting(self: Any, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
        seen.append(inputs["input_ids"].flatten().tolist())
        return compute(self, model, inputs, *more, **named)

    monkeypatch.setattr(PairRewardTrainer, "get_train_dataloader", shard)
    monkeypatch.setattr(PairRewardTrainer, "compute_loss", noting)
    settings = {**cpu_arguments, "per_device_train_batch_size": 5, "num_train_epochs": 3}
    model: Any = build_reward_model(base_folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    args = RewardConfig(**{**settings, "save_strategy": "steps", "save_steps": 1})
    trainer = PairRewardTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    assert len(seen) == 12, (
        "four steps of five pairs in each of three epochs; the other process has the other twenty pairs"
    )
    whole = seen[:]
    seen.clear()
    again = PairRewardTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)
    again.train(resume_from_checkpoint=str(Path(args.output_dir) / "checkpoint-9"))
    assert seen == whole[9:]
    assert seen != whole[1:4]


def test_an_order_is_drawn_for_the_pairs_that_are_asked_for(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    model: Any = build_reward_model(base_folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    trainer = PairRewardTrainer(model, RewardConfig(**cpu_arguments), train_dataset=pairs, processing_class=tokenizer)
    assert isinstance(trainer._get_train_sampler(), GroupedByLength), "pairs of similar length meet"
    lengths, size = trainer.lengths(trainer.train_dataset), trainer.args.train_batch_size
    for epoch, begins in ((None, 0), (0.0, 0), (0.97, 0), (1.0, 1), (2.4, 2)):  # where a checkpoint lies
        trainer.state.epoch = epoch
        expected = order_by_length(lengths, size, seed=trainer.args.seed, epoch=begins)
        assert list(trainer._get_train_sampler()) == expected
    few = trainer.train_dataset.select(range(6))
    assert sorted(trainer._get_train_sampler(few)) == list(range(6))
    assert sorted(trainer._get_train_sampler()) == list(range(len(pairs)))
