"""`rlhf evaluate`: several models, benchmarks, probes; what is wrong is said at once and nothing is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from typer.testing import CliRunner

from rlhf.cli import app
from rlhf.data.rows import assistant_turn, user_turn
from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.files import write_jsonl
from rlhf.pipeline.evaluate import data_names, evaluate_models, models_and_data
from rlhf.report.evaluation_terminal import bias_sentence, evaluation_lines, evaluation_tables
from tests.conftest import PROMPTS, WORDS

CONTRACT = {"n", "accuracy", "accuracy_ci", "ties", "ece", "length_baseline", "length_baseline_ci"}


def write(path: Path, rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def other_folder(reward_folder: Path, tmp_path: Path) -> Path:
    """The reward model with its head turned round: right where the other is wrong."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "other"
    shutil.copytree(reward_folder, folder)
    (folder / "reward_model.json").unlink()
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = -weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def styled(tmp_path: Path) -> str:
    """RM-Bench's four domains, two rows each."""
    rows = [
        {"prompt": f"{domain} {i}", "domain": domain, "id": f"{domain}{i}"}
        | {side: [f"{word} {i}", f"{word} {WORDS[i]} {i}", f"- **{word}** {WORDS[i]} {i}"] for side, word in words}
        for i in range(2)
        for domain in ("chat", "code", "math", "safety-refuse")
        for words in [(("chosen", "yes"), ("rejected", "no"))]
    ]
    return write(tmp_path / "styled.jsonl", rows)


@pytest.mark.filterwarnings("ignore:.*not checked against stored")
def test_several_models_on_a_benchmark_and_on_pairs_with_probes(
    reward_folder: Path, other_folder: Path, styled: str, tmp_path: Path
) -> None:
    pairs = [{"prompt": p, "chosen": f"yes {WORDS[i % 9]}", "rejected": f"no {i}"} for i, p in enumerate(PROMPTS)]
    said: list[str] = []
    models, data = [str(reward_folder), str(other_folder)], [styled, write(tmp_path / "pairs.jsonl", pairs)]
    result = evaluate_models(models, data, tmp_path / "e.json", probes=True, say=said.append)
    assert json.loads((tmp_path / "e.json").read_text()) == json.loads(json.dumps(result))
    assert any("styled.jsonl: read as RM-Bench, for it has the columns" in line for line in said)
    assert all(set(report) >= CONTRACT for report in result["data"].values())
    assert result["models"] == models

    # Every outcome of the second model is the opposite of the first one's, so every figure is one minus it.
    for name, report in result["data"].items():
        first, second = report["models"]
        assert report["accuracy"] == first["accuracy"], name
        assert second["accuracy"] == pytest.approx(1 - first["accuracy"])
        assert second["difference"] == pytest.approx(1 - 2 * first["accuracy"])
        assert report["against"]["difference"] == pytest.approx(2 * first["accuracy"] - 1), "first minus the other"
        for figure, entry in report["figures"].items():
            one, two = entry["models"]
            assert two["value"] == pytest.approx(1 - one["value"]), figure
            assert two["difference"] == pytest.approx(1 - 2 * one["value"]), figure
            assert one["ci"][0] <= one["value"] <= one["ci"][1]
            assert {"n", "longer", "shorter"} <= set(entry)
    benchmark = result["data"]["styled"]
    assert benchmark["n"] == 9 * 8
    rules = {name: benchmark["figures"][name]["longer"] for name in ("easy", "normal", "hard")}
    assert rules == pytest.approx({"easy": 1, "normal": 1, "hard": 0}), "style is longer; alike in style, yes is"
    assert set(benchmark["matrices"][0]) == {"chat", "code", "math", "safety"}
    assert benchmark["benchmark"] == "RM-Bench"

    # Scores of the second model are the first one's with another sign, and so are the effects of the edits.
    assert [entry["model"] for entry in result["probes"]] == models
    one, two = (entry["effects"] for entry in result["probes"])
    for name in one:
        assert two[name]["effect"] == pytest.approx(-one[name]["effect"], abs=1e-5), name
    assert one["batch mates"]["effect"] == pytest.approx(0, abs=1e-4)

    # What people see.
    page = (tmp_path / "e.html").read_text()
    for words in (
        "RM-Bench, its own arithmetic",
        "Matrix of styles, chat",
        "Probes, model B",
        "Models on the same pairs",
    ):
        assert words in page, words
    assert len(evaluation_tables(result)) == 3
    lines = evaluation_lines(result)
    assert lines[:2] == [f"A: {models[0]}", f"B: {models[1]}"]
    assert any("(paired, by prompt)" in line for line in lines)
    assert any(line.startswith("B: Probes:") for line in lines)


