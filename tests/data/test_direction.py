"""Which of two responses is the better one: every code that people write is read right or refused, and said."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import direction as direction_module
from rlhf.data.direction import Direction, _unstated, directions, has_two_responses
from rlhf.data.prepare import DataSources, prepare_data
from rlhf.data.rows import answer
from rlhf.data.sides import code_of, named_side, numbered_sides, shown_codes
from rlhf.data.sources import Source, read_pair_rows, read_sources, to_pairs
from rlhf.errors import UserError
from rlhf.files import read_jsonl, write_jsonl
from rlhf.recipe import load_recipe

TWO = [0, 1, 1, 0, 0, 1, 0, 1]  # which response of a row is the better one; the better one says yes


def file_of(folder: Path, codes: Sequence[Any], column: str = "preference", **more: Any) -> str:
    """Write a file whose row i has codes[TWO[i]] as its preference."""
    rows = []
    for i, better in enumerate(TWO):
        texts = [f"no {i}", f"no {i}"]
        texts[better] = f"yes {i}"
        rows.append(
            {"prompt": f"say {i}", "response_1": texts[0], "response_2": texts[1], column: codes[better]} | more
        )
    write_jsonl(folder / "x.jsonl", rows)
    return str(folder / "x.jsonl")


def chosen(source: str, preference: dict[str, Any] | None = None) -> tuple[list[str], list[str]]:
    """Return the first words of the chosen answers, and what was said."""
    reports: list[Any] = []
    rows = read_sources([Source(source, preference=preference)], to_pairs, reports, "pairs", 0)
    texts = [answer(row.values, "chosen") for row in rows.train]
    assert len({row.number for row in rows.train}) == len(texts)
    return [text.split()[0] for text in texts], reports[0].sentences()


STATED = [
    (1, 2), ("1", "2"), (1.0, 2.0), ("A", "B"), ("a", "b"), ("first", "second"), ("left", "right"), ("response_1", "response_2"),
    ("Response 1", "Response 2"), ("model_a", "model_b"), ("model-1", "model-2"), ("assistant_a", "assistant_b"),
    (-3, 3), (-2, 1), (-0.5, 0.25), ("answer1", "answer2"),
]  # fmt: skip


@pytest.mark.parametrize("column", ["preference", "overall_preference"])
@pytest.mark.parametrize("codes", STATED, ids=str)
def test_codes_that_say_it_are_read_right_and_said(tmp_path: Path, codes: tuple[Any, Any], column: str) -> None:
    if column == "overall_preference" and [code_of(code) for code in codes] == ["1", "2"]:
        with pytest.raises(
            UserError, match=r"` holds \{1, 2\}, which does not say.* In HelpSteer3 `overall_preference` is such a"
        ):
            chosen(file_of(tmp_path, codes, column))  # a cut of HelpSteer3, of rows in which the second is better
        return
    words, sentences = chosen(file_of(tmp_path, codes, column))
    assert words == ["yes"] * len(TWO)
    said = (
        f'`{column}` {code_of(codes[0])} of {shown_codes(map(code_of, codes))}: the first is better: chosen = "yes 0"'
    )
    assert f"  {said}" in sentences


@pytest.mark.parametrize("column", ["preference", "overall_preference"])
@pytest.mark.parametrize(
    "codes",
    [(0, 1), (1, 0), (-1, 1), (1, -1), ("0", "1"), (True, False), (1, 1), (0.2, 0.7), (2, 6), (3, 1), ("A", 1)],
    ids=str,
)
def test_codes_that_do_not_say_it_are_refused_with_two_ways_out(
    tmp_path: Path, codes: tuple[Any, Any], column: str
) -> None:
    source = file_of(tmp_path, codes, column)
    with pytest.raises(UserError) as error:
        chosen(source)
    sentence = str(error.value)
    assert f"`{column}` holds {{" in sentence
    assert "preference: {" in sentence
    assert "`chosen` and `rejected`" in sentence
    if code_of(codes[0]) != code_of(codes[1]):  # the first way out, taken
        stated = {str(codes[0]): "first", str(codes[1]): "second"}
        assert chosen(source, stated)[0] == ["yes"] * len(TWO)
        turned = {str(codes[0]): "second", str(codes[1]): "first"}
        assert chosen(source, turned)[0] == ["no"] * len(TWO), "the recipe has the last word"


@pytest.mark.parametrize("codes", [(0, 1), (1, 2), (-1, 1), ("A", "B"), (-3, 3), ("x", "y")], ids=str)
def test_no_code_is_ever_learnt_the_wrong_way_round(tmp_path: Path, codes: tuple[Any, Any]) -> None:
    """Whichever of the two the file's maker meant by the lower one: right, or refused."""
    for column in ("preference", "overall_preference", "preference_strength", "strength"):
        try:
            words, _ = chosen(file_of(tmp_path, codes, column))
        except UserError:
            continue
        assert set(words) <= {"yes"}, column


