"""One encoding of the prompt equals one encoding per answer: scores, gradients, and where it must not be used."""

from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification
from trl import RewardConfig

from rlhf import PairRewardTrainer
from rlhf.models import packing
from rlhf.models.load import model_settings
from rlhf.models.packing import (
    Packed,
    attention_bias,
    largest_difference,
    obstacle,
    order_by_length,
    pack,
    shared_scores,
    unpack,
)
from rlhf.models.score import score_rows
from rlhf.models.text import encode_answers
from tests.conftest import PROMPTS, WORDS
from tests.unit_scale import build_reward_model

GROUPS = [
    [[5, 6, 7, 8], [5, 6, 9]],  # an ordinary pair
    [[5, 6], [5, 6, 7, 8, 9, 10]],  # one answer is the beginning of the other: it keeps its last token
    [[20, 21], [30]],  # nothing in common
    [[5, 6, 7], [5, 6, 7]],  # the same twice
    [[8]],  # an answer alone
    [[5, 6], [5, 7], [5, 8, 9]],  # three
]


@pytest.mark.parametrize("fill", [False, True])
def test_packing_is_undone_by_unpacking_and_shares_what_is_common(fill: bool) -> None:
    packed = pack(GROUPS, pad_token_id=0, long_row=1000 if fill else None)
    answers = [answer for group in GROUPS for answer in group]
    ids, mask = unpack(packed, pad_token_id=0)
    assert [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)] == answers
    shared_tokens = [int(((packed.segments == 0) & (packed.groups == i)).sum()) for i in range(len(GROUPS))]
    assert shared_tokens == [2, 1, 0, 2, 0, 1], "never all of one answer, unless it is alone"
    assert packed.groups[packed.rows, packed.ends].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 5, 5]
    if not fill:
        assert packed.rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 5, 5]
    tokens = int((packed.segments >= 0).sum())
    assert packed.input_ids.shape == ((1, 25) if fill else (6, 7)), "short ones fill a row without padding"
    assert tokens == 25, "whatever the layout"
    for row, end, answer in zip(packed.rows, packed.ends, answers, strict=True):
        assert packed.input_ids[row, end] == answer[-1]
        assert packed.position_ids[row, end] == len(answer) - 1, "as if the other answers were not there"


def test_answers_see_the_prefix_and_not_each_other() -> None:
    packed = pack([[[5, 6, 7], [5, 8]], [[5]], [[1] * 9]], pad_token_id=0, long_row=1000)
    assert packed.input_ids.tolist() == [[1] * 9 + [5, 6, 7, 8] + [5]], "three groups in a row, longest first"
    bias = attention_bias(packed, torch.float32)[0, 0]
    sees = [[j for j in range(14) if bias[i, j] == 0] for i in range(9, 14)]
    assert sees == [[9], [9, 10], [9, 10, 11], [9, 12], [13]]
    assert packed.position_ids[0, 9:].tolist() == [0, 1, 2, 1, 0]
    padded = attention_bias(pack([[[1]], [[1, 2, 3]]], pad_token_id=0), torch.float32)[0, 0]
    assert [[j for j in range(3) if padded[i, j] == 0] for i in range(3)] == [[0], [1], [2]], "padding sees itself"


def test_rows_are_filled_where_that_makes_less_padding() -> None:
    """Lengths 1 to 400: balanced rows leave less than a twentieth to padding, and don't grow past three of the longest."""
    generator = torch.Generator().manual_seed(0)
    groups = [[list(range(1, n + 1))] for n in torch.randint(1, 400, (32,), generator=generator).tolist()]
    one_each, filled = pack(groups, pad_token_id=0), pack(groups, pad_token_id=0, long_row=1000)
    tokens = int((filled.segments >= 0).sum())
    assert tokens == sum(len(group[0]) for group in groups)
    assert tokens > 0.95 * filled.input_ids.numel()
    assert tokens < 0.65 * one_each.input_ids.numel()
    assert filled.input_ids.shape[1] <= 3 * 400


