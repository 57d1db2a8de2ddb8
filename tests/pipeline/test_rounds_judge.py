"""Rounds that a language model labels: in both orders, within a budget, and from a model and prompts alone."""

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
from rlhf.data.labels import Verdict, read_questions
from rlhf.errors import TrainingError, UserError
from rlhf.files import read_jsonl
from rlhf.pipeline.estimate import estimate
from rlhf.pipeline.run import run as run_recipe
from rlhf.recipe import load_recipe
from rlhf.report.terminal import show_summary
from tests.pipeline.two_rounds import again, recipe, rows, start


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
    two_rounds: Path, tmp_path: Path, judge_url: str
) -> None:
    run = again(two_rounds, tmp_path)
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


@pytest.mark.parametrize(("before", "sent"), [(0, 14), (3, 8)])
def test_a_judge_stops_at_its_budget(two_rounds: Path, tmp_path: Path, judge_url: str, before: int, sent: int) -> None:
    """The budget is for all rounds: what an earlier one asked counts."""
    run = again(two_rounds, tmp_path)
    LabelBook(run / BOOK).record([Verdict(f"r1-{i}", "first", "j") for i in range(before)])
    made = recipe(
        tmp_path,
        "rounds.labels_from=judge",
        f"rounds.judge_url={judge_url}",
        "rounds.judge_model=j",
        "rounds.judge_budget=15",
    )
    said = start(made, run, until="label")
    assert Judge.seen == sent
    assert any("budget of 15 requests is spent" in line for line in said)
    assert len(rows(run / "round-2/label/fresh.jsonl")) == sent // 2


COLD = """
name: cold
data: {test_fraction: 0.25}
reward: {learning_rate: 1.0e-3, per_device_train_batch_size: 16, logging_steps: 2}
ppo: {total_episodes: 16, per_device_train_batch_size: 8, num_ppo_epochs: 1, learning_rate: 1.0e-3, max_completion_length: 12}
rounds: {count: 2, first: sampled, labels_from: judge, judge_model: j, prompts: 16, labels: 24}
evaluate: {prompts: 16}
"""


@pytest.mark.usefixtures("timed_once")
def test_a_model_and_prompts_are_enough_to_begin_with(
    two_rounds: Path, tmp_path: Path, judge_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No pair, no demonstration and no word of SFT: all that the reward model learns from, and is judged on, is labelled on the way."""
    (tmp_path / "cold.yaml").write_text(COLD)
    begin, prompts = two_rounds / "x/round-0/sft/model", two_rounds / "x/round-0/data/data/prompts.jsonl"
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
