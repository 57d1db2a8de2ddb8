"""Chat templates: how they close an answer, what they refuse, and whether two of them write the same text."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

from jinja2.exceptions import SecurityError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from rlhf.bounded import TOO_LARGE, TOO_LONG, try_in_child
from rlhf.data.rows import Message, Messages, Prompt
from rlhf.errors import UserError
from rlhf.models.open import open_tokenizer

# Stands for an answer that occurs nowhere else, so that what a template writes around it can be seen.
MARKER = "\u241fanswer\u241f"
_USER, _ANSWER = Message(role="user", content="Which one?"), Message(role="assistant", content=MARKER)
CONVERSATIONS: tuple[Messages, ...] = (
    [_USER, _ANSWER],
    [_USER, Message(role="assistant", content="That one."), Message(role="user", content="  And now?\n"), _ANSWER],
    [Message(role="system", content="Be short."), _USER, _ANSWER],
)

# What a template may take to write one of these, and how much it may write.
SECONDS_TO_RENDER, BYTES_TO_RENDER, LONGEST_TEXT = 10.0, 512 * 2**20, 10_000_000
LEAVES_SANDBOX = 1
_TRIED: set[str] = set()

# A newline after `{% set … %}` is dropped by `trim_blocks` and lets the original begin a line, as it did; `{{ '' }}` keeps
# `lstrip_blocks` from taking white space away from its end.
_ENDED_TEMPLATE = (
    "{% set rlhf_text %}\n@ORIGINAL@{{ '' }}{% endset %}"
    "{%- if add_generation_prompt or messages[-1]['role'] != 'assistant' -%}{{- rlhf_text -}}"
    "{%- elif rlhf_text.rstrip().endswith(eos_token) -%}{{- rlhf_text.rstrip() -}}"
    "{%- else -%}{{- rlhf_text.rstrip('\\n') + eos_token -}}{%- endif -%}"
)


def check_template(tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
    """Refuse a chat template that comes to no end, asks for more memory than any text takes, or tries to leave its sandbox.

    It is tried in a process of its own, once for each template. Turns that it refuses are no fault here.

    Args:
        name: whose tokenizer it is, for messages.

    Raises:
        UserError: it does one of the three.
    """
    template = json.dumps(tokenizer.chat_template)
    if tokenizer.chat_template is None or template in _TRIED:
        return

    def render_all() -> int:
        for conversation in CONVERSATIONS:
            for messages, asks in ((conversation, False), (conversation[:-1], True)):
                try:
                    text = rendered(tokenizer, messages, asks=asks)
                except SecurityError:
                    return LEAVES_SANDBOX
                except MemoryError:
                    return TOO_LARGE
                except Exception:  # a template may raise anything
                    continue
                if len(text) > LONGEST_TEXT:
                    return TOO_LARGE
        return 0

    outcome = try_in_child(render_all, seconds=SECONDS_TO_RENDER, more_bytes=BYTES_TO_RENDER)
    reason = {
        TOO_LONG: f"was not done after {SECONDS_TO_RENDER:.0f} s with a conversation of a few words",
        TOO_LARGE: "asks for hundreds of megabytes for a conversation of a few words",
        LEAVES_SANDBOX: "tries to reach what no template needs, outside its sandbox",
    }.get(outcome)
    if reason is not None:
        raise UserError(f"{name}: the chat template {reason}; put a template of your own into chat_template.jinja.")
    _TRIED.add(template)


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, asks: bool = False) -> str:
    """Return a conversation as the chat template writes it.

    Args:
        asks: whether the text ends where the next answer begins.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    assert isinstance(text, str)
    return text


def closing(tokenizer: PreTrainedTokenizerBase, prompt: Messages) -> str:
    """Return what the chat template writes after any answer to a prompt."""
    return rendered(tokenizer, [*prompt, _ANSWER]).rpartition(MARKER)[2]


def behind_question(tokenizer: PreTrainedTokenizerBase, answer: str) -> str:
    """Return what the chat template writes of an answer behind a prompt that asks for it, its close left out.

    A thought that the answer brings along stays its only one; an answer without one gets the empty thought of the template.
    """
    prompt = rendered(tokenizer, [_USER], asks=True)
    whole = rendered(tokenizer, [_USER, Message(role="assistant", content=answer)])
    return whole.removeprefix(prompt).removesuffix(closing(tokenizer, [_USER]))


class Frame(NamedTuple):
    """What a chat template writes around a question and its answer.

    Attributes:
        begin: the begin token before everything; empty where the template writes none.
        asks: what stands behind the question in a prompt that asks for an answer.
        asks_in_tokens: whether special tokens are in that.
        lead: what stands between such a prompt and the answer.
        close: what stands behind the answer.
        ends: each text in which an answer can end: the close, every special token of it, end token and padding token.
        trims: whether white space around an answer is left out.
    """

    begin: str
    asks: str
    asks_in_tokens: bool
    lead: str
    close: str
    ends: tuple[str, ...]
    trims: bool


