"""`PairRewardTrainer` against TRL's own trainer, against itself in other batch shapes, and against planted truths."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from rlhf import (
    LabelSmoothingRewardTrainer,
    MarginRewardTrainer,
    Objective,
    PairRewardTrainer,
    SoftLabelRewardTrainer,
)
from rlhf.errors import TrainingError, UserError
from rlhf.models.load import load_scorer, model_settings
from rlhf.models.scalar_head import score_head
from rlhf.recipe.objectives import Loss
from rlhf.reward.columns import check_columns
from rlhf.reward.model import RewardModel
from rlhf.reward.trainer import training_columns
from tests.conftest import PROMPTS
from tests.unit_scale import build_reward_model


def build(base: Path, tokenizer: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return build_reward_model(base, model_settings(settings), pad_token_id=tokenizer.pad_token_id)


def train(cls: type, model: Any, tokenizer: Any, pairs: Dataset, arguments: dict[str, Any], **extra: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "max_grad_norm": 1e9,
        **arguments,
        **extra,
    }
    trainer = cls(model, RewardConfig(**settings), train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("share", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("margin", [False, True])
def test_equals_trl_on_plain_and_margin_losses(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], margin: bool, share: bool
) -> None:
    """TRL's RewardTrainer is the oracle: same losses and same weights over an epoch of full batches in one order.

    With one encoding of each prompt, sums run in another order; where a gradient is nearly 0, Adam turns that rounding
    into a part of a step (the learning rate is 1e-3), so one weight in a thousand may differ by that much. Without, some
    CPUs round a little otherwise all the same (AVX-512: 2.5e-5 after five steps; where was not traced).
    """
    data = pairs.add_column("margin", [0.1 * (i % 7) for i in range(len(pairs))]) if margin else pairs
    arguments = {**cpu_arguments, "train_sampling_strategy": "sequential"}
    cls: Any = partial(PairRewardTrainer, share_prompts=share)
    ours = train(cls, build(base_folder, tokenizer), tokenizer, data, arguments)
    assert ours._shares == share
    theirs = train(RewardTrainer, build(base_folder, tokenizer), tokenizer, data, arguments)
    assert len(losses(ours)) == 5
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    differences = torch.cat(
        [(p - theirs.model.get_parameter(name)).abs().flatten() for name, p in ours.model.named_parameters()]
    )
    assert differences.max() < (1e-3 if share else 1e-4)
    assert (differences > 1e-5).double().mean() <= 1e-3


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 4), (3, 6), (1, 16)])
def test_accumulation_equals_one_big_batch(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], batch: int, accumulation: int
) -> None:
    """One optimizer step over 16 pairs, however they are cut; (3, 6) leaves a ragged last micro-batch of one pair."""
    data = pairs.select(range(16)).add_column("weight", [1.0 + i % 3 for i in range(16)])
    whole = train(
        PairRewardTrainer, build(base_folder, tokenizer), tokenizer, data, cpu_arguments, per_device_train_batch_size=16
    )
    parts = train(
        PairRewardTrainer,
        build(base_folder, tokenizer),
        tokenizer,
        data,
        cpu_arguments,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    first, second = whole.state.log_history[0], parts.state.log_history[0]
    assert parts.state.global_step == whole.state.global_step == 1
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)


def test_confidence_weight_and_smoothing_reach_the_loss(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    """At step 0 with a zero head d = 0, so the loss is known: w (log 2), whatever p is; with a margin m it is not."""

    def zero_headed() -> Any:
        model = build(base_folder, tokenizer)
        torch.nn.init.zeros_(model.score.weight)
        return model

    n = len(pairs)
    cases = [
        (SoftLabelRewardTrainer, {"confidence": [0.3] * n}, math.log(2)),
        (SoftLabelRewardTrainer, {"confidence": [1.0] * n, "weight": [3.0] * n}, 3 * math.log(2)),
        (MarginRewardTrainer, {"margin": [1.0] * n}, math.log(1 + math.e)),
        (LabelSmoothingRewardTrainer, {"margin": [1.0] * n}, math.log(1 + math.e) - 0.2),
    ]
    for cls, columns, expected in cases:
        data = pairs
        for name, values in columns.items():
            data = data.add_column(name, values)
        trainer = train(cls, zero_headed(), tokenizer, data, cpu_arguments, learning_rate=1e-12)
        assert losses(trainer)[0] == pytest.approx(expected, abs=1e-4), cls.__name__


def test_it_learns_a_planted_preference(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:

    with pytest.warns(UserWarning, match="overfit after one epoch"):
        trainer = train(
            PairRewardTrainer,
            build(base_folder, tokenizer),
            tokenizer,
            pairs,
            cpu_arguments,
            num_train_epochs=6,
            learning_rate=5e-3,
        )
    reward = RewardModel(trainer.model, tokenizer)
    unseen = [[{"role": "user", "content": f"three {word}"}] for word in ("red", "dog", "plum")]
    assert (reward.score(unseen, ["yes cat"] * 3) > reward.score(unseen, ["no cat"] * 3)).all()


@pytest.mark.fault("adapter read back")
@pytest.mark.parametrize("four_bit", [False, True], ids=["lora", "qlora"])
def test_lora_trains_and_saves_the_head(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], tmp_path: Path, four_bit: bool
) -> None:
    from rlhf.reward.load import load_reward_model, save_reward_model

    settings = {"use_peft": True, "lora_r": 4, "load_in_4bit": four_bit}
    if four_bit:
        settings["dtype"] = "bfloat16"
    model = build(base_folder, tokenizer, **settings)
    assert isinstance(model, PeftModel)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train(PairRewardTrainer, model, tokenizer, pairs, cpu_arguments, learning_rate=1e-2)
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p.float(), before[name].float())}
    assert any("score.modules_to_save" in name for name in changed), "the head is trained"
    assert any("lora_B" in name for name in changed)
    assert all("lora_" in name or "modules_to_save" in name for name in changed), "the base is not"
    samples = [(prompt, f"{word} dog") for prompt in PROMPTS for word in ("yes", "no")]
    saved = save_reward_model(
        tmp_path / "rm", trainer.model, tokenizer, samples=samples, facts={"load_in_4bit": four_bit}
    )
    prompts, answers = [p for p, _ in samples], [a for _, a in samples]
    scores = load_reward_model(tmp_path / "rm").score(prompts, answers)
    assert torch.equal(scores, saved.score(prompts, answers))
    # On 4-bit weights TRL trains the adapter in bfloat16, and PEFT loads it in float32.
    in_memory = RewardModel(trainer.model, tokenizer).score(prompts, answers)
    assert (scores - in_memory).abs().max().item() < (0.1 * saved.std if four_bit else 1e-6)
    assert load_scorer(tmp_path / "rm", load_in_4bit=four_bit).config.problem_type == "regression"


@pytest.mark.parametrize("autocast", [False, True])
def test_the_head_is_exact_on_a_base_of_16_bits(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], tmp_path: Path, autocast: bool
) -> None:
    """At a learning rate of LoRA every weight of it moves; in bfloat16 four of five stay. What is loaded is what was trained."""
    from rlhf.reward.load import save_reward_model

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = build(base, tokenizer, use_peft=True, lora_r=4, dtype="bfloat16")
    start = score_head(model).weight.detach().float().clone()
    trainer = train(PairRewardTrainer, model, tokenizer, pairs, {**cpu_arguments, "bf16": autocast}, learning_rate=1e-5)
    head = score_head(trainer.model)
    assert head.weight.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert (head.weight != start).float().mean().item() > 0.95
    samples = [(prompt, f"{word} dog") for prompt in PROMPTS for word in ("yes", "no")]
    save_reward_model(tmp_path / "rm", trainer.model, tokenizer, samples=samples)
    loaded = load_scorer(tmp_path / "rm")
    assert loaded.get_input_embeddings().weight.dtype == torch.bfloat16
    assert torch.equal(score_head(loaded).weight, head.weight)
    scores = RewardModel(loaded, tokenizer).score(*zip(*samples, strict=True))
    assert not torch.equal(scores, scores.bfloat16().float()), "they are no multiples of 2^-8 of their size"


@pytest.mark.fault("rows too long")
def test_too_long_pairs_are_counted_and_said(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    long = pairs.select(range(4)).map(lambda row: {"chosen": [{"role": "assistant", "content": "yes " * 100}]})
    from datasets import concatenate_datasets

    data = concatenate_datasets([pairs, long])
    args = RewardConfig(**cpu_arguments, max_length=60)
    with pytest.warns(UserWarning, match="4 of 44 pairs of the train set are longer than max_length=60"):
        trainer = PairRewardTrainer(build(base_folder, tokenizer), args, train_dataset=data, processing_class=tokenizer)
    assert trainer.dropped_too_long == 4
    with pytest.raises(UserError, match="all 44 pairs"):
        PairRewardTrainer(
            build(base_folder, tokenizer),
            RewardConfig(**cpu_arguments, max_length=3),
            train_dataset=data,
            processing_class=tokenizer,
        )


@pytest.mark.fault("margin out of range")
def test_columns_are_checked_before_training(pairs: Dataset) -> None:
    with pytest.raises(UserError, match="no column 'confidence'"):
        check_columns(pairs, ("confidence",))
    bad = pairs.add_column("confidence", [0.5] * 7 + [1.7] + [0.5] * 32).add_column("margin", [math.nan] + [0.0] * 39)
    with pytest.raises(UserError) as error:
        check_columns(bad, ("confidence",))
    assert [p.split(":")[1].strip().split(",")[0] for p in error.value.problems] == ["row 0", "row 7"]


@pytest.mark.fault("not finite")
def test_a_loss_that_is_not_finite_stops_before_the_update(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    model = build(base_folder, tokenizer)
    with torch.no_grad():
        model.score.weight.fill_(math.nan)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "score" not in name}
    with pytest.raises(TrainingError, match="nothing was updated"):
        train(PairRewardTrainer, model, tokenizer, pairs, cpu_arguments)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_trl_with_the_wrong_task_type_is_why_we_force_it(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The trap itself, so that a fixed PEFT will tell us: without SEQ_CLS the head is not saved."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=1)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no trained score"):
        load_scorer(tmp_path)


@pytest.mark.parametrize("share", [False, True], ids=["plain", "shared"])
def test_evaluation_during_training_counts_every_pair_once(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], share: bool
) -> None:
    """13 held-out pairs in batches of 4: the loss and accuracy that follow from scores of one pair at a time."""

    model = build(base_folder, tokenizer)
    args = RewardConfig(**cpu_arguments, per_device_eval_batch_size=4, num_train_epochs=1)
    held_out = pairs.select(range(13))
    trainer = PairRewardTrainer(
        model, args, share_prompts=share, train_dataset=pairs, eval_dataset=held_out, processing_class=tokenizer
    )
    metrics = trainer.evaluate()
    reward = RewardModel(model, tokenizer)
    sides = [reward.score(held_out["prompt"], [x[0]["content"] for x in held_out[s]]) for s in ("chosen", "rejected")]
    difference = sides[0] - sides[1]
    assert metrics["eval_loss"] == pytest.approx(torch.nn.functional.softplus(-difference).mean().item(), abs=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(
        (difference > 0).float().mean().item(), abs=0.06
    )  # mean over batches


def hinge(chosen: torch.Tensor, rejected: torch.Tensor, *, gap: torch.Tensor) -> torch.Tensor:
    """Another loss, with a column of its own: max(0, gap - d)."""
    return (gap - (chosen - rejected)).clamp(min=0)


@pytest.mark.parametrize("share", [False, True], ids=["plain", "shared"])
def test_another_loss_is_a_row_and_a_formula(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], share: bool
) -> None:
    """The trainer takes function and columns from the table's record, packed or not: with a zero head d = 0 and the loss is the gap."""
    row = Objective("hinge", "a hinge loss", loss=Loss(f"{__name__}.hinge", columns={"gap": 1.0}))
    rows = training_columns(
        [{**pair, **({"gap": 3.0} if i % 2 else {})} for i, pair in enumerate(pairs)], row.loss.columns
    )
    model = build(base_folder, tokenizer)
    torch.nn.init.zeros_(model.score.weight)
    cls: Any = partial(PairRewardTrainer, loss=row.loss, share_prompts=share)
    settings = {"learning_rate": 1e-12, "per_device_train_batch_size": len(rows)}
    trainer = train(cls, model, tokenizer, Dataset.from_list(rows), cpu_arguments, **settings)
    assert trainer._shares == share
    assert losses(trainer) == pytest.approx([2.0], abs=1e-5)


