"""Rankings: several answers to one prompt with their scores. The forms in which they are published, and the pairs in them.

`rlhf.data.layouts` says by which columns each form is recognised.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple, cast

from rlhf.data.canonical import check_answer, check_prompt, extras_of, in_common, of_all_pairs
from rlhf.data.messages import ended_of, messages
from rlhf.data.read import BadRow
from rlhf.data.rows import Demonstration, Message, Messages, Pair, assistant_turn, group_key, has_ended, prompt_key

LISTS = ("responses", "answers", "completions")
TEXTS = ("content", "text", "response", "answer")
SCORES = ("score", "overall_score")
RESPONSES = ("response_1", "response1", "response_2", "response2")
PREFERENCES = ("preference_strength", "overall_preference", "preference", "strength")
ROLES = {"prompter": "user", "user": "user", "human": "user", "assistant": "assistant", "system": "system"}
RATING = "helpfulness"


class Answer(NamedTuple):
    """An answer and how good it is; only differences of scores within one ranking mean anything.

    Attributes:
        extras: as those of `Ranking`, where the answer has a row of its own.
    """

    content: str
    score: float
    ended: bool = True
    extras: Mapping[str, Any] = {}

    @property
    def turn(self) -> Messages:
        """Return it as the one message that it is in a canonical row."""
        return assistant_turn(self.content, ended=self.ended)


class RatedAnswer(NamedTuple):
    """An answer with a rating of its own, to be compared with the other rated answers to its prompt."""

    prompt: Messages
    answer: Answer

    @property
    def group(self) -> tuple[str, object]:
        """Return what answers that are compared have in common: the prompt and who rated them, each on a scale of their own."""
        return prompt_key(self.prompt), self.answer.extras.get("annotator")


class RatedEntry(NamedTuple):
    """An answer that is rated by itself: its prompt, what should be its text, whether it came to its end, its ratings."""

    prompt: Messages
    content: object
    ended: bool
    ratings: object


@dataclass
class Ranking:
    """Answers to one prompt with their scores, higher is better, ties allowed.

    Attributes:
        extras: `source`, `subset`, `annotator`, `id`, `agree` and `weight` where the row has them.
    """

    prompt: Messages
    answers: list[Answer]
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """Return what the pairs of this ranking have in common."""
        return group_key(self.prompt)

    @property
    def is_decided(self) -> bool:
        """Return whether two answers differ in score."""
        return len({answer.score for answer in self.answers}) > 1


def usable(rankings: Sequence[Ranking]) -> list[Ranking]:
    """Return the rankings of a row that say something.

    Raises:
        BadRow: no ranking has two answers that differ in score; a prompt or an answer is none.
    """
    decided = [ranking for ranking in rankings if ranking.is_decided]
    if not decided:
        raise BadRow("no two answers of different rank")
    for ranking in decided:
        check_prompt(ranking.prompt)
        for answer in ranking.answers:
            check_answer(answer.content, "an answer")
    return decided


def comparisons(ranking: Ranking) -> list[Pair]:
    """Return every pair of answers with different scores as a canonical pair, with its `group` and `rating_gap`."""
    pairs: list[Pair] = []
    for first, second in combinations(ranking.answers, 2):
        better, worse = (first, second) if first.score > second.score else (second, first)
        if better.score == worse.score or better.content.strip() == worse.content.strip():
            continue
        canonical: Pair = {
            "prompt": ranking.prompt,
            "chosen": better.turn,
            "rejected": worse.turn,
            "group": ranking.group,
            "rating_gap": better.score - worse.score,
        }
        pairs.append(cast(Pair, {**canonical, **ranking.extras, **in_common(better.extras, worse.extras)}))
    return pairs


def best_demonstration(ranking: Ranking) -> Demonstration:
    """Return a ranking's prompt with its best answer, the first of several."""
    return {"prompt": ranking.prompt, "completion": max(ranking.answers, key=_score).turn}


def group_rated(rated: Sequence[RatedAnswer]) -> list[Ranking]:
    """Group rated answers by prompt and annotator; return each ranking in which two different answers differ in rating."""
    groups: dict[tuple[str, object], Ranking] = {}
    for entry in rated:
        groups.setdefault(entry.group, Ranking(entry.prompt, [])).answers.append(entry.answer)
    return [ranking for ranking in groups.values() if comparisons(ranking)]


# ---- The forms: each reads one row that `rlhf.data.layouts` has recognised ----


def k_wise_prompt(row: Mapping[str, object]) -> Messages:
    """Return the prompt of a row with a list of answers; `instruction` and `input` are two parts of one text, as in Alpaca.

    Raises:
        BadRow: it is neither text nor messages.
    """
    turns, more = messages(row.get("prompt", row.get("instruction")), "prompt"), row.get("input")
    if "prompt" not in row and isinstance(more, str) and more.strip() and turns and turns[-1]["role"] == "user":
        turns = [*turns[:-1], {**turns[-1], "content": f"{turns[-1]['content']}\n{more}"}]
    return turns