@pytest.mark.parametrize(
    ("codes", "tie"),
    [
        *product([(1, 2), ("A", "B"), ("first", "second")], ["tie", "both", "equal", "Tie (bothbad)"]),
        ((1, 2), 0),
        ((-3, 3), 0),
    ],
    ids=str,
)
def test_a_tie_is_no_win(tmp_path: Path, codes: tuple[Any, Any], tie: Any) -> None:
    source = file_of(tmp_path, codes)
    rows = read_jsonl(Path(source))
    rows[2]["preference"] = rows[5]["preference"] = tie
    write_jsonl(Path(source), rows)
    pairs, report = read_pair_rows(source)
    assert [row.number for row in pairs] == [1, 2, 4, 5, 7, 8]
    assert {answer(row.values, "chosen").split()[0] for row in pairs} == {"yes"}
    assert sum(report.dropped.values()) == 2
    assert next(iter(report.dropped)).startswith("no preference between the two responses")


def test_a_strength_is_a_scale_and_keeps_its_size(tmp_path: Path) -> None:
    for codes in ((-1, 1), (-3, 2), (-0.5, 0.5)):
        source = file_of(tmp_path, codes, "preference_strength")
        pairs, _ = read_pair_rows(source)
        assert [row.values.get("rating_gap") for row in pairs] == [abs(codes[better]) for better in TWO]
        assert chosen(source)[0] == ["yes"] * len(TWO)


def test_a_code_is_no_rating(tmp_path: Path) -> None:
    pairs, report = read_pair_rows(file_of(tmp_path, (1, 2)))
    assert all("rating_gap" not in row.values for row in pairs)
    assert report.noted == {}


def test_a_strength_whose_rows_all_point_to_one_side_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "response_1": "a", "response_2": "b", "strength": 1 + i % 3} for i in range(8)]
    assert directions(rows[:7], "x")["strength"].sides is None
    with pytest.raises(UserError, match=r"`strength` holds \{1, 2, 3\}"):
        directions(rows, "x")
    assert directions([*rows, rows[0] | {"strength": -1}], "x")["strength"].sides is None


def test_the_whole_file_decides(tmp_path: Path) -> None:
    """The 2 stands in the last row only, and the first row is a tie."""
    source = file_of(tmp_path, (1, 1))
    rows = read_jsonl(Path(source))
    write_jsonl(Path(source), [rows[0] | {"preference": 0}, *rows[:1], rows[1] | {"preference": 2}])
    pairs, _ = read_pair_rows(source)
    assert [answer(row.values, "chosen") for row in pairs] == ["yes 0", "yes 1"]


def test_values_that_name_no_side_are_left_out_and_counted(tmp_path: Path) -> None:
    source = file_of(tmp_path, ("A", "B"))
    rows = read_jsonl(Path(source))
    rows[3]["preference"], rows[4]["preference"] = "C", "unsure"
    del rows[5]["preference"]
    write_jsonl(Path(source), rows)
    _, report = read_pair_rows(source)
    assert report.dropped == {
        "the preference names neither of the two responses": 2,
        "two responses without a preference (preference_strength, overall_preference, preference, strength)": 1,
    }


def test_a_stated_meaning_that_nothing_needs_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(UserError, match="take the key out"):
        chosen(str(tmp_path / "p.jsonl"), {"1": "first"})


def test_responses_as_messages_and_a_context(tmp_path: Path) -> None:
    rows = [
        {
            "context": [{"role": "user", "content": "Hi"}],
            "response1": {"content": "a"},
            "response2": {"text": "b"},
            "preference": p,
        }
        for p in (1, 2)
    ]
    write_jsonl(tmp_path / "x.jsonl", rows)
    pairs = read_sources([Source(str(tmp_path / "x.jsonl"))], to_pairs, [], "pairs", 0).train
    assert [answer(row.values, "chosen") for row in pairs] == ["a", "b"]
    assert pairs[0].values["prompt"] == [{"role": "user", "content": "Hi"}]


EVERY_LAYOUT = [
    ([{"text": "Hi", "role": "prompter"}, {"text": "yes", "role": "assistant"}, {"text": "no", "role": "assistant"}], "the first is the best"),
    ({"text": "Hi", "role": "prompter", "replies": [{"text": t, "role": "assistant", "rank": r} for t, r in (("no", 1), ("yes", 0))]}, "`rank` in a tree"),
    ({"prompt": "Hi", "responses": [{"content": "no", "score": 0}, {"content": "yes", "score": 1}]}, "highest score"),
    ({"prompt": "Hi", "responses": [{"content": "no", "rank": 2}, {"content": "yes", "rank": 1}]}, "lowest rank"),
    ({"prompt": "Hi", "response_1": "no", "response_2": "yes", "overall_preference": 2}, "`overall_preference` 2 of {-2, 2}: the second is better"),
    ({"prompt": "Hi", "chosen": "yes", "rejected": "no"}, "`chosen` and `rejected`"),
    ({"prompt": "Hi", "chosen": ["yes"], "rejected": ["no"]}, "`chosen` and `rejected`"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "words"), EVERY_LAYOUT)
