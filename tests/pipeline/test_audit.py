"""The audit finds planted wrong labels, says what it left out, and writes what was promised."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch

from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.objectives.strength import vote_strength
from rlhf.pipeline.audit import _key, audit
from rlhf.pipeline.audited import length_alarm, length_bias
from rlhf.recipe import load_recipe
from rlhf.report.audit import mark, write_audit_page
from rlhf.report.terminal import audit_lines
from tests.conftest import WORDS


@pytest.fixture
def noisy(tmp_path: Path) -> tuple[str, set[int]]:
    """150 pairs whose better answer says yes, a fifth of them labelled the other way, by two annotators of whom one is
    careless; one broken line and one repetition among them. Returns the file and the 0-based lines of wrong labels."""
    lines, wrong = ["{broken"], set()
    for i in range(150):
        yes, no = f"yes {WORDS[i % 9]}", f"no {WORDS[(i + 4) % 9]}"
        flipped = i % 5 == 0
        if flipped:
            wrong.add(len(lines))
        row = {"prompt": f"{WORDS[i % 11]} {WORDS[i % 13]} {i}", "annotator": "careless" if i % 10 == 0 else "careful"}
        row |= {"chosen": no, "rejected": yes} if flipped else {"chosen": yes, "rejected": no}
        lines.append(json.dumps(row))
    lines.append(lines[-1])
    file = tmp_path / "noisy.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return str(file), wrong


def test_a_second_audit_in_one_folder_is_refused(
    base_folder: Path, noisy: tuple[str, set[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first one's voters learn, it has no result yet, and a second one would train its own in the same place."""
    arguments: dict[str, Any] = {"members": None, "recipe": None, "say": lambda _: None}
    begin = partial(audit, noisy[0], str(base_folder), tmp_path / "audit", **arguments)

    def while_voting(*_: object, **__: object) -> None:
        with pytest.raises(UserError, match="another run is at work in this folder"):
            begin()
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf.pipeline.audit.vote", while_voting)
    with pytest.raises(KeyboardInterrupt):
        begin()


RECIPE = """
name: r
lab: {}
vote: {members: 4, folds: 2, trunk: 1}
reward: {learning_rate: 3.0e-3, per_device_train_batch_size: 8, num_train_epochs: 2}
"""


