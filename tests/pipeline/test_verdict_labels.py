"""Labels of a round from a causal model's verdicts: which pairs they make, how sure they are, what is refused before a run."""

import json
from pathlib import Path

import pytest

from rlhf.data.labels import Question, Verdict, question_id
from rlhf.errors import UserError
from rlhf.files import read_jsonl, write_jsonl
from rlhf.models.verdicts import load_verdict_model
from rlhf.objectives.verdicts import first_is_better
from rlhf.pipeline import label as label_module
from rlhf.pipeline.checks import check_arguments, check_sources
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.label import run_label
from rlhf.pipeline.plan import plan
from rlhf.recipe import Recipe, load_recipe
from tests.conftest import PROMPTS, WORDS


def recipe(folder: Path, base: Path, annotator: object, *overrides: str) -> Recipe:
    file = folder / "r.yaml"
    prompts = folder / "prompts.jsonl"
    write_jsonl(prompts, [{"prompt": prompt} for prompt in PROMPTS])
    file.write_text(f"""
name: verdicts
backbone: {{model: {base}}}
data: {{prompts: {prompts}, test_fraction: 0.3}}
rounds: {{count: 1, first: sampled, labels_from: verdicts, judge_model: {annotator}}}
""")
    return load_recipe(file, list(overrides))


def questions() -> list[Question]:
    made = []
    for i, prompt in enumerate(PROMPTS[:12]):
        first, second = f"yes {WORDS[i % 9]}", f"no {WORDS[i % 7]} and more" if i else "dog " * 600
        made.append(Question(question_id(1, prompt, [first, second]), 1, prompt, first, second))
    return made


def test_pairs_have_the_models_label_and_its_confidence(
    base_folder: Path, verdict_folder: Path, tmp_path: Path
) -> None:
    run, asked, said = tmp_path / "x", questions(), list[str]()
    folder, parents = run / "round-1/label", {"data": run / "round-0/data", "select": run / "round-1/select"}
    for place in (folder, parents["data"] / "data", parents["select"]):
        place.mkdir(parents=True)
    write_jsonl(parents["select"] / "questions.jsonl", [q.as_row() for q in asked])
    write_jsonl(parents["data"] / "data/prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    made = recipe(tmp_path, base_folder, verdict_folder)
    facts = run_label(StageContext(made, folder, parents, said.append))
    pairs = [*read_jsonl(folder / "fresh.jsonl"), *read_jsonl(folder / "test_pairs.jsonl")]
    assert (facts["labelled"], facts["skipped"], len(pairs)) == (11, 1, 11)

    # Each by itself, from the answers' own side.
    model = load_verdict_model(str(verdict_folder))
    for row in pairs:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        orders = model.compare([row["prompt"]], [chosen], [rejected]).orders
        assert row["confidence"] == pytest.approx(first_is_better(orders).item(), abs=1e-5)
        assert 0.5 < row["confidence"] < 1
        assert row["annotator"] == str(verdict_folder)
    turned = sum("turn with the order" in line and "1 pairs were too long for it (skipped)" in line for line in said)
    assert turned == 1, said


def test_labels_that_are_all_equal_are_said(
    base_folder: Path, verdict_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are taken, since a policy may be asked about few pairs; a person should look."""
    run, asked = tmp_path / "x", questions()
    folder, parents = run / "round-1/label", {"data": run / "round-0/data", "select": run / "round-1/select"}
    for place in (folder, parents["data"] / "data", parents["select"]):
        place.mkdir(parents=True)
    write_jsonl(parents["select"] / "questions.jsonl", [q.as_row() for q in asked])
    said = list[str]()
    context = StageContext(recipe(tmp_path, base_folder, verdict_folder), folder, parents, said.append)
    key_held = "label: all 12 verdicts are for the second answer, though the order was random; was one key held down?"
    ties = "label: all 12 verdicts are ties, so they say of no answer that it is better"
    write_jsonl(parents["data"] / "data/test_pairs.jsonl", [])  # all are trained on
    for labels, sentences in (
        (["second"] * 12, [key_held]),
        (["tie"] * 12, [ties]),
        (["second"] * 11 + ["first"], []),
        (["second"] * 7 + ["skip"] * 5, []),
    ):
        said.clear()
        verdicts = [Verdict(q.id, label, "ann") for q, label in zip(asked, labels, strict=True)]
        monkeypatch.setattr(label_module, "_labelled", lambda *_, given=verdicts: (asked, given))
        run_label(context)
        assert [line for line in said if "verdicts are" in line] == sentences


def test_labels_are_held_out_by_conversation(
    base_folder: Path, verdict_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second prompt of a conversation has the first one in it, so both are on one side."""
    run = tmp_path / "x"
    folder, parents = run / "round-1/label", {"data": run / "round-0/data", "select": run / "round-1/select"}
    for place in (folder, parents["data"] / "data", parents["select"]):
        place.mkdir(parents=True)
    first = [[{"role": "user", "content": f"Question {i}"}] for i in range(40)]
    more = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "and then?"}]
    prompts = [prompt for opening in first for prompt in (opening, [*opening, *more])]
    asked = [Question(question_id(1, prompt, ["a", "b"]), 1, prompt, "a", "b") for prompt in prompts]
    write_jsonl(parents["data"] / "data/prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    write_jsonl(parents["select"] / "questions.jsonl", [q.as_row() for q in asked])
    verdicts = [Verdict(q.id, "first", "ann") for q in asked]
    monkeypatch.setattr(label_module, "_labelled", lambda *_: (asked, verdicts))
    facts = run_label(StageContext(recipe(tmp_path, base_folder, verdict_folder), folder, parents, lambda _: None))
    held, kept = (
        [row["prompt"][0]["content"] for row in read_jsonl(folder / name)]
        for name in ("test_pairs.jsonl", "fresh.jsonl")
    )
    assert (len(held), len(kept)) == (facts["held_out"], facts["fresh"])
    assert len(held) + len(kept) == 80
    assert held
    assert not set(held) & set(kept)


def test_what_cannot_label_is_refused_before_a_run(
    base_folder: Path, verdict_folder: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"set rounds.judge_model \(a folder or hub id"):
        recipe(tmp_path, base_folder, "null")
    with pytest.raises(UserError, match=r"rounds.judge_url is .*, which is not used: rounds.labels_from is not judge"):
        recipe(tmp_path, base_folder, verdict_folder, "rounds.judge_url=http://x/v1")
    with pytest.raises(UserError, match=r"rounds.judge_model: /none/there: no such folder"):
        check_sources(recipe(tmp_path, base_folder, "/none/there"))
    with pytest.raises(UserError, match=r"rounds.judge_model: .*an encoder says no next token"):
        check_arguments(recipe(tmp_path, base_folder, encoder_folder))


def test_another_model_is_another_stage(base_folder: Path, verdict_folder: Path, tmp_path: Path) -> None:
    """The files of the model are part of the key, so weights that changed make new labels."""
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(verdict_folder, copy)

    def key() -> str:
        return next(stage.key for stage in plan(recipe(tmp_path, base_folder, copy)) if stage.name == "label")

    before = key()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "note": 1}))
    assert key() != before
