"""Ratings of attributes in training: the step against plain autograd, the score of the saved model, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig

from rlhf import AttributeRewardTrainer
from rlhf.data.ratings import RatingReader, RatingScale
from rlhf.data.read import ReadReport
from rlhf.data.sources import Source, read_sources
from rlhf.errors import UserError
from rlhf.models.load import load_scorer, load_tokenizer, model_settings
from rlhf.models.text import encode_answers
from rlhf.reward.load import load_reward_model, save_reward_model
from rlhf.reward.model import RewardModel
from tests.conftest import PROMPTS, WORDS
from tests.unit_scale import build_reward_model

WEIGHTS = {"helpfulness": 1.0, "verbosity": -0.5, "humour": 0.25}
K = len(WEIGHTS)


def rated(count: int = 8) -> list[dict[str, Any]]:
    """Answers of different lengths; every third one has no rating of humour, every fourth none of verbosity."""
    rows = []
    for i in range(count):
        attributes: dict[str, float | None] = {
            "helpfulness": float(i % 5),
            "verbosity": 4.0 - i % 3,
            "humour": float(i % 2),
        }
        attributes |= {"humour": None} if i % 3 == 0 else {}
        attributes |= {"verbosity": None} if i % 4 == 0 else {}
        answer = " ".join(WORDS[(i + j) % 9] for j in range(1 + i % 4))
        message = [{"role": "assistant", "content": answer}]
        rows.append({"prompt": PROMPTS[i % len(PROMPTS)], "completion": message, "attributes": attributes})
    return rows


def build(base: Any, tokenizer: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = model_settings(settings)
    return build_reward_model(base, config, pad_token_id=tokenizer.pad_token_id, labels=list(WEIGHTS))


def arguments(**changes: Any) -> RewardConfig:
    settings: dict[str, Any] = {
        "output_dir": "nowhere", "per_device_train_batch_size": 8, "learning_rate": 0.1, "optim": "sgd", "num_train_epochs": 1,
        "logging_steps": 1, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 1e9, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return RewardConfig(**{**settings, **changes})


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (3, 3), (1, 8)])
@pytest.mark.parametrize("share", [False, True], ids=["plain", "shared"])
def test_the_step_is_that_of_the_mean_over_answers(
    base_folder: Any, tokenizer: Any, batch: int, accumulation: int, share: bool
) -> None:
    """SGD's step against autograd of a formula written here: each answer counts once, however many ratings it has."""
    model, rows = build(base_folder, tokenizer), rated()
    before = model.score.weight.detach().clone()
    given = {name: [row["attributes"][name] for row in rows if row["attributes"][name] is not None] for name in WEIGHTS}
    centres = {name: sum(values) / len(values) for name, values in given.items()}
    head = before.clone().requires_grad_()
    losses = []
    for row in rows:
        text = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            features = model.model(input_ids=ids).last_hidden_state[0, -1]
        predicted = head @ features
        errors = [
            (predicted[i] - (row["attributes"][name] - centres[name])) ** 2
            for i, name in enumerate(WEIGHTS)
            if row["attributes"][name] is not None
        ]
        losses.append(torch.stack(errors).mean())
    expected = torch.stack(losses).mean()
    expected.backward()
    trainer = AttributeRewardTrainer(
        model, arguments(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation), weights=WEIGHTS,
        share_prompts=share, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    assert trainer.centres.tolist() == pytest.approx(list(centres.values()))
    trainer.train()
    assert trainer.state.global_step == 1
    assert head.grad is not None
    torch.testing.assert_close((before - model.score.weight.detach()) / 0.1, head.grad, atol=1e-4, rtol=1e-3)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert "accuracy" not in trainer.state.log_history[0], "a single answer is compared with nothing"


@pytest.mark.parametrize("kind", ["full", "lora", "encoder"])
def test_the_saved_model_scores_the_weighted_sum_in_plain_transformers(
    base_folder: Any, encoder_folder: Any, tokenizer: Any, pairs: Dataset, tmp_path: Path, kind: str
) -> None:
    """Of k labels one is made: what transformers or PEFT load is w · (what the trained head said of each attribute)."""
    settings = {"use_peft": True, "lora_r": K} if kind == "lora" else {}  # factors of as many rows as there are labels
    folder = encoder_folder if kind == "encoder" else base_folder
    tokenizer = load_tokenizer(folder, conversational=True)
    model = build(folder, tokenizer, **settings)
    trainer = AttributeRewardTrainer(
        model, arguments(learning_rate=1e-2, optim="adamw_torch"), weights=WEIGHTS, train_dataset=Dataset.from_list(rated(16)),
        eval_dataset=pairs.select(range(9)), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    held_out = trainer.evaluate()
    row = rated()[5]
    ids = torch.tensor(encode_answers(tokenizer, [row["prompt"]], [row["completion"][0]["content"]])[0])
    with torch.no_grad():
        by_attribute = trainer.model.eval()(input_ids=ids).logits[0]
    expected = (by_attribute * torch.tensor(list(WEIGHTS.values()))).sum().item()
    trainer.merge_head()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(held_out["eval_loss"], abs=1e-5), "the scores are the same"
    samples = [(row["prompt"], row["completion"][0]["content"]) for row in rated()]
    save_reward_model(tmp_path / "rm", trainer.model, tokenizer, samples=samples)

    if kind == "lora":
        from peft import AutoPeftModelForSequenceClassification

        plain: Any = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "rm", num_labels=1)
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert plain.config.num_labels == 1
    plain.config.pad_token_id = AutoTokenizer.from_pretrained(tmp_path / "rm").pad_token_id
    with torch.no_grad():
        assert plain.eval()(input_ids=ids).logits.tolist()[0][0] == pytest.approx(expected, abs=1e-5)
    scores = load_reward_model(tmp_path / "rm").score([row["prompt"]], [row["completion"][0]["content"]])
    assert scores.item() == pytest.approx(expected, abs=1e-5)
    assert json.loads((tmp_path / "rm/reward_model.json").read_text())["probe"]


def test_a_merged_head_reads_states_of_16_bits(base_folder: Any, tokenizer: Any, pairs: Dataset) -> None:
    model = build(base_folder, tokenizer, use_peft=True, lora_r=K, dtype="bfloat16")
    trainer = AttributeRewardTrainer(
        model, arguments(), weights=WEIGHTS, train_dataset=Dataset.from_list(rated()), processing_class=tokenizer
    )
    trainer.merge_head()
    scores = RewardModel(trainer.model.eval(), tokenizer).score(pairs["prompt"][:3], ["yes", "no", "dog"])
    assert scores.isfinite().all()


def test_held_out_pairs_are_compared_by_the_weighted_score(base_folder: Any, tokenizer: Any, pairs: Dataset) -> None:
    model = build(base_folder, tokenizer)
    trainer = AttributeRewardTrainer(
        model, arguments(per_device_eval_batch_size=4), weights=WEIGHTS, train_dataset=Dataset.from_list(rated()),
        eval_dataset=pairs.select(range(13)), processing_class=tokenizer,
    )  # fmt: skip
    metrics = trainer.evaluate()
    trainer.merge_head()
    reward, held_out = RewardModel(model, tokenizer), pairs.select(range(13))
    sides = [reward.score(held_out["prompt"], [x[0]["content"] for x in held_out[s]]) for s in ("chosen", "rejected")]
    assert metrics["eval_loss"] == pytest.approx(
        torch.nn.functional.softplus(sides[1] - sides[0]).mean().item(), abs=1e-5
    )
    assert metrics["eval_accuracy"] == pytest.approx((sides[0] > sides[1]).float().mean().item(), abs=1e-6)


def test_a_model_whose_labels_were_not_merged_is_refused(base_folder: Any, tokenizer: Any, tmp_path: Path) -> None:
    build(base_folder, tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a reward model has one label, this one has 3"):
        load_scorer(tmp_path)


def test_what_can_not_be_trained_is_refused(base_folder: Any, tokenizer: Any) -> None:
    data = Dataset.from_list(rated())
    cases: list[tuple[dict[str, float], Any, RewardConfig, str]] = [
        ({"helpfulness": 1.0}, data, arguments(), r"3 labels for 1 attributes; build it with labels=list\(weights\)"),
        ({"helpfulness": 1.0, "wit": 1.0, "humour": 1.0}, data, arguments(), "nobody rated wit"),
        (WEIGHTS, data.to_iterable_dataset(), arguments(), "pass a Dataset"),
        (WEIGHTS, data, arguments(center_rewards_coefficient=0.1), "center_rewards_coefficient"),
    ]
    for weights, rows, args, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            AttributeRewardTrainer(
                build(base_folder, tokenizer), args, weights=weights, train_dataset=rows, processing_class=tokenizer
            )


# ---- Reading ----


def read(rows: list[dict[str, Any]], file: Path, names: tuple[str, ...] = ("helpfulness", "verbosity")) -> Any:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reader, reports = RatingReader(RatingScale(names, 0.0, 4.0)), list[ReadReport]()
    read = read_sources([Source(str(file))], reader.read, reports, "ratings", 0)
    reader.check()
    return read.train, reports[0]


def test_three_layouts_are_read_and_bad_rows_are_counted(tmp_path: Path) -> None:
    flat = {"prompt": "Hi", "response": "a", "helpfulness": 3, "verbosity": None, "id": 7}
    talk = {
        "messages": [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")],
        "attributes": [{"helpfulness": 1, "verbosity": 2}, {"verbosity": 4}],
    }
    ranking = {
        "prompt": "Ho",
        "responses": [{"content": "b", "score": 1, "attributes": {"helpfulness": 0.5}}, {"content": "c", "score": 0}],
    }
    unrated = {"prompt": "Hu", "response": "d", "helpfulness": None}
    pair = {"prompt": "Hy", "chosen": "e", "rejected": "f"}
    rows, report = read([flat, talk, ranking, unrated, pair], tmp_path / "r.jsonl")
    assert [row.values["attributes"] for row in rows] == [
        {"helpfulness": 3.0}, {"helpfulness": 1.0, "verbosity": 2.0}, {"verbosity": 4.0}, {"helpfulness": 0.5}
    ]  # fmt: skip
    assert [len(row.values["prompt"]) for row in rows] == [1, 1, 3, 1]
    assert report.dropped == {
        "rated in none of helpfulness, verbosity": 1, "no ratings of attributes beside an answer": 1
    }  # fmt: skip


def test_ratings_outside_the_scale_and_unknown_attributes_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "response": "a", "helpfulness": rating} for i, rating in enumerate((4, 5, 0, 7))]
    with pytest.raises(UserError) as error:
        read(rows, tmp_path / "r.jsonl", ("helpfulness", "wit"))
    outside, unknown = error.value.problems
    assert "row 2: helpfulness is 5 (2 such ratings); reward.rating_scale says 0 to 4" in outside
    assert unknown == "reward.attributes: nobody rated wit; what is rated in data.preferences is helpfulness."
    assert not math.isnan(
        read(rows[:1], tmp_path / "r.jsonl", ("helpfulness",))[0][0].values["attributes"]["helpfulness"]
    )
