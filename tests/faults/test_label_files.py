"""Files of labels from anywhere: a row that can't be used is put aside with its reason, the others are taken."""

import gzip
import json
import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.labelbook import BOOK, LabelBook
from rlhf.data.labels import Question, question_id
from tests.faults.here import Outcome, rlhf

SCRIPT = "<script>alert(1)</script>"


def question(number: int) -> Question:
    prompt = [{"role": "user", "content": f"List {number} fruits."}]
    first, second = f"good {number}", f"bad {number}"
    return Question(question_id(2, prompt, [first, second]), 2, prompt, first, second)


IDS = [question(i).id for i in range(4)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working directory with a run that waits for labels."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("rounds: {annotators_per_pair: 2}\n", encoding="utf-8")
    LabelBook(tmp_path / "run" / BOOK).ask([question(i) for i in range(4)])
    return tmp_path


def take(place: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes) -> Outcome:
    (place / name).write_bytes(content)
    return rlhf("label", "run", "--import", name, cwd=place, capsys=capsys)


def plain(**values: Any) -> bytes:
    """A row with these values between two good ones."""
    rows = [
        {"id": IDS[0], "label": "first", "annotator": "ann"},
        values,
        {"id": IDS[1], "label": "b", "annotator": "ann"},
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def raw(text: str) -> bytes:
    """A line of such text between two good ones."""
    first, _, last = plain(x=1).decode().splitlines()
    return f"{first}\n{text}\n{last}\n".encode()


def studio(**values: Any) -> bytes:
    """An annotation of Label Studio with these values, between two good ones."""
    good = {"result": [{"from_name": "preference", "value": {"selected": "left"}}], "completed_by": 1}
    tasks = [{"data": {"id": IDS[i]}, "annotations": [{**good, **(values if i == 2 else {})}]} for i in (0, 2, 1)]
    return json.dumps(tasks).encode()


def studio_task(**values: Any) -> bytes:
    tasks = json.loads(studio())
    tasks[1] |= values
    return json.dumps(tasks).encode()


def argilla(**values: Any) -> bytes:
    """A record of Argilla with these values, between two good ones."""
    good = {"fields": {}, "responses": {"preference": [{"value": "first", "user_id": "u"}]}}
    return json.dumps([{"id": IDS[i], **good, **(values if i == 2 else {})} for i in (0, 2, 1)]).encode()


def flat(**values: Any) -> bytes:
    rows = [{"id": IDS[i], "preference.responses": ["first"], **(values if i == 2 else {})} for i in (0, 2, 1)]
    return json.dumps(rows).encode()


GOOD = {"id": IDS[2], "label": "first", "annotator": "eve"}
# One bad row or part of it: the two good ones are taken, and the import says what it put aside.
PUT_ASIDE: dict[str, tuple[str, bytes]] = {
    "an unknown id": ("x.jsonl", plain(**GOOD | {"id": "r2-0000000000000000"})),
    "an id of another round": ("x.jsonl", plain(**GOOD | {"id": "r1-0000000000000000"})),
    "an id of a megabyte": ("x.jsonl", plain(**GOOD | {"id": "r2-" + "x" * 2**20})),
    "an id that is a number": ("x.jsonl", plain(**GOOD | {"id": 3})),
    "no id": ("x.jsonl", plain(label="first")),
    "no label": ("x.jsonl", plain(**GOOD | {"label": None})),
    "an unknown label": ("x.jsonl", plain(**GOOD | {"label": "best"})),
    "a label that is a list": ("x.jsonl", plain(**GOOD | {"label": ["first"]})),
    "a label that is a script": ("x.jsonl", plain(**GOOD | {"label": SCRIPT})),
    "a label of half a character": ("x.jsonl", plain(**GOOD | {"label": "\ud83d"})),
    "half a character in the id": ("x.jsonl", plain(**GOOD | {"id": "r2-\ud83d"})),
    "half a character in the name": ("x.jsonl", plain(**GOOD | {"annotator": "\ud83d"})),
    "a name of a megabyte": ("x.jsonl", plain(**GOOD | {"annotator": "x" * 2**20})),
    "a number of 5,000 digits": ("x.jsonl", raw(f'{{"id": "{IDS[2]}", "label": {"1" * 5000}}}')),
    "deep nesting": ("x.jsonl", raw("[" * 100_000)),
    "a line that is no JSON": ("x.jsonl", raw("{oh")),
    "a line that is no UTF-8": ("x.jsonl", plain(**GOOD).replace(b'"eve"', b'"\xff\xfe"')),
    "a line that is a number": ("x.jsonl", raw("3")),
    "a task without data": ("x.json", studio_task(data={})),
    "a task with an annotation of null": ("x.json", studio_task(annotations=[None])),
    "a task with annotations of text": ("x.json", studio_task(annotations=["x"])),
    "a result of null": ("x.json", studio(result=None)),
    "a result of text": ("x.json", studio(result="left")),
    "a result of numbers": ("x.json", studio(result=[1, 2])),
    "a value of null": ("x.json", studio(result=[{"from_name": "preference", "value": None}])),
    "choices of numbers": ("x.json", studio(result=[{"from_name": "preference", "value": {"choices": 5}}])),
    "two choices": ("x.json", studio(result=[{"from_name": "preference", "value": {"choices": ["a", "b"]}}])),
    "responses as a list": ("x.json", argilla(responses=[{"value": "first"}])),
    "a response of null": ("x.json", argilla(responses={"preference": [None]})),
    "a response whose value is a list": ("x.json", argilla(responses={"preference": [{"value": ["first"]}]})),
    "a record without id": ("x.json", argilla(id=None)),
    "more users than responses": ("x.json", flat(**{"preference.responses.users": ["a", "b"]})),
    "flat responses of text": ("x.json", flat(**{"preference.responses": 7})),
}  # fmt: skip
# Odd and harmless: all three rows are taken.
TAKEN: dict[str, tuple[str, bytes]] = {
    "seconds as text": ("x.jsonl", plain(**GOOD, seconds="long")),
    "seconds as a list": ("x.jsonl", plain(**GOOD, seconds=[1])),
    "seconds of 10^400": ("x.jsonl", raw(json.dumps({**GOOD, "seconds": 0}).replace("0}", "1" + "0" * 400 + "}"))),
    "NaN seconds": ("x.jsonl", plain(**GOOD, seconds=float("nan"))),
    "infinite seconds": ("x.jsonl", plain(**GOOD, seconds=float("inf"))),
    "seconds below 0": ("x.jsonl", plain(**GOOD, seconds=-5e300)),
    "a name that is a script": ("x.jsonl", plain(**GOOD | {"annotator": SCRIPT})),
    "a name that is a formula": ("x.jsonl", plain(**GOOD | {"annotator": "=HYPERLINK(1)"})),
    "a lead time as a list": ("x.json", studio(lead_time=[1])),
    "an e-mail of null": ("x.json", studio(completed_by={"email": None})),
    "nobody": ("x.json", studio(completed_by=None)),
    "the same row twice": ("x.jsonl", plain(**GOOD) + json.dumps(GOOD).encode() + b"\n"),
}  # fmt: skip
REFUSED: dict[str, tuple[str, bytes]] = {
    "nothing": ("x.jsonl", b""),
    "binary": ("x.jsonl", b"\x7fELF\0\0" * 99),
    "not gz": ("x.jsonl.gz", plain(**GOOD)),
    "cut gz": ("x.jsonl.gz", gzip.compress(plain(**GOOD))[:-20]),
    "a bomb": ("x.jsonl.gz", gzip.compress(plain(**GOOD) + b" " * 60_000_000)),
    "no parquet": ("x.parquet", b"x" * 99),
    "a document that is no list": ("x.json", b'{"a": 1}'),
    "a document of deep nesting": ("x.json", b"[" * 100_000),
}


@pytest.mark.fault("hostile label files", "labels of a round")
@pytest.mark.parametrize("name", PUT_ASIDE)
def test_a_bad_row_is_put_aside(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    outcome = take(place, capsys, *PUT_ASIDE[name])
    assert outcome.code == 0, outcome.stderr
    assert "Traceback" not in outcome.stderr
    verdicts = LabelBook(place / "run" / BOOK).verdicts(2)
    assert {v.id for v in verdicts} == set(IDS[:2])
    line = next(line for line in outcome.stdout.splitlines() if line.startswith(f"{PUT_ASIDE[name][0]}: 2 taken"))
    is_said = ", 1 " in line or "1 lines left out" in outcome.stdout
    assert is_said, outcome.stdout


@pytest.mark.fault("hostile label files", "markup in texts")
@pytest.mark.parametrize("name", TAKEN)
def test_an_odd_row_is_taken(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    outcome = take(place, capsys, *TAKEN[name])
    assert outcome.code == 0, outcome.stderr
    verdicts = LabelBook(place / "run" / BOOK).verdicts(2)
    assert {v.id for v in verdicts} == set(IDS[:3])
    assert all(v.seconds is None for v in verdicts), "a time that nobody can have taken is none"


@pytest.mark.fault("hostile label files")
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_none_is_refused(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    outcome = take(place, capsys, *REFUSED[name])
    assert outcome.code == 2
    assert "Traceback" not in outcome.stderr
    assert len(outcome.sentences) == 1
    assert LabelBook(place / "run" / BOOK).verdicts(2) == []


@pytest.mark.fault("hostile label files")
@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("run", "is a folder"),
        ("nowhere/x.jsonl", "no such folder"),
        ("filled.jsonl", "is there already"),
        (f"run/{BOOK}", "is there already"),
        ("run/recipe.yaml", "is there already"),
    ],
)
def test_an_export_is_written_over_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], target: str, said: str
) -> None:
    """Labels that people have filled in, the book of all verdicts: gone in a moment, if they could be."""
    (place / "filled.jsonl").write_text(json.dumps({**GOOD, "id": IDS[0]}) + "\n")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for more in ((), ("--import", "filled.jsonl")):
        outcome = rlhf("label", "run", "--export", target, *more, cwd=place, capsys=capsys)
        assert outcome.code == 2
        assert f"--export {target}: {said}" in outcome.stderr
    assert all(path.read_bytes() == content for path, content in before.items())
    assert LabelBook(place / "run" / BOOK).verdicts(2) == []


@pytest.mark.fault("hostile label files")
def test_what_is_taken_in_is_open_no_more_in_what_goes_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**GOOD, "id": IDS[0], "annotator": name} for name in ("ann", "bob")]
    (place / "filled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = rlhf("label", "run", "--import", "filled.jsonl", "--export", "open.jsonl", cwd=place, capsys=capsys)
    assert outcome.code == 0, outcome.stderr
    assert IDS[0] not in (place / "open.jsonl").read_text()
    assert IDS[1] in (place / "open.jsonl").read_text()


def test_an_address_that_is_taken_is_a_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        for port, said in ((other.getsockname()[1], "Address already in use"), (99999, "choose one from 1 to 65535")):
            outcome = rlhf("label", "run", "--port", str(port), cwd=place, capsys=capsys)
            assert outcome.code == 2
            assert said in outcome.stderr
            assert "http://" not in outcome.stdout, "no link that leads nowhere"


def test_a_book_that_is_none_is_a_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "run" / BOOK).write_text("no book, " * 200)
    outcome = rlhf("label", "run", "--status", cwd=place, capsys=capsys)
    assert (outcome.code, "Traceback" in outcome.stderr) == (2, False)
    assert f"{BOOK}: is no book of labels" in outcome.stderr


