"""Control questions: how many come, which, and never as a training label."""

from pathlib import Path

import pytest

from rlhf.data.controls import (
    GOLD_SHARE,
    REPEATED_AFTER,
    Gold,
    History,
    controls_due,
    controls_expected,
    gold_questions,
    next_control,
    repeated,
)
from rlhf.data.labelbook import LabelBook
from rlhf.data.labels import Question, Verdict, question_id, tally
from rlhf.data.rows import Pair, assistant_turn, user_turn
from rlhf.errors import UserError


def pair(number: int) -> Pair:
    return {
        "prompt": user_turn(f"Name {number} towns."),
        "chosen": assistant_turn(f"good {number}"),
        "rejected": assistant_turn(f"bad {number}"),
    }


def question(number: int) -> Question:
    prompt = user_turn(f"List {number} fruits.")
    return Question(question_id(2, prompt, ["good", "bad"]), 2, prompt, "good", "bad")


QUESTIONS = [question(i) for i in range(100)]
GOLD = gold_questions([pair(i) for i in range(200)], QUESTIONS, 2)


def test_the_right_answer_stands_on_either_side() -> None:
    assert all(getattr(one.question, one.label).startswith("good") for one in GOLD)
    assert 72 < sum(one.label == "first" for one in GOLD) < 128, "a fair coin: ±4 deviations"
    assert {one.question.id[:3] for one in GOLD} == {"r2-"}, "named as all others are"
    assert {len(one.question.id) for one in GOLD} == {len(QUESTIONS[0].id)}


def test_controls_come_at_their_share() -> None:
    """Mean over people of the controls due after 1,000 answers, ±4 deviations of a binomial."""
    people, answers = [f"p{i}" for i in range(20)], 1000
    for kind, share in (("gold", GOLD_SHARE), ("repeat", 0.2)):
        total = sum(controls_due(name, kind, answers, share) for name in people)
        assert abs(total - 20_000 * share) < 4 * (20_000 * share * (1 - share)) ** 0.5
    orders = {tuple(controls_due(name, "gold", n, 0.1) for n in range(50)) for name in people}
    assert len(orders) == 20, "everybody has an order of their own"


def answered(person: str, gold: list[Gold], repeat: float) -> tuple[History, list[int]]:
    """One person answers all questions and every control that is due; after how many answers each control came."""
    history, places = History([], [], []), list[int]()
    asked = {q.id: q for q in QUESTIONS}
    for each in QUESTIONS:
        while (control := next_control(person, history, gold, asked, repeat=repeat)) is not None:
            places.append(len(history.verdicts))
            if control.question.id == control.of:
                history = history._replace(gold=[*history.gold, control.of])
            else:
                said = [v.id for v in history.verdicts]
                assert said.index(control.of) < len(said) - REPEATED_AFTER, "not while it is fresh in mind"
                assert control == repeated(asked[control.of])
                assert control.question.id not in asked
                history = history._replace(repeated=[*history.repeated, control.of])
        history = history._replace(verdicts=[*history.verdicts, Verdict(each.id, "first", person)])
    return history, places


def test_a_person_meets_as_many_as_the_bar_counts_and_none_twice() -> None:
    for person in ("ann", "bob", "李"):
        history, places = answered(person, GOLD[:5], 0.2)
        assert len(set(history.gold)) == len(history.gold) <= 5
        assert len(set(history.repeated)) == len(history.repeated) > 5
        assert len(places) == controls_expected(person, 100, 5, repeat=0.2)
    assert answered("ann", [], 0.0) == (answered("ann", [], 0.0)[0], [])
    assert controls_expected("ann", 0, 5, repeat=0.2) == 0


def test_what_can_be_no_gold_question() -> None:
    tie: Pair = {**pair(1), "confidence": 0.5}
    with pytest.raises(UserError, match="pair 2 is a tie"):
        gold_questions([pair(0), tie], [], 2)
    known = [one.question for one in gold_questions([pair(0)], [], 2)]
    assert len(gold_questions([pair(0), pair(1)], known, 2)) == 1, "what is asked anyway is a label"
    with pytest.raises(UserError, match="none of its 1 pairs can be a control question"):
        gold_questions([pair(0)], known, 2)


def test_a_book_keeps_controls_apart_from_labels(tmp_path: Path) -> None:
    book = LabelBook(tmp_path / "labels.sqlite")
    book.ask(QUESTIONS[:3])
    book.hide_gold(GOLD[:2])
    book.hide_gold(GOLD[:2])
    assert book.gold(2) == GOLD[:2]
    first, gold = QUESTIONS[0], GOLD[0].question
    book.record([Verdict(first.id, "first", "ann", 2.0)])
    again = repeated(first)
    book.record_control(again, Verdict(again.question.id, "second", "ann"))
    golden = next_control("ann", History([Verdict(first.id, "first", "ann")] * 100, [], []), GOLD[:1], {}, repeat=0)
    assert golden is not None
    book.record_control(golden, Verdict(gold.id, "tie", "ann"))
    assert [v.id for v in book.verdicts(2)] == [v.id for v in book.verdicts()] == [first.id]
    assert [v.id for v in book.verdicts(2, with_gold=True)] == [first.id, gold.id], "in their order, without repeats"
    assert book.progress(2, wanted=1) == (1, 3, 0)
    assert tally(QUESTIONS[:3], book.verdicts(2)).counts["verdicts"] == 1
    assert book.repeats(2) == [("ann", "first", "second")]
    assert book.history("ann", 2) == ([Verdict(first.id, "first", "ann", 2.0)], [gold.id], [first.id])
    assert book.history("bob", 2) == ([], [], [])
    assert book.repeats(1) == book.gold(1) == book.verdicts(1, with_gold=True) == []
    assert [book.undo("ann", 2) for _ in range(4)] == [gold.id, again.question.id, first.id, None], "the latest first"
