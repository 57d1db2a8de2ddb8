"""The second look of a round: asked apart from the annotators' labels, remembered by later rounds, paid from the same labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.data.labelbook import BOOK
from rlhf.data.labels import Question, Verdict
from rlhf.errors import UserError, Waiting
from rlhf.files import read_jsonl, write_jsonl
from rlhf.pipeline import second_look_stage
from rlhf.pipeline.context import PAIRS, TEST_PAIRS, StageContext
from rlhf.pipeline.looked import EXPERT_ERROR
from rlhf.pipeline.plan import plan
from rlhf.pipeline.run import run as run_recipe
from rlhf.pipeline.second_look_stage import run_second_look
from rlhf.pipeline.store import CHECKPOINTS
from rlhf.recipe import Recipe, load_recipe
from rlhf.report.rounds import rounds_section
from rlhf.serve.desk import open_book
from tests.conftest import WORDS

GOLD = "def gold(prompts, completions):\n    return [float(text.startswith('yes')) for text in completions]\n"
RECIPE = """
name: looked
lab: {demonstrations: 300, pairs: 100, test_pairs: 50, hidden_size: 32, num_hidden_layers: 2}
sft: {learning_rate: 3.0e-3, per_device_train_batch_size: 16, num_train_epochs: 1}
vote: {members: 4, folds: 2, trunk: 1}
reward: {learning_rate: 3.0e-3, per_device_train_batch_size: 8, num_train_epochs: 2}
ppo: {max_completion_length: 12}
rounds: {count: 2, labels: 40, prompts: 20, second_look: 0.3}
evaluate: {prompts: 16}
"""
PEOPLE = "rounds.labels_from=people"


def recipe(folder: Path, *overrides: str) -> Recipe:
    file = folder / "r.yaml"
    file.write_text(RECIPE)
    return load_recipe(file, list(overrides))


def pair(i: int, *, of_round: int) -> dict[str, Any]:
    """The better answer says yes; every fifth label is the other way."""
    better, worse = f"yes {WORDS[i % 9]}", f"no {WORDS[(i + 4) % 9]}"
    sides = (worse, better) if i % 5 == 0 else (better, worse)
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in sides)
    prompt = [{"role": "user", "content": f"{WORDS[i % 11]} {WORDS[i % 13]} {i}"}]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "round": of_round}


def truth(question: Question) -> str:
    return "first" if question.first.startswith("yes") else "second"


@pytest.fixture
def stage(base_folder: Path, tmp_path: Path) -> Any:
    """Run the second look of a round on 80 pairs and a tie, `stage.run` the run's folder."""
    run = tmp_path / "run"
    (run / "data/data").mkdir(parents=True)
    (run / "sft").mkdir()
    (run / "sft/model").symlink_to(base_folder, target_is_directory=True)
    (tmp_path / "gold.py").write_text(GOLD)
    made = recipe(tmp_path, PEOPLE, f"evaluate.gold={tmp_path / 'gold.py'}:gold")
    (run / "recipe.yaml").write_text("")

    def look(number: int, *, is_main: bool = True) -> dict[str, Any]:
        label, folder = run / f"round-{number}/label", run / f"round-{number}/second_look"
        for place in (label, folder):
            place.mkdir(parents=True, exist_ok=True)
        pairs = [pair(i, of_round=number) for i in range(80)]
        tie = {**pair(81, of_round=number), "confidence": 0.5}
        write_jsonl(label / PAIRS, [tie, *pairs])
        write_jsonl(label / TEST_PAIRS, [pair(99, of_round=number)])
        parents = {"data": run / "data", "sft": run / "sft", "label": label}
        if number > 2:
            parents["earlier"] = run / f"round-{number - 1}/second_look"
        return run_second_look(StageContext(made, folder, parents, lambda _: None, is_main))

    look.run = run  # type: ignore[attr-defined]
    return look


def answer(run: Path, count: int, label: Any = truth) -> list[Question]:
    """Answer the open round's first questions; they are in a book of their own."""
    book, number, wanted = open_book(run / "second_look")
    assert wanted == 1
    questions = book.questions(number)
    book.record([Verdict(q.id, label(q), "ann") for q in questions[:count]])
    return questions


