"""What once went wrong with reward models and labels without a word."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import RewardConfig

from rlhf.data.rows import assistant_turn, user_turn
from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.objectives.strength import VoteStrength
from rlhf.pipeline.audit import _key
from rlhf.reward.annotators import annotators_differ
from rlhf.reward.denoise import DenoiseConfig, denoised, flip_pair
from rlhf.reward.frozen_trunk import Trunk
from rlhf.reward.gated import fit_gated
from rlhf.reward.noise import NoiseEstimate, decided_rows, estimate_noise
from tests.conftest import PROMPTS, WORDS
from tests.reward.test_frozen_trunk import plain_loss, shared

NOISE = NoiseEstimate(flip_rate=0.2, fitted=0.2, scale=1.0, low=0.1, high=0.3)


def pair(number: int, **columns: Any) -> Any:
    return {
        "prompt": user_turn(f"p{number}"),
        "chosen": assistant_turn("a"),
        "rejected": assistant_turn("b"),
        **columns,
    }


def votes(strength: torch.Tensor) -> VoteStrength:
    return VoteStrength(strength, torch.ones_like(strength), torch.ones_like(strength), torch.full_like(strength, 4))


# ---- Ties are no labels ----


def test_ties_tell_nothing_of_wrong_labels() -> None:
    """Half of the pairs were called equal: whichever of their answers is written first, votes contradict it half the time."""
    generator = torch.Generator().manual_seed(0)
    right = 3 * torch.randn(400, generator=generator).abs()
    tied = 0.5 * torch.randn(400, generator=generator)
    rows = [pair(i) for i in range(400)] + [pair(i + 400, confidence=0.5) for i in range(400)]
    strength = torch.cat([right, tied])
    prompts = list(range(800))
    decided = decided_rows(rows)
    assert decided == list(range(400))
    of_labels = estimate_noise(strength[decided], decided)
    assert of_labels == estimate_noise(right, list(range(400)))
    assert estimate_noise(strength, prompts).flip_rate > of_labels.flip_rate
    with pytest.raises(UserError, match="all pairs are ties"):
        decided_rows(rows[400:])


@pytest.mark.parametrize("objective", ["flip", "drop", "flip_margin"])
@pytest.mark.parametrize("by", ["rank", "sign"])
def test_a_tie_is_neither_flipped_nor_dropped_in_place_of_a_label(objective: str, by: str) -> None:
    rows = [pair(0, confidence=0.5), pair(1, confidence=0.5), pair(2), pair(3), pair(4)]
    strength = torch.tensor([-9.0, -8.0, -2.0, 1.0, 2.0])
    config = DenoiseConfig(objective, flip_by=by, flip_fraction=0.2)
    found = denoised(rows, config, votes(strength), NOISE)
    by_prompt = {row["prompt"][0]["content"]: row for row in found.rows}
    assert [by_prompt[name]["chosen"] for name in ("p0", "p1")] == [assistant_turn("a")] * 2
    if objective == "drop":
        assert "p2" not in by_prompt
        assert len(by_prompt) == 4
    else:
        assert by_prompt["p2"]["chosen"] == assistant_turn("b")
        assert found.flipped == 1


def test_ties_are_kept_where_more_would_be_flipped_than_there_are_labels() -> None:
    rows = [pair(0, confidence=0.5), pair(1, confidence=0.5), pair(2), pair(3), pair(4)]
    config = DenoiseConfig("drop", flip_by="rank", flip_fraction=0.9)
    kept = denoised(rows, config, votes(torch.tensor([-9.0, -8.0, -2.0, 1.0, 2.0])), NOISE).rows
    assert [row["prompt"][0]["content"] for row in kept] == ["p0", "p1"]


def test_a_flipped_pair_is_rated_the_other_way_round() -> None:
    """Else a margin of its ratings would teach the flipped label against them."""
    flipped = flip_pair(pair(0, rating_gap=2.0, margin=1.0, confidence=0.9))
    assert (flipped["rating_gap"], flipped["margin"], flipped["confidence"]) == (-2.0, -1.0, pytest.approx(0.1))
    (margin,) = denoised([flip_pair(pair(0, rating_gap=2.0))], DenoiseConfig("margin")).rows
    (weight,) = denoised([flip_pair(pair(0, rating_gap=2.0))], DenoiseConfig("scaled")).rows
    assert margin["margin"] == -2.0
    assert weight["weight"] == 0.0


def test_a_gate_learns_nothing_of_ties(base_folder: Path, tokenizer: Any) -> None:
    from rlhf.models.load import build_reward_model

    rated: list[Any] = [
        {"prompt": prompt, "completion": assistant_turn(f"yes {word}"), "attributes": {"good": float(i % 5)}}
        for i, (prompt, word) in enumerate(zip(PROMPTS, WORDS, strict=False))
    ]
    labelled = [
        {"prompt": prompt, "chosen": assistant_turn(f"yes {word}"), "rejected": assistant_turn("no")}
        for prompt, word in zip(PROMPTS, WORDS, strict=False)
    ]
    ties = [{**row, "chosen": row["rejected"], "rejected": row["chosen"], "confidence": 0.5} for row in labelled]

    def gate(pairs: list[Any]) -> Mapping[str, torch.Tensor]:
        torch.manual_seed(0)
        model = build_reward_model(base_folder, pad_token_id=tokenizer.pad_token_id, labels=("good",))
        return vars(fit_gated(model, tokenizer, rated, pairs, {"good": 1.0}).attributes.gate)

    alone, beside = gate(labelled), gate(labelled + ties)
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
    with pytest.raises(UserError, match="all pairs are ties"):
        gate(ties)


# ---- Pairs of a prompt are not independent ----


def test_six_labels_on_one_prompt_are_no_six_annotators_labels() -> None:
    """Four annotators who are equally good; all pairs of a prompt are right or wrong together. 5 % may be taken for different."""
    found = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        rows, strength = [], []
        for prompt in range(80):
            is_wrong = torch.rand(1, generator=generator).item() < 0.25
            vote = (torch.randn(1, generator=generator).abs() + 0.5).item()
            for copy in range(6):
                row = pair(prompt, annotator=f"ann{prompt % 4}")
                rows.append({**row, "chosen": assistant_turn(f"a{copy}"), "rejected": assistant_turn(f"b{copy}")})
                strength.append(-vote if is_wrong else vote)
        found += annotators_differ(rows, torch.tensor(strength), NOISE)
    assert found <= 4, "of 20, of which one is expected; 5 or more are had by chance in 3 of 1000"


# ---- Numbers ----


def test_confident_learning_finds_no_more_than_half_of_the_labels_wrong() -> None:
    """More would mean that they are turned round, and the sure votes are too few to say that."""
    differences = torch.cat([torch.full((550,), 0.01), torch.full((50,), 100.0), torch.full((400,), -5.0)])
    assert estimate_noise(differences, list(range(1000))).flip_rate <= 0.5


# ---- Members on a shared trunk ----


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.0},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}},
        {"adam_beta2": 0.95, "adam_epsilon": 1e-5},
    ],
)
def test_members_take_the_settings_of_any_trainer(
    base_folder: Path, tmp_path: Path, cpu_arguments: dict[str, Any], settings: dict[str, Any]
) -> None:
    """A `max_grad_norm` of 0 switches clipping off, and not learning; schedules have numbers of their own."""
    trunk, features = shared(base_folder, tmp_path)
    ends = []
    for more in ({}, settings):
        args = RewardConfig(**{**cpu_arguments, "learning_rate": 1e-2, "per_device_train_batch_size": 4, **more})
        torch.manual_seed(1)
        member = trunk.member()
        untrained = member.differences(features, range(18))
        member.train(features, range(18), args, objective=plain_loss, label="x")
        ends.append(member.differences(features, range(18)))
        assert (ends[-1] - untrained).mean() > 0.5
    assert not torch.equal(ends[0], ends[1])
    assert isinstance(trunk, Trunk)


# ---- An audit and its seed ----


def test_an_audit_of_another_seed_is_another_audit() -> None:
    """Which fold a pair is in follows the seed; kept votes would go to other pairs."""
    source = Source("x.jsonl")
    keys = [_key(source, "answers", "model", {}, {"members": 2}, seed) for seed in (0, 1, 2)]
    assert len(set(keys)) == 3
