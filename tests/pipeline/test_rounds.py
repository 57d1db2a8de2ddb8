"""Rounds: a whole two-round run, killed at every boundary, labelled by people."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.labelbook import BOOK, LabelBook
from rlhf.data.labels import read_questions
from rlhf.errors import UserError, Waiting
from rlhf.pipeline.plan import plan
from rlhf.pipeline.run import run as run_recipe
from rlhf.pipeline.store import Store
from rlhf.reward.load import load_reward_model
from rlhf.serve.desk import export_to, import_from, open_book, progress_lines
from tests.pipeline.two_rounds import ROUND_1, ROUND_2, again, recipe, rows, start

LABELS = "rounds.labels_from=people"


def result(run: Path) -> dict[str, Any]:
    """All that a run says, but for times."""
    digests = {
        f"{file.parent.relative_to(run)}/{entry['path']}": entry["sha256"]
        for file in sorted(run.glob("round-*/*/manifest.json"))
        for entry in json.loads(file.read_text())["files"]
        if entry["path"].endswith((".safetensors", "pairs.jsonl", "samples.jsonl", "questions.jsonl"))
    }
    summary = json.loads((run / "summary.json").read_text())
    return {"digests": digests, "summary": {key: value for key, value in summary.items() if key != "seconds"}}


def test_two_rounds_are_as_the_recipe_says(two_rounds: Path) -> None:
    run = two_rounds / "x"
    done = sorted(str(file.parent.relative_to(run)) for file in run.glob("round-*/*/manifest.json"))
    expected = ["round-0/data", "round-0/lab", "round-0/sft"]
    assert done == sorted(expected + [f"round-1/{s}" for s in ROUND_1] + [f"round-2/{s}" for s in ROUND_2])
    pairs, fresh = rows(run / "round-2/label/pairs.jsonl"), rows(run / "round-2/label/fresh.jsonl")
    assert len(fresh) == 24
    assert len(pairs) == 120 + 24
    assert [row["weight"] for row in pairs] == [0.5] * 120 + [1.0] * 24, "an older label weighs half"
    questions = read_questions(run / "round-2/select/questions.jsonl")
    assert {q.prompt[0]["content"] for q in questions} <= {
        r["prompt"][0]["content"] for r in rows(run / "round-2/sample/samples.jsonl")
    }
    assert not {json.dumps(r["prompt"]) for r in rows(run / "round-1/sample/samples.jsonl")} & {
        json.dumps(q.prompt) for q in questions
    }
    practised = [{json.dumps(row["prompt"]) for row in rows(run / f"round-{n}/ppo/samples.jsonl")} for n in (1, 2)]
    assert not practised[0] & practised[1], "PPO goes on with other prompts, as long as there are some"
    summary = json.loads((run / "summary.json").read_text())
    first, second = summary["rounds"]
    assert (first["pairs"], second["pairs"]) == (120, 144)
    assert second["labels"]["fresh"] == 24
    assert 0 <= second["labels"]["fresh_accuracy"] <= 1
    gold = [[row["gold_policy"] for row in rows(run / f"round-{n}/evaluate/samples.jsonl")] for n in (1, 2)]
    difference = sum(b - a for a, b in zip(*gold, strict=True)) / len(gold[0])
    assert second["change_in_gold"]["difference"] == pytest.approx(difference)
    wins = sum(b > a for a, b in zip(*gold, strict=True)) / len(gold[0])
    assert second["change_in_gold"]["win_tie_lose"][0] == pytest.approx(wins)
    win, tie, lose = second["policy"]["win_tie_lose"]
    assert second["policy"]["win_rate"] == pytest.approx(win + tie / 2)
    assert win + tie + lose == pytest.approx(1)
    judge = load_reward_model(run / "round-2/reward/model")
    answers = rows(run / "round-1/evaluate/samples.jsonl")
    prompts = [row["prompt"] for row in rows(run / "round-0/data/data/test_prompts.jsonl")[: len(answers)]]
    ours, theirs = (
        judge.score(prompts, [row[who] for row in answers], ended=[row[f"ended_{who}"] for row in answers])
        for who in ("policy", "sft")
    )
    expected = ((ours > theirs).float() + 0.5 * (ours == theirs).float()).mean().item()
    assert first["hindsight"]["win_rate"] == pytest.approx(expected)
    assert first["hindsight"]["round"] == 1
    assert second["hindsight"] is None, "nobody has looked back at the last round"
    best = max(summary["rounds"], key=lambda entry: entry["policy"]["gold"])["round"]
    assert summary["best_round"] == best
    assert (run / "best").resolve() == (run / f"round-{best}/ppo/model").resolve()
    assert not (run / "round-2/evaluate/sft_answers.jsonl").exists(), "SFT's answers are sampled once"
    sft = [[row["sft"] for row in rows(run / f"round-{n}/evaluate/samples.jsonl")] for n in (1, 2)]
    assert sft[0] == sft[1]
    assert "Round by round" in (run / "report.html").read_text()
    for number, entry in enumerate(summary["rounds"], start=1):
        card = (run / f"round-{number}/ppo/model/README.md").read_text()
        assert f"{entry['policy']['gold']:.3f}" in card, "each round's card has that round's numbers"


@pytest.mark.fault("kill at any moment")
@pytest.mark.slow
def test_killed_at_every_boundary_it_does_the_rest_and_nothing_twice(
    two_rounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Death right after each manifest: what follows has only the files to go on."""

    class Killed(BaseException):
        """No handler of ours catches it, as none catches SIGKILL."""

    finish, ended = Store.finish, list[str]()

    def dying(self: Store, stage: Any, facts: dict[str, Any], seconds: float) -> None:
        finish(self, stage, facts, seconds)
        ended.append(stage.folder)
        raise Killed

    made, run = recipe(tmp_path), tmp_path / "x"
    stages = plan(made)
    monkeypatch.setattr(Store, "finish", dying)
    for _ in stages:
        with pytest.raises(Killed):
            run_recipe(made, run, say=lambda _: None)
    assert ended == [stage.folder for stage in stages], "each stage ran once"
    run_recipe(made, run, say=lambda _: None)
    assert result(run) == result(two_rounds / "x")


