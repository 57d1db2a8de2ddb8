"""Sources that are no single JSON file: tables, folders, patterns, hub data sets with a config and a split."""

import gzip
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf.data.prepare import DataSources, prepare_data
from rlhf.data.read import ReadReport, read_rows
from rlhf.data.rows import answer
from rlhf.data.sources import Source, read_pair_rows, read_pairs
from rlhf.data.tables import _check_names, _row, is_folder, local_files, table_rows
from rlhf.errors import UserError
from rlhf.files import write_jsonl


def pairs(numbers: range) -> list[dict[str, Any]]:
    return [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in numbers]


def chosen(source: Source | str, split: str = "test") -> list[str]:
    return [answer(row, "chosen") for row in read_pairs(source, split=split)[0]]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t"), ("semicolons.csv", ";")])
def test_a_table_is_read_cell_for_cell(tmp_path: Path, name: str, separator: str) -> None:
    """Quotes, line breaks and numbers in texts stay; numbers are numbers where the column's name says so."""
    head = separator.join(("prompt", "chosen", "rejected", "margin", "annotator"))
    cells = ['"two\nlines ""quoted"""', "42", '"a, b; c"', "0.5", ""]
    file = tmp_path / name
    file.write_text(f"\ufeff{head}\n{separator.join(cells)}\n", encoding="utf-8")
    rows, _ = read_pairs(str(file))
    assert [
        (row["prompt"][0]["content"], answer(row, "chosen"), answer(row, "rejected"), row["margin"]) for row in rows
    ] == [('two\nlines "quoted"', "42", "a, b; c", 0.5)]
    assert "annotator" not in rows[0]
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert read_pairs(str(packed))[0] == rows


def test_a_table_with_codes_says_its_direction(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("prompt,response_1,response_2,preference\na,yes,no,1\nb,no,yes,2\n")
    assert chosen(str(file)) == ["yes", "yes"]
    file.write_text("prompt,response_0,response_1,better_response_id\na,yes,no,0\nb,no,yes,1\n")
    assert chosen(str(file)) == ["yes", "yes"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prompt\nx\n", "first line must name two columns or more"),
        ("", "first line must name two columns or more"),
        ("prompt,chosen,chosen\na,b,c\n", "the column 'chosen' stands there twice"),
        ('prompt,chosen,rejected\na,b,c\na,"b,c\n', "row 2 is no row of a table"),
        (b"prompt,chosen,rejected\na,\xff,c\n", "row 1 is not UTF-8 text"),
    ],
)
def test_a_broken_table_is_refused_with_its_row(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=sentence):
        read_pairs(str(file))


