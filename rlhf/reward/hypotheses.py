"""What a reward model itself would say of its golden texts if it were served wrongly, one hypothesis a fault."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Message
from rlhf.models.scalar_head import score_head
from rlhf.models.score import score_rows
from rlhf.models.templates import affixes, closing, rendered
from rlhf.models.text import encode, prompt_text
from rlhf.reward.certify import Golden, computed_in, prompt_of
from rlhf.reward.critique_model import CritiqueRewardModel
from rlhf.reward.model import RewardModel
from rlhf.reward.verify import Hypothesis


class _Reading(NamedTuple):
    """A fault, and the token ids that a server with it reads of a golden text; None where it can't."""

    fault: str
    detail: str
    ids: Callable[[Golden], list[int] | None]


def suppose_faults(reward: RewardModel, golden: Sequence[Golden]) -> list[Hypothesis]:
    """Score the golden texts as a server with each known fault would read them; the likelier faults first.

    A decoder that is read at an earlier token gives the score of the text up to there. Experts and ensembles are no single
    network, and nothing is supposed of them; of a model that writes critiques, that none was written.

    Args:
        reward: the model that should be served.
        golden: texts that it reads correctly, with their ids.
    """
    if isinstance(reward, CritiqueRewardModel):
        with computed_in(reward.model, torch.float32):
            scores = reward.score_at_end([text["ids"] for text in golden])
        return [Hypothesis("critique_missing", "", scores.tolist())]
    if type(reward) is not RewardModel:
        return []
    readings = [*_ends(reward), *_begins(reward), *_renderings(reward), *_places(reward)]
    rows = [[_readable(reading.ids, text, reward.max_length) for text in golden] for reading in readings]

    # Many faults leave some texts as they are, so each row of ids is scored once.
    distinct = sorted({ids for row in rows for ids in row if ids is not None}, key=len)
    with computed_in(reward.model, torch.float32):
        scores = score_rows(
            reward.model, distinct, pad_token_id=reward.tokenizer.pad_token_id, batch_size=reward.batch_size
        )
    score_of = dict(zip(distinct, scores.tolist(), strict=True))
    return [
        Hypothesis(reading.fault, reading.detail, [None if ids is None else score_of[ids] for ids in row])
        for reading, row in zip(readings, rows, strict=True)
    ]


def _readable(ids_of: Callable[[Golden], list[int] | None], text: Golden, max_length: int) -> tuple[int, ...] | None:
    """Return the ids that are read, or None where there are none or too many."""
    try:
        ids = ids_of(text)
    except Exception:  # a chat template may refuse what a wrong server would give it
        return None
    return tuple(ids) if ids and len(ids) <= max_length else None


def _ends(reward: RewardModel) -> Iterator[_Reading]:
    """Yield the faults of the end token; they leave answers that were cut off as they are, or not."""
    tokenizer = reward.tokenizer
    end = tokenizer.eos_token_id

    def without(text: Golden) -> list[int] | None:
        ids = text["ids"]
        return ids[:-1] if text["ended"] and ids[-1] == end else ids

    def without_close(text: Golden) -> list[int] | None:
        if not text["ended"]:
            return text["ids"]
        if not reward.conversational:
            return None
        whole = text["text"].removesuffix(closing(tokenizer, text["messages"][:-1]))
        return encode(tokenizer, [whole], conversational=True)[0]

    yield _Reading("end_token_missing", "", without)
    yield _Reading("end_token_missing", "nothing of the template's close is there", without_close)
    yield _Reading("end_token_doubled", "", lambda text: [*text["ids"], end] if text["ended"] else text["ids"])
    yield _Reading("end_token_doubled", "answers that were cut off get one", lambda text: [*text["ids"], end])
    yield _Reading("end_token_added", "", lambda text: text["ids"] if text["ended"] else [*text["ids"], end])


def _begins(reward: RewardModel) -> Iterator[_Reading]:
    """Yield the faults of the begin token."""
    begin = reward.tokenizer.bos_token_id
    if begin is None:
        return
    has = lambda text: text["ids"][0] == begin  # noqa: E731
    yield _Reading("begin_token_doubled", "", lambda text: [begin, *text["ids"]] if has(text) else None)
    yield _Reading("begin_token_missing", "", lambda text: text["ids"][1:] if has(text) else None)
    yield _Reading(
        "begin_token_doubled",
        "the model was trained without any",
        lambda text: None if has(text) else [begin, *text["ids"]],
    )