def test_people_are_asked_once_and_their_verdicts_are_kept_by_later_rounds(
    stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        Waiting, match=r"round 2, second look: 0 of 12 pairs labelled by experts: `rlhf label .*second_look`"
    ):
        stage(2)
    assert not (stage.run / BOOK).exists(), "the annotators' book is another one"
    questions = answer(stage.run, 5)
    votes = stage.run / f"round-2/second_look/{CHECKPOINTS}"
    before = {file: file.stat().st_mtime_ns for file in votes.rglob("differences.safetensors")}
    assert len(before) == 4
    with monkeypatch.context() as patch, pytest.raises(Waiting, match="5 of 12"):
        patch.setattr(second_look_stage, "second_look", lambda *_, **__: list(range(20, 32)))  # another machine chooses
        stage(2)
    assert {file: file.stat().st_mtime_ns for file in before} == before, "members that voted are not trained again"
    assert answer(stage.run, 12) == questions, "nobody is asked about other pairs while a round waits"

    facts = stage(2)
    assert (facts["looked_at"], facts["answered"], facts["open"], facts["ties"]) == (12, 12, 0, 0)
    first_looks = {q.prompt[0]["content"] for q in questions}
    check_bayes(stage.run, 2, facts, first_looks)
    labelled = read_jsonl(stage.run / f"round-2/label/{PAIRS}")
    assert labelled[1:] == [pair(i, of_round=2) for i in range(80)], "labels stay as they were given"
    assert facts["flip_rate"]["before"] == pytest.approx(16 / 80)
    assert facts["flip_rate"]["after"] < 0.1
    assert facts["worth"]["after"] > facts["worth"]["before"]
    assert read_jsonl(stage.run / f"round-2/second_look/{TEST_PAIRS}") == [pair(99, of_round=2)]

    # The next round asks about other pairs, and knows what was said of these.
    with pytest.raises(Waiting):
        stage(3)
    later = {q.prompt[0]["content"] for q in answer(stage.run, 12)}
    assert len(later) == 12
    assert not later & first_looks
    facts = stage(3)
    assert (facts["looked_at"], facts["asked"], facts["answered"]) == (12, 24, 24)
    check_bayes(stage.run, 3, facts, first_looks | later)


def test_a_round_made_anew_asks_about_its_own_pairs(stage: Any) -> None:
    """Questions on pairs that are gone are taken back; those on pairs that are still there keep their verdicts."""
    with pytest.raises(Waiting):
        stage(2)
    asked = answer(stage.run, 12)
    gone = {asked[0].prompt[0]["content"], asked[1].prompt[0]["content"]}
    book, number, _ = open_book(stage.run / "second_look")
    with book._open() as connection:  # two pairs of an earlier attempt, which this round does not have
        for name in (asked[0].id, asked[1].id):
            connection.execute("UPDATE questions SET id = id || '-old' WHERE id = ?", (name,))
    with pytest.raises(Waiting, match="10 of 12"):
        stage(2)
    questions = book.questions(number)
    assert len(questions) == 12
    assert {q.id for q in questions} >= {q.id for q in asked[2:]}
    assert gone <= {q.prompt[0]["content"] for q in questions}, "they are asked about again, as pairs of this attempt"


def check_bayes(run: Path, number: int, facts: dict[str, Any], looks: set[str]) -> None:
    """Label, vote and verdict add in log-odds: what is left of them is one scale times the vote, in numpy."""
    from safetensors.numpy import load_file

    folder = run / f"round-{number}/second_look"
    made = read_jsonl(folder / PAIRS)
    assert made[0]["confidence"] == 0.5, "the annotators' tie is kept"
    rate, scale = facts["noise"]["fitted"], facts["noise"]["scale"]
    assert 0.05 < rate < 0.4
    implied = []
    for i, row in enumerate(made[1:]):
        is_wrong, says_yes = i % 5 == 0, row["chosen"][0]["content"].startswith("yes")
        right = 1 - row["confidence"] if is_wrong == says_yes else row["confidence"]
        assert row["confidence"] >= 0.5
        sure = not 1e-4 < right < 1 - 1e-4  # float32 has no digits for the odds there
        if row["prompt"][0]["content"] in looks and not sure:
            verdict = (-1 if is_wrong else 1) * np.log((1 - EXPERT_ERROR) / EXPERT_ERROR)
            without = 1 / (1 + np.exp(verdict) * (1 - right) / right)
            right = (without - facts["shared"] / 2) / (1 - facts["shared"])  # what the label and the vote said
        implied.append(np.nan if sure else (np.log(right / (1 - right)) - np.log((1 - rate) / rate)) / scale)
    # Two members vote on every pair: those of its fold.
    members = [
        load_file(file)["differences"] for file in sorted((folder / CHECKPOINTS).rglob("differences.safetensors"))
    ]
    voted = np.sort(np.concatenate([(members[0] + members[2]) / 2, (members[1] + members[3]) / 2]))
    known = np.sort(np.array(implied)[~np.isnan(implied)])
    assert len(known) >= 40
    nearest = np.abs(voted[None, :] - known[:, None]).min(axis=1)
    assert nearest.max() < 0.02 * np.abs(voted).max(), "each is the vote on some pair"


