"""Text as models read it: the one place where a prompt and an answer become it, in training, evaluation and PPO alike."""

import datetime
import re
import warnings
from collections.abc import Sequence

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from rlhf.data.rows import Message, Messages, Prompt, user_turn
from rlhf.errors import UserError
from rlhf.models.templates import (
    MARKER,
    affixes,
    behind_question,
    closing,
    end_texts,
    frame,
    rendered,
    without_begins,
    without_ends,
)
from rlhf.models.typed import as_words, encode_words, is_marked


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """Return the text that the policy reads before it answers."""
    if isinstance(prompt, str):
        return prompt
    return rendered(tokenizer, prompt, asks=True)


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str, *, ended: bool = True) -> str:
    """Return the text that the reward model reads: what its own chat template writes, to the last character.

    A chat template closes every turn, also that of an answer that was cut off; `ended=False` takes the close away
    again, so that the model can tell the two apart. A prompt that is a string gets the answer and, if it came to its
    end, the end token. Templates of reward models that are trained here end in the end token (`end_at_end_token`).

    Args:
        prompt: a string, or messages ending with the turn to be answered.
        answer: the answer's text; an end token that it carries already is not doubled.
        ended: whether the answer's end token was produced.
    """
    if isinstance(prompt, str):
        return prompt + without_ends(answer, end_texts(tokenizer)) + (tokenizer.eos_token if ended else "")
    answer = without_ends(answer, frame(tokenizer).ends)
    text = rendered(tokenizer, [*prompt, Message(role="assistant", content=answer)])
    return text if ended else text.removesuffix(closing(tokenizer, prompt))


def continued_text(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, ended: bool = True) -> str:
    """Return the text that the reward model reads of an answer to a prompt that a chat template has rendered already.

    It is what the template writes of the whole conversation, whether or not the prompt has its begin token, and its end the
    white space that the template writes there.
    """
    around = frame(tokenizer)
    bare = prompt.rstrip()
    if bare.endswith(around.asks.rstrip()):
        prompt = bare + around.asks[len(around.asks.rstrip()) :]
        answer = behind_question(tokenizer, answer) if around.lead else answer.lstrip() if around.trims else answer
    return closed_text(tokenizer, prompt + answer, conversational=True, ended=ended)


def closed_text(tokenizer: PreTrainedTokenizerBase, text: str, *, conversational: bool, ended: bool = True) -> str:
    """Return a text that somebody else rendered, prompt and answer in one, its begin and its close neither missing nor doubled.

    Padding around it goes, as do all begin tokens before it and all end tokens behind it. Then follow those that the
    tokenizer's own template writes, or the end token of a plain text, the latter if the answer came to its end.
    """
    text = without_begins(text, tokenizer.pad_token)
    if not conversational:
        begin = tokenizer.bos_token if affixes(tokenizer)[0] else None  # the tokenizer writes one
        text = without_ends(without_begins(text, begin), end_texts(tokenizer))
        return text + tokenizer.eos_token if ended else text
    around, rest = frame(tokenizer), without_begins(text, tokenizer.bos_token)
    begin = tokenizer.bos_token if len(rest) < len(text) and _opens_system_turn(tokenizer, rest) else around.begin
    text = begin + without_ends(rest, around.ends)
    opening = around.asks + around.lead
    if around.trims and not text.endswith(opening):
        text = text.rstrip()
    return text + around.close if ended else text


def _opens_system_turn(tokenizer: PreTrainedTokenizerBase, rest: str) -> bool:
    """Tell whether the begin token, taken off a rendered text, was the template's marker of its system turn.

    Args:
        rest: the text without it.
    """
    turns = [Message(role="system", content=MARKER), *user_turn("x")]
    try:
        opening = rendered(tokenizer, turns).partition(MARKER)[0]
    except Exception:  # whatever a template without system turns raises
        return False
    begin = tokenizer.bos_token
    return opening != begin and opening.startswith(begin) and (begin + rest).startswith(opening)


