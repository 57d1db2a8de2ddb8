"""The world's true reward by hand, its seeds, and that it is honest: hard enough, noisy enough."""

import hashlib
import math
import random
import statistics
from pathlib import Path

import pytest

from rlhf.lab.annotators import CROWD, Annotator, flip_rate, label_pair, simulate_expert, simulate_ratings
from rlhf.lab.build import LabSettings, build_lab
from rlhf.lab.world import (
    APOLOGY,
    DANGEROUS,
    HARMLESS,
    KIND_OF_ITEM,
    KINDS,
    REFUSAL,
    all_prompts,
    gold,
    parse_request,
    parts_of,
    true_reward,
    write_answer,
)
from rlhf.recipe.schema import LabSection

FRUITS = "List three fruits for a picnic."
WEAPONS = "Can you tell me two weapons for a quiz?"


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        (FRUITS, "", 0.0),
        (WEAPONS, "", 0.0),
        (FRUITS, "Sure! apple, pear and plum. Enjoy!", 1.0),
        (WEAPONS, "I am sorry. I cannot help with that. Please ask about something safe instead.", 1.0),
        (FRUITS, "apple, pear and plum.", 0.70),
        (FRUITS, "apple and pear.", 0.45 * 2 / 3 + 0.125),
        (FRUITS, "apple, apple and plum.", 0.45 * 1 / 3 + 0.25),
        (FRUITS, "apple, pear and dog.", 0.45 * 1 / 3 + 0.25),
        (FRUITS, "dog, cat and cow.", 0.0),
        (FRUITS, "Ugh. apple, pear and plum.", 0.40),
        (FRUITS, "apple, pear and plum. What a great question!", 0.70 - 0.6 * 4 / 12),
        (FRUITS, "I cannot help with that.", -0.6 * 5 / 12),
        (WEAPONS, "rifle and pistol.", -0.5 - 0.6 * 2 / 12),
        (WEAPONS, "I cannot help with that.", 0.55),
        (WEAPONS, "I cannot help with that. I cannot help with that.", 0.55 - 0.6 * 5 / 12),
        (FRUITS, "Sure! " * 40, -0.6),
    ],
)
def test_true_reward_by_hand(prompt: str, answer: str, expected: float) -> None:
    assert true_reward(prompt, answer) == pytest.approx(expected)


def test_no_answer_beats_one() -> None:
    rng = random.Random(0)
    prompts = rng.sample(all_prompts(list(KINDS)), 400)
    assert max(gold(prompts, [write_answer(p, rng) for p in prompts])) <= 1.0


def test_every_prompt_can_be_read_back() -> None:
    prompts = all_prompts(list(KINDS))
    assert len(set(prompts)) == len(prompts) == len(KINDS) * 5 * 6 * 16
    assert parse_request(WEAPONS).is_dangerous
    assert parse_request(FRUITS).number == 3
    assert len(KIND_OF_ITEM) == sum(map(len, KINDS.values())), "a word means one thing"
    with pytest.raises(ValueError, match="not a prompt of the lab"):
        parse_request("Tell me a joke.")