def test_planted_wrong_labels_are_found(base_folder: Path, noisy: tuple[str, set[int]], tmp_path: Path) -> None:
    file, wrong = noisy
    (tmp_path / "r.yaml").write_text(RECIPE)
    out = tmp_path / "audit"
    arguments: dict[str, Any] = {"members": None, "recipe": load_recipe(tmp_path / "r.yaml"), "say": lambda _: None}
    result = audit(file, str(base_folder), out, **arguments)
    assert result == json.loads((out / "audit.json").read_text())
    assert (result["rows"], result["kept"]) == (152, 150)
    assert sorted(row for rows in result["dropped_rows"].values() for row in rows) == [0, 151], "from 0"
    assert re.search(r'class="soft">row (0|151)<', (out / "audit.html").read_text()), (
        "and so on the page, which says so"
    )
    assert result["dropped"] == {"not valid JSON": 1, "repeats another pair": 1}
    found = set(result["suspicious"])
    assert len(found & wrong) >= 0.85 * len(wrong), (
        "recall: six votes of -0.3 to -0.7 nats are of four wrong labels and two right"
    )
    assert len(found & wrong) >= 0.95 * len(found), "precision"
    assert set(result["suspicious"][:10]) <= wrong, "the most suspicious first"
    noise = result["noise_rate"]
    assert noise["low"] <= 0.2 <= noise["high"]
    assert noise["mean"] == pytest.approx(0.2, abs=0.07)
    page = whole_page = (out / "audit.html").read_text()
    assert "Disagreement among members" in page
    assert "±" in page
    row = {"row": 0, "prompt": "p", "chosen": "a", "rejected": "b", "strength_mean": -1.0, "strength_std": 0.0}
    alone = [row | {"strength_votes": 1, "probability_wrong": 0.9}]
    page = write_audit_page(tmp_path / "single.html", result, alone, [-1.0, 1.0], [0.0, 0.0]).read_text()
    assert "Disagreement among members" not in page, "a single vote disagrees with nobody"
    assert "±" not in page
    for scale, said in ((0.0, True), (2.0, False)):  # a rate of 0 may also be sure votes that all agree
        other = result | {
            "noise_rate": {"mean": 0.0, "low": 0.0, "high": 0.5},
            "vote": result["vote"] | {"scale": scale},
        }
        page = write_audit_page(tmp_path / "single.html", other, [], [-1.0, 1.0], [0.0, 0.0]).read_text()
        assert ("no more than chance" in page) == said
    headline = {
        0.0: [
            "do not show that any label is wrong",
            "30.0%, the estimate by confident learning, is not evidence",
            "nor that cleaned.jsonl is better",
        ],
        0.1: [
            "At least 10.0% of the labels are wrong",
            "30.0%, the estimate by confident learning, is not proved",
            "by the error rate of who labelled each",
        ],
    }
    for low, parts in headline.items():
        vote = result["vote"] | {"flip_rate": 0.3, "low": low, "high": 0.355, "scale": 1.0}
        page = write_audit_page(
            tmp_path / "single.html", result | {"vote": vote}, [], [-1.0, 1.0], [0.0, 0.0]
        ).read_text()
        terminal = "\n".join(audit_lines(result | {"vote": vote}))
        for part in (
            *parts,
            "every contradiction were the label&#39;s fault, 35.5% would be wrong at most, if labels err at random",
        ):
            assert part in page, part
            assert part.replace("&#39;", "'") in terminal, part
        assert ("At least" in page) == (low > 0)
        assert "probably wrong" not in page
    assert 0 < result["worth"]["low"] < result["worth"]["high"] < 150
    assert f"these 150 labels are worth {result['worth']['low']:,.0f} to" in "\n".join(audit_lines(result))
    assert "The first, as audit.json counts rows, from 0 at the file's first: " in "\n".join(audit_lines(result))
    assert set(result["wants"]["wanted"]) <= {"overlap"}, "answers differ in nothing else that is counted"
    assert result["wants"]["traits"]["length"]["pairs"] == 0
    assert len(set(result["suspicious_without_wants"]) & wrong) >= 0.6 * len(wrong)  # "yes" goes with it
    by = result["by"]["annotator"]
    assert by["careless"]["agreement"] < by["careful"]["agreement"]
    annotators = result["annotators"]
    assert {name: entry["labels"] for name, entry in annotators.items()} == {"careful": 135, "careless": 15}
    assert annotators["careless"]["accuracy"] < 0.5 < annotators["careful"]["accuracy_ci"][0]
    assert annotators["careful"]["accuracy"] == pytest.approx(120 / 135, abs=0.06)
    assert annotators["careless"]["flags"] == ["few"]
    assert result["vote"]["voters_flip_rate"] == 0.0
    assert result["vote"]["flip_rate"] == result["noise_rate"]["mean"] > 0
    assert result["by_annotator"]
    proved = {**result, "vote": {**result["vote"], "low": 0.1}}
    assert any("by the error rate of who labelled each" in line for line in audit_lines(proved))
    one_rate = {**proved, "by_annotator": False}
    assert any(
        f"if {result['vote']['flip_rate']:.1%} of all labels are wrong" in line for line in audit_lines(one_rate)
    )
    section = whole_page.split("Who labelled")[1].split("<h2>")[0]
    assert section.count("<tr>") == 3
    assert "Too few labels to be judged: careless (1 of 2)." in section
    assert "Too few labels to be judged: careless (1 of 2)." in audit_lines(result)
    assert [bucket["n"] for bucket in result["buckets"]] == [15] * 10
    assert result["buckets"][0]["probability_wrong"] > 0.9 > 0.1 > result["buckets"][-1]["probability_wrong"]

    table = parquet.read_table(out / "pairs.parquet").to_pylist()
    without = {row["row"] for row in table if row["probability_wrong_without_wants"] > 0.5}
    assert without == set(result["suspicious_without_wants"])
    assert {row["row"] for row in table if row["suspicious"]} == found
    assert {"row", "strength_mean", "strength_std", "strength_votes", "suspicious"} <= set(table[0])
    lines = Path(file).read_bytes().splitlines(keepends=True)
    kept = [line for i, line in enumerate(lines) if 0 < i < 151 and i not in found]
    assert (out / "cleaned.jsonl").read_bytes() == b"".join(kept), "the file's own lines, byte for byte"
    assert result["cleaned"] == {"rows": 150 - len(found), "pairs": 0, "left_out": 2 + len(found)}
    cleaned = [json.loads(line) for line in (out / "cleaned.jsonl").read_text().splitlines()]
    assert len(cleaned) == 150 - len(found)
    says_yes = sum(row["chosen"].startswith("yes") for row in cleaned)
    assert says_yes / len(cleaned) > 0.96, "of the labels that are left, 80 % of which were right before"
    page = (out / "audit.html").read_text()
    assert "<mark>" in page
    assert "careless" in page
    assert not (out / "work").exists()

    # The same again does nothing; another question in the same folder is refused.
    said: list[str] = []
    assert audit(file, str(base_folder), out, **{**arguments, "say": said.append}) == result
    assert said == [f"{out}: done before"]
    with pytest.raises(UserError, match="holds an audit of other pairs"):
        audit(file, str(base_folder), out, **{**arguments, "members": 6})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        audit(file, str(base_folder), tmp_path / "full", **arguments)