def is_rendered(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Tell whether a prompt was rendered by the tokenizer's chat template, which has then written how an answer begins.

    Behind that may only stand tokens, such as those of an empty thought. A special token alone proves nothing, nor does such
    an opening in the middle of a text: a person can type both. One case stays: a person's text that ends in all that the
    template writes there is taken for rendered, for OpenRLHF sends rendered prompts as strings and says no more about them. A
    prompt given as messages is never in doubt.
    """
    if not tokenizer.chat_template:
        return False
    around = frame(tokenizer)
    asks = around.asks.strip()
    if not asks or asks not in prompt:
        return False
    behind = prompt.rpartition(asks)[2]
    if around.asks_in_tokens:
        for token in (*(token.content for token in tokenizer.added_tokens_decoder.values()), "<think>", "</think>"):
            behind = behind.replace(token, "")
    return not behind.strip()


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, conversational: bool) -> list[list[int]]:
    """Return the token ids of texts that the functions above built.

    A chat template writes its own beginning-of-text token; a plain text gets one here, where the tokenizer writes one.
    What the tokenizer would append by itself is left out: a prompt goes on, and an answer that ended has its end token.
    Special tokens are read as such, but for those that `as_words` has marked: people typed them, and they are words.
    """
    before, appended = (0, 0) if conversational else affixes(tokenizer)
    if before:  # a text that somebody rendered may begin with the token that is written here
        texts = [without_begins(text, tokenizer.bos_token) for text in texts]
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=not conversational)["input_ids"]
    rows = [row[:-appended] for row in rows] if appended else rows
    typed = [i for i, text in enumerate(texts) if is_marked(text)]
    for i, words in zip(typed, encode_words(tokenizer, [texts[i] for i in typed]), strict=True):
        rows[i] = rows[i][:before] + words
    return rows


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    *,
    ended: Sequence[bool] | None = None,
    max_length: int | None = None,
    conversational: bool | None = None,
) -> tuple[list[list[int]], int]:
    """Return the token ids of prompt and answer as a reward model reads them.

    Special tokens that somebody typed, in an answer or in the messages of a prompt, are words; end tokens at the end of an
    answer are its own end, and are there once. A prompt that was rendered already, or is no conversation, is read as it stands.

    Args:
        ended: whether each answer came to its end; None if all did.
        conversational: whether the model reads conversations; a prompt that is a string is then a user's words, or a
            conversation that its template has rendered. None: whether the prompts are conversations.
        max_length: longer rows lose the beginning of the prompt, never the end of the answer.

    Returns:
        the ids, and how many rows were cut.
    """
    ended = [True] * len(prompts) if ended is None else ended
    if conversational is None:
        flags = {not isinstance(prompt, str) for prompt in prompts}
        assert len(flags) <= 1, "a batch is either conversational or not"
        conversational = flags == {True}
    ends = frame(tokenizer).ends if conversational else end_texts(tokenizer)
    texts = []
    for prompt, answer, flag in zip(prompts, answers, ended, strict=True):
        words = as_words(tokenizer, without_ends(answer, ends))
        if conversational and isinstance(prompt, str) and is_rendered(tokenizer, prompt):
            texts.append(continued_text(tokenizer, prompt, words, ended=flag))
            continue
        asked = user_turn(prompt) if conversational and isinstance(prompt, str) else prompt
        asked = asked if isinstance(asked, str) else as_words(tokenizer, asked)
        texts.append(answer_text(tokenizer, asked, words, ended=flag))
    return encode_texts(tokenizer, texts, conversational=conversational, max_length=max_length)


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, conversational: bool, max_length: int | None
) -> tuple[list[list[int]], int]:
    """Return the token ids of texts that end in an answer, and how many rows were cut; arguments as in `encode_answers`."""
    rows = encode(tokenizer, texts, conversational=conversational) if texts else []
    if max_length is None:
        return rows, 0
    cut = sum(len(row) > max_length for row in rows)
    return [without_beginning(row, max_length, tokenizer.bos_token_id) for row in rows], cut


def without_beginning(row: list[int], most: int, bos_token_id: int | None) -> list[int]:
    """Return the last tokens of a row that is too long, still behind its begin token: an encoder reads its score there."""
    if len(row) <= most:
        return row
    return row[-most:] if row[0] != bos_token_id else [row[0], *row[len(row) - most + 1 :]]


def plain(prompt: Prompt) -> str:
    """Return a prompt as a person or a gold function sees it: the text of its only turn, or "role: text" for each turn."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def last_turn(completion: str | Messages) -> str:
    """Return an answer's text: a string as it is, of a conversation the last turn.

    >>> last_turn([{"role": "assistant", "content": "yes"}]), last_turn("yes")
    ('yes', 'yes')
    """
    return completion if isinstance(completion, str) else completion[-1]["content"]


def before_last_turn(prompt: Prompt, completion: str | Messages) -> Prompt:
    """Return the conversation that an answer's last turn ends: the prompt, and the turns that the answer has before it.

    >>> before_last_turn("Hi", "yes")
    'Hi'
    """
    if isinstance(prompt, str) or isinstance(completion, str):
        return prompt
    return [*prompt, *completion[:-1]]


PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set names = {'user': 'Human', 'assistant': 'Assistant', 'system': 'System'} -%}"
    "{{- '\\n\\n' + names[message['role']] + ': ' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\n\\nAssistant:' -}}{%- endif -%}"
)