def test_all_that_is_wrong_is_said_at_once(reward_folder: Path, styled: str, tmp_path: Path) -> None:
    """Two models of which one can't be opened, and two bad files: three sentences, exit 2, nothing written."""
    broken = [{"input": "q", "output_1": "a", "output_2": "b", "label": 3}]
    bad = write(tmp_path / "llmbar.jsonl", broken)
    arguments = [str(reward_folder), str(tmp_path / "no/model/there"), styled, bad, str(tmp_path / "none.jsonl")]
    models, data = models_and_data(arguments)
    with pytest.raises(UserError) as refusal:
        evaluate_models(models, data, tmp_path / "e.json", say=lambda _: None)
    sentences = refusal.value.problems
    assert len(sentences) == 3, sentences
    assert "row 1: `label` is 3, neither 1 nor 2" in sentences[0]
    assert "none.jsonl: no such file." in sentences[1]
    assert "no/model/there: no reward model there" in sentences[2]
    assert not (tmp_path / "e.json").exists()


def test_models_and_data_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    folder = str(tmp_path / "second")
    assert models_and_data(["org/model", folder, "a.jsonl", "allenai/reward-bench", "org/data:gpt"]) == (
        ["org/model", folder],
        ["a.jsonl", "allenai/reward-bench", "org/data:gpt"],
    )
    assert models_and_data(["m", "./runs/x/reward/model", "a.json"])[0] == ["m", "./runs/x/reward/model"]
    mapping = "{source: ./pairs, columns: {prompt: q}}"
    assert models_and_data(["m", mapping, folder, "*.csv"]) == (["m", folder], [mapping, "*.csv"])
    Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]).save_to_disk(tmp_path / "saved")
    assert models_and_data(["m", str(tmp_path / "saved")])[1] == [str(tmp_path / "saved")], "a folder, but of data"
    assert models_and_data(["m", "/no/model/there", "/no/pairs.csv"]) == (["m", "/no/model/there"], ["/no/pairs.csv"])
    with pytest.raises(UserError, match="name a file of pairs or rankings"):
        models_and_data(["m", folder])
    same = ["LLMBar/Natural/dataset.json", "pairs.jsonl", "LLMBar/GPTOut/dataset.json"]
    assert data_names(same) == ["Natural/dataset", "pairs", "GPTOut/dataset"]


