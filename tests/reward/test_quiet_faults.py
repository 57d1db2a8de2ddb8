"""What once went wrong with reward models and labels without a word."""

import warnings
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import RewardConfig

from rlhf.data.labels import Question, Verdict, question_id
from rlhf.data.rows import assistant_turn, user_turn
from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.objectives.strength import VoteStrength
from rlhf.pipeline.audit import _key
from rlhf.pipeline.known import beliefs
from rlhf.pipeline.looked import count_opinions
from rlhf.reward.denoise import DenoiseConfig, denoised, flip_pair
from rlhf.reward.frozen_trunk import Trunk
from rlhf.reward.gated import fit_gated
from rlhf.reward.noise import NoiseEstimate, decided_rows, estimate_noise
from rlhf.reward.rankings import ranking_rows
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
    config = DenoiseConfig(objective, flip_by=by, flip_fraction=0.4)  # of three labels, one
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
    assert [row["prompt"][0]["content"] for row in kept] == ["p0", "p1", "p4"], "nine tenths of three labels are two"


def test_a_flipped_pair_is_rated_the_other_way_round() -> None:
    """Else a margin of its ratings would teach the flipped label against them."""
    flipped = flip_pair(pair(0, rating_gap=2.0, margin=1.0, confidence=0.9))
    assert (flipped["rating_gap"], flipped["margin"], flipped["confidence"]) == (-2.0, -1.0, pytest.approx(0.1))
    (margin,) = denoised([flip_pair(pair(0, rating_gap=2.0))], DenoiseConfig("margin")).rows
    (weight,) = denoised([flip_pair(pair(0, rating_gap=2.0))], DenoiseConfig("scaled")).rows
    assert margin["margin"] == -2.0
    assert weight["weight"] == 0.0


def test_a_gate_learns_nothing_of_ties(base_folder: Path, tokenizer: Any) -> None:
    from tests.unit_scale import build_reward_model

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


# ---- What votes and verdicts say ----