def k_wise(row: Mapping[str, object]) -> list[Ranking]:
    """Return the ranking in a list of answers that have each a score, or a rank (1 is best).

    Raises:
        BadRow: an answer is no mapping, or has neither; or some have scores and others ranks, which have no scale in common.
    """
    prompt = k_wise_prompt(row)
    answers, has_score = [], set()
    for entry in _answer_list(row) or []:
        if not isinstance(entry, dict):
            raise BadRow("an answer is no mapping with text and score")
        content: Any = next((entry[name] for name in TEXTS if entry.get(name) is not None), None)
        score = next((entry[name] for name in SCORES if entry.get(name) is not None), None)
        if score is None and entry.get("rank") is None:
            raise BadRow("an answer has neither score nor rank")
        value = -_finite(entry["rank"], "rank") if score is None else _finite(score, "score")
        answers.append(Answer(content, value, ended_of(entry)))
        has_score.add(score is not None)
    if len(has_score) > 1:
        raise BadRow("some of its answers have a score and others a rank alone")
    return [Ranking(prompt, answers, of_all_pairs(row))]


def is_k_wise(row: Mapping[str, object]) -> bool:
    """Return whether a row has a list of answers."""
    return _answer_list(row) is not None


def ranked_list(row: Sequence[object]) -> list[Ranking]:
    """Return the ranking in a list of messages that ends in answers to the same turn, best first; a score is minus its place.

    Raises:
        BadRow: fewer than two answers, or a message without a known role.
    """
    turns = [_turn(entry) for entry in row]
    first = len(turns)
    while first and turns[first - 1]["role"] == "assistant":
        first -= 1
    if len(turns) - first < 2:
        raise BadRow("a ranked list that does not end in two answers or more")
    answers = [Answer(turn["content"], -float(i), has_ended([turn])) for i, turn in enumerate(turns[first:])]
    return [Ranking(turns[:first], answers)]


def signed_strength(row: Mapping[str, object]) -> list[Ranking]:
    """Return the ranking of two responses of which a preference above 0 says that the second is better.

    Scores are 0 and the preference.

    Raises:
        BadRow: no preference, one of 0, or a response without text.
    """
    preference = preference_of(row)
    if preference is None:
        raise BadRow(f"two responses without a preference ({', '.join(PREFERENCES)})")
    value = _finite(preference[1], "the preference")
    if value == 0:
        raise BadRow("no preference between the two responses (strength 0)")
    prompt = messages(row.get("prompt", row.get("context")), "prompt")
    answers = [given_answer(first_response(row), 0.0), given_answer(second_response(row), value)]
    return [Ranking(prompt, answers, of_all_pairs(row))]


def preference_of(row: Mapping[str, object]) -> tuple[str, object] | None:
    """Return the column that says which of two responses is better, and its value; None if the row has none."""
    return next(((name, row[name]) for name in PREFERENCES if row.get(name) is not None), None)


def first_response(row: Mapping[str, object]) -> object:
    """Return the first of two responses; None if the row has none."""
    return _alone(row.get("response_1", row.get("response1")))


def second_response(row: Mapping[str, object]) -> object:
    """Return the second of two responses; None if the row has none."""
    return _alone(row.get("response_2", row.get("response2")))


def _alone(response: object) -> object:
    return response[0] if isinstance(response, list) and len(response) == 1 else response


def given_answer(response: object, score: float) -> Answer:
    """Return a response, a text or a message, as an answer with a score.

    Raises:
        BadRow: it is several messages, or has no text.
    """
    if isinstance(response, list):
        raise BadRow("a response is not a single answer")
    return Answer(response if isinstance(response, str) else _text_of(response), score, _is_whole(response))


def right_and_wrong(row: Mapping[str, object]) -> list[Ranking]:
    """Return the ranking of several chosen texts (score 1) above several rejected ones (score 0), as in RewardBench 2."""
    prompt = messages(row.get("prompt"), "prompt")
    answers = [
        Answer(text, score) for side, score in (("chosen", 1.0), ("rejected", 0.0)) for text in _texts(row, side)
    ]
    return [Ranking(prompt, answers, of_all_pairs(row))]


def is_right_and_wrong(row: Mapping[str, object]) -> bool:
    """Return whether both sides of a row are lists of texts."""
    return bool(_texts(row, "chosen") and _texts(row, "rejected"))


def message_tree(row: Mapping[str, object]) -> list[Ranking]:
    """Return the rankings in an OASST tree: the ranked replies to each of the prompter's turns, by minus `rank`.

    Raises:
        BadRow: a message without a known role or text, a rank that is no number.
    """
    return [Ranking(turn.prompt, turn.answers, extras_of(row)) for turn in _answered_turns(row)]