def test_streamed_rows_train_like_rows_in_memory(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    """A stream has no length and may not know its columns; in the file's order its losses are the same."""
    arguments = {**cpu_arguments, "train_sampling_strategy": "sequential", "max_steps": 4}
    expected = losses(train(PairRewardTrainer, build(base_folder, tokenizer), tokenizer, pairs, arguments))
    stream = pairs.to_iterable_dataset().map(lambda row: row)  # forgets the columns
    assert stream.column_names is None
    found = train(PairRewardTrainer, build(base_folder, tokenizer), tokenizer, stream, arguments)
    assert losses(found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 40])
def test_evaluation_is_over_all_pairs_whatever_the_batches(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], size: int
) -> None:
    """13 pairs in batches of `size`, the last one ragged: the means are those of the 13, at every evaluation."""
    held_out = pairs.select(range(13))
    args = RewardConfig(**cpu_arguments, num_train_epochs=1, per_device_eval_batch_size=size)
    model = build(base_folder, tokenizer)
    trainer = PairRewardTrainer(model, args, train_dataset=pairs, eval_dataset=held_out, processing_class=tokenizer)
    reward = RewardModel(model, tokenizer, conversational=True)
    chosen, rejected = (
        reward.score(held_out["prompt"], [answer[-1]["content"] for answer in held_out[side]])
        for side in ("chosen", "rejected")
    )
    for _ in range(2):
        metrics = trainer.evaluate()
        assert metrics["eval_accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
        assert metrics["eval_margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-4)
        assert metrics["eval_mean_reward"] == pytest.approx(torch.cat([chosen, rejected]).mean().item(), abs=1e-4)
    assert trainer.checks.entries == {}