@pytest.mark.fault("labels of a round")
def test_people_label_through_files_and_the_run_goes_on(two_rounds: Path, tmp_path: Path) -> None:
    run = again(two_rounds, tmp_path)
    with pytest.raises(UserError, match="no questions yet"):
        (run / "recipe.yaml").write_text("{}")
        open_book(run)
    made = recipe(tmp_path, LABELS, "rounds.annotators_per_pair=2", "rounds.age_weight=1.0")
    with pytest.raises(Waiting, match=r"round 2: 0 of 24 pairs labelled: `rlhf label .*x`; then run the same command"):
        start(made, run)
    assert json.loads((run / "summary.json").read_text())["rounds"][0]["policy"]["gold"] is not None
    file = tmp_path / "labels.jsonl"
    assert export_to(run, file, "plain") == 24
    asked = rows(file)
    assert {"id", "prompt", "first", "second", "label", "annotator"} == set(asked[0])

    # What comes back: nobody's answer, strangers, an old round, spellings, two people who differ.
    answers = [{**row, "label": "a", "annotator": "ann"} for row in asked]
    answers += [{**row, "label": "b" if i < 6 else "first", "annotator": "bob"} for i, row in enumerate(asked[:20])]
    answers += [
        {"id": "r2-ffffffffffffffff", "label": "a"}, {"id": "r1-ffffffffffffffff", "label": "a"},
        {"id": asked[0]["id"], "label": "maybe"}, {"id": asked[1]["id"], "label": ""}, {"label": "a"},
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in answers))
    expected = {"taken": 44, "unknown id": 1, "of another round": 1, "unknown label": 1, "no label yet": 1, "no id": 1}
    assert import_from(run, file) == expected
    assert len(rows(run / "quarantine-labels.jsonl")) == 5
    import_from(run, file)
    other = tmp_path / "another" / file.name  # a stranger's file of the same name must not cost the first one's
    other.parent.mkdir()
    other.write_text(
        json.dumps({"id": "r2-ffffffffffffffff", "label": "a", "annotator": "cy"}) + "\n" + file.read_text()
    )
    import_from(run, other)
    assert [len(rows(path)) for path in sorted(run.glob("quarantine-*"))] == [6, 5]
    with pytest.raises(Waiting, match="20 of 24"):
        run_recipe(made, run, say=lambda _: None)
    assert any("kappa" in line for line in progress_lines(run))
    file = tmp_path / "rest.jsonl"
    assert export_to(run, file, "plain") == 4, "only what is still open"
    file.write_text("".join(json.dumps({**row, "label": "skip", "annotator": "bob"}) + "\n" for row in rows(file)))
    import_from(run, file)
    run_recipe(made, run, say=lambda _: None)
    fresh = rows(run / "round-2/label/fresh.jsonl")
    assert len(fresh) == 24
    assert [row.get("confidence") for row in fresh].count(0.5) == 6, "one for each answer: a tie"
    facts = json.loads((run / "round-2/label/manifest.json").read_text())["facts"]
    assert facts["contested"] == 6
    assert (run / "round-2/evaluate/manifest.json").is_file()


