"""Rankings in training: rows made of pairs, batches, the step against plain autograd, and what is refused."""

import itertools
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import RewardConfig

from rlhf import PairRewardTrainer, RankingRewardTrainer
from rlhf.data.rankings import Answer, Ranking, comparisons
from rlhf.data.rows import Pair
from rlhf.errors import UserError
from rlhf.reward.rankings import RankingCollator, comparisons_of, ranking_rows
from tests.conftest import PROMPTS, WORDS
from tests.unit_scale import build_reward_model


def ranking(number: int, scores: list[float]) -> Ranking:
    """Answers of different lengths to one prompt."""
    answers = [
        Answer(" ".join([WORDS[(number + i) % 9]] * (1 + i % 3)) + f" {WORDS[i]}", s) for i, s in enumerate(scores)
    ]
    return Ranking(PROMPTS[number], answers)


SCORES = [[2.0, 0.0, 1.0, 1.0], [1.0, 3.0], [0.0, 0.0, 5.0], [4.0, 3.0, 2.0, 1.0, 0.0]]
RANKINGS = [ranking(number, scores) for number, scores in enumerate(SCORES)]
PAIRS: list[Pair] = [pair for one in RANKINGS for pair in comparisons(one)]


def k_wise() -> Dataset:
    """The rankings as K-wise rows."""
    return Dataset.from_list(
        [
            {"prompt": one.prompt, "responses": [{"content": a.content, "score": a.score} for a in one.answers]}
            for one in RANKINGS
        ]
    )


