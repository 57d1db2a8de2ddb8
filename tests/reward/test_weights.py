"""Weights by prompt: the gradient of one element a prompt, made by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import RewardConfig

from rlhf import PairRewardTrainer
from rlhf.data.rows import Pair
from rlhf.objectives.pairwise import pair_loss
from rlhf.recipe import load_recipe
from rlhf.reward.trainer import training_columns
from rlhf.reward.weights import prompt_balanced
from tests.conftest import PROMPTS, WORDS
from tests.unit_scale import build_reward_model


def pair(prompt: Any, chosen: str, rejected: str, **columns: float) -> Pair:
    sides = {s: [{"role": "assistant", "content": t}] for s, t in (("chosen", chosen), ("rejected", rejected))}
    return {"prompt": prompt, **sides, **columns}  # type: ignore[typeddict-item]


ROWS = [
    *(pair(PROMPTS[0], f"yes {WORDS[i]}", f"no {WORDS[j]}") for i in range(3) for j in range(2)),
    pair(PROMPTS[1], "yes red", "no blue", weight=0.5),
    pair(PROMPTS[2], "yes plum", "no"),
]


def test_every_prompt_counts_the_same() -> None:
    weights = [row["weight"] for row in prompt_balanced(ROWS)]
    assert sum(weights[:6]) == pytest.approx(weights[7]), "six pairs of one prompt count as the one pair of another"
    assert weights[6] == pytest.approx(weights[7] / 2), "a weight that was there stays"
    alone = prompt_balanced([ROWS[0], ROWS[7]])
    assert [row["weight"] for row in alone] == [1.0, 1.0]


def test_the_step_is_that_of_the_mean_over_prompts(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """SGD's step in the trainer against the gradient of the mean over prompts, written out with plain tensors."""
    torch.manual_seed(0)
    model: Any = build_reward_model(base_folder, pad_token_id=tokenizer.pad_token_id)
    args = RewardConfig(
        str(tmp_path), per_device_train_batch_size=8, learning_rate=1.0, optim="sgd", num_train_epochs=1, logging_steps=1,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
        max_grad_norm=1e9, lr_scheduler_type="constant",
    )  # fmt: skip
    rows = [*ROWS[:6], ROWS[7], pair(PROMPTS[3], "yes dog", "no cat")]
    data = Dataset.from_list(training_columns(prompt_balanced(rows)))
    trainer = PairRewardTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    before = model.score.weight.detach().clone()

    features = []
    for row in rows:
        for side in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                features.append(model.model(input_ids=ids).last_hidden_state[0, -1])
    head = before.clone().requires_grad_()
    scored = [(feature * head[0]).sum() for feature in features]
    losses = pair_loss(torch.stack(scored[0::2]), torch.stack(scored[1::2]))
    (losses[:6].mean() / 3 + losses[6] / 3 + losses[7] / 3).backward()
    trainer.train()
    assert head.grad is not None
    torch.testing.assert_close(before - model.score.weight.detach(), head.grad, atol=1e-5, rtol=1e-4)


def test_the_key_stands_in_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "name: x\nbackbone: {model: m}\ndata: {preferences: p.jsonl}\nreward: {group_weight: prompt}\n"
    )
    assert load_recipe(tmp_path / "r.yaml").reward.group_weight == "prompt"