def tree_demonstrations(row: Mapping[str, object]) -> list[Demonstration]:
    """Return the best answer to each of the prompter's turns in a tree; the first one where none is ranked.

    Raises:
        BadRow: there is none, or a message without a known role or text.
    """
    best = [
        (turn.prompt, max(turn.answers, key=_score) if turn.answers else turn.first_reply)
        for turn in _answered_turns(row)
    ]
    if not best:
        raise BadRow("no answer in this tree")
    return [{"prompt": prompt, "completion": reply.turn} for prompt, reply in best]


def tree_root(row: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return the first message of a tree, which is the row's `prompt` or the row itself; None if there are no `replies`."""
    prompt = row.get("prompt")
    root = prompt if isinstance(prompt, dict) else row
    return root if isinstance(root.get("replies"), list) else None


def rated_answers(row: Mapping[str, object]) -> list[RatedAnswer]:
    """Return each rated answer of a row with its prompt.

    Raises:
        BadRow: no rating, or one that is no number.
    """
    rated = []
    for prompt, content, ended, values in rated_entries(row):
        check_prompt(prompt)
        text = check_answer(content, "the answer")
        if not isinstance(values, dict) or values.get(RATING) is None:
            raise BadRow(f"attributes without {RATING!r}, by which answers are compared")
        rated.append(RatedAnswer(prompt, Answer(text, _finite(values[RATING], RATING), ended, of_all_pairs(row))))
    return rated


def rated_entries(row: Mapping[str, object]) -> list[RatedEntry]:
    """Return each answer of a row that is rated by itself.

    Raises:
        BadRow: the row has not as many ratings as answers.
    """
    if row.get("messages") is None:
        prompt, ended = messages(row.get("prompt"), "prompt"), ended_of(row)
        return [RatedEntry(prompt, row.get("response"), ended, row.get("attributes", row))]
    turns = messages(row["messages"], "messages")
    places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    attributes = row.get("attributes")
    if not isinstance(attributes, list) or len(attributes) != len(places):
        raise BadRow("attributes is not one mapping for each of the assistant's messages")
    return [
        RatedEntry(turns[:i], turns[i]["content"], has_ended(turns[: i + 1]), values)
        for i, values in zip(places, attributes, strict=True)
    ]


def is_rated(row: Mapping[str, object]) -> bool:
    """Return whether a row holds answers with a rating of their own."""
    if "chosen" in row:
        return False
    return ("messages" in row and "attributes" in row) or ("response" in row and ("attributes" in row or RATING in row))


class _AnsweredTurn(NamedTuple):
    """A prompter's turn of a tree, with the thread that leads to it, its ranked answers and the first of all its replies."""

    prompt: Messages
    answers: list[Answer]
    first_reply: Answer


def _answered_turns(row: Mapping[str, object]) -> Iterator[_AnsweredTurn]:
    root: Any = tree_root(row)
    pending: list[tuple[Messages, dict[str, Any]]] = [([], root)]
    while pending:
        above, node = pending.pop()
        thread = [*above, _turn(node)]
        replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
        pending += [(thread, reply) for reply in reversed(replies)]
        if thread[-1]["role"] == "user" and replies:
            ranked = [reply for reply in replies if reply.get("rank") is not None]
            answers = [_reply(reply, -_finite(reply["rank"], "rank")) for reply in ranked]
            yield _AnsweredTurn(thread, answers, _reply(replies[0], 0.0))


def _reply(entry: object, score: float) -> Answer:
    turn = _turn(entry)
    return Answer(turn["content"], score, has_ended([turn]))


def _answer_list(row: Mapping[str, object]) -> list[object] | None:
    for name in LISTS:
        if isinstance(value := row.get(name), list):
            return value
    return None


def _texts(row: Mapping[str, object], side: str) -> list[str]:
    value = row.get(side)
    return value if isinstance(value, list) and all(isinstance(text, str) for text in value) else []


def _turn(entry: object) -> Message:
    role = ROLES.get(str(entry.get("role"))) if isinstance(entry, dict) else None
    if role is None:
        raise BadRow("a message without a known role")
    turn = Message(role=role, content=_text_of(entry))
    return turn if _is_whole(entry) else {**turn, "ended": False}


def _is_whole(response: object) -> bool:
    """Return whether a response, a text or a message, came to its end."""
    return not isinstance(response, dict) or ended_of(response)


def _text_of(entry: object) -> str:
    text = entry.get("text", entry.get("content", entry.get("value"))) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise BadRow("a message has no text")
    return text


def _score(answer: Answer) -> float:
    return answer.score


def _finite(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise BadRow(f"{name} is not a finite number")
    return float(value)