def test_where_ppo_starts_and_what_its_kl_is_to(two_rounds: Path, tmp_path: Path) -> None:
    """On from the round before it is away from SFT at once; from itself, or starting at SFT, it is not."""
    first = rows(two_rounds / "x/round-2/ppo/metrics.jsonl")[0]
    assert first["kl_k3"] > 0
    ended_at = json.loads((two_rounds / "x/round-1/ppo/manifest.json").read_text())["facts"]["kl_coef"]
    assert first["kl_coef"] == ended_at < 0.05, "on from where the round before ended"
    for name, overrides in (
        ("moving", ["rounds.reference=previous"]),
        ("sft", ["rounds.start=sft"]),
    ):
        (tmp_path / name).mkdir()
        run = again(two_rounds, tmp_path / name)
        for stage in ("sample", "select", "label", "vote", "reward"):
            shutil.copytree(two_rounds / "x/round-2" / stage, run / "round-2" / stage)
        start(recipe(tmp_path / name, *overrides), run, until="round-2/ppo")
        assert rows(run / "round-2/ppo/metrics.jsonl")[0]["kl_k3"] == 0.0, name
        begins_at = rows(run / "round-2/ppo/metrics.jsonl")[0]["kl_coef"]
        assert begins_at == (0.05 if name == "sft" else ended_at), (
            "a policy that begins anew has its coefficient do so too"
        )


@pytest.mark.fault("labels of a round")
def test_an_empty_round_is_said_and_trains_on_what_was_there(two_rounds: Path, tmp_path: Path) -> None:
    run = again(two_rounds, tmp_path)
    made = recipe(tmp_path, LABELS)
    with pytest.raises(Waiting):
        start(made, run)
    book = LabelBook(run / BOOK)
    from rlhf.data.labels import Verdict

    book.record([Verdict(question.id, "skip", "ann") for question in book.questions(2)])
    book.ask([replace(book.questions(2)[0], id="r3-x", round=3)])
    said: list[str] = []
    run_recipe(made, run, until="label", say=said.append)
    assert any("no new pair in this round" in line for line in said)
    assert any("24 skipped" in line for line in said)
    assert any("1 questions of later rounds" in line for line in said)
    assert book.rounds() == [2]
    assert len(rows(run / "round-2/label/pairs.jsonl")) == 120


def test_a_dataset_is_dealt_out_over_the_rounds(two_rounds: Path, tmp_path: Path) -> None:
    run = again(two_rounds, tmp_path, keep=("round-0",))
    asks_nobody = ("rounds.labels_from=dataset", "rounds.labels=500", "rounds.prompts=512", "rounds.select=random")
    made = recipe(tmp_path, *asks_nobody, "reward.meta=false", "reward.meta_pool=512", "rounds.age_weight=1.0")
    start(made, run, until="label")
    half = rows(run / "round-1/label/pairs.jsonl")
    everything = rows(run / "round-0/data/data/pairs.jsonl")
    prompts = {json.dumps(row["prompt"]) for row in everything}
    assert len({json.dumps(row["prompt"]) for row in half}) == -(-len(prompts) // 2)
    assert [stage.folder for stage in plan(made) if stage.name == "label"] == ["round-1/label", "round-2/label"]


def test_round_1_may_begin_with_the_policys_own_answers(two_rounds: Path, tmp_path: Path) -> None:
    run = again(two_rounds, tmp_path, keep=("round-0",))
    made = recipe(tmp_path, "rounds.first=sampled", "rounds.count=1")
    said = start(made, run, until="label")
    assert any("no reward model yet, so pairs are taken at random" in line for line in said)
    pairs = rows(run / "round-1/label/pairs.jsonl")
    assert len(pairs) == 24
    assert {row["round"] for row in pairs} == {1}


@pytest.mark.parametrize("how", ["random", "deviation", "diversity"])
def test_every_way_of_choosing_asks_for_different_pairs(how: str, two_rounds: Path, tmp_path: Path) -> None:
    run = again(two_rounds, tmp_path)
    shutil.copytree(two_rounds / "x/round-2/sample", run / "round-2/sample")
    start(recipe(tmp_path, f"rounds.select={how}"), run, until="select")
    found = read_questions(run / "round-2/select/questions.jsonl")
    assert len({question.id for question in found}) == 24
    assert all(question.first != question.second for question in found)
    if how == "random":
        assert len({json.dumps(question.prompt) for question in found}) == 16, "every prompt before any comes twice"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (("lab=null", "backbone.model=m", "data.preferences=p.jsonl"), "labels_from is lab, but there is no `lab:`"),
        (("rounds.labels_from=judge",), "set rounds.judge_url and rounds.judge_model"),
        (("rounds.start=sft", "rounds.reference=previous"), "set rounds.start: previous"),
        (("rounds.labels_from=dataset", "rounds.first=sampled"), "labels_from: dataset samples nothing"),
        (("rounds.labels_form=people",), "did you mean 'labels_from'"),
    ],
)
def test_rounds_that_cannot_be_are_refused(tmp_path: Path, override: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipe(tmp_path, *override)