def test_votes_that_agree_with_every_label_are_not_taken_for_chance() -> None:
    """One wrong label of 200 was fine, and none at all was said to be no better than chance."""
    strength = torch.linspace(0.5, 6, 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise = estimate_noise(strength, range(200))
    assert (noise.flip_rate, noise.low) == (0.0, 0.0)
    assert 0 < noise.fitted < 0.005
    assert 0 < noise.scale <= 1
    assert noise.high == pytest.approx(1 - 0.025 ** (1 / 200)), "none of 200 contradicted: the exact interval"
    twice = torch.zeros(200)
    twice[0] = -2 * 2.94
    assert beliefs(strength, estimate_noise(strength, range(200), twice), twice)[0] < 0.5, (
        "two experts turn a label of a weak vote"
    )
    strength[0] = -0.5
    assert estimate_noise(strength, range(200)).flip_rate < 0.05


@pytest.mark.filterwarnings("ignore:vote")
def test_where_votes_say_nothing_verdicts_alone_tell_how_many_labels_are_wrong() -> None:
    """They were left out, the labels taken to be right with 0.99, and an expert could turn none of them."""
    generator = torch.Generator().manual_seed(1)
    strength, clusters = torch.randn(400, generator=generator), range(400)
    odds = torch.zeros(400)
    odds[:140], odds[140:200] = 2.94, -2.94  # an expert who is wrong in 5 %: 60 of 200 labels contradicted
    noise = estimate_noise(strength, clusters, odds)
    assert noise.scale == 0
    assert noise.fitted == pytest.approx((0.3 - 0.05) / 0.9, abs=0.01)
    assert 0.1 < noise.low < noise.fitted
    right = beliefs(strength, noise, odds)
    assert (right[140:200] < 0.5).all(), "what an expert contradicts is more likely wrong"
    assert right[200:].tolist() == pytest.approx([1 - noise.fitted] * 200, abs=1e-6)
    assert estimate_noise(strength, clusters) == NoiseEstimate(0.0, 0.0, 0.0, 0.0, noise.high)


@pytest.mark.parametrize("objective", ["flip", "drop", "flip_margin"])
def test_a_share_of_the_labels_is_one_of_those_that_decide(objective: str) -> None:
    rows = [pair(i, **({"confidence": 0.5} if i % 2 else {})) for i in range(100)]
    made = denoised(rows, DenoiseConfig(objective, flip_fraction=0.1), votes(torch.linspace(-2, 5, 100)), NOISE)
    changed = 100 - len(made.rows) if objective == "drop" else made.flipped
    assert changed == 5, "a tenth of fifty labels; fifty are ties"


def test_a_margin_goes_with_the_order_that_is_likelier_and_a_weight_stays() -> None:
    rows = [pair(0, margin=3.0, weight=4.0), pair(1, margin=3.0), pair(2), pair(3, margin=3.0, confidence=0.5)]
    strength = votes(torch.tensor([-6.0, 6.0, 0.0, 0.0]))
    config = DenoiseConfig("posterior")
    soft = denoised(rows, config, strength, NOISE).rows
    for row in soft[:2]:
        assert row["margin"] == pytest.approx(3 * (2 * row["confidence"] - 1))
    assert soft[0]["margin"] < -2.9, "as a flip has it"
    assert soft[3] == rows[3]
    assert "margin" not in soft[2]
    weighted = denoised(rows, DenoiseConfig("weight"), strength, NOISE).rows
    assert weighted[0]["weight"] == pytest.approx(4 * soft[0]["confidence"])
    assert weighted[1]["weight"] == pytest.approx(soft[1]["confidence"])
    assert weighted[0]["margin"] == 3.0


def test_everybodys_ranking_of_a_prompt_counts() -> None:
    """Four people of one mind and a fifth of another were one ranking in which neither won."""

    def ranked(annotator: str, *order: str) -> list[Any]:
        return [
            {**pair(0, group="g", annotator=annotator), "chosen": assistant_turn(one), "rejected": assistant_turn(two)}
            for one, two in combinations(order, 2)
        ]

    rows = [row for name in "abcd" for row in ranked(name, "x", "y", "z")] + ranked("e", "z", "y", "x")
    rankings = ranking_rows(rows, objective="plackett_luce")
    assert len(rankings) == 5
    wins = [
        {
            (r["responses"][i]["content"][0]["content"], r["responses"][j]["content"][0]["content"])
            for i, j in r["beats"]
        }
        for r in rankings
    ]
    assert sum(("x", "z") in won for won in wins) == 4
    assert sum(("z", "x") in won for won in wins) == 1
    once = [{**row, "annotator": name} for row, name in zip(ranked("a", "x", "y", "z"), "abc", strict=True)]
    (whole,) = ranking_rows(once, objective="plackett_luce")
    assert len(whole["beats"]) == 3, "who compared which two answers makes no rankings of its own"


def test_a_pair_that_several_people_labelled_is_one_question() -> None:
    """Its rows were counted, so more pairs had an answer than were asked about, and fewer than none were open."""
    turned = {**pair(0), "chosen": assistant_turn("b"), "rejected": assistant_turn("a")}
    rows = [row for i in range(3) for row in ({**pair(i), "annotator": "x"}, {**pair(i), "annotator": "y"})]
    rows[1] = {**turned, "annotator": "y"}
    asked = [
        Question(question_id(1, user_turn(f"p{i}"), ["a", "b"]), 1, user_turn(f"p{i}"), "a", "b") for i in range(3)
    ]
    verdicts = [Verdict(asked[0].id, "second", "expert"), Verdict(asked[1].id, "tie", "expert")]
    looked = count_opinions(rows, asked, verdicts)
    assert looked.counts() == {
        "asked": 3, "answered": 2, "open": 1, "skipped": 0, "ties": 1, "agree": 0, "contradict": 1,
    }  # fmt: skip
    assert looked.contradict.tolist()[:2] == [1.0, 0.0], "the verdict is about what each row says"
    assert looked.agree.tolist()[:2] == [0.0, 1.0]


@pytest.mark.parametrize(("objective", "column"), [("scaled", "weight"), ("margin", "margin")])
def test_ratings_in_other_units_are_said(objective: str, column: str, recwarn: pytest.WarningsRecorder) -> None:
    """Of ratings of 1 to 10 beside those of 0 to 4 the former count more; of one source nothing is said, nor of few gaps."""
    rows = [pair(i, rating_gap=1.0 + i % 3, source="stars") for i in range(60)]
    tens = [pair(i, rating_gap=3.0 + i % 6, source="tens") for i in range(60)]
    denoised(rows, DenoiseConfig(objective))
    denoised([*rows, *tens[:20]], DenoiseConfig(objective))
    denoised([*rows, *({**row, "source": "stars"} for row in tens)], DenoiseConfig(objective))
    denoised([*rows, *({**row, column: 1.0} for row in tens)], DenoiseConfig(objective))
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match=r"gaps of 'tens' are 5.5 on average and those of 'stars' 2, .* 2.8 times as much"
    ):
        denoised([*rows, *tens], DenoiseConfig(objective))


def test_a_confidence_that_is_not_used_is_said(recwarn: pytest.WarningsRecorder) -> None:
    rows = [pair(0, confidence=0.67), pair(1, confidence=0.5), pair(2, confidence=1.0), pair(3)]
    denoised(rows, DenoiseConfig("bt"))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="says how likely each label is right, and 1 of 4 pairs bring a `confidence`"):
        denoised(rows, DenoiseConfig("smoothing"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # where votes say nothing it is used
        silent = NoiseEstimate(flip_rate=0.2, fitted=0.2, scale=0.0, low=0.0, high=0.3)
        strength = votes(torch.zeros(4))
        assert denoised(rows, DenoiseConfig("posterior"), strength, silent).rows == rows
    with pytest.warns(UserWarning, match="1 of 4 pairs bring a `confidence`"):
        denoised(rows, DenoiseConfig("posterior"), strength, NOISE)


@pytest.mark.parametrize("objective", ["adaptive_margin", "flip_margin", "soft_margin", "flip"])
def test_a_margin_that_is_not_used_is_said(objective: str, recwarn: pytest.WarningsRecorder) -> None:
    rows = [pair(0, margin=2.0), pair(1, margin=1.0, confidence=0.5), pair(2, margin=0.0), pair(3)]
    denoised(rows, DenoiseConfig(objective), votes(torch.ones(4)), NOISE)
    said = [str(warning.message) for warning in recwarn if "bring a `margin`" in str(warning.message)]
    expected = f"reward.objective {objective} makes margins of the votes, and 1 of 4 pairs bring a `margin`"
    assert [sentence.partition(", which")[0] for sentence in said] == ([] if objective == "flip" else [expected])
