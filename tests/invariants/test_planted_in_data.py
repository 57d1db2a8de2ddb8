"""Planted faults of labels, lines, servers and foreign code: each is named by a sentence; without it there is none."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fastapi.testclient import TestClient

from rlhf.data.functions import load_function
from rlhf.data.sources import Source, read_pairs
from rlhf.errors import UserError
from rlhf.files import write_jsonl
from rlhf.invariants.scores import as_rendered
from rlhf.models.open import open_config
from rlhf.pipeline.checks import check_directions
from rlhf.ppo.remote import RemoteReward
from rlhf.reward.load import load_reward_model
from rlhf.serve.reward import reward_app
from tests.conftest import PROMPTS, WORDS

SYSTEM = {"role": "system", "content": "say please"}


class Place(NamedTuple):
    """Where a fault is planted."""

    folder: Path
    reward: Path
    patch: pytest.MonkeyPatch


def refused(act: Callable[[], object]) -> str:
    """The sentence of a refusal, or none."""
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


# ---- Labels ----


def rated(place: Place, chosen_ratings: list[int]) -> str:
    """What a reader says of pairs whose label and ratings are two signals of one thing."""
    rows = [
        {"prompt": f"p {i}", "chosen": "yes", "rejected": f"no {i}", "score_chosen": rating, "score_rejected": 3}
        for i, rating in enumerate(chosen_ratings)
    ]
    write_jsonl(place.folder / "pairs.jsonl", rows)
    return "\n".join(key for key in read_pairs(str(place.folder / "pairs.jsonl"))[1].noted)


def coded(place: Place, codes: list[int]) -> str:
    rows = [{"prompt": f"p {i}", "response_1": "a", "response_2": "b", "preference": x} for i, x in enumerate(codes)]
    write_jsonl(place.folder / "pairs.jsonl", rows)
    return refused(lambda: check_directions(Source(str(place.folder / "pairs.jsonl"))))


# ---- Lines ----


class SplitEverywhere(io.BytesIO):
    """A file that ends its lines where `str.splitlines` does."""

    def readline(self, size: int | None = -1, /) -> bytes:
        place = self.tell()
        rest = self.getvalue()[place:].decode().splitlines(keepends=True)
        line = rest[0].encode() if rest else b""
        self.seek(place + len(line))
        return line


def separated(place: Place, *, is_split: bool) -> str:
    rows = [
        {"prompt": f"{ord(x)} one{x}two", "chosen": "yes", "rejected": "no"}
        for x in "\u2028\u2029\u0085\u001c\u001d\u001e\x0b\x0c"
    ]
    write_jsonl(place.folder / "pairs.jsonl", rows)
    if is_split:
        place.patch.setattr("rlhf.data.read.open_text", lambda path: SplitEverywhere(path.read_bytes()))
    _, report = read_pairs(str(place.folder / "pairs.jsonl"))
    assert report.kept == 8 or report.dropped
    return "\n".join(report.dropped)


# ---- The same reward model, in a folder and behind a server ----


def served(place: Place, without: tuple[str, ...]) -> str:
    """Scores of a server that does not look at some of what it is sent, against those of the folder."""
    reward = load_reward_model(place.reward, device="cpu")
    client = TestClient(reward_app(reward, "reward"))

    def post(url: str, body: dict[str, Any], **_: object) -> Any:
        return client.post("/get_reward", json={k: v for k, v in body.items() if k not in without}).json()

    place.patch.setattr("rlhf.ppo.remote.post_json", post)
    prompts = [[SYSTEM, *prompt] for prompt in PROMPTS[:4]]
    answers, ended = [" ".join(WORDS[: n + 1]) for n in range(4)], [True, False, True, False]
    with client:  # the server's worker lives as long
        scores = RemoteReward("http://server/get_reward")(prompts, answers, ended=ended)
    check = as_rendered(torch.tensor(scores), reward.score(prompts, answers, ended=ended), dtype=torch.float32)
    return "" if check.held else check.sentence


# ---- Code that is not ours ----


def asked(place: Place, body: str) -> str:
    (place.folder / "own.py").write_text(f"import sys\ndef score(prompts, completions):\n    {body}\n")
    reference = f"{place.folder / 'own.py'}:score"
    return refused(lambda: load_function(reference, key="evaluate.gold")(["p"], ["a"]))


def opened(place: Place, **more: object) -> str:
    """A model whose folder brings code; the code would leave a trace."""
    (place.folder / "own.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    config = {"model_type": "own" if more else "llama", **more}
    (place.folder / "config.json").write_text(json.dumps(config))
    sentence = refused(lambda: open_config(place.folder))
    assert not (place.folder / "ran").exists()
    return sentence


class Planted(NamedTuple):
    """A fault, the same thing without it, and words of the sentence that must name it."""

    fault: Callable[[Place], str]
    sound: Callable[[Place], str]
    words: str


REMOTE = {"auto_map": {"AutoConfig": "own.Config"}}
PLANTED = {
    "label against the ratings of its row": Planted(
        lambda p: rated(p, [5, 1, 4]), lambda p: rated(p, [5, 4, 4]), "its ratings contradict its label"
    ),
    "codes 0 and 1": Planted(
        lambda p: coded(p, [0, 1, 1]),
        lambda p: coded(p, [2, 1, 1]),
        "does not say which of the two responses is better",
    ),
    "codes -1 and 1": Planted(
        lambda p: coded(p, [-1, 1, 1]),
        lambda p: coded(p, [-2, 1, 1]),
        "does not say which of the two responses is better",
    ),
    "lines that end at U+2028 and its like": Planted(
        lambda p: separated(p, is_split=True), lambda p: separated(p, is_split=False), "not valid JSON"
    ),
    "server that flattens conversations": Planted(
        lambda p: served(p, ("messages",)), lambda p: served(p, ()), "of another text"
    ),
    "server that takes every answer for ended": Planted(
        lambda p: served(p, ("ended",)), lambda p: served(p, ("query",)), "of another text"
    ),
    "function that exits": Planted(
        lambda p: asked(p, "sys.exit(0)"), lambda p: asked(p, "return [1.0]"), "would end the run in the middle"
    ),
    "function that gives no number": Planted(
        lambda p: asked(p, "return [float('nan')]"), lambda p: asked(p, "return [0.0]"), "one finite number for each"
    ),
    "model that brings code": Planted(lambda p: opened(p, **REMOTE), opened, "remote code is never run"),
}


@pytest.fixture
def place(tmp_path: Path, reward_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, reward_folder, monkeypatch)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_named(place: Place, name: str) -> None:
    assert PLANTED[name].words in PLANTED[name].fault(place)


@pytest.mark.parametrize("name", PLANTED)
def test_without_the_fault_nothing_is_said(place: Place, name: str) -> None:
    assert PLANTED[name].sound(place) == ""
