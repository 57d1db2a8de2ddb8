"""The thread that owns a model: fair turns, batches of similar length, one bad text does not take others along."""

import shutil
import threading
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from rlhf import load_reward_model
from rlhf.reward.ensemble import RewardEnsemble
from rlhf.reward.load import CARD
from rlhf.reward.model import RewardModel
from rlhf.serve.batching import Refused, Worker, neighbours
from rlhf.serve.metrics import Metrics
from rlhf.serve.models import Answer, Encoded, Rendered, ServedModel, Text, open_models
from tests.conftest import PROMPTS


class Pretended:
    """A model whose score of a text is its number; a text is as long as its prompt. It waits before each forward."""

    name = "pretended"
    members: list[Any] = []

    def __init__(self) -> None:
        self.may_go = threading.Semaphore(0)
        self.batches: list[list[float]] = []

    def encode(self, texts: Sequence[Answer]) -> list[Encoded | str]:
        return ["no" if t.response == "bad" else Encoded([], len(t.prompt), False) for t in texts]

    def score(self, texts: Sequence[Answer], encoded: Sequence[Encoded]) -> list[float]:
        assert self.may_go.acquire(timeout=20)
        if any(text.response == "raise" for text in texts):
            raise MemoryError("a person's text")
        self.batches.append([float(text.response) for text in texts])
        return self.batches[-1]


def start(model: Pretended, **settings: int) -> Worker:
    limits = {"batch_tokens": 10_000, "batch_texts": 4, "most_waiting": 1000} | settings
    worker = Worker(cast(ServedModel, model), Metrics(), **limits)
    worker.start()
    return worker


def answers(*responses: object, length: int = 1) -> list[Text]:
    return [Answer("x" * length, str(response)) for response in responses]


@pytest.mark.fault("long queues")
def test_a_large_request_does_not_keep_a_small_one_waiting() -> None:
    model = Pretended()
    worker = start(model)
    large = worker.submit(answers(*range(400)))
    model.may_go.release()
    while not model.batches:
        pass
    small = worker.submit(answers(1000))
    for _ in range(3):
        model.may_go.release()
    assert small.done.result(timeout=20).scores == [1000]
    assert len(model.batches) <= 4, "the batch that was in hand, and its own"
    assert large.left > 300
    model.may_go.release(200)
    assert large.done.result(timeout=20).scores == list(range(400)), "in the order sent"
    worker.stop()
    assert worker.waiting == 0


def test_small_requests_are_scored_together_and_long_ones_apart() -> None:
    model = Pretended()
    worker = start(model)
    first = worker.submit(answers(0))
    lengths = [10, 2000, 11, 2001]
    jobs = [worker.submit(answers(i + 1, length=length)) for i, length in enumerate(lengths)]
    model.may_go.release(20)
    assert [job.done.result(timeout=20).scores for job in (first, *jobs)] == [[0], [1], [2], [3], [4]]
    assert sorted(map(sorted, model.batches)) in ([[0], [1, 3], [2, 4]], [[0, 1, 3], [2, 4]])
    worker.stop()


def test_neighbours_fit_the_budget_and_are_not_mostly_padding() -> None:
    lengths = [5, 400, 410, 420, 6, 6000]
    assert neighbours(lengths, 1, most_tokens=1000, most_rows=64) == {1, 2}
    assert neighbours(lengths, 1, most_tokens=2000, most_rows=64) == {1, 2, 3}, "not the 6: a quarter may be padding"
    assert neighbours(lengths, 1, most_tokens=9999, most_rows=2) == {1, 2}
    assert neighbours(lengths, 5, most_tokens=1000, most_rows=64) == {5}, "a text alone may be longer"
    assert neighbours([3] * 100, 50, most_tokens=30, most_rows=64) >= {50}
    assert len(neighbours([3] * 100, 50, most_tokens=30, most_rows=64)) == 10


@pytest.mark.fault("garbage and load")
def test_a_text_that_fails_fails_alone() -> None:
    model = Pretended()
    worker = start(model)
    worker.submit(answers(0))
    good, refused = worker.submit(answers(1, 2)), worker.submit(answers(3, "bad"))
    broken, infinite = worker.submit(answers("raise")), worker.submit(answers("inf"))
    model.may_go.release(50)
    assert good.done.result(timeout=20).scores == [1, 2]
    for job, status, sentence in (
        (refused, 422, "answer 1: no"),
        (broken, 500, "MemoryError"),
        (infinite, 422, "not a finite number"),
    ):
        with pytest.raises(Refused, match=sentence) as refusal:
            job.done.result(timeout=20)
        assert refusal.value.status == status
        assert "a person's text" not in refusal.value.sentence
    worker.stop()
    assert worker.waiting == 0