def build(base: Any, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    return build_reward_model(base, pad_token_id=tokenizer.pad_token_id)


def arguments(**changes: Any) -> RewardConfig:
    settings: dict[str, Any] = {
        "output_dir": "nowhere", "per_device_train_batch_size": 4, "learning_rate": 1.0, "optim": "sgd", "num_train_epochs": 1,
        "logging_steps": 1, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 1e9, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return RewardConfig(**{**settings, **changes})


# ---- Rows ----


def test_pairs_of_a_ranking_become_it_again() -> None:
    rows = ranking_rows(PAIRS)
    assert [len(row["responses"]) for row in rows] == [4, 2, 3, 5]
    for row, one in zip(rows, RANKINGS, strict=True):
        texts = [response["content"][0]["content"] for response in row["responses"]]  # type: ignore[index]
        scores = {answer.content: answer.score for answer in one.answers}
        expected = {(a, b) for a, b in itertools.permutations(scores, 2) if scores[a] > scores[b]}
        assert {(texts[i], texts[j]) for i, j in row["beats"]} == expected
        assert "weight" not in row


def test_pairs_without_a_group_are_rankings_of_two_and_weights_are_means() -> None:
    lone: Pair = {"prompt": PROMPTS[9], "chosen": PAIRS[0]["chosen"], "rejected": PAIRS[0]["rejected"], "weight": 0.25}
    rows = ranking_rows([{**PAIRS[0], "weight": 1.0}, {**PAIRS[1], "weight": 0.5}, lone, lone])
    assert [len(row["responses"]) for row in rows] == [3, 2, 2]
    assert [row["weight"] for row in rows] == [0.75, 0.25, 0.25]


@pytest.mark.parametrize("column", ["margin", "confidence"])
def test_what_a_ranking_has_no_place_for_is_refused(column: str) -> None:
    rows: Any = [PAIRS[0], {**PAIRS[1], column: 0.5}]
    with pytest.raises(
        UserError, match=rf"kwise, which reads no '{column}', but 1 of 2 pairs \(the first is number 2\)"
    ):
        ranking_rows(rows, objective="kwise")


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [([1.0], "a ranking of 1 answers"), ([2.0, 2.0, 2.0], "all of its answers are tied"),
     ([1.0, float("nan")], "without a `score` that is a finite number")],
)  # fmt: skip
def test_rankings_that_say_nothing_are_refused(
    base_folder: Any, tokenizer: Any, scores: list[float], sentence: str
) -> None:
    bad = {"prompt": PROMPTS[5], "responses": [{"content": WORDS[i], "score": s} for i, s in enumerate(scores)]}
    rows = Dataset.from_list([*k_wise().to_list(), bad, bad])
    with pytest.raises(UserError, match=rf"reward: row 4 \(2 in all\): .*{sentence}"):
        RankingRewardTrainer(build(base_folder, tokenizer), arguments(), train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(UserError, match="flip_rate is of pairs' labels, and this loss is of rankings"):
        RankingRewardTrainer(
            build(base_folder, tokenizer), flip_rate=0.1, train_dataset=k_wise(), processing_class=tokenizer
        )
    with pytest.raises(UserError, match="'bt' is none of rankings: plackett_luce, kwise"):
        RankingRewardTrainer(
            build(base_folder, tokenizer), objective="bt", train_dataset=rows, processing_class=tokenizer
        )


# ---- Batches ----


def test_every_answer_is_read_once() -> None:
    examples = [
        {"answer_ids": [[5, 6, 7 + i] for i in range(len(one.answers))], "beats": comparisons_of(row)}
        for one, row in zip(RANKINGS, k_wise(), strict=True)
    ]
    for shared in (False, True):
        batch = RankingCollator(0, shared=shared).torch_call(examples)
        assert len(batch["ends"] if shared else batch["input_ids"]) == 14, "4 + 2 + 3 + 5 answers"
        assert batch["answers"].shape == (4, 5)
        assert batch["answers"][1].tolist() == [4, 5, -1, -1, -1]
        assert batch["beats"].sum(dim=(1, 2)).tolist() == [5, 1, 2, 10]
        assert batch["pairs"].tolist() == [[0, 1], [5, 4], [8, 6], [9, 13]]
    padded = RankingCollator(0, pad_to_multiple_of=8).torch_call(examples)
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (14, 8)


# ---- Training ----


def reference_losses(model: Any, tokenizer: Any, head: torch.Tensor, objective: str) -> torch.Tensor:
    """The loss of each ranking with plain tensors, every answer encoded alone."""
    losses = []
    for one in RANKINGS:
        rewards = []
        for answer in one.answers:
            text = tokenizer.apply_chat_template(
                [*one.prompt, {"role": "assistant", "content": answer.content}], tokenize=False
            )
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                features = model.model(input_ids=ids).last_hidden_state[0, -1]
            rewards.append(features @ head[0])
        scores = [answer.score for answer in one.answers]
        factors = {}
        for i, score in enumerate(scores):
            below = [rewards[j] for j, other in enumerate(scores) if other < score]
            factors[i] = -torch.log_softmax(torch.stack([rewards[i], *below]), dim=0)[0]
        best = [i for i, score in enumerate(scores) if score == max(scores)]
        if objective == "kwise":
            losses.append(torch.stack([factors[i] for i in best]).mean())
        else:
            losses.append(torch.stack(list(factors.values())).sum())
    return torch.stack(losses)


@pytest.mark.parametrize("objective", ["plackett_luce", "kwise"])
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (3, 2), (1, 4)])
@pytest.mark.parametrize("share", [False, True], ids=["plain", "shared"])
def test_the_step_is_that_of_the_mean_over_prompts(
    base_folder: Any, tokenizer: Any, objective: str, batch: int, accumulation: int, share: bool
) -> None:
    """SGD's step against autograd of the formula written here: a prompt counts once, however many answers it has."""
    model = build(base_folder, tokenizer)
    before = model.score.weight.detach().clone()
    head = before.clone().requires_grad_()
    expected = reference_losses(model, tokenizer, head, objective).mean()
    expected.backward()
    trainer = RankingRewardTrainer(
        model, arguments(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation),
        objective=objective, share_prompts=share, train_dataset=k_wise(), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1
    assert head.grad is not None
    torch.testing.assert_close(before - model.score.weight.detach(), head.grad, atol=1e-5, rtol=1e-4)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_rankings_of_two_train_as_pairs_do(
    base_folder: Any, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    """The same batches in the same order: losses, accuracy and weights are those of Bradley-Terry."""
    args = RewardConfig(**cpu_arguments, num_train_epochs=1, learning_rate=1e-3, logging_steps=1)
    trainers = []
    for cls, data in (
        (PairRewardTrainer, pairs),
        (RankingRewardTrainer, Dataset.from_list(ranking_rows(pairs.to_list()))),
    ):  # type: ignore[arg-type]
        trainer = cls(
            build(base_folder, tokenizer), args, train_dataset=data, eval_dataset=pairs, processing_class=tokenizer
        )
        trainer.train()
        trainers.append(trainer)
    for name in ("loss", "accuracy", "margin"):
        ours, theirs = ([row[name] for row in t.state.log_history if name in row] for t in trainers)
        assert len(ours) >= 2
        assert ours == pytest.approx(theirs, abs=1e-5)
    first, second = (trainer.evaluate() for trainer in trainers)
    assert first["eval_loss"] == pytest.approx(second["eval_loss"], abs=1e-5)
    assert first["eval_accuracy"] == second["eval_accuracy"]


def test_centring_is_that_of_a_pair(base_folder: Any, tokenizer: Any, pairs: Dataset) -> None:
    losses = []
    args = arguments(center_rewards_coefficient=0.3, learning_rate=1e-9)
    for cls, data in (
        (PairRewardTrainer, pairs),
        (RankingRewardTrainer, Dataset.from_list(ranking_rows(pairs.to_list()))),
    ):  # type: ignore[arg-type]
        trainer = cls(build(base_folder, tokenizer), args, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_long_answers_leave_their_ranking_and_are_counted(base_folder: Any, tokenizer: Any) -> None:
    rows = k_wise().to_list()
    rows[0]["responses"][0]["content"] = "yes " * 60
    rows[1]["responses"][0]["content"] = "no " * 60
    args = arguments(max_length=60)
    with pytest.warns(UserWarning, match="2 of 14 answers of the train set are longer than max_length=60") as warned:
        trainer = RankingRewardTrainer(
            build(base_folder, tokenizer), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    assert any("1 of 4 rankings of the train set" in str(warning.message) for warning in warned)
    assert trainer.dropped_too_long == 1
    assert [len(ids) for ids in trainer.train_dataset["answer_ids"]] == [3, 3, 5]
    assert trainer.train_dataset["beats"][0] == [[1, 0], [2, 0]], "what is left of 0, 1, 1, renumbered"
