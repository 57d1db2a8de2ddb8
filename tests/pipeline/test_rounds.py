"""Rounds: a whole two-round run, killed at every boundary, labelled by people and by a judge, stopped by its rules."""

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rlhf.cli.console import output
from rlhf.data import http
from rlhf.data.labelbook import BOOK, LabelBook
from rlhf.data.labels import read_questions
from rlhf.errors import TrainingError, UserError, Waiting
from rlhf.files import read_jsonl
from rlhf.pipeline.estimate import estimate
from rlhf.pipeline.plan import plan
from rlhf.pipeline.run import run as run_recipe
from rlhf.pipeline.stopping import change_since_last_round, reason_to_stop
from rlhf.pipeline.store import Store
from rlhf.pipeline.summary import _best
from rlhf.recipe import Recipe, load_recipe
from rlhf.recipe.schema import RoundsSection
from rlhf.report.records import read_record, sealed
from rlhf.report.terminal import show_summary
from rlhf.reward.load import load_reward_model
from rlhf.serve.desk import export_to, import_from, open_book, progress_lines

RECIPE = """
name: small
lab: {demonstrations: 300, pairs: 120, test_pairs: 60, hidden_size: 32, num_hidden_layers: 1}
sft: {learning_rate: 3.0e-3, per_device_train_batch_size: 16, num_train_epochs: 1, logging_steps: 2}
vote: {members: 2, folds: 2}
reward: {learning_rate: 1.0e-3, per_device_train_batch_size: 16, logging_steps: 2, objective: posterior, meta: true, meta_pool: 12}
ppo: {total_episodes: 32, per_device_train_batch_size: 8, num_ppo_epochs: 1, learning_rate: 1.0e-3, max_completion_length: 12,
      save_steps: 1, kl_target: 4.0, kl_horizon: 100}
rounds: {count: 2, prompts: 16, labels: 24, select: information, start: previous, age_weight: 0.5, stop_when_worse: false}
evaluate: {prompts: 24}
"""
ROUND_1 = ["sample", "vote", "reward", "ppo", "evaluate"]
ROUND_2 = ["sample", "select", "label", "vote", "reward", "ppo", "evaluate"]
LABELS = "rounds.labels_from=people"


def recipe(folder: Path, *overrides: str) -> Recipe:
    file = folder / "r.yaml"
    file.write_text(RECIPE)
    return load_recipe(file, list(overrides))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds")
    run_recipe(recipe(folder), folder / "x", say=lambda _: None)
    return folder


def again(finished: Path, folder: Path, *, keep: tuple[str, ...] = ("round-0", "round-1")) -> Path:
    """A copy of a run from which later stages, and the recipe that asked for them, are gone."""
    run = folder / "x"
    for name in keep:
        shutil.copytree(finished / "x" / name, run / name)
    return run


def start(made: Recipe, run: Path, **arguments: Any) -> list[str]:
    """Run with a recipe that differs in what comes after the copied stages."""
    said: list[str] = []
    (run / "recipe.yaml").unlink(missing_ok=True)
    import yaml

    (run / "recipe.yaml").write_text(yaml.safe_dump(made.resolved(), sort_keys=False))
    run_recipe(made, run, say=said.append, **arguments)
    return said


def test_two_rounds_are_as_the_recipe_says(finished: Path) -> None:
    run = finished / "x"
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
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert result(run) == result(finished / "x")


@pytest.mark.fault("labels of a round")
def test_people_label_through_files_and_the_run_goes_on(finished: Path, tmp_path: Path) -> None:
    run = again(finished, tmp_path)
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


def test_where_ppo_starts_and_what_its_kl_is_to(finished: Path, tmp_path: Path) -> None:
    """On from the round before it is away from SFT at once; from itself, or starting at SFT, it is not."""
    first = rows(finished / "x/round-2/ppo/metrics.jsonl")[0]
    assert first["kl_k3"] > 0
    ended_at = json.loads((finished / "x/round-1/ppo/manifest.json").read_text())["facts"]["kl_coef"]
    assert first["kl_coef"] == ended_at < 0.05, "on from where the round before ended"
    for name, overrides in (
        ("moving", ["rounds.reference=previous"]),
        ("sft", ["rounds.start=sft"]),
    ):
        (tmp_path / name).mkdir()
        run = again(finished, tmp_path / name)
        for stage in ("sample", "select", "label", "vote", "reward"):
            shutil.copytree(finished / "x/round-2" / stage, run / "round-2" / stage)
        start(recipe(tmp_path / name, *overrides), run, until="round-2/ppo")
        assert rows(run / "round-2/ppo/metrics.jsonl")[0]["kl_k3"] == 0.0, name
        begins_at = rows(run / "round-2/ppo/metrics.jsonl")[0]["kl_coef"]
        assert begins_at == (0.05 if name == "sft" else ended_at), (
            "a policy that begins anew has its coefficient do so too"
        )


