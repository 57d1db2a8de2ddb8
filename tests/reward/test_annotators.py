"""Annotators of planted accuracy and taste are told apart, and posterior labels take their own error rates."""

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from rlhf.data.labels import Question, Verdict, shows_second_on_the_left
from rlhf.data.rows import assistant_turn, pair_digest, user_turn
from rlhf.objectives.annotators import vote_worth
from rlhf.objectives.strength import VoteStrength
from rlhf.report.annotators import annotator_rows, annotator_sentences
from rlhf.reward.annotators import ENOUGH, posterior_by_annotator, report_rows, report_verdicts
from rlhf.reward.denoise import DenoiseConfig, denoised
from rlhf.reward.noise import NoiseEstimate

NOISE = NoiseEstimate(flip_rate=0.25, fitted=0.2, scale=1.0, low=0.15, high=0.3)
GOOD = {f"good-{i}": 0.9 for i in range(6)}
COINS = {f"coin-{i}": 0.5 for i in range(3)}


def crowd(
    accuracies: dict[str, float], each: int, *, seed: int, length_fan: str | None = None
) -> tuple[list[Any], torch.Tensor]:
    """Pairs with one label each, and a calibrated vote on them; one annotator takes the longer answer nine times in ten."""
    rng = random.Random(seed)
    rows, strength = [], []
    names = [*accuracies, *([length_fan] if length_fan else [])] * each
    for i, name in enumerate(names):
        vote = rng.gauss(0, 3)
        truth = rng.random() < 1 / (1 + math.exp(-vote))  # the first answer is better
        words = [rng.randint(5, 25), rng.randint(5, 25)]
        if name == length_fan:
            longer = words[0] >= words[1]
            says = longer if rng.random() < 0.9 else not longer
        else:
            says = truth if rng.random() < accuracies[name] else not truth
        answers = [" ".join([f"{side}{i}"] + ["x"] * (n - 1)) for side, n in zip("ab", words, strict=True)]
        chosen, rejected = answers if says else answers[::-1]
        rows.append(
            {
                "prompt": user_turn(f"p{i}"),
                "chosen": assistant_turn(chosen),
                "rejected": assistant_turn(rejected),
                "annotator": name,
            }
        )
        strength.append(vote if says else -vote)
    return rows, torch.tensor(strength)


def votes(strength: torch.Tensor) -> VoteStrength:
    return VoteStrength(strength, torch.ones_like(strength), torch.ones_like(strength), torch.ones_like(strength))


def own_worth(rows: list[Any], strength: torch.Tensor) -> float:
    """What a vote is worth where everybody has an accuracy of their own."""
    names = sorted({row["annotator"] for row in rows})
    return vote_worth(strength, torch.tensor([names.index(row["annotator"]) for row in rows]), len(names))


def test_a_vote_is_worth_what_annotators_of_their_own_accuracy_make_likeliest() -> None:
    """Against plain numpy and scipy: no worth a grid's step away is likelier; planted is 1."""
    rows, strength = crowd(GOOD | COINS, 400, seed=11)
    names, votes_of = np.array([row["annotator"] for row in rows]), strength.double().numpy()

    def likelihood(worth: float) -> float:
        total = 0.0
        for name in {*GOOD, *COINS}:
            right = 1 / (1 + np.exp(-worth * votes_of[names == name]))
            best = minimize_scalar(
                lambda a, right=right: -np.log(a * right + (1 - a) * (1 - right)).sum(), bounds=(0, 1), method="bounded"
            )
            total -= best.fun
        return total

    worth = own_worth(rows, strength)
    assert abs(math.log(worth)) < 0.5, (
        "2.5 deviations: over draws of 600 labels it is 0.48, and here are six times as many"
    )
    assert likelihood(worth) > max(likelihood(worth / 1.2), likelihood(worth * 1.2))
    assert own_worth(rows, 3 * strength) == pytest.approx(worth / 3), "in units of the vote"
    mixed = [{**row, "annotator": "all"} for row in rows]
    report = report_rows(rows, strength, replace(NOISE, scale=0.1))
    assert report["good-0"]["accuracy"] == report_rows(rows, strength, NOISE)["good-0"]["accuracy"], (
        "whatever one rate says"
    )
    assert report_rows(mixed, strength, replace(NOISE, scale=0.1)) != report_rows(mixed, strength, NOISE), (
        "one annotator"
    )
    silent = report_rows(rows, strength, replace(NOISE, scale=0.0))["good-0"]
    assert silent["accuracy"] is None, "votes that say nothing of the labels stay so"