# ---- Gold questions ----


def gold(*numbers: int, prompt: str = "Name {} towns.") -> str:
    rows = [{"prompt": prompt.format(i), "chosen": f"good {i}", "rejected": f"bad {i}"} for i in numbers]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.fault("gold questions")
def test_gold_questions_go_out_and_come_back_in_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "gold.jsonl").write_text(gold(0, 1, 2) + gold(3, prompt="List {} fruits."))
    outcome = rlhf("label", "run", "--gold", "gold.jsonl", "--export", "out.jsonl", cwd=place, capsys=capsys)
    assert outcome.code == 0, outcome.stderr
    assert "3 gold questions are hidden among those of round 2" in outcome.stdout
    assert "1 of its pairs are left out, as this round asks about them anyway" in outcome.stdout
    rows = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 7
    assert {tuple(row) for row in rows} == {("id", "prompt", "first", "second", "label", "annotator")}
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows), "no place tells a gold one"
    for row in rows:
        row |= {"label": "first" if row["first"].startswith("good") else "second", "annotator": "ann"}
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    outcome = take(place, capsys, "in.jsonl", lines.encode())
    assert outcome.code == 0, outcome.stderr
    assert "7 taken, 3 of them on gold questions." in outcome.stdout
    assert "ann: 100% of 3 gold questions right [0.29, 1.00]." in outcome.stdout
    assert "ann: accuracy 1.00" in outcome.stdout
    assert "by gold questions and the others' verdicts" in outcome.stdout
    assert "nobody to compare with" not in outcome.stdout
    assert len(LabelBook(place / "run" / BOOK).verdicts(2)) == 4, "no gold question is a label"