@pytest.mark.fault("long queues")
def test_a_full_queue_refuses_and_a_stopping_one_finishes() -> None:
    model = Pretended()
    worker = start(model, most_waiting=10)
    taken = worker.submit(answers(*range(50)))  # a request alone may be larger than the queue
    with pytest.raises(Refused, match="50 texts wait") as refusal:
        worker.submit(answers(1))
    assert (refusal.value.status, refusal.value.retry_after) == (429, 1)
    given_up = taken
    worker.give_up(given_up)
    assert worker.waiting == 0, "nobody waits for them"
    last = worker.submit(answers(7))
    model.may_go.release(50)
    worker.stop()
    assert last.done.result(timeout=0).scores == [7]
    with pytest.raises(Refused, match="stops"):
        worker.submit(answers(1))


def test_models_are_opened_under_their_names(reward_folder: Any, tmp_path: Any) -> None:
    """A folder, the same under another name, and a stage with two members, whose score is the mean of centred ones."""
    (tmp_path / "model").symlink_to(reward_folder)
    (tmp_path / "member-1").symlink_to(reward_folder)
    alone, named, both = open_models([str(reward_folder), f"small={reward_folder}", f"two={tmp_path}"])
    assert [alone.name, named.name, both.name] == [str(reward_folder), "small", "two"]
    assert [alone.kind, both.kind] == ["reward model", "ensemble"]
    both.members[1].mean += 0.5
    reward = load_reward_model(reward_folder)
    texts: list[Text] = [Answer(PROMPTS[0], "yes"), Answer(PROMPTS[1], "no no", False), Rendered("apple")]
    encoded = alone.encode(texts)
    scores = alone.score(texts, cast(list[Encoded], encoded))
    expected = reward.score(PROMPTS[:2], ["yes", "no no"], ended=[True, False])
    expected = torch.cat([expected, reward.score_texts(["apple"])])
    assert scores == pytest.approx(expected.tolist(), abs=1e-6)
    mean = RewardEnsemble(both.members).score(PROMPTS[:2], ["yes", "no no"], ended=[True, False])
    of_both = both.score(texts, cast(list[Encoded], both.encode(texts)))
    assert of_both[:2] == pytest.approx(mean.tolist(), abs=1e-6)


def test_a_scale_that_nobody_measured_is_none(reward_folder: Any, tmp_path: Any) -> None:
    """They were 0 and 1, as if they had been measured."""
    shutil.copytree(reward_folder, tmp_path / "theirs")
    (tmp_path / "theirs" / CARD).unlink()
    with pytest.warns(UserWarning, match="its scores are not checked"):
        theirs, ours = open_models([str(tmp_path / "theirs"), str(reward_folder)])
    assert (theirs.mean, theirs.std) == (None, None)
    assert ours.std is not None
    assert ours.std > 0


def test_a_text_that_raises_what_nobody_foresaw_fails_alone(
    reward_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended the model's thread, and every other request waited until its time was up."""
    served = ServedModel("x", [load_reward_model(reward_folder)])
    encode = RewardModel.encode

    def fails(self: RewardModel, prompts: Any, responses: Any, ended: Any = None) -> Any:
        if "bad" in responses:
            raise AttributeError("a person's text")
        return encode(self, prompts, responses, ended)

    monkeypatch.setattr(RewardModel, "encode", fails)
    first, second, third = served.encode([Answer("a", "b"), Answer("a", "bad"), Answer("a", "c")])
    assert second == "can't be read (AttributeError)"
    assert isinstance(first, Encoded)
    assert isinstance(third, Encoded)


def test_a_batch_is_one_forward(reward_folder: Any) -> None:
    """Whatever the server was told of its size: beyond 8,192 tokens they were two."""
    served = ServedModel("x", [load_reward_model(reward_folder)])
    model, forwards = served.members[0].model, []
    model.register_forward_hook(lambda *_: forwards.append(1))
    rows = [[5] * 200] * 60
    for limit, expected in ((16_384, 1), (8_192, 2)):
        start(cast(Pretended, served), batch_tokens=limit, batch_texts=64).stop()
        forwards.clear()
        served.members[0].score_rows(rows)
        assert len(forwards) == expected


def test_the_text_that_was_cut_is_the_one_that_says_so(reward_folder: Any) -> None:
    served = ServedModel("x", [load_reward_model(reward_folder)])
    texts: list[Text] = [Answer("a", "b"), Answer("apple " * 400, "b"), Answer("c", "d")]
    assert [cast(Encoded, x).is_cut for x in served.encode(texts)] == [False, True, False]
    assert served.members[0].cut == 1
