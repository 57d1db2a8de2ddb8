"""Opening books of labels, and correcting what stands in them."""

import json
from pathlib import Path

import yaml

from rlhf.data.labelbook import BOOK, LabelBook
from rlhf.data.labels import Question, question_id
from rlhf.data.rows import user_turn
from rlhf.serve.desk import hide_gold, import_from, open_book, progress_lines


def question(i: int) -> Question:
    prompt = user_turn(f"List {i} fruits.")
    return Question(question_id(2, prompt, [f"a {i}", f"b {i}"]), 2, prompt, f"a {i}", f"b {i}", None, None)


def run_with_questions(folder: Path) -> LabelBook:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"rounds": {"annotators_per_pair": 3}}))
    book = LabelBook(folder / BOOK)
    book.ask([question(i) for i in range(4)])
    return book


def test_a_recipe_beside_a_run_does_not_make_it_a_second_look(tmp_path: Path) -> None:
    """`rlhf run exp/recipe.yaml --out exp/run` is a natural place; three verdicts a pair stay three."""
    run_with_questions(tmp_path / "exp/run")
    (tmp_path / "exp/recipe.yaml").write_text("name: x")
    assert open_book(tmp_path / "exp/run")[1:] == (2, 3)


def test_a_gold_question_that_was_wrong_is_corrected(tmp_path: Path) -> None:
    book = run_with_questions(tmp_path / "run")
    file = tmp_path / "gold.jsonl"
    rights = []
    for chosen, rejected in (("5", "4"), ("4", "5")):
        file.write_text(json.dumps({"prompt": "2 + 2?", "chosen": chosen, "rejected": rejected}))
        hide_gold(tmp_path / "run", file)
        (gold,) = book.gold(2)
        rights.append(gold.question.first if gold.label == "first" else gold.question.second)
    assert rights == ["5", "4"]


def test_questions_of_an_earlier_attempt_are_taken_back(tmp_path: Path) -> None:
    book = run_with_questions(tmp_path / "run")
    assert book.withdraw_others(2, {question(i).id for i in (0, 1, 9)}) == 2
    assert {q.id for q in book.questions(2)} == {question(0).id, question(1).id}
    assert book.withdraw_others(1, set()) == 0, "those of another round stay"
    assert len(book.questions(2)) == 2


def test_verdicts_that_come_too_late_are_said_to(tmp_path: Path) -> None:
    """The label stage is done; what is imported then changes nothing, and the command says what to delete for it to count."""
    run = tmp_path / "run"
    run_with_questions(run)
    verdicts = tmp_path / "verdicts.jsonl"
    verdicts.write_text("".join(json.dumps({"id": question(i).id, "label": "first"}) + "\n" for i in range(4)))
    lines: list[str] = []
    import_from(run, verdicts, say=lines.append)
    assert not any("has read the verdicts" in line for line in (*lines, *progress_lines(run)))
    (run / "round-2/label").mkdir(parents=True)
    (run / "round-2/label/manifest.json").write_text("{}")
    import_from(run, verdicts, say=lines.append)
    for said in (lines, progress_lines(run)):
        (late,) = [line for line in said if "has read the verdicts of round 2" in line]
        assert f"delete {run}/round-2/label" in late