@pytest.mark.fault("gold questions")
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            gold(3, prompt="List {} fruits."),
            "none of its 1 pairs can be a control question, as this round asks about them",
        ),
        ('{"prompt": "a", "chosen": "x", "rejected": "y", "confidence": 0.5}\n', "pair 1 is a tie"),
        ('{"id": "r2-0000000000000000", "label": "first"}\n', "no usable pair"),
        ("", "gold.jsonl"),
    ],
    ids=["asked anyway", "a tie", "labels of unknown pairs", "empty"],
)
def test_what_can_be_no_gold_question_is_a_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], content: str, sentence: str
) -> None:
    (place / "gold.jsonl").write_text(content)
    outcome = rlhf("label", "run", "--gold", "gold.jsonl", "--status", cwd=place, capsys=capsys)
    assert outcome.code == 2, outcome.stdout
    assert sentence in " ".join(outcome.stderr.split())
    assert LabelBook(place / "run" / BOOK).gold(2) == []


@pytest.mark.fault("gold questions")
@pytest.mark.parametrize("share", ["-0.1", "0.9", "nan"])
def test_a_share_that_no_page_can_repeat(place: Path, capsys: pytest.CaptureFixture[str], share: str) -> None:
    outcome = rlhf("label", "run", "--repeat", share, cwd=place, capsys=capsys)
    assert outcome.code == 2
    assert "must lie between 0 and 0.5" in outcome.stderr