def test_against_may_be_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def stop(models: list[str], data: list[str], out: Path, **options: Any) -> None:
        asked.append((models, data, options["probes"]))
        raise UserError("enough")

    monkeypatch.setattr("rlhf.pipeline.evaluate.evaluate_models", stop)
    arguments = [
        "evaluate",
        "m",
        "a.jsonl",
        "--against",
        "x",
        "--against",
        "y",
        "--probes",
        "--out",
        str(tmp_path / "o.json"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert asked == [(["m", "x", "y"], [Source("a.jsonl")], True)]
    mapped = ["evaluate", "m", "{source: b.csv, split: x}", "--columns", "prompt=q.text,chosen=good"]
    CliRunner().invoke(app, [*mapped, "--out", str(tmp_path / "o.json")])
    columns = {"prompt": "q.text", "chosen": "good"}
    assert asked[1] == (["m"], [Source("b.csv", columns=columns, split="x")], False)


def test_columns_are_named_and_ties_are_left_out(reward_folder: Path, tmp_path: Path) -> None:
    """A benchmark's file under columns of one's own is ordinary pairs; a pair of equals is counted, and not scored."""
    rows = [
        {"question": f"q {i}", "good": f"yes {i}", "bad": f"no {i}", "agree": 0.5 if i == 2 else 1} for i in range(6)
    ]
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "confidence": "agree"}
    source = Source(write(tmp_path / "own.jsonl", rows), columns=columns)
    said: list[str] = []
    report = evaluate_models([str(reward_folder)], [source], tmp_path / "e.json", say=said.append)["data"]["own"]
    assert report["n"] == 5
    assert report["read"]["dropped"] == {"ties, which nothing can be right about": 1}
    assert (report["read"]["rows"], report["read"]["kept"]) == (6, 5)
    assert "  1 left out: ties, which nothing can be right about (row 3)" in "\n".join(said).splitlines()
    ties = write(tmp_path / "ties.jsonl", [{**row, "agree": 0.5} for row in rows])
    with pytest.raises(UserError, match="all of its pairs are ties"):
        evaluate_models([str(reward_folder)], [Source(ties, columns=columns)], tmp_path / "f.json", say=said.append)
    with pytest.raises(UserError, match="a local file has no config and no split"):
        evaluate_models([str(reward_folder)], [Source(ties, split="x")], tmp_path / "f.json", say=said.append)


def test_texts_that_were_cut_are_those_of_the_data(reward_folder: Path, tmp_path: Path) -> None:
    """Neither answers that probes edit, nor rankings whose answers stand in pairs already, are further texts."""
    long = "word " * 5000
    pairs = [{"prompt": f"q {i}", "chosen": f"yes {i}{long if i < 2 else ''}", "rejected": f"no {i}"} for i in range(6)]
    ranked = [{"content": f"{long if k < 1 else ''}{k}", "score": k} for k in range(3)]
    data = write(tmp_path / "long.jsonl", [*pairs, {"prompt": "q 9", "responses": ranked}])
    said: list[str] = []
    evaluate_models([str(reward_folder)], [data], tmp_path / "e.json", probes=True, say=said.append)
    assert [line.split(": ")[1].split(" ")[0] for line in said if line.startswith(f"{reward_folder}: ")] == ["3", "3"]


@pytest.mark.parametrize("cut", [5, 12])
def test_probes_say_how_many_pairs_have_a_cut_answer(reward_folder: Path, tmp_path: Path, cut: int) -> None:
    """They were left out in silence; where all had one it was said that there are no pairs."""
    rows: list[dict[str, object]] = [
        {
            "prompt": user_turn(f"list {i}"),
            "chosen": assistant_turn("red blue. yes"),
            "rejected": assistant_turn(f"gre {i}", ended=i >= cut),
        }
        for i in range(12)
    ]
    write_jsonl(tmp_path / "p.jsonl", rows)
    said: list[str] = []
    result = evaluate_models(
        [str(reward_folder)], [str(tmp_path / "p.jsonl")], tmp_path / "e.json", probes=True, say=said.append
    )
    assert f"Probes: {cut} pairs are left out, as an answer of theirs was cut off." in said
    assert ("probes" in result) == (cut < 12)


def test_edits_in_one_conversation_say_nothing_of_others() -> None:
    effects = {name: {"effect": effect, "effect_ci": None} for name, effect in (("a", 2.0), ("b", -3.0))}
    assert "all answers are of one conversation" in bias_sentence({"effects": effects})
    known = {name: {**entry, "effect_ci": [-4.0, 4.0]} for name, entry in effects.items()}
    assert "none of 2 edits" in bias_sentence({"effects": known})