def _renderings(reward: RewardModel) -> Iterator[_Reading]:
    """Yield the faults of the chat template: applied twice, not at all, or where none belongs."""
    tokenizer, conversational = reward.tokenizer, reward.conversational

    def read(text: str) -> list[int]:
        return encode(tokenizer, [text], conversational=conversational)[0]

    if not conversational:
        if tokenizer.chat_template:
            yield _Reading("template_added", "", lambda text: read(rendered(tokenizer, text["messages"])))
        return

    def prompt_again(text: Golden) -> list[int]:
        prompt = prompt_text(tokenizer, prompt_of(text, conversational=True))
        again = rendered(tokenizer, [Message(role="user", content=prompt), text["messages"][-1]])
        return read(again if text["ended"] else again.removesuffix(closing(tokenizer, text["messages"][:-1])))

    def all_again(asks: bool) -> Callable[[Golden], list[int]]:
        return lambda text: read(rendered(tokenizer, [Message(role="user", content=text["text"])], asks=asks))

    def as_answer(text: Golden) -> list[int]:
        answer = text["text"].removesuffix(tokenizer.eos_token)
        return read(rendered(tokenizer, [Message(role="user", content=""), Message(role="assistant", content=answer)]))

    yield _Reading("template_twice", "the rendered prompt is taken for a user's words", prompt_again)
    yield _Reading("template_twice", "the rendered text is taken for a user's words", all_again(False))
    yield _Reading(
        "template_twice", "the rendered text is taken for a user's words, and an answer opened", all_again(True)
    )
    yield _Reading("template_twice", "the rendered text is taken for an answer", as_answer)
    by_itself = (False, True) if affixes(tokenizer) != (0, 0) else (False,)
    for between in ("\n", "", " ", "\n\n"):
        for begins in by_itself:
            for end in (tokenizer.eos_token, ""):
                yield _Reading("template_missing", _join_detail(between, end), _joined(tokenizer, between, end, begins))


def _join_detail(between: str, end: str) -> str:
    return f"the turns are joined by {between!r}, {'with' if end else 'without'} an end token"


def _joined(tokenizer: PreTrainedTokenizerBase, between: str, end: str, begins: bool) -> Callable[[Golden], list[int]]:
    """Return what reads the turns as one plain text, with the tokenizer's own begin token or without."""

    def ids(text: Golden) -> list[int]:
        plain = between.join(message["content"] for message in text["messages"])
        whole = plain + (end if text["ended"] else "")
        return encode(tokenizer, [whole], conversational=not begins)[0]

    return ids


def _places(reward: RewardModel) -> Iterator[_Reading]:
    """Yield the faults of where the score is read: a text that goes on, or an earlier token of a decoder's."""
    tokenizer, conversational = reward.tokenizer, reward.conversational

    def read(text: str) -> list[int]:
        return encode(tokenizer, [text], conversational=conversational)[0]

    if conversational:
        yield _Reading(
            "wrong_token",
            "at the opening of a next turn",
            lambda text: read(rendered(tokenizer, text["messages"], asks=True)),
        )
    yield _Reading("wrong_token", "at a newline behind the text", lambda text: read(text["text"] + "\n"))
    if score_head(reward.model) is None:  # an encoder reads its score at the first token
        return
    yield _Reading("wrong_token", "one token before the last", lambda text: text["ids"][:-1])
    yield _Reading("wrong_token", "two tokens before the last", lambda text: text["ids"][:-2])
    yield _Reading("wrong_token", "at the first token", lambda text: text["ids"][:1])
    yield _Reading(
        "wrong_token",
        "at the end of the prompt",
        lambda text: read(prompt_text(tokenizer, prompt_of(text, conversational=conversational))),
    )
    pad = tokenizer.pad_token_id
    if pad is not None:
        yield _Reading("wrong_token", "at a padding token behind the text", lambda text: [*text["ids"], pad])
