"""Trainers that are declared over votes: what a user of Python gets is what the pipeline would train on."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import RewardConfig

from rlhf import (
    OBJECTIVES,
    AdaptiveMarginRewardTrainer,
    LabelFlipRewardTrainer,
    LabelSmoothingRewardTrainer,
    MarginRewardTrainer,
    PairRewardTrainer,
    SoftLabelRewardTrainer,
    VotedRewardTrainer,
)
from rlhf.errors import UserError
from rlhf.objectives.strength import STRENGTH_COLUMNS, VoteStrength, posterior_confidence
from rlhf.reward.denoise import DenoiseConfig, denoised
from rlhf.reward.noise import NoiseEstimate, estimate_noise
from tests.reward.test_noise import simulated
from tests.reward.test_trainer import build, losses, train


def test_declarations_of_the_paper_correct_by_strength(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    """Adaptive margin and label flip of a vote are the general loss with the columns written by hand."""
    voted = with_votes(pairs)
    strength = voted["strength_mean"][:]
    arguments = {**cpu_arguments, "max_steps": 3}

    def run(cls: Any, data: Dataset, **options: Any) -> list[float]:
        cls = partial(cls, **options)
        return losses(train(cls, build(base_folder, tokenizer), tokenizer, data, arguments))

    plain = run(PairRewardTrainer, pairs)
    margins = run(PairRewardTrainer, pairs.add_column("margin", strength))
    assert run(AdaptiveMarginRewardTrainer, voted) == pytest.approx(margins, abs=1e-6)
    assert margins != pytest.approx(plain, abs=1e-3)
    weakest = sorted(range(len(pairs)), key=lambda i: (strength[i], i))[: len(pairs) // 10]
    turned = pairs.add_column("confidence", [0.0 if i in weakest else 1.0 for i in range(len(pairs))])
    assert run(LabelFlipRewardTrainer, voted) == pytest.approx(run(PairRewardTrainer, turned), abs=1e-5)
    with pytest.raises(UserError, match="no column 'strength_share', which this objective needs"):
        run(LabelFlipRewardTrainer, voted.remove_columns("strength_share"))
    robust = run(PairRewardTrainer, pairs, flip_rate=0.2)
    assert robust != pytest.approx(plain, abs=1e-3)
    with pytest.raises(UserError, match=r"flip_rate is 0.7"):
        run(PairRewardTrainer, pairs, flip_rate=0.7)


def with_votes(pairs: Dataset) -> Dataset:
    """The votes of two members on each pair: sure ones, of which a fifth contradict their label, and some that disagree."""
    strength = [0.1 * (i % 7) + (0.0 if i % 10 == 9 else -3.0 if i % 5 == 0 else 3.0) for i in range(len(pairs))]
    columns: dict[str, list[Any]] = {
        "strength_mean": strength,
        "strength_std": [0.5] * len(pairs),
        "strength_share": [0.0 if d < -1 else 0.5 if d < 1 else 1.0 for d in strength],
        "strength_votes": [2] * len(pairs),
    }
    for name, values in columns.items():
        pairs = pairs.add_column(name, values)
    return pairs


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if objective.needs.vote])
def test_every_voted_objective_trains_on_what_the_pipeline_would(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], name: str
) -> None:
    """The votes are the dataset's own, all four columns."""
    voted = with_votes(pairs)
    numbers: dict[str, Any] = {"flip_by": "sign", "margin_scale": 0.5, "smoothing": 0.3}
    noise = NoiseEstimate(flip_rate=0.2, fitted=0.15, scale=2.0, low=0.1, high=0.3)
    strength = VoteStrength(*(torch.tensor([float(x) for x in voted[column]]) for column in STRENGTH_COLUMNS))
    trainer = VotedRewardTrainer(
        build(base_folder, tokenizer), RewardConfig(**cpu_arguments, num_train_epochs=1), objective=name, noise=noise,
        train_dataset=voted, eval_dataset=pairs, processing_class=tokenizer, **numbers,
    )  # fmt: skip
    rows, _ = denoised(voted.to_list(), DenoiseConfig(name, **numbers), strength, noise)
    assert trainer.train_dataset["chosen"] == [row["chosen"] for row in rows]
    for column in ("margin", "confidence", "weight"):
        expected = [row[column] for row in rows] if column in rows[0] else None
        assert (trainer.train_dataset[column] if column in trainer.train_dataset.column_names else None) == expected
    assert trainer.eval_dataset["chosen"] == pairs["chosen"], "held-out labels stay as they are"