@pytest.mark.parametrize(
    "rows",
    [
        ['q\t"open quote\tb', 'q2\ta"\tb'],
        ['q\t"open quote\tb', "q1\tx\ty", 'q2\ta\tb"'],
        ['"q\ta\tb', 'q2"\ta\tb'],
        ['q\ta\t"b', 'q2"\ta\tb'],
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_without_quoting_whose_quotation_mark_swallows_rows_is_refused(
    tmp_path: Path, rows: list[str], end: str
) -> None:
    file = tmp_path / "t.tsv"
    file.write_bytes(end.join(["prompt\tchosen\trejected", "p\tyes\tno", *rows, ""]).encode())
    with pytest.raises(
        UserError, match=r"t\.tsv: row 2: a cell that begins with a quotation mark goes on over the rows"
    ):
        read_pairs(str(file))


def test_a_quoted_cell_may_hold_lines_and_tabs(tmp_path: Path) -> None:
    file = tmp_path / "t.tsv"
    file.write_text('prompt\tchosen\trejected\nq\t"if x:\n\treturn 1\n"\tno\nq2\t"a\tb"\tc\n')
    assert chosen(str(file)) == ["if x:\n\treturn 1", "a\tb"]


def test_a_row_of_another_width_costs_itself(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("prompt,chosen,rejected\na,yes,no\nb,yes\nc,yes,no\n")
    rows, report = read_pairs(str(file))
    assert len(rows) == 2
    assert report.dropped == {"has 2 cells, where the first line names 3 columns": 1}
    assert list(report.examples.values()) == [[2]]


def test_several_files_are_read_as_one(tmp_path: Path) -> None:
    """Codes are decided over all of them, numbers run on, and a bad line is named by its number."""
    for name, rows in (("b", [("no", "yes", 2)]), ("a", [("yes", "no", 1), ("yes", "no", 1)])):
        lines = [
            {"prompt": f"{name}{i}", "response_1": f, "response_2": s, "preference": p}
            for i, (f, s, p) in enumerate(rows)
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", lines)
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("{broken\n")
    pattern = str(tmp_path / "*.jsonl")
    rows, report = read_pairs(pattern)
    assert [answer(row, "chosen") for row in rows] == ["yes"] * 3
    assert [row["prompt"][0]["content"] for row in rows] == ["a0", "a1", "b0"]
    assert report.examples == {"not valid JSON": [4]}
    assert f"{tmp_path}/b.jsonl from 3" in report.directions["files"]
    with pytest.raises(UserError, match=r"nothing-\*.jsonl: no file matches"):
        read_pairs(str(tmp_path / "nothing-*.jsonl"))


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    alone, several = tmp_path / "alone", tmp_path / "several"
    datasets.Dataset.from_list(pairs(range(3))).save_to_disk(alone)
    parts = {"train": pairs(range(40)), "test": pairs(range(40, 45))}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(several)
    assert chosen(str(alone)) == ["yes 0", "yes 1", "yes 2"]
    assert chosen(str(several)) == [f"yes {i}" for i in range(40, 45)], "evaluated on the test split"
    assert len(chosen(Source(str(several), split="train"))) == 40
    source = Source(str(several))
    facts = prepare_data(tmp_path / "out", DataSources(sft=[source], preferences=[source]), seed=0)
    assert (facts["rows"]["pairs"], facts["rows"]["test_pairs"]) == (40, 5), "its own test split is the test side"
    for stated, sentence in (
        (Source(str(several), split="dev"), "has no split 'dev'; it has train, test"),
        (Source(str(alone), split="dev"), "one data set without splits"),
        (Source(str(alone), config="x"), "a local file has no config"),
    ):
        with pytest.raises(UserError, match=sentence):
            read_pairs(stated)


def test_folders_of_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are numbered from 1, as those of files; what cannot be read is not blamed on the hub."""
    monkeypatch.chdir(tmp_path)
    for folder, names in (("csv", ("a", "b")), ("both", ("train", "test"))):
        (tmp_path / folder).mkdir()
        for i, name in enumerate(names):
            write_jsonl(tmp_path / folder / f"{name}.jsonl", pairs(range(20 * i, 20 * i + 20 - 10 * i)))
    rows, report = read_pair_rows("csv")
    assert [row.number for row in rows] == list(range(1, 31)), "a folder may have the name of a reader of the library"
    assert report.rows == 30
    assert chosen("both") == [f"yes {i}" for i in range(20, 30)], "evaluated on the test split"
    given = [Source("both")]
    facts = prepare_data(tmp_path / "out", DataSources(sft=given, preferences=given), seed=0)
    assert (facts["rows"]["pairs"], facts["rows"]["test_pairs"]) == (20, 10), "its own test split is the test side"
    for folder in ("mixed", "empty"):
        (tmp_path / folder).mkdir()
    for name in ("one", "two"):
        write_jsonl(tmp_path / "mixed" / f"{name}.jsonl", [{name: name}])
    for source, sentence in (
        (Source("csv", split="dev"), "csv: has no split 'dev'; it has train"),
        (Source("mixed"), r"mixed: `datasets` can't read the files of .*name those that are meant, such as 'mixed/\*"),
        (Source("empty/"), r"empty/: `datasets` can't read .*such as 'empty/\*"),
    ):
        with pytest.raises(UserError, match=sentence) as refused:
            read_pairs(source)
        assert "hub" not in str(refused.value)


def test_a_folders_files_are_those_that_are_not_hidden(tmp_path: Path) -> None:
    for name in ("b.jsonl", "deep/a.jsonl", ".cache/x.json", ".DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    assert [file.relative_to(tmp_path).as_posix() for file in local_files(str(tmp_path))] == ["b.jsonl", "deep/a.jsonl"]
    assert not is_folder(""), "which is not the folder that one stands in"


def test_a_hub_dataset_is_asked_for_its_config_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*names: str, split: str) -> Any:
        asked.append((*names, split))
        if split not in ("train", "train_prefs", "test"):
            raise ValueError(f"Unknown split {split!r}.")
        return datasets.Dataset.from_list(pairs(range(30) if split != "test" else range(30, 33)))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(chosen(Source("org/x", config="helpful-base", split="train"))) == 30
    with pytest.raises(UserError, match="org/x, config 'helpful-base': cannot load the 'dev' split"):
        read_pairs(Source("org/x", config="helpful-base", split="dev"))
    for split, tested in ((None, 3), ("train", 3), ("train_prefs", None)):
        asked.clear()
        source = Source("org/x", config="c", split=split)
        facts = prepare_data(tmp_path / f"{split}", DataSources(sft=[source], preferences=[source]), seed=0)
        assert (("org/x", "c", "test") in asked) == (tested is not None)
        assert tested is None or facts["rows"]["test_pairs"] == tested


def test_a_table_has_two_columns_at_least_and_says_the_row_that_breaks_it(tmp_path: Path) -> None:
    _check_names(Path("x"), ["a", "b"])
    for names in ([], ["a"]):
        with pytest.raises(UserError, match="two columns or more"):
            _check_names(Path("x"), names)
    assert _row(["a", "b"], ["1", ""]) == {"a": "1", "b": None}
    assert "has 3 cells" in str(_row(["a", "b"], ["1", "2", "3"]))
    for broken, row in ((b'a,b\n1,2\n3,"4\n', 2), (b'a,b\n"1,2\n', 1)):
        (tmp_path / "x.csv").write_bytes(broken)
        with pytest.raises(UserError, match=f"row {row} is no row of a table"):
            list(table_rows(tmp_path / "x.csv"))
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 5000)[:-20])
    with pytest.raises(UserError, match=r"row \d+: the compressed file is cut off or damaged"):
        list(table_rows(tmp_path / "x.csv.gz"))


def test_semicolons_separate_names_that_hold_no_comma(tmp_path: Path) -> None:
    for text, row in (("a;x,b\n1,2\n", {"a;x": "1", "b": "2"}), ("a;b\n1,5;2\n", {"a": "1,5", "b": "2"})):
        (tmp_path / "x.csv").write_text(text)
        assert list(table_rows(tmp_path / "x.csv")) == [row]


def test_a_table_that_is_no_text_says_so_of_its_first_row(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"a,b\n\xff,2\n")
    with pytest.raises(UserError, match="row 1 is not UTF-8 text"):
        list(table_rows(tmp_path / "x.csv"))


def test_a_table_that_leaves_out_a_row_names_it(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n1,2,3\n4,5\n")
    report = ReadReport("x")
    assert [number for number, _ in read_rows(str(tmp_path / "x.csv"), report)] == [1, 3]
    assert list(report.examples.values()) == [[2]]


def test_a_saved_folder_that_is_damaged_is_a_sentence(tmp_path: Path) -> None:
    """It was a traceback of json's."""
    datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]).save_to_disk(tmp_path / "s")
    (tmp_path / "s" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="can't read the files of this folder"):
        list(read_rows(str(tmp_path / "s"), ReadReport("s")))