@pytest.mark.parametrize("seed", range(3))
def test_coins_and_a_taste_are_found_and_nobody_else(seed: int) -> None:
    """60 labels each: what the lab's benchmark asks for, with a vote whose truth is known."""
    rows, strength = crowd(GOOD | COINS, 60, seed=seed, length_fan="long")
    report = report_rows(rows, strength, NOISE)
    assert {name for name, entry in report.items() if "coin" in entry["flags"]} - {"long"} == set(COINS)
    assert {name for name, entry in report.items() if "more length" in entry["flags"]} == {"long"}
    assert all(report[name]["flags"] == [] for name in GOOD)
    sentences = annotator_sentences(report)
    assert "coin-0, coin-1, coin-2" in sentences[0]
    assert any(line.startswith("long follows length more than the others do: more of it") for line in sentences)
    assert [row[0] for row in annotator_rows(report)] == sorted([*GOOD, *COINS, "long"])


def test_figures_of_an_annotator() -> None:
    rows, strength = crowd({"ann": 0.9, "bob": 0.6}, 600, seed=1)
    report = report_rows(rows, strength, NOISE)
    for name, planted in (("ann", 0.9), ("bob", 0.6)):
        entry = report[name]
        assert (entry["labels"], entry["ties"]) == (600, 0)
        assert entry["accuracy"] == pytest.approx(planted, abs=0.06)
        low, high = entry["accuracy_ci"] or [1, 0]
        assert low - 0.03 < planted < high + 0.03, "the interval takes the worth of a vote as known"
        assert entry["error_rate"] == pytest.approx(1 - planted, abs=0.06)
        drift_low, drift_high = entry["drift_ci"] or [1, 0]
        assert drift_low < 0 < drift_high
        assert entry["left"] is None, "a file does not say where an answer stood"


def test_who_may_be_good_is_no_coin() -> None:
    """25 labels on pairs of which little else is known reach 1/2, and whatever the others have too."""
    rows, strength = crowd({"ann": 0.9, "bob": 0.9}, 200, seed=9)
    more, vote = crowd({"new": 0.7}, 25, seed=10)
    report = report_rows([*rows, *more], torch.cat([strength, 0.3 * vote]), NOISE)
    low, high = report["new"]["accuracy_ci"] or [0.6, 0]
    assert low < 0.5
    assert high > 0.95
    assert report["new"]["flags"] == []


def test_a_taste_that_all_share_is_nobodys() -> None:
    """All take the longer answer nine times in ten: what labels want is the audit's other question."""
    data, votes_of = [], []
    for i, name in enumerate(["ann", "bob", "cy"]):
        rows, strength = crowd({}, 100, seed=20 + i, length_fan=name)
        data, votes_of = [*data, *rows], [*votes_of, strength]
    report = report_rows(data, torch.cat(votes_of), NOISE)
    for entry in report.values():
        assert entry["tastes"]["length"]["slope_ci"][0] > 0
        assert "more length" not in entry["flags"]


def test_a_drift_is_seen() -> None:
    first, strength_first = crowd({"ann": 0.95, "bob": 0.9}, 200, seed=2)
    second, strength_second = crowd({"ann": 0.5, "bob": 0.9}, 200, seed=3)
    report = report_rows([*first, *second], torch.cat([strength_first, strength_second]), NOISE)
    assert report["ann"]["flags"] == ["worse"]
    assert report["ann"]["drift"] == pytest.approx(-0.45, abs=0.15)
    assert report["bob"]["flags"] == []
    assert any("ann is worse in the later half" in line for line in annotator_sentences(report))