def give_plain_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a base model's tokenizer, which has no chat template, the transcript form "Human: … Assistant: …".

    The template is saved with every model trained on it, so all stages and every later user read the same text.

    Returns:
        whether one was missing.
    """
    if tokenizer.chat_template:
        return False
    first = tokenizer("x")["input_ids"][:1]
    begins = "{{- bos_token -}}" if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else ""
    tokenizer.chat_template = begins + PLAIN_TEMPLATE
    return True


# A template that asks for today's date would score one text differently on two days. Llama 3's own fallback date.
FROZEN_DATE = datetime.datetime(2024, 7, 26)
_DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def freeze_template(tokenizer: PreTrainedTokenizerBase, *, name: str) -> bool:
    """Replace a chat template's calls for today's date by a fixed one; the frozen template is saved with every model.

    Args:
        name: whose tokenizer it is, for messages.

    Returns:
        whether there was one.

    Raises:
        UserError: the template computes a date in a way that cannot be frozen.
    """
    given = tokenizer.chat_template
    templates: dict[str, str] = given if isinstance(given, dict) else {"": given or ""}
    frozen = {
        kind: _DATE_CALL.sub(lambda call: repr(FROZEN_DATE.strftime(call[2])), template)
        for kind, template in templates.items()
    }
    if any("strftime_now(" in template for template in frozen.values()):
        raise UserError(f"{name}: the chat template computes a date from a variable; write a fixed date into it.")
    if frozen == templates:
        return False
    tokenizer.chat_template = frozen if isinstance(given, dict) else frozen[""]
    warnings.warn(
        f"{name}: the chat template inserts today's date; it is frozen at {FROZEN_DATE:%d %b %Y}, so that a text has one score.",
        stacklevel=3,
    )
    return True


def adopt_encoder_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give an encoder's [CLS] and [SEP] the names that other tokenizers have for the tokens that begin and end a text."""
    if tokenizer.eos_token is None and tokenizer.cls_token is not None and tokenizer.sep_token is not None:
        tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, *, name: str, pads: bool = False
) -> None:
    """Refuse a tokenizer that writes ids of which the model has no embedding: it belongs to another model.

    A token that was added for another purpose, and that no text needs, may lie outside (Gemma 3's for pictures).

    Args:
        name: whose tokenizer it is, for messages.
        pads: whether the padding token must have an embedding too, as in training.

    Raises:
        UserError: naming the first such tokens.
    """
    size = config.get_text_config().vocab_size
    needed = {tokenizer.bos_token, tokenizer.eos_token, *([tokenizer.pad_token] if pads else [])}
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    outside = {
        token: x for token, x in tokenizer.get_vocab().items() if x >= size and (token in needed or token not in added)
    }
    if outside:
        first, x = min(outside.items(), key=lambda item: item[1])
        raise UserError(
            f"{name}: {len(outside)} tokens of its tokenizer have ids that the model has no embedding for, the first is {first!r} "
            f"({x}, and there are {size}); take the tokenizer that belongs to these weights, or resize the embeddings."
        )


# What tokens are called that nobody needs, the best first.
SPARE_WORDS = ("pad", "PAD", "reserved", "extra", "unused", "endoftext")
# Every byte that UTF-8 has: all characters of one and two bytes, one for each first byte of a longer one.
_EVERY_BYTE = "".join(
    map(chr, (*range(0x800), *range(0x800, 0xD800, 0x400), 0xE000, 0xF000, *range(0x10000, 0x110000, 0x30000)))
)


def _knows_all(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a tokenizer, having an id for every byte, never writes its unknown token."""
    return tokenizer.unk_token_id not in tokenizer(_EVERY_BYTE, add_special_tokens=False)["input_ids"]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, conversational: bool, name: str, pads: bool = True) -> None:
    """Refuse a tokenizer that would make scores or stops meaningless; give it a padding token of its own if it has none.

    A padding token that equals the end token hides the end of every answer from a reward model and from the loss, so
    another unused special token is taken in its place; the unknown token, where no text needs it (Llama 2, SmolLM2).

    Args:
        conversational: whether the data are conversations, which need a chat template.
        name: whose tokenizer it is, for messages.
        pads: whether a padding token of its own is needed; without, one is taken where there is one.

    Raises:
        UserError: no end token, no chat template for conversations, or no token free to be the padding token.
    """
    if tokenizer.eos_token is None:
        raise UserError(
            f"{name}: the tokenizer has no end-of-sequence token; set `eos_token` in its tokenizer_config.json."
        )
    if conversational and not tokenizer.chat_template:
        raise UserError(
            f"{name}: the data are conversations but the tokenizer has no chat template; use an instruct model or plain text."
        )
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    used = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, None}
    unused = [
        token.content
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and token.content not in used
    ]
    spare = [token for word in SPARE_WORDS for token in unused if word in token]
    if (
        not spare
        and tokenizer.unk_token not in (None, tokenizer.bos_token, tokenizer.eos_token)
        and _knows_all(tokenizer)
    ):
        spare = [tokenizer.unk_token]
    if not spare and not pads:
        return
    if not spare:
        raise UserError(
            f"{name}: the tokenizer has no padding token other than its end token {tokenizer.eos_token!r}, and no reserved "
            "token to use instead; add one (`tokenizer.add_special_tokens({'pad_token': '<|pad|>'})`, then resize the "
            "model's embeddings) and save the checkpoint again."
        )
    tokenizer.pad_token = spare[0]
