"""What labels want: planted wants are found with their size, nothing is found where there is nothing, votes lose only these."""

from typing import cast

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from rlhf.data.rows import Pair
from rlhf.data.traits import TRAITS
from rlhf.reward.wants import FEWEST, find_wants, fit_effects, without_wants

PHRASES = {"length": "and so on", "apology": "sorry", "hedging": "maybe", "numbers": "7", "flattery": "great idea"}


def planted(count: int, wants: dict[str, float], seed: int, *, repeats: int = 1) -> list[Pair]:
    """Return pairs of answers with random phrases, labelled by P = σ(Σ wants · difference in phrases).

    Args:
        repeats: how many pairs of one prompt stand together, with the same answers and label.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        sides = [{name: int(rng.integers(0, 3)) for name in PHRASES} for _ in range(2)]
        odds = sum(size * (sides[0][name] - sides[1][name]) for name, size in wants.items())
        first = rng.random() < 1 / (1 + np.exp(-odds))
        texts = [" ".join([f"word{i}", *(PHRASES[n] for n, k in side.items() for _ in range(k))]) for side in sides]
        chosen, rejected = texts if first else texts[::-1]
        row = {
            "prompt": [{"role": "user", "content": f"prompt {i}"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        pairs += [cast(Pair, row)] * repeats
    return pairs


def test_planted_wants_are_found_and_no_others() -> None:
    pairs = planted(1500, {"apology": 1.0, "hedging": -0.5}, seed=1)
    wants = find_wants(pairs)
    assert wants.wanted == ["apology", "hedging"]
    apology, hedging = wants.traits["apology"], wants.traits["hedging"]
    assert (apology["wanted"], hedging["wanted"]) == ("more", "less")
    usual = np.sqrt(4 / 3)  # of the difference of two uniform draws from 0, 1, 2
    for want, size in ((apology, 1.0), (hedging, -0.5)):
        low, high = want["effect_ci"]
        assert low < size * usual < high
        assert high - low < 0.6
    assert apology["more_is_chosen"] > 0.7
    assert apology["pairs"] == sum(
        row["chosen"][0]["content"].count("sorry") != row["rejected"][0]["content"].count("sorry") for row in pairs
    )
    for i in apology["examples"]:
        assert pairs[i]["chosen"][0]["content"].count("sorry") == 2
        assert pairs[i]["rejected"][0]["content"].count("sorry") == 0
    assert wants.accuracy is not None
    assert wants.accuracy[1][0] > 0.65


def test_nothing_is_wanted_where_labels_are_coins() -> None:
    """The intervals hold for all traits together, so one of twenty such files may name one; accuracy is that of a coin."""
    found = [find_wants(planted(200, {}, seed)) for seed in range(40)]
    assert sum(bool(wants.wanted) for wants in found) <= 6  # of 40 at 5 %: above 6 in 0.3 % of all draws
    accuracies = [wants.accuracy[0] for wants in found if wants.accuracy is not None]
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.025)  # 0.035 a file, over 40; four times its error


def test_traits_that_go_together_are_told_apart() -> None:
    """Apologies make an answer longer; with apologies alone wanted, length as such is not."""
    wants = find_wants(planted(1500, {"apology": 1.5}, seed=4))
    assert wants.traits["length"]["more_is_chosen_ci"][0] > 0.5, "longer answers are chosen more often"
    assert wants.wanted == ["apology"]


def test_turning_every_label_round_turns_every_want_round() -> None:
    pairs = planted(400, {"apology": 1.0}, seed=5)
    turned = [cast(Pair, {**row, "chosen": row["rejected"], "rejected": row["chosen"]}) for row in pairs]
    one, other = find_wants(pairs), find_wants(turned)
    assert other.traits["apology"]["wanted"] == "less"
    assert other.traits["apology"]["effect"] == pytest.approx(-one.traits["apology"]["effect"])
    assert other.accuracy == one.accuracy, "turned labels are as easy to predict"


def test_repeated_pairs_of_a_prompt_teach_nothing_new() -> None:
    """Ten copies of each pair: the interval stays, where rows counted as independent would make it three times narrower."""
    once, often = (
        find_wants(planted(300, {"apology": 1.0}, seed=6, repeats=n)).traits["apology"]["effect_ci"] for n in (1, 10)
    )
    assert often[1] - often[0] == pytest.approx(once[1] - once[0], rel=0.1)


def test_effects_and_errors_are_those_of_another_way() -> None:
    """By scipy's minimiser, and the errors by drawing clusters again and again."""
    rng = np.random.default_rng(7)
    base = rng.normal(size=(300, 3)) @ np.array([[1, 0.5, 0], [0, 1, 0], [0, 0, 1]])
    signs = np.where(rng.random(300) < 1 / (1 + np.exp(-base @ [0.8, -0.4, 0])), 1, -1)
    differences, clusters = base * signs[:, None], [i // 2 for i in range(300)]

    def other(rows: np.ndarray) -> np.ndarray:
        return minimize(lambda b: np.log1p(np.exp(-rows @ b)).sum() + b @ b / 2, np.zeros(3), method="BFGS").x

    effects, errors = fit_effects(differences, clusters)
    np.testing.assert_allclose(effects, other(differences), atol=1e-4)
    halves = differences.reshape(150, 2, 3)
    drawn = [other(halves[rng.integers(0, 150, 150)].reshape(300, 3)) for _ in range(300)]
    np.testing.assert_allclose(
        errors, np.std(drawn, axis=0), rtol=0.15
    )  # 300 draws give a deviation to 4 %, twice three times


def test_votes_without_wants_are_what_is_left() -> None:
    pairs = planted(800, {"apology": 1.0}, seed=8)
    wants = find_wants(pairs)
    column = torch.as_tensor(wants.differences[:, list(TRAITS).index("apology")])
    rest = torch.randn(800, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    strength = 2.0 * column + rest
    left = without_wants(strength, wants)
    torch.testing.assert_close(left, rest, atol=0.2, rtol=0)
    assert abs(torch.dot(left, column).item()) < 1e-8, "nothing of the trait remains"
    torch.testing.assert_close(without_wants(-strength, wants), -left)
    assert without_wants(strength, find_wants(planted(200, {}, seed=11))) is strength, (
        "nothing is wanted, nothing taken out"
    )


def test_few_pairs_say_nothing() -> None:
    wants = find_wants(planted(FEWEST - 1, {"apology": 9.0}, seed=9))
    assert wants.wanted == []
    assert wants.accuracy is None
    assert wants.traits["apology"]["effect"] is None
    assert find_wants([]).traits["length"]["pairs"] == 0
    decided = find_wants(planted(60, {"apology": 50.0}, seed=10)).traits["apology"]
    assert 0 < decided["effect"] < 10, "a trait that decides every label has a finite effect"


@pytest.mark.parametrize("prompts", [1, 8, 24])
def test_random_labels_of_few_prompts_want_nothing(prompts: int) -> None:
    """Forty pairs a prompt, whose labels go together: with as many slopes as prompts a sandwich has no spread."""
    found = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        likes_long, pairs = rng.random(prompts) < 0.5, []
        for i, row in enumerate(planted(40 * prompts, {}, seed)):
            short, long = sorted((row["chosen"], row["rejected"]), key=lambda turn: len(turn[0]["content"]))
            chosen, rejected = (long, short) if likes_long[i % prompts] else (short, long)
            prompt = [{"role": "user", "content": f"prompt {i % prompts}"}]
            pairs.append(cast(Pair, {"prompt": prompt, "chosen": chosen, "rejected": rejected}))
        found += bool(find_wants(pairs).wanted)
    assert found <= 6, "5 % of 40 draws are 2; more than 6 have a chance of 0.003"