@pytest.mark.fault("labels of a round")
def test_an_empty_round_is_said_and_trains_on_what_was_there(finished: Path, tmp_path: Path) -> None:
    run = again(finished, tmp_path)
    made = recipe(tmp_path, LABELS)
    with pytest.raises(Waiting):
        start(made, run)
    book = LabelBook(run / BOOK)
    from rlhf.data.labels import Verdict

    book.record([Verdict(question.id, "skip", "ann") for question in book.questions(2)])
    said: list[str] = []
    run_recipe(made, run, until="label", say=said.append)
    assert any("no new pair in this round" in line for line in said)
    assert any("24 skipped" in line for line in said)
    assert len(rows(run / "round-2/label/pairs.jsonl")) == 120


class Judge(BaseHTTPRequestHandler):
    """Likes the longer answer; of two equally long ones, the first it sees. Dies after some requests where told to."""

    seen: ClassVar[int] = 0
    dies_after: ClassVar[int | None] = None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen += 1
        if type(self).dies_after is not None and type(self).seen > type(self).dies_after:
            self.send_response(400)
            self.end_headers()
            return
        text = body["messages"][0]["content"]
        first = text.split("[Answer A]\n")[1].split("\n[End of A]")[0]
        second = text.split("[Answer B]\n")[1].split("\n[End of B]")[0]
        verdict = "[[A]]" if len(first) >= len(second) else "[[B]]"
        reply = {"choices": [{"message": {"content": f"One of [[A]], [[B]]: {verdict}"}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def judge_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(http, "FIRST_WAIT", 0.0)
    Judge.seen, Judge.dies_after = 0, None
    server = HTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()


def test_a_judge_is_asked_in_both_orders_and_nothing_is_asked_twice(
    finished: Path, tmp_path: Path, judge_url: str
) -> None:
    run = again(finished, tmp_path)
    made = recipe(tmp_path, "rounds.labels_from=judge", f"rounds.judge_url={judge_url}", "rounds.judge_model=j")
    Judge.dies_after = 11
    with pytest.raises(TrainingError, match="what it said so far is kept"):
        start(made, run, until="label")
    Judge.dies_after = None
    before = len(LabelBook(run / BOOK).verdicts())
    assert before == 5, "eleven requests are five whole questions"
    run_recipe(made, run, until="label", say=lambda _: None)
    assert Judge.seen == 12 + 2 * (24 - before)
    questions = {q.id: q for q in read_questions(run / "round-2/select/questions.jsonl")}
    for verdict in LabelBook(run / BOOK).verdicts():
        question = questions[verdict.id]
        longer = len(question.first) - len(question.second)
        assert verdict.label == ("first" if longer > 0 else "second" if longer < 0 else "tie"), "order decides nothing"

    # Another judge, as the refusal advises: the stage is made again, and the first one's verdicts count no more.
    shutil.rmtree(run / "round-2/label")
    (run / "recipe.yaml").unlink()
    made = recipe(tmp_path, "rounds.labels_from=judge", f"rounds.judge_url={judge_url}", "rounds.judge_model=k")
    run_recipe(made, run, until="label", say=lambda _: None)
    assert {verdict.annotator for verdict in LabelBook(run / BOOK).verdicts()} == {"j", "k"}, "nothing is lost"
    labelled = [row for row in read_jsonl(run / "round-2/label/pairs.jsonl") if row.get("round") == 2]
    assert {row["annotator"] for row in labelled} == {"k"}


def test_a_judge_stops_at_its_budget(finished: Path, tmp_path: Path, judge_url: str) -> None:
    run = again(finished, tmp_path)
    made = recipe(
        tmp_path,
        "rounds.labels_from=judge",
        f"rounds.judge_url={judge_url}",
        "rounds.judge_model=j",
        "rounds.judge_budget=15",
    )
    said = start(made, run, until="label")
    assert Judge.seen == 14
    assert any("budget of 15 requests is spent" in line for line in said)
    assert len(rows(run / "round-2/label/fresh.jsonl")) == 7


def test_a_dataset_is_dealt_out_over_the_rounds(finished: Path, tmp_path: Path) -> None:
    run = again(finished, tmp_path, keep=("round-0",))
    asks_nobody = ("rounds.labels_from=dataset", "rounds.labels=500", "rounds.prompts=512", "rounds.select=random")
    made = recipe(tmp_path, *asks_nobody, "reward.meta=false", "reward.meta_pool=512", "rounds.age_weight=1.0")
    start(made, run, until="label")
    half = rows(run / "round-1/label/pairs.jsonl")
    everything = rows(run / "round-0/data/data/pairs.jsonl")
    prompts = {json.dumps(row["prompt"]) for row in everything}
    assert len({json.dumps(row["prompt"]) for row in half}) == -(-len(prompts) // 2)
    assert [stage.folder for stage in plan(made) if stage.name == "label"] == ["round-1/label", "round-2/label"]


def test_round_1_may_begin_with_the_policys_own_answers(finished: Path, tmp_path: Path) -> None:
    run = again(finished, tmp_path, keep=("round-0",))
    made = recipe(tmp_path, "rounds.first=sampled", "rounds.count=1")
    said = start(made, run, until="label")
    assert any("no reward model yet, so pairs are taken at random" in line for line in said)
    pairs = rows(run / "round-1/label/pairs.jsonl")
    assert len(pairs) == 24
    assert {row["round"] for row in pairs} == {1}


COLD = """
name: cold
data: {test_fraction: 0.25}
reward: {learning_rate: 1.0e-3, per_device_train_batch_size: 16, logging_steps: 2}
ppo: {total_episodes: 16, per_device_train_batch_size: 8, num_ppo_epochs: 1, learning_rate: 1.0e-3, max_completion_length: 12}
rounds: {count: 2, first: sampled, labels_from: judge, judge_model: j, prompts: 16, labels: 24}
evaluate: {prompts: 16}
"""


def test_a_model_and_prompts_are_enough_to_begin_with(
    finished: Path, tmp_path: Path, judge_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No pair, no demonstration and no word of SFT: all that the reward model learns from, and is judged on, is labelled on the way."""
    (tmp_path / "cold.yaml").write_text(COLD)
    begin, prompts = finished / "x/round-0/sft/model", finished / "x/round-0/data/data/prompts.jsonl"
    named = [f"backbone.model={begin}", f"data.prompts={prompts}", f"rounds.judge_url={judge_url}"]
    made = load_recipe(tmp_path / "cold.yaml", named)
    run, lines = tmp_path / "x", list[str]()
    run_recipe(made, run, say=lines.append)
    show_summary(run, output)
    texts = [run / "report.html", *run.glob("round-*/*/model/README.md")]
    assert len(texts) == 5
    told = {str(file): file.read_text() for file in texts}
    told |= {"terminal": capsys.readouterr().out, "the run": "\n".join(lines)}
    for place, text in told.items():
        assert "SFT" not in text, f"{place}: there was none"
        assert "backbone" in text or place == "the run", place
    assert {file.name for file in (run / "round-0/data/data").iterdir()} == {"prompts.jsonl", "test_prompts.jsonl"}
    judged: list[dict[str, Any]] = []
    for number in (1, 2):
        label = run / f"round-{number}/label"
        facts = json.loads((label / "manifest.json").read_text())["facts"]
        trained, held = rows(label / "pairs.jsonl"), rows(label / "test_pairs.jsonl")
        assert facts["fresh"] + facts["held_out"] + facts["held_out_ties"] == facts["labelled"] == 24
        assert held[: len(judged)] == judged, "what was held out stays so"
        judged = held
        sides = [{json.dumps(row["prompt"]) for row in side} for side in (trained, held)]
        assert sides[0].isdisjoint(sides[1])
        assert all(row.get("confidence") != 0.5 for row in held)
        reward = json.loads((run / f"round-{number}/reward/manifest.json").read_text())["facts"]
        assert reward["n"] == len(held)
        assert reward["pairs"] == len(trained)
    planned = {stage.folder: stage for stage in estimate(made)[0]}
    assert planned["round-2/reward"].rows == 48 - 12
    length, judge = estimate(made)[1]
    assert "No pairs yet: answers are taken to be 12 tokens long" in length
    assert judge.startswith("Not counted: rounds.labels_from: judge.")

    with pytest.raises(UserError, match=r"data\.prompts is missing: without data\.preferences nobody"):
        load_recipe(tmp_path / "cold.yaml", [named[0], named[2]])
    with pytest.raises(UserError, match=r"data\.preferences is missing"):
        load_recipe(tmp_path / "cold.yaml", [*named, "rounds.first=offline"])
    few = load_recipe(tmp_path / "cold.yaml", [*named, "rounds.labels=2", "data.test_fraction=0.01"])
    with pytest.raises(UserError, match="none of 2 labelled pairs is of a held-out prompt"):
        run_recipe(few, tmp_path / "few", say=lambda _: None)


@pytest.mark.parametrize("how", ["random", "deviation", "diversity"])
def test_every_way_of_choosing_asks_for_different_pairs(how: str, finished: Path, tmp_path: Path) -> None:
    run = again(finished, tmp_path)
    shutil.copytree(finished / "x/round-2/sample", run / "round-2/sample")
    start(recipe(tmp_path, f"rounds.select={how}"), run, until="select")
    found = read_questions(run / "round-2/select/questions.jsonl")
    assert len({question.id for question in found}) == 24
    assert all(question.first != question.second for question in found)
    if how == "random":
        assert len({json.dumps(question.prompt) for question in found}) == 16, "every prompt before any comes twice"


def test_rules_stop_a_run_for_what_the_manifests_say(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "x"
    shutil.copytree(finished / "x", run, symlinks=True)
    store, stages = Store(run), plan(recipe(tmp_path, "rounds.count=3"))
    by_folder = {stage.folder: stage for stage in stages}

    def reason(folder: str, **rules: Any) -> str | None:
        return reason_to_stop(RoundsSection(**rules), by_folder[folder], stages, store)

    for folder in ("round-1/evaluate", "round-2/label", "round-2/evaluate"):
        assert reason(folder, stop_when_worse=False) is None
    assert "below rounds.min_fresh_accuracy=0.99" in str(reason("round-2/label", min_fresh_accuracy=0.99))
    assert "over rounds.kl_limit=1e-06" in str(reason("round-2/evaluate", kl_limit=1e-6))
    manifest = run / "round-2/vote/manifest.json"
    known: Any = read_record(manifest)
    known["facts"]["noise"] |= {"low": 0.3, "flip_rate": 0.35}
    manifest.write_text(json.dumps(sealed(known)))
    assert "At least 30.0% of the labels are wrong" in str(reason("round-2/vote", max_noise=0.2))
    manifest = run / "round-2/reward/manifest.json"
    known = read_record(manifest)
    known["facts"]["hindsight"] |= {"win_rate": 0.3, "win_rate_ci": [0.2, 0.4]}
    manifest.write_text(json.dumps(sealed(known)))
    assert reason("round-2/reward") is None, "the true reward is known, and decides"
    judged = run / "round-1/evaluate/manifest.json"
    unknown: Any = read_record(judged)
    gold = unknown["facts"]["policy"].pop("gold")
    judged.write_text(json.dumps(sealed({**unknown, "facts": unknown["facts"] | {"policy": {"gold": None}}})))
    assert "beats the one before it on 30.0% of the prompts only, at most 40.0%" in str(reason("round-2/reward"))
    assert reason("round-2/reward", stop_when_worse=False) is None
    unknown["facts"]["policy"]["gold"] = gold
    judged.write_text(json.dumps(sealed(unknown)))
    file = run / "round-2/evaluate/samples.jsonl"
    before = [row["gold_policy"] for row in rows(run / "round-1/evaluate/samples.jsonl")]
    worse = [{**row, "gold_policy": gold - 0.5} for row, gold in zip(rows(file), before, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in worse))
    assert "the true reward fell by 0.500 [0." in str(reason("round-2/evaluate"))
    change = change_since_last_round(by_folder["round-2/evaluate"], stages, store)
    assert change is not None
    assert change["difference"] == pytest.approx(-0.5)


def test_without_a_true_reward_the_best_round_is_the_last_that_nobody_found_worse() -> None:
    def entry(number: int, win_rate: float | None, proxy: float | None = 1.0) -> dict[str, Any]:
        found = None if win_rate is None else {"win_rate_ci": [win_rate - 0.05, win_rate + 0.05]}
        return {"round": number, "hindsight": found, "policy": {"proxy": proxy, "gold": None}}

    assert _best([entry(1, 0.7), entry(2, 0.6), entry(3, None)]) == 3
    assert _best([entry(1, 0.7), entry(2, 0.3), entry(3, None, proxy=None)]) == 1
    assert _best([entry(1, 0.7), entry(2, 0.47), entry(3, None, proxy=None)]) == 2
    assert _best([entry(1, 0.2), entry(2, None, proxy=None)]) == 1, "there is no other"


def test_a_run_that_a_rule_stops_is_finished_and_says_why(finished: Path, tmp_path: Path) -> None:
    run = again(finished, tmp_path)
    for stage in ("sample", "select"):
        shutil.copytree(finished / "x/round-2" / stage, run / "round-2" / stage)
    said = start(recipe(tmp_path, "rounds.min_fresh_accuracy=0.99"), run)
    assert said[-1].startswith("round-2: stopped. The reward model so far orders")
    assert not (run / "round-2/vote").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stopped"] == said[-1]
    last = summary["rounds"][-1]
    assert last["labels"]["fresh"] == 24
    assert last["policy"]["gold"] is None
    assert (run / "best").resolve() == (run / "round-1/ppo/model").resolve()
    assert "Round by round" in (run / "report.html").read_text()


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
