"""The contrastive trainer: two views that differ, a pair loss over both, prototypes that survive a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertModel

from rlhf import ContrastiveRewardTrainer, PairRewardTrainer
from rlhf.errors import UserError
from rlhf.reward.contrastive import CONTRASTS, set_dropout, two_views
from tests.reward.test_trainer import build, losses, train

EXTRAS = sorted(CONTRASTS)


def make(base: Path, tokenizer: Any, pairs: Dataset, arguments: dict[str, Any], **extra: Any) -> Any:
    from trl import RewardConfig

    settings = {key: extra.pop(key) for key in list(extra) if key in ("use_peft", "lora_r")}
    config = {key: extra.pop(key) for key in list(extra) if key in RewardConfig.__dataclass_fields__}
    args = RewardConfig(**{"per_device_train_batch_size": 8, "learning_rate": 1e-3, **arguments, **config})
    return ContrastiveRewardTrainer(
        build(base, tokenizer, **settings), args, train_dataset=pairs, processing_class=tokenizer, **extra
    )


def first_batch(trainer: Any) -> dict[str, Any]:
    return next(iter(trainer.get_train_dataloader()))


def gradients(trainer: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(8))
    loss.backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [True, False], ids=["shared", "plain"])
def test_two_views_differ_in_training_and_evaluation_has_one(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], share: bool
) -> None:
    trainer = make(base_folder, tokenizer, pairs, cpu_arguments, share_prompts=share)
    batch = first_batch(trainer)
    batch = {name: batch[name] for name in batch}
    trainer.model.train()
    scored = trainer.scored(trainer.model, dict(batch))
    assert scored.representations is not None
    first, second = scored.representations.chunk(2)
    assert (first - second).abs().amax(dim=1).min() > 1e-4, "no answer has two equal views"
    assert torch.cosine_similarity(first, second).median() > 0.8, "and both are views of the same answer"
    head = trainer.model.score.weight
    torch.testing.assert_close((scored.representations @ head.T).squeeze(-1), scored.rewards, atol=1e-5, rtol=1e-5)

    trainer.model.eval()
    with torch.no_grad():
        once = trainer.scored(trainer.model, dict(batch))
        again = trainer.scored(trainer.model, dict(batch))
    assert once.representations is None
    assert torch.equal(once.rewards, again.rewards), "evaluation knows no dropout"


@pytest.mark.parametrize("extra", EXTRAS)
def test_checkpointing_recomputes_the_same_views(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], extra: str
) -> None:
    both = []
    for checkpointing in (False, True):
        trainer = make(
            base_folder, tokenizer, pairs, {**cpu_arguments, "gradient_checkpointing": checkpointing}, extra=extra
        )
        if checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        both.append(gradients(trainer, first_batch(trainer)))
    plain, checkpointed = both
    assert set(plain) == set(checkpointed)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)


def test_without_weight_and_dropout_it_is_the_plain_trainer(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    """Both views are the answers themselves, so the mean over them is the pair loss: over a whole epoch, columns included.

    The tolerance is that of sums over twice as many rows, in float32.
    """
    data = pairs.add_column("margin", [0.1 * (i % 7) for i in range(len(pairs))])
    plain = train(PairRewardTrainer, build(base_folder, tokenizer), tokenizer, data, cpu_arguments)

    def without(*arguments: Any, **named: Any) -> Any:
        return ContrastiveRewardTrainer(*arguments, extra_weight=0.0, dropout=1e-12, **named)

    twice = train(without, build(base_folder, tokenizer), tokenizer, data, cpu_arguments)  # type: ignore[arg-type]
    assert losses(twice) == pytest.approx(losses(plain), abs=2e-5)


def test_the_term_counts_by_its_weight(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    """Loss(β) - Loss(0) = β times the mean of the elements' losses, under the same dropout."""
    by_weight = {}
    for weight in (0.0, 0.5, 1.0):
        trainer = make(base_folder, tokenizer, pairs, cpu_arguments, extra="simcse", extra_weight=weight)
        trainer.model.train()
        torch.manual_seed(0)
        by_weight[weight] = trainer.compute_loss(
            trainer.model, dict(first_batch(trainer)), num_items_in_batch=torch.tensor(8)
        ).item()
        term = trainer._metrics["train"]["contrastive"][-1]
    assert by_weight[1.0] - by_weight[0.0] == pytest.approx(term, abs=1e-5)
    assert by_weight[0.5] - by_weight[0.0] == pytest.approx(term / 2, abs=1e-5)


@pytest.mark.parametrize("extra", ["simcse", "swav_diff"])
def test_a_resumed_run_ends_bit_for_bit(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], tmp_path: Path, extra: str
) -> None:
    """Prototypes and their optimizer state come back too."""
    saving = {**cpu_arguments, "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}

    def whole(folder: str, **more: Any) -> Any:
        made = make(
            base_folder, tokenizer, pairs, {**saving, "output_dir": str(tmp_path / folder), **more}, extra=extra
        )
        return made

    through = whole("a")
    through.train()
    whole("b", max_steps=2, lr_scheduler_type="constant")  # only to show that another folder is not read
    resumed = whole("a")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, parameter in through.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    if through.prototypes is not None:
        assert torch.equal(through.prototypes, resumed.prototypes)
        start = torch.randn(20, 64, generator=torch.Generator().manual_seed(through.args.seed))
        assert (through.prototypes - start).abs().max() > 1e-3, "they are trained"


def test_lora_and_encoders_have_views_too(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    trainer = make(base_folder, tokenizer, pairs, cpu_arguments, use_peft=True, lora_r=4)
    trainer.train()
    assert losses_fall_or_hold(trainer)

    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    encoder = make(tmp_path / "bert", tokenizer, pairs, cpu_arguments)
    scored = encoder.scored(encoder.model.train(), dict(first_batch(encoder)))
    assert scored.representations.shape == (2 * 2 * 8, 32)
    head = encoder.model.classifier
    seen = scored.representations @ head.weight.T + head.bias
    torch.testing.assert_close(seen.squeeze(-1), scored.rewards, atol=1e-5, rtol=1e-5)


def losses_fall_or_hold(trainer: Any) -> bool:
    similarity = [row["view_similarity"] for row in trainer.state.log_history if "view_similarity" in row]
    return bool(similarity) and all(0 < value < 1 for value in similarity)


def test_without_dropout_there_are_no_views(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="both views of an answer are the same"):
        make(base_folder, tokenizer, pairs, cpu_arguments, dropout=0.0)
    with pytest.raises(UserError, match="'simclr' is none of simcse"):
        make(base_folder, tokenizer, pairs, cpu_arguments, extra="simclr")


def test_dropout_reaches_attention_that_was_built_without_it(base_folder: Path, tokenizer: Any) -> None:
    model = build(base_folder, tokenizer)
    assert set_dropout(model, 0.05) == 2, "one place a layer"
    ids = torch.randint(5, 200, (4, 9), generator=torch.Generator().manual_seed(0))
    model.train()
    first, second = (model(input_ids=ids).logits for _ in range(2))
    assert (first - second).abs().min() > 1e-5


def test_doubling_keeps_pairs_apart() -> None:
    ids = torch.arange(8).reshape(4, 2)  # two pairs: chosen 0, 1, rejected 2, 3
    doubled = two_views({"input_ids": ids, "attention_mask": torch.ones(4, 2), "margin": torch.tensor([1.0, 2.0])})
    assert doubled["pairs"].tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert doubled["margin"].tolist() == [1.0, 2.0, 1.0, 2.0]
