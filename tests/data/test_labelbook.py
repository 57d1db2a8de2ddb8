"""The book of verdicts: who is asked what, what counts, and when a round is done."""

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.data import labelbook
from rlhf.data.labelbook import LabelBook
from rlhf.data.labels import Verdict, tally
from tests.data.five_questions import FIVE, question


def test_a_book_survives_undo_repeats_and_two_annotators(tmp_path: Path) -> None:
    book = LabelBook(tmp_path / "labels.sqlite")
    book.ask(FIVE)
    book.ask(FIVE)
    assert book.questions(2) == FIVE
    first = book.next_for("ann", 2, wanted=1)
    assert first is not None
    assert first == book.next_for("ann", 2, wanted=1), "a page that is loaded again shows it again"
    book.record([Verdict(first.id, "first", "ann", 3.5)])
    assert book.next_for("ann", 2, wanted=1) not in (first, None)
    assert len(asked_of(book, "bob", wanted=1)) == 4, "one verdict is enough"
    assert len(asked_of(book, "bob", wanted=2)) == 5, "two are wanted"
    book.record([Verdict(first.id, "tie", "ann")])
    assert [v.label for v in book.verdicts(2)] == ["tie"]
    assert book.undo("bob", 2) is None
    assert book.undo("ann", 2) == first.id
    assert book.progress(2, wanted=1) == (0, 5, 0)
    assert LabelBook(tmp_path / "labels.sqlite").questions(2) == FIVE


def test_a_question_that_is_asked_again_keeps_its_sides(tmp_path: Path) -> None:
    """A stage made anew draws other sides for a pair that comes up again; `first` of an old verdict means what it was shown."""
    book = LabelBook(tmp_path / "labels.sqlite")
    assert book.ask(FIVE) == FIVE
    book.record([Verdict(FIVE[0].id, "first", "ann")])
    turned = replace(FIVE[0], first=FIVE[0].second, second=FIVE[0].first)
    asked = book.ask([replace(turned, difference=2.0, second_ended=False), FIVE[1]])
    assert asked == [replace(FIVE[0], difference=-2.0, first_ended=False), FIVE[1]], "all else is of the new question"
    (row,) = tally(asked[:1], book.verdicts(2)).rows
    assert row["chosen"][0]["content"] == FIVE[0].first


def test_a_question_that_was_taken_back_comes_back_with_its_sides(tmp_path: Path) -> None:
    """Its row was deleted, its verdicts were not: sides drawn anew turned the label round."""
    book = LabelBook(tmp_path / "labels.sqlite")
    book.ask(FIVE)
    book.record([Verdict(FIVE[0].id, "first", "ann")])
    assert book.withdraw_others(2, [one.id for one in FIVE[1:]]) == 1
    assert (book.questions(2), book.rounds()) == (FIVE[1:], [2])
    assert (book.verdicts(2), book.progress(2, wanted=1)) == ([], (0, 4, 0)), "nothing of it counts now"
    assert book.withdraw_others(2, [one.id for one in FIVE[1:]]) == 0
    turned = replace(FIVE[0], first=FIVE[0].second, second=FIVE[0].first)
    assert book.ask([turned, *FIVE[1:]]) == FIVE
    assert [verdict.label for verdict in book.verdicts(2)] == ["first"]
    assert book.withdraw_others(2, []) == 5
    assert book.rounds() == []


def test_a_round_that_asks_again_takes_back_the_later_ones(tmp_path: Path) -> None:
    """People answer the newest round of a book; questions of a policy that is trained anew are no longer worth an answer."""
    book = LabelBook(tmp_path / "labels.sqlite")
    later = [replace(one, id=f"r{number}-x", round=number) for number, one in ((3, FIVE[0]), (4, FIVE[1]))]
    book.ask([*FIVE, *later])
    assert book.rounds() == [2, 3, 4]
    assert book.withdraw_later(2) == 2
    assert (book.rounds(), len(book.questions(2))) == ([2], 5)
    assert book.withdraw_later(2) == 0
    assert book.ask(later[:1]) == later[:1], "asked again, it is there again"
    assert book.rounds() == [2, 3]