def test_labels_on_one_conversation_make_intervals_wide() -> None:
    """Every label six times: on six turns of one conversation it tells less than on six prompts."""
    rows, strength = crowd({"ann": 0.9, "bob": 0.8}, 30, seed=13, length_fan="long")
    six = [{**row, "prompt": user_turn(f"{row['prompt'][0]['content']} {i}")} for row in rows for i in range(6)]
    together = [
        {**row, "prompt": [*rows[i // 6]["prompt"], assistant_turn("x")[0], *row["prompt"]]}
        for i, row in enumerate(six)
    ]
    apart, of_one = (report_rows(data, strength.repeat_interleave(6), NOISE) for data in (six, together))
    for name in ("ann", "bob", "long"):
        for figure in ("accuracy_ci", "drift_ci"):
            (low, high), (low_apart, high_apart) = of_one[name][figure], apart[name][figure]
            assert high - low > 1.5 * (high_apart - low_apart), (name, figure)
        for figure in ("slope_ci", "beyond_ci"):
            taste, taste_apart = of_one[name]["tastes"]["length"][figure], apart[name]["tastes"]["length"][figure]
            assert taste[1] - taste[0] > 1.5 * (taste_apart[1] - taste_apart[0]), (name, figure)


def test_questions_on_one_conversation_make_intervals_of_verdicts_wide() -> None:
    rng = random.Random(0)
    right = {f"q{i}-{j}": "first" for i in range(30) for j in range(6)}
    wrong = {f"q{i}" for i in range(30) if rng.random() < 0.2}
    verdicts = [Verdict(name, "second" if name.partition("-")[0] in wrong else "first", "ann") for name in right]
    questions = [Question(name, 1, user_turn(name.partition("-")[0]), "a", f"b{name}") for name in right]
    of_one = report_verdicts(verdicts, right=right, questions=questions)["ann"]["accuracy_ci"]
    apart = report_verdicts(verdicts, right=right)["ann"]["accuracy_ci"]
    assert of_one is not None
    assert apart is not None
    assert of_one[1] - of_one[0] > 2 * (apart[1] - apart[0])


# ---- Posterior labels ----


def test_posterior_labels_take_the_annotators_own_error_rate() -> None:
    """Against Bayes in plain numpy with the error rates of the report; a coin's label says nothing beside the vote."""
    rows, strength = crowd({"ann": 0.9, "bob": 0.5}, 300, seed=4)
    made = denoised(rows, DenoiseConfig("posterior"), votes(strength / 2), NOISE).rows
    report = report_rows(rows, strength / 2, NOISE)
    worth = own_worth(rows, strength / 2)  # about 2
    for row, vote, out in zip(rows, (worth * strength / 2).tolist(), made, strict=True):
        error = report[row["annotator"]]["error_rate"]
        right = (1 - error) / (1 + math.exp(-vote))
        wrong = error / (1 + math.exp(vote))
        assert out["confidence"] == pytest.approx(right / (right + wrong), abs=1e-5)
    weights = denoised(rows, DenoiseConfig("weight"), votes(strength / 2), NOISE).rows
    assert [row["weight"] for row in weights] == [row["confidence"] for row in made]


def test_a_pair_that_several_labelled_is_one_row_with_what_all_say() -> None:
    rows, strength = crowd({"ann": 0.9, "bob": 0.8}, 100, seed=5)
    against = {**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"], "annotator": "bob"}
    agrees = {**rows[1], "annotator": "ann"}  # row 1 is bob's
    tie = {**rows[2], "confidence": 0.5, "annotator": "bob"}
    data = [*rows, against, agrees, tie]
    strength = torch.cat([strength, torch.tensor([-strength[0], strength[1], strength[2]])])
    made = denoised(data, DenoiseConfig("posterior"), votes(strength), NOISE).rows
    assert len(made) == len(rows)
    report = report_rows(data, strength, NOISE)
    odds = {name: math.log((1 - report[name]["error_rate"]) / report[name]["error_rate"]) for name in ("ann", "bob")}
    worth = own_worth(data[:-1], strength[:-1])
    expected = [
        worth * strength[0] + odds["ann"] - odds["bob"],
        worth * strength[1] + odds["ann"] + odds["bob"],
        worth * strength[2] + odds["ann"],
    ]
    got = [row["confidence"] for row in made[:3]]
    np.testing.assert_allclose(got, [1 / (1 + math.exp(-x)) for x in expected], atol=1e-5)
    assert made[2]["chosen"] == rows[2]["chosen"]
    weighted = denoised(data, DenoiseConfig("weight"), votes(strength), NOISE).rows
    for_it, against_it = weighted[0]["weight"], weighted[len(rows)]["weight"]
    assert against_it == pytest.approx(1 - for_it, abs=1e-6), (
        "the label against is right as often as the first is wrong"
    )


def test_the_rate_of_the_whole_is_taken_where_no_own_one_is_known() -> None:
    """One annotator; nobody named; many annotators with one label each: exactly the posterior of the global rate."""
    rows, strength = crowd({"ann": 0.8}, 60, seed=6)
    unnamed = [{name: value for name, value in row.items() if name != "annotator"} for row in rows]
    strangers = [{**row, "annotator": f"a{i}"} for i, row in enumerate(rows)]
    expected = [1 / (1 + math.exp(-vote) * 0.2 / 0.8) for vote in strength.tolist()]
    for data in (rows, unnamed, strangers):
        assert posterior_by_annotator(data, strength, NOISE) is None
        made = denoised(data, DenoiseConfig("posterior"), votes(strength), NOISE).rows
        np.testing.assert_allclose([row["confidence"] for row in made], expected, atol=1e-6)


def test_posteriors_need_no_proof_but_votes_that_say_something() -> None:
    """Few votes prove no wrong label; what they leave likely is taken, for all or for each annotator."""
    unproved = replace(NOISE, low=0.0)
    rows, strength = crowd({"ann": 0.95, "bob": 0.5}, 200, seed=11)
    for objective in ("posterior", "weight"):
        made = denoised(rows, DenoiseConfig(objective), votes(strength), unproved).rows
        assert made == denoised(rows, DenoiseConfig(objective), votes(strength), NOISE).rows != rows
        silent = replace(NOISE, fitted=0.0, scale=0.0, low=0.0)
        assert denoised(rows, DenoiseConfig(objective), votes(strength), silent).rows == rows
    assert denoised(rows, DenoiseConfig("vote_sigmoid"), votes(strength), unproved).rows == rows


# ---- Bad input ----


def test_one_annotator_and_nobody() -> None:
    rows, strength = crowd({"ann": 0.8}, 60, seed=6)
    report = report_rows(rows, strength, NOISE)
    assert annotator_sentences(report) == ["All labels are by one annotator, ann: there is nobody to compare with."]
    assert report["ann"]["flags"] == report["ann"]["tastes"] == [] or report["ann"]["tastes"] == {}
    assert report_rows([{**row, "annotator": None} for row in rows], strength, NOISE) == {}
    assert annotator_sentences({}) == []


def test_sources_stand_for_people_where_nobody_is_named() -> None:
    rows, strength = crowd({"ann": 0.9, "bob": 0.5}, 200, seed=8)
    by_source = [{**row, "source": row["annotator"], "annotator": None} for row in rows]
    assert report_rows(by_source, strength, NOISE) == report_rows(rows, strength, NOISE)
    assert report_rows([{**row, "source": "one"} for row in by_source], strength, NOISE) == {}


def test_an_annotator_with_one_label_is_not_judged() -> None:
    rows, strength = crowd({"ann": 0.9}, 100, seed=7)
    rows[50] = {**rows[50], "annotator": "once"}
    report = report_rows(rows, strength, NOISE)
    assert report["once"]["labels"] == 1
    assert report["once"]["flags"] == ["few"]
    assert report["once"]["drift"] is None
    assert "Too few labels to be judged: once (1 of 2)." in annotator_sentences(report)
    assert report["once"]["error_rate"] == pytest.approx(report["ann"]["error_rate"], abs=0.1), "drawn to that of all"


def test_labels_that_are_all_equal() -> None:
    """Verdicts: everybody always says first, or tie. No figure is invented, and what is seen is said."""
    same = [Verdict(f"q{i}", "first", name) for i in range(40) for name in ("ann", "bob")]
    assert report_verdicts(same, right={})["ann"]["accuracy"] is None, "two that agree may both hold one key down"
    ties = [Verdict(f"q{i}", "tie", name) for i in range(40) for name in ("ann", "bob")]
    report = report_verdicts(ties, right={})
    assert (report["ann"]["ties"], report["ann"]["accuracy"], report["ann"]["flags"]) == (40, None, ["few"])
    skips = [Verdict(f"q{i}", "skip", "ann") for i in range(40)]
    assert report_verdicts(skips, right={}) == report_verdicts([], right={}) == {}


def test_a_habit_of_place_is_seen() -> None:
    """Ann always clicks on the left; the page draws the sides anew for everybody."""
    rng = random.Random(0)
    verdicts = []
    for i in range(120):
        verdicts.append(Verdict(f"q{i}", "second" if shows_second_on_the_left("ann", f"q{i}") else "first", "ann"))
        for name in ("bob", "cy"):
            verdicts.append(Verdict(f"q{i}", "first" if rng.random() < 0.9 else "second", name))
    report = report_verdicts(verdicts, right={})
    assert report["ann"]["left"] == 1.0
    assert {"left", "coin"} <= set(report["ann"]["flags"])
    assert report["bob"]["flags"] == []
    assert "ann chooses the answer on the left in 100% of the pairs." in annotator_sentences(report)


def test_verdicts_that_no_one_else_gave_tell_no_accuracy() -> None:
    verdicts = [Verdict(f"{name}{i}", "first", name) for i in range(ENOUGH) for name in ("ann", "bob")]
    report = report_verdicts(verdicts, right={})
    assert report["ann"]["accuracy"] is report["ann"]["accuracy_ci"] is None
    assert any("Accuracy not known" in line for line in annotator_sentences(report))


def test_a_pair_is_one_whichever_answer_is_chosen() -> None:
    rows, _ = crowd({"ann": 0.9}, 1, seed=0)
    other = {**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    assert pair_digest(rows[0]) == pair_digest(other)