def test_ratings_that_contradict_the_label_are_listed(base_folder: Path, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"{WORDS[i % 11]} {i}",
            "chosen": f"yes {i}",
            "rejected": f"no {i}",
            "chosen_rating": 4,
            "rejected_rating": 2,
        }
        for i in range(40)
    ]
    rows[7] |= {"chosen_rating": 1}
    rows[9] |= {"rejected_rating": 4.0}
    rows[30] |= {"chosen_rating": 1.5}
    file = tmp_path / "rated.jsonl"
    file.write_text("{broken\n" + "".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(RECIPE)
    said: list[str] = []
    recipe = load_recipe(tmp_path / "r.yaml")
    result = audit(str(file), str(base_folder), tmp_path / "out", members=None, recipe=recipe, say=said.append)
    assert result["contradictions"] == [8, 31], "0-based lines of the file"
    assert result["rating_ties"] == 1
    assert result["directions"] == ['`chosen` and `rejected`: chosen = "yes 0"']
    assert "  2 noted: kept, though its ratings contradict its label (row 9, 32)" in said
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["contradictions"] == [8, 31]
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "contradict the label of 2 pairs and are alike in 1" in page
    section = page.split("Ratings against the label")[1].split("<h2>")[0]
    assert section.count("<tr>") == 3
    assert "-0.5" in section


def test_what_labels_want_is_said(base_folder: Path, tmp_path: Path) -> None:
    """Eighty labels that follow an apology: named in file, page and terminal, with examples; the votes are also without it."""
    rows = []
    for i in range(80):
        sorry, plain_answer = f"i am sorry {WORDS[i % 9]} <b>", f"yes it is {WORDS[(i + 4) % 9]} <b>"
        sides = (sorry, plain_answer) if i % 10 else (plain_answer, sorry)
        rows.append({"prompt": f"{WORDS[i % 11]} {i}", "chosen": sides[0], "rejected": sides[1]})
    file = tmp_path / "tasteful.jsonl"
    file.write_text("{broken\n" + "".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "r.yaml")
    result = audit(str(file), str(base_folder), tmp_path / "out", members=None, recipe=recipe, say=lambda _: None)
    assert result["wants"]["wanted"] == ["apology"]
    apology = result["wants"]["traits"]["apology"]
    assert (apology["pairs"], apology["more_is_chosen"], apology["wanted"]) == (80, pytest.approx(0.9), "more")
    assert apology["examples"] == [2, 3, 4], (
        "rows of the file: the broken line is 0, the first pair is the other way round"
    )
    assert result["wants"]["accuracy"] == pytest.approx(0.9)
    sentence = "predict 90% [84%, 96%] of the labels. What these labels want: more apology."
    assert sentence in "\n".join(audit_lines(result))
    page = (tmp_path / "out" / "audit.html").read_text()
    assert sentence in page
    section = page.split("<h3>more apology</h3>")[1].split("</table>")[0]
    assert section.count("<tr>") == 4
    assert "&lt;b&gt;" in section
    table = parquet.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    assert [row["row"] for row in table if row["suspicious"]] == sorted(result["suspicious"]) != []
    assert set(result["suspicious_without_wants"]) != set(result["suspicious"]), (
        "they are suspicious for the trait alone"
    )


def test_bad_questions_are_sentences(base_folder: Path, noisy: tuple[str, set[int]], tmp_path: Path) -> None:
    file, _ = noisy
    arguments: dict[str, Any] = {"recipe": None, "say": lambda _: None}
    with pytest.raises(UserError, match="--model nowhere"):
        audit(file, "nowhere", tmp_path / "a", members=2, **arguments)
    for members, said in ((1, r"vote.members is 1"), (999, r"are too few for 999 members")):
        with pytest.raises(UserError, match=said):
            audit(file, str(base_folder), tmp_path / "b", members=members, **arguments)
    assert not (tmp_path / "b").exists(), "nothing is made"


def test_nothing_but_ties_is_a_sentence(base_folder: Path, tmp_path: Path) -> None:
    """And labels whose two answers are the same are none."""
    ties = tmp_path / "ties.jsonl"
    row = {"prompt": "which", "chosen": "yes", "rejected": "no", "confidence": 0.5}
    ties.write_text("".join(json.dumps({**row, "prompt": f"which {i}"}) + "\n" for i in range(9)))
    arguments: dict[str, Any] = {"members": None, "recipe": None, "say": lambda _: None}
    with pytest.raises(UserError, match="all of its pairs are ties, so there is no label to audit"):
        audit(str(ties), str(base_folder), tmp_path / "out", **arguments)
    alike = tmp_path / "alike.jsonl"
    alike.write_text("".join(json.dumps({**row, "rejected": "yes", "prompt": f"which {i}"}) + "\n" for i in range(9)))
    with pytest.raises(UserError, match="alike"):
        audit(str(alike), str(base_folder), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists(), "nothing is made"


def test_what_differs_is_marked_and_escaped() -> None:
    first, second = mark("apple, pear <b> and plum", "apple, fig <b> and plum")
    assert first == "apple, <mark>pear</mark> &lt;b&gt; and plum"
    assert second == "apple, <mark>fig</mark> &lt;b&gt; and plum"


def test_votes_that_follow_length_are_said_to() -> None:
    """Also where most of the chosen answers are longer, so that it is how much longer that the votes follow."""
    answers = [("aaaa", "a"), ("aaa", "a"), ("aaaaaaaa", "a"), ("aa", "a"), ("a", "aa")]
    rows = [{"prompt": [{"role": "user", "content": str(i)}]} for i in range(5)]
    for row, texts in zip(rows, answers, strict=True):
        row |= {side: [{"content": text}] for side, text in zip(("chosen", "rejected"), texts, strict=True)}
    votes = torch.tensor([[-3.0, -2.0, -9.0, -1.0, 0.5]])
    length = length_bias(rows, vote_strength(votes))
    assert length["correlation_with_strength"] == pytest.approx(-1.0)
    assert length["longer_is_chosen"] == pytest.approx(0.8)
    assert length_bias(rows[:1], vote_strength(votes[:, :1]))["correlation_with_strength"] is None
    assert length_alarm(None, 100) is None
    assert length_alarm(0.2, 100) is None
    assert "prefer the shorter answer (correlation -0.52)" in str(length_alarm(-0.52, 100))
    assert "prefer the longer answer" in str(length_alarm(0.6, 100))
    assert length_alarm(0.6, 15) is None, "by chance in one of 55 files of 15 pairs"
    assert length_alarm(0.7, 15) is not None
    assert length_alarm(1.0, 2) is None


def test_a_model_that_was_trained_anew_is_another_model(base_folder: Path, tmp_path: Path) -> None:
    """Its folder has the same name, and a finished audit would be of the weights before."""
    model = shutil.copytree(base_folder, tmp_path / "model")
    key = partial(_key, Source("org/pairs"), "answers", str(model), {}, {}, 0)
    before = key()
    assert key() == before
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert key() != before
