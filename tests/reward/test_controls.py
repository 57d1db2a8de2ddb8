"""What control questions tell of those who label."""

import random

import pytest
from scipy.stats import binomtest

from rlhf.data.controls import Repeat
from rlhf.data.labels import Verdict
from rlhf.objectives.annotators import most_accuracy
from rlhf.report.annotators import annotator_sentences, control_sentences
from rlhf.reward.annotators import report_verdicts
from rlhf.reward.controls import report_gold, report_repeats

OTHER = {"first": "second", "second": "first"}


def test_gold_questions_are_counted_without_ties_and_skips() -> None:
    right = {"g1": "first", "g2": "second", "g3": "first"}
    labels = [("g1", "first"), ("g2", "first"), ("g3", "tie"), ("q", "second")]
    verdicts = [Verdict(name, label, "ann") for name, label in labels] + [Verdict("g1", "skip", "bob")]
    interval = binomtest(1, 2).proportion_ci(0.95)
    assert report_gold(verdicts, right) == {
        "ann": {"answered": 2, "right": 0.5, "right_ci": [interval.low, interval.high]}
    }


def test_agreement_with_oneself_bounds_accuracy() -> None:
    repeats = [Repeat("ann", "first", "first")] * 9 + [Repeat("ann", "first", "second"), Repeat("ann", "skip", "first")]
    report = report_repeats([*repeats, *[Repeat("ann", "first", "tie"), Repeat("ann", "tie", "tie")]])["ann"]
    high = binomtest(9, 10).proportion_ci(0.95).high
    assert (report["answered"], report["alike"]) == (10, 0.9)
    assert report["most_accuracy"] == pytest.approx((1 + (2 * high - 1) ** 0.5) / 2)
    for accuracy in (0.5, 0.75, 0.9, 1.0):
        assert most_accuracy(accuracy**2 + (1 - accuracy) ** 2) == pytest.approx(accuracy), "equally easy questions"
    easy_and_hard = [1.0] * 50 + [0.6] * 50
    alike = sum(q * q + (1 - q) ** 2 for q in easy_and_hard) / 100
    assert most_accuracy(alike) > sum(easy_and_hard) / 100, "else a bound"


def test_who_calls_close_pairs_equal_now_and_then_may_be_right_in_all_others() -> None:
    """The bound is on labels without ties, and so is what it rests on."""
    repeats = [Repeat("ann", "first", "first")] * 30 + [Repeat("ann", "first", "tie")] * 15
    assert report_repeats(repeats)["ann"]["most_accuracy"] == 1.0
    assert report_repeats([Repeat("bob", "tie", "first")]) == {}


def test_gold_questions_tell_a_coin_from_one_who_is_alone() -> None:
    """One annotator, 40 gold questions: nobody else labelled, and the accuracy is the share of right answers."""
    right = {f"g{i}": ("first", "second")[i % 2] for i in range(40)}
    verdicts = [
        Verdict(name, label if i % 10 else OTHER[label], "ann") for i, (name, label) in enumerate(right.items())
    ]
    entry = report_verdicts(verdicts, right=right)["ann"]
    assert entry["accuracy"] == pytest.approx(0.9, abs=0.003), "a gold answer is taken for right with 0.999"
    alone = report_verdicts(verdicts, right={})
    assert alone["ann"]["accuracy"] is None
    assert annotator_sentences(alone) == ["All labels are by one annotator, ann: there is nobody to compare with."]
    assert annotator_sentences({"ann": entry}, has_gold=True) == []

    # A coin beside her, on the gold questions and on questions that nobody shares.
    rng = random.Random(0)
    verdicts += [Verdict(name, rng.choice(list(OTHER)), "bob") for name in right]
    verdicts += [Verdict(f"{name}-{i}", "first", name) for name in ("ann", "bob") for i in range(30)]
    report = report_verdicts(verdicts, right=right)
    assert "coin" in report["bob"]["flags"]
    assert "coin" not in report["ann"]["flags"]


def test_an_annotator_with_one_label_is_said_to_have_too_few() -> None:
    verdicts = [Verdict("g", "first", "ann"), *(Verdict(f"q{i}", "first", "bob") for i in range(25))]
    report = report_verdicts(verdicts, right={"g": "first"})
    assert report["ann"]["flags"] == ["few"]
    assert "Too few labels to be judged: ann (1 of 2)." in annotator_sentences(report)
    assert control_sentences(report_gold(verdicts, {"g": "first"}), {}) == [
        "ann: 100% of 1 gold questions right [0.03, 1.00]."
    ]
    assert control_sentences({}, report_repeats([Repeat("ann", "first", "first")])) == [
        "ann: 100% of 1 repeated questions answered alike [0.03, 1.00], so an accuracy of 1.00 at most."
    ]


def test_two_annotators_without_gold_questions_are_not_told_apart() -> None:
    """One is right in 98 %, the other in 70 %: all that shows is how often they agree, and both were given the mean."""

    def verdicts(seed: int, **people: tuple[range, float]) -> list[Verdict]:
        rng, made = random.Random(seed), []
        for name, (questions, accuracy) in people.items():
            for number in questions:
                right = ("first", "second")[number % 2]
                made.append(Verdict(f"q{number}", right if rng.random() < accuracy else OTHER[right], name))
        return made

    both = {"ann": (range(200), 0.98), "bob": (range(200), 0.7)}
    one_more, elsewhere = {"cid": (range(1), 0.9)}, {"cid": (range(300, 400), 0.9)}
    chain = {"ann": (range(200), 0.98), "bob": (range(100), 0.7), "cid": (range(100, 200), 0.9)}
    for people in (both, {**both, **one_more}, {**both, **elsewhere}, chain):
        report = report_verdicts(verdicts(0, **people), right={})
        assert [report[name]["accuracy"] for name in ("ann", "bob")] == [None, None], people
        assert not report["ann"]["flags"]
    assert "too little else is known of the pairs that they labelled: ann, bob, cid." in annotator_sentences(report)[-1]
    held = 0
    for seed in range(20):
        report = report_verdicts(verdicts(seed, **both, cid=(range(200), 0.9)), right={})
        for name, accuracy in (("ann", 0.98), ("bob", 0.7), ("cid", 0.9)):
            low, high = report[name]["accuracy_ci"] or (0.0, 0.0)
            held += low <= accuracy <= high
    assert held >= 48, (
        "0.95 of 60 are 57; the others' own errors are left out of an interval, so it holds a little less often"
    )