def test_votes_in_python_prove_the_noise_themselves(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    """Without `noise`, it is estimated from the votes, and pairs of one prompt count once (each prompt stands here twice)."""
    differences, _ = simulated(300, 0.25, sharpness=6.0)
    rows = [
        {
            **pairs[i % 40],
            "prompt": [{"role": "user", "content": f"{word} {i}"}],
            "strength_mean": d,
            "strength_std": 0.1,
        }
        | {"strength_share": float(d > 0), "strength_votes": 2}
        for word in ("list", "List ")
        for i, d in enumerate(differences.tolist())
    ]
    args = RewardConfig(**cpu_arguments, num_train_epochs=1)
    trainer = VotedRewardTrainer(
        build(base_folder, tokenizer), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    twice = differences.repeat(2)
    noise = estimate_noise(twice, [i % 300 for i in range(600)])
    assert trainer.noise == noise
    assert noise.fitted == pytest.approx(0.25, abs=0.06)
    assert noise.low < estimate_noise(twice, range(600)).low
    expected = posterior_confidence(twice, flip_rate=noise.fitted, scale=noise.scale)
    assert list(trainer.train_dataset["confidence"]) == pytest.approx(expected.tolist())


def test_votes_that_are_none_are_refused(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    model, args = build(base_folder, tokenizer), RewardConfig(**cpu_arguments, num_train_epochs=1)
    options: dict[str, Any] = {"processing_class": tokenizer}
    voted = with_votes(pairs)
    with pytest.raises(UserError) as error:
        VotedRewardTrainer(model, args, train_dataset=pairs, **options)
    assert error.value.problems == [
        f"reward: the dataset has no column {name!r}, which this objective needs." for name in STRENGTH_COLUMNS
    ]
    with pytest.raises(UserError, match="'bt' is none that needs a vote: flip, adaptive_margin"):
        VotedRewardTrainer(model, args, objective="bt", train_dataset=voted, **options)
    with pytest.raises(UserError, match="can't be a stream"):
        VotedRewardTrainer(model, args, train_dataset=voted.to_iterable_dataset(), **options)
    with pytest.raises(UserError, match=r"row 0, column 'strength_share': 1.5 is not a finite number in \[0.0, 1.0\]"):
        bad = voted.remove_columns("strength_share").add_column("strength_share", [1.5] * len(voted))
        VotedRewardTrainer(model, args, train_dataset=bad, **options)


def test_declarations_make_their_columns_or_require_them(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    """Ratings serve for margins; a smoothed trainer smooths streams and evaluation data too; a missing column is a sentence."""
    args = RewardConfig(**cpu_arguments, num_train_epochs=1, max_steps=1)
    options: dict[str, Any] = {"processing_class": tokenizer}

    def trainer(cls: Any, data: Any, **more: Any) -> Any:
        return cls(build(base_folder, tokenizer), args, train_dataset=data, **options, **more)

    rated = pairs.add_column("rating_gap", [float(i % 4) for i in range(len(pairs))])
    margins = trainer(MarginRewardTrainer, rated, margin_scale=0.5).train_dataset["margin"]
    assert margins == [0.5 * (i % 4) for i in range(len(pairs))]
    for cls, column in ((MarginRewardTrainer, "margin"), (SoftLabelRewardTrainer, "confidence")):
        with pytest.raises(UserError, match=f"no column '{column}', which this objective needs"):
            trainer(cls, pairs)
    stream = pairs.to_iterable_dataset()
    smooth = trainer(LabelSmoothingRewardTrainer, stream, smoothing=0.3, eval_dataset={"held": pairs})
    assert {row["confidence"] for row in smooth.train_dataset} == {0.7}
    assert set(smooth.eval_dataset["held"]["confidence"]) == {0.7}
    soft = trainer(SoftLabelRewardTrainer, pairs.add_column("confidence", [0.7] * len(pairs)), eval_dataset=pairs)
    assert "confidence" not in soft.eval_dataset.column_names