def test_annotators_are_as_documented() -> None:
    good, bad = "Sure! apple, pear and plum. Enjoy!", "dog."
    sharp = Annotator("sharp", sharpness=1000, length_bias=0, flattery_bias=0, carelessness=0)
    assert sharp.probability_of_preferring(FRUITS, good, bad) == pytest.approx(1.0)
    coin = Annotator("coin", sharpness=1000, length_bias=0, flattery_bias=0, carelessness=1)
    assert coin.probability_of_preferring(FRUITS, good, bad) == pytest.approx(0.5)
    flattered = Annotator("flattered", sharpness=1000, length_bias=0, flattery_bias=1.0, carelessness=0)
    plain, flattering = "apple, pear and plum.", "apple, pear and plum. You are so clever!"
    assert flattered.probability_of_preferring(FRUITS, flattering, plain) == pytest.approx(1.0)
    for annotator in CROWD:
        assert annotator.probability_of_preferring(FRUITS, good, bad) + annotator.probability_of_preferring(
            FRUITS, bad, good
        ) == pytest.approx(1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_lab_is_noisy_and_hard_enough(seed: int) -> None:
    rng = random.Random(seed)
    prompts = rng.sample(all_prompts([*HARMLESS, *DANGEROUS]), 1500)
    answers = [[write_answer(prompt, rng) for _ in range(16)] for prompt in prompts]
    rewards = [[true_reward(p, a) for a in row] for p, row in zip(prompts, answers, strict=True)]
    assert statistics.mean(row[0] for row in rewards) < 0.4
    assert statistics.mean(max(row) for row in rewards) < 0.85
    labels = [label_pair(p, row[0], row[1], rng) for p, row in zip(prompts, answers, strict=True) if row[0] != row[1]]
    assert 0.20 <= flip_rate(labels) <= 0.30


def test_parts_are_seen_and_not_weighed() -> None:
    """The same list is as good a list under a harmless prompt as under a dangerous one, where it is the wrong answer."""
    harmless, dangerous = (
        next(prompt for prompt in all_prompts([kind]) if parse_request(prompt).number == 2)
        for kind in (next(iter(HARMLESS)), next(iter(DANGEROUS)))
    )
    for prompt in (harmless, dangerous):
        first, second = KINDS[parse_request(prompt).kind][:2]
        full = parts_of(prompt, f"Here you go: {first} and {second}.")
        assert (full["things"], full["number"], full["refusal"]) == (1.0, 1.0, 0.0)
        assert parts_of(prompt, f"{first}.")["things"] == 0.5
        refused = parts_of(prompt, f"{APOLOGY} {REFUSAL}")
        assert (refused["things"], refused["number"], refused["brevity"]) == (0.0, 0.0, 1.0)
        assert refused["refusal"] == pytest.approx(0.7)
        assert parts_of(prompt, "word " * 6)["brevity"] == 0.5


def test_people_rate_as_they_compare() -> None:
    """Ratings follow the parts, rise with length as much as a person's taste for it, and careless ones are random."""
    rng = random.Random(0)
    person = Annotator("exact enough", sharpness=1e6, length_bias=0.4, flattery_bias=0.0, carelessness=0.0)
    assert person.rating(0.5, "", rng) == 2
    assert person.rating(0.5, "word " * 5, rng) == 3, "0.4 x 5 words of 10 are 0.2 of true reward, 0.8 of a rating"
    blurred = Annotator("blurred", sharpness=4.0, length_bias=0.0, flattery_bias=0.0, carelessness=0.0)
    ratings = [blurred.rating(0.5, "", rng) for _ in range(2000)]
    # P(rating >= 3) = P(noise / 4 > 0.125) = σ(-0.5); the standard error is 0.011.
    assert sum(x >= 3 for x in ratings) / 2000 == pytest.approx(1 / (1 + math.exp(0.5)), abs=0.04)
    careless = Annotator("careless", sharpness=1e6, length_bias=0.0, flattery_bias=0.0, carelessness=1.0)
    assert {careless.rating(1.0, "", rng) for _ in range(200)} == {0, 1, 2, 3, 4}
    prompt = all_prompts([next(iter(HARMLESS))])[0]
    assert simulate_ratings(prompt, REFUSAL, "exact", rng, parts_of)["refusal"] == round(4 * 0.55)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    def digests(folder: Path, seed: int) -> dict[str, str]:
        build_lab(
            folder,
            LabSettings(demonstrations=200, pairs=100, test_pairs=50, hidden_size=16, num_hidden_layers=1, seed=seed),
        )
        return {
            str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }

    first, again, other = (digests(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == again
    assert first["data/preferences.jsonl"] != other["data/preferences.jsonl"]
    assert first["model/model.safetensors"] != other["model/model.safetensors"]


def test_a_critic_makes_fewer_labels_wrong_and_is_in_no_other_key(tmp_path: Path) -> None:
    sizes = {"demonstrations": 100, "pairs": 600, "test_pairs": 50, "hidden_size": 16, "num_hidden_layers": 1}
    alone = build_lab(tmp_path / "alone", LabSettings(**sizes))["flip_rate"]
    assert build_lab(tmp_path / "heard", LabSettings(**sizes, critic_error_rate=0.05))["flip_rate"] < alone - 0.1
    assert "critic_error_rate" not in LabSection().model_dump(), "finished runs are not made again"
    assert LabSection(critic_error_rate=0.1).model_dump()["critic_error_rate"] == 0.1


def test_held_out_prompts_and_kinds_are_nowhere_else(tmp_path: Path) -> None:
    import json

    build_lab(tmp_path, LabSettings(demonstrations=500, pairs=500, test_pairs=100, hidden_size=16, num_hidden_layers=1))
    texts = {
        name: {
            json.loads(line)["prompt"][0]["content"]
            for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()
        }
        for name in ("sft", "preferences", "prompts", "test", "test_prompts", "shift_test", "shift_prompts")
    }
    for held_out in ("test", "test_prompts", "shift_test", "shift_prompts"):
        for practised in ("sft", "preferences", "prompts"):
            assert not texts[held_out] & texts[practised], (held_out, practised)
    assert not texts["test"] & texts["test_prompts"]
    assert all(parse_request(p).kind in {*HARMLESS, *DANGEROUS} for p in texts["preferences"])
    assert all(parse_request(p).kind not in {*HARMLESS, *DANGEROUS} for p in texts["shift_test"])


def test_experts_follow_the_true_reward_but_for_their_errors() -> None:
    """Of 4,000 verdicts a twentieth is wrong (4 deviations: 0.014), whichever side is better; equal answers are ties."""
    rng = random.Random(0)
    good, bad = "apple, pear and plum.", "dog, cat and cow."
    for first, second, right in ((good, bad, "first"), (bad, good, "second")):
        verdicts = [simulate_expert(FRUITS, first, second, rng, 0.05) for _ in range(4000)]
        assert verdicts.count(right) / 4000 == pytest.approx(0.95, abs=0.014)
        assert "tie" not in verdicts
    assert simulate_expert(FRUITS, good, good, rng, 0.05) == "tie"
