"""Special tokens that people type, `<|im_end|>` or `</s>` in the middle of a text: words to a model, never tokens.

Only a chat template writes special tokens. transformers has what it takes (`apply_chat_template` with
`sanitize_control_tokens=True`): typed tokens are marked before the template is rendered, and encoded apart behind it. The two
steps are called one by one here, because an answer that was cut off loses its close between them. A text in which nobody
typed a special token takes no other way than it always took.
"""

import re
import warnings
from collections.abc import Sequence
from typing import TypeVar
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from rlhf.data.rows import Message, Messages

# The private characters between which transformers puts a typed token.
MARKS: tuple[str, str] = tuple(mark_control_tokens("x", re.compile("x")).split("x"))
_ANY_MARK = re.compile("|".join(MARKS))
_TURNS: Messages = [
    Message(role="user", content=MARKS[0]),
    Message(role="assistant", content=MARKS[0]),
    Message(role="user", content=MARKS[0]),
]

Words = TypeVar("Words", str, Messages)
_patterns: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, re.Pattern[str]]] = WeakKeyDictionary()


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return what nobody may type: the special tokens, and the added ones that the chat template writes around turns.

    Checkpoints declare `<|im_start|>` as a token that is not special, too. What a template writes inside an answer, such as
    `<think>`, is no end of a turn: answers hold it, and it stays the token that it is, also where a template writes an empty
    thought before every answer.
    """
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    others = [token.content for token in added if token.content not in special and not token.content.isspace()]
    if others and tokenizer.chat_template:
        try:
            text = tokenizer.apply_chat_template(_TURNS, tokenize=False)
        except Exception:  # a template may raise anything; where it matters, `template_problems` says so
            text = ""
        special |= {token for token in others if token in text} - _empty_thought(others, text)
    return special


def _empty_thought(tokens: Sequence[str], text: str) -> set[str]:
    """Return the tokens of pairs, such as `<think></think>`, that stand before an answer and nowhere else.

    What opens an answer's turn comes alone, `<|assistant|>`, or stands before other turns as well.

    Args:
        text: what the chat template writes of `_TURNS`.
    """
    if text.count(MARKS[0]) != len(_TURNS):
        return set()
    before, opening, *behind = text.split(MARKS[0])
    inside = {token for token in tokens if token in opening and not any(token in part for part in (before, *behind))}
    closing = {token for token in inside if "/" in token and token.replace("/", "", 1) in inside}
    return closing | {token.replace("/", "", 1) for token in closing}


def spelled(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern that finds the special tokens of a tokenizer in a text, the longest first."""
    state = (len(tokenizer), tuple(tokenizer.all_special_tokens), str(tokenizer.chat_template))
    if tokenizer not in _patterns or _patterns[tokenizer][0] != state:
        longest_first = sorted(special_tokens(tokenizer), key=len, reverse=True)
        _patterns[tokenizer] = state, re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    return _patterns[tokenizer][1]


def as_words(tokenizer: PreTrainedTokenizerBase, words: Words) -> Words:
    """Return a person's words, a text or the messages of a conversation, with every special token in them marked.

    `encode_words` reads what is marked as the characters that it is. Words without a special token are returned unchanged.
    """
    pattern = spelled(tokenizer)
    if isinstance(words, str):
        return _marked(tokenizer, words, pattern)
    marked: Messages = []
    for turn in words:
        beside: Message = mark_control_tokens({name: part for name, part in turn.items() if name != "role"}, pattern)
        marked.append(turn | beside | Message(role=turn["role"], content=_marked(tokenizer, turn["content"], pattern)))
    return marked


def is_marked(text: str) -> bool:
    """Tell whether a text holds typed special tokens that `as_words` has marked."""
    return _ANY_MARK.search(text) is not None


def is_typed(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> bool:
    """Tell whether somebody typed a special token in a conversation."""
    return as_words(tokenizer, messages) != messages


def _marked(tokenizer: PreTrainedTokenizerBase, text: str, pattern: re.Pattern[str]) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer) and backend.normalizer is not None and not isinstance(backend.model, models.BPE):
        # The vocabulary itself holds the special tokens, and `＜/s＞` in wide letters becomes one when it is normalised.
        normal = backend.normalizer.normalize_str(text)
        any_case = re.compile(pattern.pattern, re.IGNORECASE)
        text = normal if len(any_case.findall(normal)) > len(pattern.findall(text)) else text
        pattern = any_case
    if pattern.search(text) is None and _ANY_MARK.search(text) is None:
        return text
    marked: str = mark_control_tokens(text, pattern)
    return marked


def encode_words(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts in which `as_words` has marked what people typed; no token is added around them.

    Where a tokenizer makes a special token of the marked letters all the same (its vocabulary holds `</s>` as a word), the
    letters are cut into two. What no cut can help is counted, in a warning.
    """
    rows, misread = [], 0
    for text in texts:
        try:
            rows.append(encode_marked_chat(tokenizer, text))
        except ValueError:
            cut = re.sub(f"{MARKS[0]}(.)", rf"\1{MARKS[0]}", text, flags=re.DOTALL)
            rows.append(encode_marked_chat(tokenizer, cut))
            written_by_template = spelled(tokenizer).findall(
                re.sub(f"{MARKS[0]}.*?{MARKS[1]}", MARKS[0], text, flags=re.DOTALL)
            )
            misread += _count_special(tokenizer, rows[-1]) > len(written_by_template)
    if misread:
        warnings.warn(
            f"{tokenizer.name_or_path}: {misread} of {len(texts)} texts with typed special tokens are read with these as tokens: "
            "this tokenizer can't read them as words. Take the tokens out of the texts.",
            stacklevel=3,
        )
    return rows


def _count_special(tokenizer: PreTrainedTokenizerBase, row: Sequence[int]) -> int:
    ids = {tokenizer.convert_tokens_to_ids(token) for token in special_tokens(tokenizer)} - {tokenizer.unk_token_id}
    return sum(token in ids for token in row)