def model_of(base: Path, tokenizer: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = build_reward_model(base, model_settings(settings), pad_token_id=tokenizer.pad_token_id)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def groups_of(tokenizer: Any, k: int) -> list[list[list[int]]]:
    answers = [" ".join(WORDS[i % 5 : i % 5 + 1 + i % 4]) for i in range(8 * k)]
    prompts = [PROMPTS[i // k] for i in range(8 * k)]
    rows, _ = encode_answers(tokenizer, prompts, answers)
    return [rows[i : i + k] for i in range(0, len(rows), k)]


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"use_peft": True, "lora_r": 4},
    {"use_peft": True, "lora_r": 4, "load_in_4bit": True},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["full", "lora", "4-bit"])
@pytest.mark.parametrize("k", [2, 8])
@pytest.mark.parametrize("fill", [False, True], ids=["a row each", "filled rows"])
def test_scores_are_those_of_the_plain_forward(
    base_folder: Path, tokenizer: Any, layout: dict[str, Any], k: int, fill: bool
) -> None:
    """1e-5 in float32 and on 4-bit weights (whose activations are float32), for pairs and for eight answers at once."""
    model, groups = model_of(base_folder, tokenizer, **layout), groups_of(tokenizer, k)
    packed = pack(groups, pad_token_id=tokenizer.pad_token_id, long_row=1000 if fill else None)
    with torch.no_grad():
        found = shared_scores(model, model, packed)
    flat = [row for group in groups for row in group]
    expected = score_rows(model, flat, pad_token_id=tokenizer.pad_token_id)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert largest_difference(model, packed, pad_token_id=tokenizer.pad_token_id) <= 1e-5
    assert found.std() > 0.1


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_gradients_are_those_of_the_plain_forward(base_folder: Path, tokenizer: Any, checkpointing: bool) -> None:
    groups = groups_of(tokenizer, 2)
    gradients = []
    for share in (False, True):
        model = model_of(base_folder, tokenizer, use_peft=True, lora_r=4, lora_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        packed = pack(groups, pad_token_id=tokenizer.pad_token_id)
        if share:
            scores = shared_scores(model, model, packed)
        else:
            ids, mask = unpack(packed, pad_token_id=tokenizer.pad_token_id)
            scores = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        (scores[0::2] - scores[1::2]).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3)


def test_a_mask_that_lets_answers_see_each_other_would_be_noticed(
    base_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def causal(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
        b, t = packed.segments.shape
        looks = torch.ones(t, t, dtype=torch.bool).tril()[None].expand(b, t, t)
        return torch.zeros(looks.shape, dtype=dtype).masked_fill(~looks, torch.finfo(dtype).min)[:, None]

    monkeypatch.setattr(packing, "attention_bias", causal)
    packed = pack(groups_of(tokenizer, 2), pad_token_id=tokenizer.pad_token_id)
    model = model_of(base_folder, tokenizer)
    assert largest_difference(model, packed, pad_token_id=tokenizer.pad_token_id) > 1e-2


# ---- Where it must not be used ----


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attn_implementation": "eager"}, "attn_implementation is eager"),
        ({"sliding_window": 8}, "sliding window"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layers are sliding_attention"),
    ],
)
def test_obstacles_are_named(base_folder: Path, change: dict[str, Any], said: str) -> None:
    attention = change.pop("attn_implementation", "sdpa")
    config = AutoConfig.from_pretrained(base_folder, num_labels=1)
    for name, value in change.items():
        setattr(config, name, value)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    reason = obstacle(model)
    assert reason is not None
    assert said in reason


def test_an_encoder_is_an_obstacle(encoder_folder: Path) -> None:
    model = build_reward_model(encoder_folder, pad_token_id=0)
    assert obstacle(model) == "an encoder's tokens look in both directions"


def test_sharing_turns_itself_off_where_scores_would_differ(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attention that ignores the mask (as a kernel might): the first batch shows it, and training is the plain one."""
    right = packing.attention_bias
    monkeypatch.setattr(
        packing,
        "attention_bias",
        lambda packed, dtype: right(replace(packed, segments=packed.segments.clamp(max=1)), dtype),
    )
    arguments = {**cpu_arguments, "num_train_epochs": 1, "logging_steps": 1}

    def losses(share: bool) -> tuple[Any, list[float]]:
        model = model_of(base_folder, tokenizer)
        args = RewardConfig(**arguments, train_sampling_strategy="sequential")
        trainer = PairRewardTrainer(model, args, share_prompts=share, train_dataset=pairs, processing_class=tokenizer)
        trainer.train()
        return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]

    with pytest.warns(UserWarning, match="scores with a shared prompt differ from plain ones"):
        trainer, found = losses(True)
    assert not trainer._shares
    assert found == pytest.approx(losses(False)[1], abs=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_a_wrong_score_shows_however_near_zero_a_new_head_is(base_folder: Path, tokenizer: Any, size: float) -> None:
    """Scores of 0.001 that are wrong by half of that are above every tolerance, bfloat16's too; rounding is below it."""
    model = model_of(base_folder, tokenizer)
    with torch.no_grad():
        model.score.weight.mul_(size / model.score.weight.norm())
    packed = pack(groups_of(tokenizer, 2), pad_token_id=tokenizer.pad_token_id)
    right = packing.largest_difference(model, packed, pad_token_id=tokenizer.pad_token_id)
    assert right < packing.tolerance(model, "no")
    read_elsewhere = replace(packed, ends=packed.ends - 1)
    original = packing.unpack
    with pytest.MonkeyPatch.context() as patch:  # the plain scores stay as they are
        patch.setattr(packing, "unpack", lambda _, pad_token_id: original(packed, pad_token_id=pad_token_id))
        wrong = packing.largest_difference(model, read_elsewhere, pad_token_id=tokenizer.pad_token_id)
    assert wrong > packing.tolerance(model, "bf16")
    with torch.no_grad():
        model.score.weight.zero_()
    assert packing.largest_difference(model, packed, pad_token_id=tokenizer.pad_token_id) == 0, (
        "and a head of 0 is no fault"
    )


def test_sharing_survives_bf16_autocast(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    """Sums in another order differ by more than float32's tolerance there, and mean nothing."""
    torch.manual_seed(0)
    args = RewardConfig(**{**cpu_arguments, "bf16": True, "max_steps": 1})
    model = model_of(base_folder, tokenizer)
    torch.nn.init.normal_(model.score.weight, std=2.0)  # scores of several units: the difference is above 1e-4
    trainer = PairRewardTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    assert trainer._compared
    assert trainer._shares
    assert packing.tolerance(model, "no") == 1e-4


# ---- Order ----


def test_batches_hold_similar_lengths_in_an_order_of_seed_and_epoch() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (1003,), generator=generator).tolist()
    first = order_by_length(lengths, 8, seed=3, epoch=0)
    assert Counter(first) == Counter(range(1003)), "every row once"
    torch.manual_seed(99)
    assert order_by_length(lengths, 8, seed=3, epoch=0) == first, (
        "the same epoch again is the same order, whatever the global generator is at: what resuming needs"
    )
    assert order_by_length(lengths, 8, seed=3, epoch=1) != first
    batches = [first[i : i + 8] for i in range(0, 1000, 8)]
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(batches)
    assert spread < 15, "of lengths up to 200; at random it is near 160"
    longest = [max(lengths[i] for i in b) for b in batches]
    assert longest != sorted(longest, reverse=True), "batches themselves are shuffled"
    assert len(first[1000:]) == 3, "the ragged batch is last"


# ---- Several pairs of one ranking ----


def test_pairs_of_one_group_encode_each_answer_once_and_lose_what_exploded_pairs_lose(
    base_folder: Path, tokenizer: Any, cpu_arguments: dict[str, Any]
) -> None:
    """Eight ranked answers make 28 pairs: their loss and gradient are those of 28 pairs encoded two by two."""
    answers = [" ".join(WORDS[i % 5 : i % 5 + 1 + i % 4]) + f" {WORDS[i % 7]}" for i in range(8)]
    rows = [
        {"prompt": prompt, "chosen": answers[i], "rejected": answers[j], "group": f"{number}", "margin": 0.1 * (j - i)}
        for number, prompt in enumerate(PROMPTS[:2])
        for i, j in combinations(range(8), 2)
    ]
    found = {}
    for name in ("grouped", "exploded"):
        data = Dataset.from_list(rows if name == "grouped" else [{**row, "group": None} for row in rows])
        args = RewardConfig(**{**cpu_arguments, "per_device_train_batch_size": 56, "max_steps": 1}, logging_steps=1)
        trainer = PairRewardTrainer(
            model_of(base_folder, tokenizer), args, train_dataset=data, processing_class=tokenizer
        )
        trainer.train()
        row = trainer.state.log_history[0]
        found[name] = (row["loss"], row["grad_norm"], row["num_tokens"])
    assert found["grouped"][:2] == pytest.approx(found["exploded"][:2], rel=1e-4)
    each = [encode_answers(tokenizer, [prompt] * 8, answers)[0] for prompt in PROMPTS[:2]]
    packed = pack(each, pad_token_id=tokenizer.pad_token_id)
    assert found["grouped"][2] == (packed.segments >= 0).sum(), "8 answers and one prompt a group"
    assert found["exploded"][2] > 4 * found["grouped"][2]


def test_pairs_of_one_group_stay_together_in_every_epoch() -> None:
    groups = [f"g{i // 6}" for i in range(60)] + [None] * 12
    order = order_by_length([10 + i % 7 for i in range(72)], 8, seed=0, epoch=0, groups=groups)
    assert Counter(order) == Counter(range(72))
    batches = [order[i : i + 8] for i in range(0, 72, 8)]
    halves = Counter(groups[i] for batch in batches for i in {groups[i]: i for i in batch}.values() if groups[i])
    assert sum(halves.values()) < 20, "ten groups of six; at random each would lie in four or five batches"
    assert max(halves.values()) == 2