def test_the_last_verdict_is_taken_back_also_when_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = LabelBook(tmp_path / "labels.sqlite")
    book.ask(FIVE)
    for number, now in enumerate((5000.0, 6000.0, 100.0, 101.0)):
        monkeypatch.setattr(labelbook.time, "time", lambda now=now: now)
        book.record([Verdict(FIVE[number].id, "first", "ann"), Verdict(FIVE[number].id, "tie", "bob")])
    assert [book.undo("ann", 2) for _ in range(3)] == [FIVE[3].id, FIVE[2].id, FIVE[1].id]


def asked_of(book: LabelBook, annotator: str, *, wanted: int) -> list[str]:
    """The questions that somebody would be asked one after the other; nothing stays in the book."""
    names: list[str] = []
    while (one := book.next_for(annotator, 2, wanted=wanted)) is not None:
        names.append(one.id)
        book.record([Verdict(one.id, "tie", annotator)])
    for _ in names:
        book.undo(annotator, 2)
    return names


def test_people_at_work_at_once_seldom_answer_the_same_question(tmp_path: Path) -> None:
    """Three people, 60 questions, one verdict wanted, all click at the same moment: in one order they would give 180 verdicts."""
    book = LabelBook(tmp_path / "labels.sqlite")
    book.ask([question(i) for i in range(60)])
    given = 0
    while book.progress(2, wanted=1).done < 60:
        shown = [(name, book.next_for(name, 2, wanted=1)) for name in ("ann", "bob", "cem")]
        verdicts = [Verdict(one.id, "first", name) for name, one in shown if one is not None]
        book.record(verdicts)
        given += len(verdicts)
    assert given <= 72


def test_who_cannot_say_gives_no_verdict(tmp_path: Path) -> None:
    """Somebody else is asked; when all who label have seen the pair, the round goes on without."""
    book = LabelBook(tmp_path / "labels.sqlite")
    book.ask(FIVE)
    book.record([Verdict(one.id, "skip", "ann") for one in FIVE])
    assert book.progress(2, wanted=2) == (0, 5, 0), "two are wanted, and one person has looked"
    assert book.progress(2, wanted=1) == (5, 5, 5), "who labels alone has seen them all"
    book.record([Verdict(one.id, "first", "bob") for one in FIVE])
    assert book.progress(2, wanted=1) == (5, 5, 0)
    assert book.progress(2, wanted=2) == (5, 5, 5), "nobody else labels"
    assert len(asked_of(book, "cem", wanted=2)) == 5, "but somebody else may come"
    book.record([Verdict(FIVE[0].id, "first", "cem")])
    assert book.progress(2, wanted=2) == (5, 5, 4), "who gives one verdict and leaves is not waited for"
    book.record([Verdict(one.id, "first", "cem") for one in FIVE[1:3]])
    assert book.progress(2, wanted=2) == (3, 5, 0), "who answers more than half as many as the others is"


def test_people_who_share_a_round_are_all_asked_before_a_pair_is_given_up(tmp_path: Path) -> None:
    """Nobody of three has half of the round, so one skip finished a question that the other two never saw."""
    book, questions = LabelBook(tmp_path / "labels.sqlite"), [question(i) for i in range(90)]
    book.ask(questions)
    people = ("ann", "bob", "cem")
    for name, own in zip(people, (questions[:30], questions[30:60], questions[60:]), strict=True):
        book.record([Verdict(one.id, "skip" if i % 3 == 0 else "first", name) for i, one in enumerate(own)])
    assert book.progress(2, wanted=1) == (60, 90, 0)
    assert book.waits_for(2, wanted=1) == {"ann": 20, "bob": 20, "cem": 20}
    assert len(asked_of(book, "ann", wanted=1)) == 20, "the ten that each of the others skipped"
    skipped = [questions[start + i] for start in (0, 30, 60) for i in range(0, 30, 3)]
    book.record([Verdict(one.id, "skip", name) for name in people for one in skipped])
    assert book.progress(2, wanted=1) == (90, 90, 30)
    assert book.waits_for(2, wanted=1) == {}