def test_every_layout_has_its_direction_in_the_facts(tmp_path: Path, row: Any, words: str) -> None:
    other = {"prompt": "x", "response_1": "yes", "response_2": "no", "overall_preference": -2}
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (row, *([other] if "of" in words else []))))
    _, report = read_pair_rows(str(tmp_path / "x.jsonl"))
    (sentence, *_) = report.as_dict()["directions"]
    assert words in sentence
    assert sentence.endswith(': chosen = "yes"')
    assert any(sentence in line for line in report.sentences()) == (words != "`chosen` and `rejected`")


def test_rated_answers_have_a_direction(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "response": text, "helpfulness": h} for text, h in (("no", 1), ("yes", 3))]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert read_pair_rows(str(tmp_path / "x.jsonl"))[1].as_dict()["directions"] == [
        '`helpfulness`: the highest is the best: chosen = "yes"'
    ]


def test_a_recipe_states_it_by_numbers_words_and_truth_values(tmp_path: Path) -> None:
    file_of(tmp_path, (0, 1))
    text = "name: r\nlab: {}\ndata: {preferences: [{source: x.jsonl, preference: %s}]}\n"
    (tmp_path / "r.yaml").write_text(text % "{0: first, 1: second, tie: tie}")
    (entry,) = load_recipe(tmp_path / "r.yaml").data.sources("preferences")
    assert entry.preference == {"0": "first", "1": "second", "tie": "tie"}
    source = Source(**entry.model_dump() | {"source": str(tmp_path / "x.jsonl")})
    facts = prepare_data(tmp_path / "out", DataSources(sft=[Source(source.source, preference=source.preference)], preferences=[source], test_fraction=0.5), seed=0)  # fmt: skip
    said = [line for line in facts["sentences"] if "`preference` 0 of {0, 1}: the first is better: chosen = " in line]
    assert len(said) == 2, "for the pairs, and for the demonstrations that are made of them"
    assert {answer(row, "chosen").split()[0] for row in read_jsonl(tmp_path / "out" / "pairs.jsonl")} == {"yes"}
    (tmp_path / "r.yaml").write_text(text % "{true: first, false: second}")
    (entry,) = load_recipe(tmp_path / "r.yaml").data.sources("preferences")
    assert chosen(file_of(tmp_path, (True, False)), dict(entry.preference or {}))[0] == ["yes"] * len(TWO)
    assert load_recipe(tmp_path / "r.yaml", ["data.preferences=[{source: x, preference: {1: tie}}]"]).data.sources("preferences")[0].preference == {"1": "tie"}  # fmt: skip
    for wrong in ("{0: better}", "{0: first, 0: second}", "{}", "first"):
        (tmp_path / "r.yaml").write_text(text % wrong)
        with pytest.raises(UserError, match="preference"):
            load_recipe(tmp_path / "r.yaml")


def test_words_and_numbers() -> None:
    assert [named_side(word) for word in ("A", " b ", "Response_2", "option 1", "3", "", "chosen")] == [
        "first", "second", "second", "first", None, None, None
    ]  # fmt: skip
    assert numbered_sides(["1", "2"]) == {"1": "first", "2": "second"}
    assert numbered_sides(["0", "1"]) is numbered_sides(["1"]) is numbered_sides(["1", "2", "3"]) is None
    assert shown_codes(map(str, range(-5, 6))) == "{-5, -4, …, 5}"
    assert code_of("nan") == "nan"
    assert Direction("p", ("nan",), None).side("nan") is None


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("inverted", lambda codes: {"1": "second", "2": "first"}),
        ("off by one", lambda codes: {"0": "first", "1": "second", "2": "second"}),
        ("a tie wins", lambda codes: {"1": "first", "2": "second", "0": "first"}),
    ],
)
def test_the_tests_would_see_a_wrong_table(
    tmp_path: Path, name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direction_module, "numbered_sides", mutant)
    with pytest.raises(AssertionError):
        test_codes_that_say_it_are_read_right_and_said(tmp_path, (1, 2), "preference")
        test_a_tie_is_no_win(tmp_path, (1, 2), 0)


def test_zero_is_the_lower_end_of_an_unknown_direction() -> None:
    assert "{0: first, 0.5: second}" in str(_unstated("p", ["0.5", "0"], "x"))


@pytest.mark.parametrize(
    ("codes", "said"),
    [(["10", "9"], "{9: first, 10: second}"), (["5", "9", "1"], "{1: first, 9: second}")],
)
def test_the_ends_of_an_unknown_direction_are_its_numbers_ends(codes: list[str], said: str) -> None:
    assert said in str(_unstated("p", codes, "x"))


def test_zero_is_no_strength_that_makes_a_scale_of_two_codes() -> None:
    def rows(*values: int) -> list[Any]:
        return [{"prompt": "p", "response_1": "a", "response_2": "b", "preference": value} for value in values]

    with pytest.raises(UserError, match="does not say which of the two responses is better"):
        directions(rows(-1, 0, 1), "x", None)
    assert directions(rows(-2, 0, 1), "x", None)


def test_pairs_are_no_two_responses_with_a_preference() -> None:
    assert not has_two_responses({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert not has_two_responses([{"text": "a", "role": "prompter"}])