# ---- The page ----


@pytest.fixture
def page(place: Path) -> Any:
    from starlette.testclient import TestClient

    from rlhf.serve.label import annotator_tokens, label_app

    book = LabelBook(place / "run" / BOOK)
    tokens = annotator_tokens(book.path, ["ann"])
    client = TestClient(label_app(book, 2, tokens, wanted=2, title="t"), base_url="http://127.0.0.1:8765")
    client.get("/", params={"token": tokens["ann"]})
    return client


FORM = {"id": IDS[0], "choice": "left"}


@pytest.mark.fault("a form of another page")
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "https://127.0.0.1:8765.evil.org"},
        {"Origin": "null"},
        {"Origin": "http://[::1"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
    ids=str,
)
def test_a_form_of_another_page_is_refused(place: Path, page: Any, headers: dict[str, str]) -> None:
    assert page.post("/", data=FORM, headers=headers).status_code == 403
    assert LabelBook(place / "run" / BOOK).verdicts(2) == []
    own = {"Origin": "http://127.0.0.1:8765", "Sec-Fetch-Site": "same-origin"}
    assert page.post("/", data=FORM, headers=own).status_code == 200
    assert len(LabelBook(place / "run" / BOOK).verdicts(2)) == 1


@pytest.mark.fault("a huge form")
def test_a_huge_form_is_read_no_further_than_a_form_is_long(page: Any) -> None:
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    form = f"id={IDS[0]}&choice=left&x=".encode()
    assert page.post("/", content=form + b"x" * 70_000, headers=kind).status_code == 400
    assert page.post("/", content=form + b"x" * 60_000, headers=kind).status_code == 200


@pytest.mark.fault("labels locked")
def test_a_locked_book_is_said_and_keeps_nobody_else_waiting(
    place: Path, page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.data.labelbook.SECONDS_TO_WAIT", 0.1)
    other = sqlite3.connect(place / "run" / BOOK)
    other.execute("BEGIN EXCLUSIVE")
    for reply in (page.post("/", data=FORM), page.get("/")):
        assert reply.status_code == 503
        assert "nothing was lost" in reply.text
    other.rollback()
    other.close()
    assert page.post("/", data=FORM).status_code == 200
