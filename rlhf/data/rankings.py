"""Several answers to one prompt, in every form in which such data are published, and the pairs in them.

| form | recognised by | score |
|---|---|---|
| K-wise row | `responses` (or `answers`, `completions`) with `score`, `overall_score` or `rank` | score, or minus rank |
| flat ranked list | a list of messages (`text` or `content`) that ends in answers, best first | minus position |
| OASST tree | `prompt` (or the row) with `replies`, nested | minus `rank` among siblings |
| signed strength | `response_1`, `response_2` and a preference; above 0 the second is better | 0 and the preference |
| several right answers | `chosen` and `rejected` lists of texts (RewardBench 2) | 1 and 0 |
| rated answers | `response` with `helpfulness`, or `messages` with `attributes`; rows of one prompt belong together | helpfulness |
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

from rlhf.data.canonical import check_answer, check_prompt, extras_of, messages
from rlhf.data.read import BadRow
from rlhf.data.rows import Message, Messages, prompt_key

LISTS = ("responses", "answers", "completions")
TEXTS = ("content", "text", "response", "answer")
SCORES = ("score", "overall_score")
PREFERENCES = ("preference_strength", "overall_preference", "preference", "strength")
ROLES = {"prompter": "user", "user": "user", "human": "user", "assistant": "assistant", "system": "system"}
RATING = "helpfulness"


class Answer(NamedTuple):
    """An answer and how good it is; only differences of scores within one ranking mean anything."""

    content: str
    score: float


@dataclass
class Ranking:
    """Answers to one prompt with their scores, higher is better, ties allowed.

    Attributes:
        extras: `source`, `subset`, `annotator` where the row has them.
    """

    prompt: Messages
    answers: list[Answer]
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """What the pairs of this ranking have in common."""
        return prompt_key(self.prompt)[:16]


def is_ranking(row: Any) -> bool:
    """Whether a row holds a ranking rather than a pair."""
    if isinstance(row, list):
        return True
    if any(isinstance(row.get(name), list) for name in LISTS) or _replies(row) is not None:
        return True
    if _second(row) is not None:
        return True
    return all(
        isinstance(row.get(side), list) and row[side] and all(isinstance(text, str) for text in row[side])
        for side in ("chosen", "rejected")
    )


def rankings(row: Any) -> list[Ranking]:
    """The rankings in a row: one, or several in a tree.

    Raises:
        BadRow: with the reason; a ranking in which no two answers differ in score has nothing to say.
    """
    if isinstance(row, list):
        found = [_ranked_list(row)]
    elif (root := _replies(row)) is not None:
        found = [Ranking(prompt, answers, extras_of(row)) for prompt, answers, _ in _tree(root)]
    elif _second(row) is not None:
        found = [_signed_strength(row)]
    elif isinstance(row.get("chosen"), list):
        prompt = messages(row.get("prompt"), "prompt")
        answers = [Answer(text, score) for side, score in (("chosen", 1.0), ("rejected", 0.0)) for text in row[side]]
        found = [Ranking(prompt, answers, extras_of(row))]
    else:
        found = [_k_wise(row)]
    usable = [ranking for ranking in found if len({answer.score for answer in ranking.answers}) > 1]
    if not usable:
        raise BadRow("no two answers of different rank")
    for ranking in usable:
        check_prompt(ranking.prompt)
        for answer in ranking.answers:
            check_answer(answer.content, "an answer")
    return usable


def best_answers(row: Any) -> list[tuple[Messages, str]]:
    """Prompts with their best answer, for SFT; in a tree also those with a single reply.

    Raises:
        BadRow: there is none.
    """
    root = None if isinstance(row, list) else _replies(row)
    if root is not None:
        found = [
            (prompt, (max(answers, key=_score).content if answers else first)) for prompt, answers, first in _tree(root)
        ]
    else:
        found = [(ranking.prompt, max(ranking.answers, key=_score).content) for ranking in rankings(row)]
    if not found:
        raise BadRow("no answer in this tree")
    return found


def comparisons(ranking: Ranking) -> list[dict[str, Any]]:
    """Every pair of answers with different scores as a canonical pair, with its `group` and `rating_gap`."""
    pairs = []
    for first, second in combinations(ranking.answers, 2):
        better, worse = (first, second) if first.score > second.score else (second, first)
        if better.score == worse.score or better.content.strip() == worse.content.strip():
            continue
        sides = {
            name: [{"role": "assistant", "content": text}]
            for name, text in (("chosen", better.content), ("rejected", worse.content))
        }
        facts = {"group": ranking.group, "rating_gap": better.score - worse.score}
        pairs.append({"prompt": ranking.prompt, **sides, **facts, **ranking.extras})
    return pairs


# ---- Rated answers: one answer a row, compared with other rows of the same prompt ----


def is_rated(row: Any) -> bool:
    """Whether a row holds rated answers rather than a pair or a ranking."""
    if not isinstance(row, dict) or "chosen" in row or is_ranking(row):
        return False
    return ("messages" in row and "attributes" in row) or ("response" in row and ("attributes" in row or RATING in row))


def rated_answers(row: dict[str, Any]) -> list[tuple[Messages, Answer]]:
    """Each rated answer of a row with its prompt.

    Raises:
        BadRow: no rating, or one that is no number.
    """
    if row.get("messages") is not None:
        turns = messages(row["messages"], "messages")
        places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        attributes = row.get("attributes")
        if not isinstance(attributes, list) or len(attributes) != len(places):
            raise BadRow("attributes is not one mapping for each of the assistant's messages")
        rated = [(turns[:i], turns[i]["content"], values) for i, values in zip(places, attributes, strict=True)]
    else:
        rated = [(messages(row.get("prompt"), "prompt"), row["response"], row.get("attributes", row))]
    found = []
    for prompt, content, values in rated:
        check_prompt(prompt)
        check_answer(content, "the answer")
        if not isinstance(values, dict) or values.get(RATING) is None:
            raise BadRow(f"attributes without {RATING!r}, by which answers are compared")
        found.append((prompt, Answer(content, _finite(values[RATING], RATING))))
    return found


def group_rated(rated: Sequence[tuple[Messages, Answer]]) -> tuple[list[Ranking], int]:
    """Rankings of the answers that have a prompt in common, and how many answers have nothing to be compared with."""
    groups: dict[str, Ranking] = {}
    for prompt, answer in rated:
        groups.setdefault(prompt_key(prompt), Ranking(prompt, [])).answers.append(answer)
    found = [ranking for ranking in groups.values() if len({answer.score for answer in ranking.answers}) > 1]
    return found, len(rated) - sum(len(ranking.answers) for ranking in found)


# ---- The forms ----


def _k_wise(row: dict[str, Any]) -> Ranking:
    prompt = messages(row.get("prompt", row.get("instruction")), "prompt")
    answers = []
    for entry in next(row[name] for name in LISTS if isinstance(row.get(name), list)):
        if not isinstance(entry, dict):
            raise BadRow("an answer is no mapping with text and score")
        content: Any = next((entry[name] for name in TEXTS if entry.get(name) is not None), None)
        score = next((entry[name] for name in SCORES if entry.get(name) is not None), None)
        if score is None and entry.get("rank") is None:
            raise BadRow("an answer has neither score nor rank")
        value = -_finite(entry["rank"], "rank") if score is None else _finite(score, "score")
        answers.append(Answer(content, value))
    return Ranking(prompt, answers, extras_of(row))


def _ranked_list(row: list[Any]) -> Ranking:
    turns = [_turn(entry) for entry in row]
    first = len(turns)
    while first and turns[first - 1]["role"] == "assistant":
        first -= 1
    if len(turns) - first < 2:
        raise BadRow("a ranked list that does not end in two answers or more")
    answers = [Answer(turn["content"], -float(i)) for i, turn in enumerate(turns[first:])]
    return Ranking(turns[:first], answers)


def _signed_strength(row: dict[str, Any]) -> Ranking:
    strength = next((row[name] for name in PREFERENCES if row.get(name) is not None), None)
    if strength is None:
        raise BadRow(f"two responses without a preference ({', '.join(PREFERENCES)})")
    value = _finite(strength, "the preference")
    if value == 0:
        raise BadRow("no preference between the two responses (strength 0)")
    prompt = messages(row.get("prompt", row.get("context")), "prompt")
    first = row.get("response_1", row.get("response1"))
    texts = [text if isinstance(text, str) else _text_of(text) for text in (first, _second(row))]
    return Ranking(prompt, [Answer(texts[0], 0.0), Answer(texts[1], value)], extras_of(row))


def _tree(root: dict[str, Any]) -> Iterator[tuple[Messages, list[Answer], str]]:
    """Of every prompter turn that was answered: the thread to it, its ranked answers, and its first answer."""
    pending: list[tuple[Messages, dict[str, Any]]] = [([], root)]
    while pending:
        above, node = pending.pop()
        thread = [*above, _turn(node)]
        replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
        pending += [(thread, reply) for reply in reversed(replies)]
        if thread[-1]["role"] == "user" and replies:
            ranked = [reply for reply in replies if reply.get("rank") is not None]
            answers = [Answer(_turn(reply)["content"], -_finite(reply["rank"], "rank")) for reply in ranked]
            yield thread, answers, _turn(replies[0])["content"]


def _replies(row: dict[str, Any]) -> dict[str, Any] | None:
    root = row.get("prompt") if isinstance(row.get("prompt"), dict) else row
    return root if isinstance(root, dict) and isinstance(root.get("replies"), list) else None


def _second(row: dict[str, Any]) -> Any:
    return row.get("response_2", row.get("response2"))


def _turn(entry: Any) -> Message:
    role = ROLES.get(str(entry.get("role"))) if isinstance(entry, dict) else None
    if role is None:
        raise BadRow("a message without a known role")
    return {"role": role, "content": _text_of(entry)}


def _text_of(entry: Any) -> str:
    text = entry.get("text", entry.get("content")) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise BadRow("a message has no text")
    return text


def _score(answer: Answer) -> float:
    return answer.score


def _finite(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(f"{name} is not a finite number")
    return float(value)