def test_all_processes_vote_again_with_what_one_of_them_asked(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others ask nobody and write nothing, but a vote that trains over processes needs them; and they wait as one does."""
    sent: list[list[Any]] = []
    received: list[list[Any]] = []

    def send(place: list[Any]) -> None:
        sent.append(list(place))

    def receive(place: list[Any]) -> None:
        received.append(list(place))
        place[:] = sent[len(received) - 1]

    monkeypatch.setattr(second_look_stage, "number_of_processes", lambda: 2)
    monkeypatch.setattr(second_look_stage, "broadcast_object_list", send)
    with pytest.raises(Waiting) as waits:
        stage(2)
    monkeypatch.setattr(second_look_stage, "broadcast_object_list", receive)
    with pytest.raises(Waiting, match="0 of 12 pairs labelled by experts") as other:
        stage(2, is_main=False)
    assert str(other.value) == str(waits.value)

    # They wait by a file of this launch, not in a broadcast, which gives up after some minutes.
    answer(stage.run, 12)
    sent.clear()
    received.clear()
    monkeypatch.setattr(second_look_stage, "broadcast_object_list", send)
    assert stage(2)["voted_again"]
    (launch,), (learnt,) = sent
    assert len(learnt) == 80
    asked = stage.run / f"round-2/second_look/{CHECKPOINTS}/asked-{launch}"
    asked.unlink()

    def sleep(_: float) -> None:
        assert len(received) == 1, "waits before the second broadcast"
        asked.touch()

    folder = stage.run / "round-2/second_look"
    made = {file: file.read_bytes() for file in folder.glob("*.jsonl")}
    votes = {file: file.read_bytes() for file in folder.rglob("again-*/member-*/differences.safetensors")}
    assert len(votes) == 4
    for file in [*made, *votes]:
        file.unlink()
    monkeypatch.setattr(second_look_stage, "broadcast_object_list", receive)
    with monkeypatch.context() as patch:
        patch.setattr(second_look_stage.time, "sleep", sleep)
        assert stage(2, is_main=False) == {}
    assert received[1] == [None]
    assert asked.is_file()
    assert {file: file.read_bytes() for file in votes} == votes
    assert not any(file.exists() for file in made)

    # What another verdict taught is not what members of before say.
    learnt[0] = 1 - learnt[0]
    received.clear()
    stage(2, is_main=False)
    assert len(list(folder.rglob("again-*/member-*/differences.safetensors"))) == 8


def test_verdicts_that_teach_nothing_are_refused(stage: Any) -> None:
    with pytest.raises(Waiting):
        stage(2)
    answer(stage.run, 12, lambda q: "first")
    with pytest.raises(UserError, match="all 12 verdicts are for the first answer, though the order was random"):
        stage(2)


def test_a_run_pays_second_looks_from_its_labels(tmp_path: Path) -> None:
    """In the lab, from sampled answers to the reward model; the reward model reads what the second look left."""
    made = recipe(tmp_path, "rounds.first=sampled", "lab.annotators=exact", "lab.flip_rate=0.25")
    said: list[str] = []
    run_recipe(made, tmp_path / "x", until="reward", say=said.append)
    run = tmp_path / "x"
    manifests = {f.parent.name: json.loads(f.read_text()) for f in run.glob("round-1/*/manifest.json")}
    assert manifests["select"]["facts"]["questions"] == 40 - 12
    facts = manifests["second_look"]["facts"]
    assert facts["looked_at"] == 12
    assert facts["flip_rate"]["before"] == manifests["label"]["facts"]["flip_rate"]
    assert manifests["reward"]["facts"]["pairs"] == facts["pairs"] == 28
    questions = read_jsonl(run / "round-1/second_look/questions.jsonl")
    assert not {"difference", "source"} & set().union(*questions), "nothing tells the expert what was labelled"
    assert not (run / "second_look").exists(), "the lab's experts need no book"

    summary = json.loads((run / "summary.json").read_text())
    entry = summary["rounds"][0]
    assert entry["second_look"] == {key: facts[key] for key in entry["second_look"]}
    section = rounds_section(run, {**summary, "rounds": [entry, {**entry, "round": 2, "second_look": None}]})
    assert section is not None
    assert [row["looked at again"] for row in section["table"]] == ["12", "-"]
    assert section["table"][0]["all wrong, before and after"].endswith("%")
    assert any("12 pairs, 12 in all rounds; experts agree" in line for line in said)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("rounds.count=1",), "no round of this recipe asks"),
        (("rounds.labels_from=dataset",), "no round of this recipe asks"),
        (("rounds.labels=3", "rounds.second_look=0.1"), "of 3 labels is 0 pairs"),
        (("rounds.labels=3", "rounds.second_look=0.9"), "of 3 labels is 3 pairs"),
        (("reward.objective=posterior",), "set reward.objective: bt"),
        (("reward.flip_rate=0.2",), "leave out reward.flip_rate"),
        (("vote.in_sample=true",), "leave out vote.in_sample"),
        (("vote.members=1",), "vote.members is 1"),
        (("rounds.second_look=1.0",), "second_look: input should be less than 1"),
    ],
)
def test_a_second_look_that_cannot_be_is_a_sentence(tmp_path: Path, overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        recipe(tmp_path, *overrides)


def test_recipes_without_second_looks_keep_their_stages(tmp_path: Path) -> None:
    """So that a run of before goes on: no new key in its recipe, none in its stages."""
    without = load_recipe(recipe_file(tmp_path))
    assert "second_look" not in without.resolved()["rounds"]
    stages = {stage.folder: stage for stage in plan(without)}
    assert "round-2/second_look" not in stages
    assert stages["round-2/select"].settings == {"labels": 40, "select": "random"}


def recipe_file(folder: Path) -> Path:
    file = folder / "without.yaml"
    file.write_text(RECIPE.replace(", second_look: 0.3", ""))
    return file