# A tokenizer's frame is asked for with every text; it stays as long as what it depends on.
_FRAMES: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, Frame]] = WeakKeyDictionary()


def frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Return what the chat template writes around a conversation."""
    basis = (tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    known = _FRAMES.get(tokenizer)
    if known is None or known[0] != basis:
        known = _FRAMES[tokenizer] = (basis, _frame(tokenizer))
    return known[1]


def _frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Return a frame as it is seen around a question and an answer that occur nowhere else."""
    question, answer = Message(role="user", content=MARKER), Message(role="assistant", content=MARKER)
    prompt, whole = rendered(tokenizer, [question], asks=True), rendered(tokenizer, [question, answer])
    with_blanks = rendered(tokenizer, [question, Message(role="assistant", content=f"\n{MARKER}\n")])
    asks = prompt.rpartition(MARKER)[2]
    before, _, close = whole.rpartition(MARKER)
    begin = tokenizer.bos_token or ""
    return Frame(
        begin=begin if whole.startswith(begin) else "",
        asks=asks,
        asks_in_tokens=bool(special_texts(tokenizer, asks)),
        lead=before.removeprefix(prompt) if before.startswith(prompt) else "",
        close=close,
        ends=end_texts(tokenizer, close),
        trims=with_blanks == whole,
    )


def end_texts(tokenizer: PreTrainedTokenizerBase, close: str = "") -> tuple[str, ...]:
    """Return each text in which an answer can end.

    Args:
        close: what the chat template writes behind it.
    """
    tokens = special_texts(tokenizer, close) if close else []
    texts = [close.strip(), *tokens, tokenizer.eos_token, tokenizer.pad_token]
    return tuple(dict.fromkeys(text for text in texts if text))


def special_texts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Return the special tokens that a text spells."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [tokenizer.decode([x]) for x in tokenizer(text, add_special_tokens=False)["input_ids"] if x in special]


def without_ends(text: str, ends: Sequence[str]) -> str:
    r"""Return a text without the end tokens in which it ends, and without white space behind them.

    >>> without_ends("yes \n</s>\n</s>", ["</s>"]), without_ends("yes\n", ["</s>"])
    ('yes \n', 'yes\n')
    """
    stop = len(text)
    while True:
        words = stop
        while words and text[words - 1].isspace():
            words -= 1
        end = next((end for end in ends if text.endswith(end, 0, words)), None)
        if end is None:
            return text[:stop]
        stop = words - len(end)


def without_begins(text: str, begin: str | None) -> str:
    """Return a text without a token that it begins with, once or many times."""
    start = 0
    while begin and text.startswith(begin, start):
        start += len(begin)
    return text[start:]


def end_at_end_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Change a chat template so that a text whose last turn is an answer ends in the end token, and in nothing after it.

    A reward model that is trained here reads its score there. Templates that write a newline after the end token, or
    another token in its place, are wrapped; prompts stay as they are. The wrapped template is saved with the model,
    so that every other program that renders it scores the same text.

    Returns:
        whether the template had to be wrapped.

    Raises:
        UserError: the wrapped template does not write what the original wrote.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template or tokenizer.eos_token is None:
        return False
    try:
        end = closing(tokenizer, [_USER])
    except Exception:  # whatever a template raises; it is reported where the data are rendered
        return False
    if end.endswith(tokenizer.eos_token):
        return False
    wrapped = copy.copy(tokenizer)
    original = template.removesuffix("\n")  # as jinja does at the end of a template
    _set_template(wrapped, _ENDED_TEMPLATE.replace("@ORIGINAL@", original))
    for conversation in CONVERSATIONS:
        expected = _render_or_none(tokenizer, conversation)
        if expected is None:
            continue
        text = expected.rstrip() if expected.rstrip().endswith(tokenizer.eos_token) else None
        text = expected.rstrip("\n") + tokenizer.eos_token if text is None else text
        prompts = [_render_or_none(x, conversation[:-1], asks=True) for x in (tokenizer, wrapped)]
        if _render_or_none(wrapped, conversation) != text or prompts[0] != prompts[1]:
            raise UserError(
                f"{tokenizer.name_or_path}: the chat template writes {end!r} after an answer and can't be made to end in "
                f"{tokenizer.eos_token!r}, where a reward model reads its score; let it end there and save it again."
            )
    _set_template(tokenizer, wrapped.chat_template)
    return True


def _set_template(tokenizer: PreTrainedTokenizerBase, template: object) -> None:
    """Replace the template, or the default one of several."""
    several = tokenizer.chat_template
    tokenizer.chat_template = {**several, "default": template} if isinstance(several, dict) else template


def _render_or_none(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, asks: bool = False) -> str | None:
    """Return a rendered conversation, or None where the template refuses it."""
    try:
        return rendered(tokenizer, messages, asks=asks)
    except Exception:  # a template may raise anything
        return None


def affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return how many tokens the tokenizer writes by itself before and after a plain text."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("x")["input_ids"]
    before = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
    return before, len(whole) - len(bare) - before


def add_no_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Keep a tokenizer from writing begin and end tokens by itself, because its chat template writes them.

    Programs that tokenise a rendered conversation without `add_special_tokens=False`, such as the pipeline of
    transformers, then read the same tokens as this package.

    Returns:
        whether it wrote any, and writes none now.
    """
    if affixes(tokenizer) == (0, 0):
        return False
    for name in ("add_bos_token", "add_eos_token"):
        if getattr(tokenizer, name, None):
            setattr(tokenizer, name, False)
    backend = getattr(tokenizer, "_tokenizer", None)
    if affixes(tokenizer) != (0, 0) and isinstance(backend, Tokenizer):
        values = json.loads(backend.to_str())
        values["post_processor"] = _without_tokens(values["post_processor"])
        plain = Tokenizer.from_str(json.dumps(values))
        if plain.post_processor is not None:
            backend.post_processor = plain.post_processor
        else:
            tokenizer._tokenizer = plain
    return affixes(tokenizer) == (0, 0)


def read_as_saved(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Let a saved tokenizer be read from its tokenizer.json alone, where its class would write begin and end tokens again.

    Args:
        folder: where it was saved.
        tokenizer: as it shall be read, writing none.

    Returns:
        whether it is read like that now; the folder is as before where it is not.
    """
    file = folder / "tokenizer_config.json"
    before = file.read_text(encoding="utf-8")
    values = {**json.loads(before), "tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    again = open_tokenizer(folder)
    texts = [text for conversation in CONVERSATIONS if (text := _render_or_none(tokenizer, conversation))]
    if [again(text)["input_ids"] for text in texts] == [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts
    ] and texts == [text for conversation in CONVERSATIONS if (text := _render_or_none(again, conversation))]:
        return True
    file.write_text(before, encoding="utf-8")
    return False


def _without_tokens(processor: dict[str, object] | None) -> dict[str, object] | None:
    """Return a post-processor of the tokenizers library without the steps that write tokens."""
    if processor is None or processor["type"] in ("TemplateProcessing", "BertProcessing", "RobertaProcessing"):
        return None
    if processor["type"] == "Sequence":
        steps = processor["processors"]
        assert isinstance(steps, list)
        kept = [step for step in map(_without_tokens, steps) if step is not None]
        return {**processor, "processors": kept} if kept else None
    return processor


def same_text(tokenizer_a: PreTrainedTokenizerBase, tokenizer_b: PreTrainedTokenizerBase) -> bool:
    """Tell whether a reward model would read the same text and the same ids through either tokenizer.

    Both are compared as reward models are trained: the text ends in the end token.
    """
    copies = [copy.copy(tokenizer_a), copy.copy(tokenizer_b)]
    for tokenizer in copies:
        end_at_end_token(tokenizer)
    for conversation in CONVERSATIONS:
        texts = [_render_or_none(tokenizer, conversation) for tokenizer in copies]
        if texts[0] != texts[1]:
            return False
        if texts[0] is not None:
            rows = [tokenizer(texts[0], add_special_tokens=False)["input_ids"] for tokenizer in copies]
            if rows[0] != rows[1]:
                return False
    return True


def turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token with which the chat template ends an answer, in a list; an empty one where it writes nothing there.

    It is the first special token after the answer; where there is none, the first token that is not white space.
    """
    if not tokenizer.chat_template:
        return []
    end = closing(tokenizer, [_USER]).strip()
    ids: list[int] = tokenizer(end, add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ([token for token in ids if token in special] or ids)[:1]


def template_problems(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[str]:
    """Return a sentence for each kind of conversation among the prompts that the chat template refuses or does not write whole.

    One prompt of each order of roles is rendered, with and without an answer.
    """
    first: dict[tuple[str, ...], int] = {}
    counts: dict[tuple[str, ...], int] = {}
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            roles = tuple(message["role"] for message in prompt)
            first.setdefault(roles, row)
            counts[roles] = counts.get(roles, 0) + 1
    problems = []
    for roles, row in first.items():
        prompt = prompts[row]
        assert not isinstance(prompt, str)
        try:
            rendered(tokenizer, prompt, asks=True)
            whole = rendered(tokenizer, [*prompt, _ANSWER])
        except Exception as error:  # a template may raise anything
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            reason = f"which the chat template of {tokenizer.name_or_path} refuses: {reason}"
        else:
            if all(turn["role"] != "system" or turn["content"].strip() in whole for turn in prompt):
                continue
            reason = (
                f"and the chat template of {tokenizer.name_or_path} leaves the system turn out once there is an answer"
            )
        problems.append(
            f"{counts[roles]} prompts (the first is row {row}) have the turns {', '.join(roles)}, {reason}. Leave these turns out "
            "or fold them into the user's, or give the tokenizer a chat_template that takes them."
        )
    return problems
