"""The one place where a prompt and an answer become the text that a model reads: in training, evaluation and PPO alike."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError

Messages: TypeAlias = list[dict[str, str]]
Prompt: TypeAlias = str | Messages


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """What the policy reads before it answers."""
    if isinstance(prompt, str):
        return prompt
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str, *, ended: bool = True) -> str:
    """What the reward model reads: the prompt, the answer and, if the answer came to its end, the end token.

    A chat template closes every turn, also that of an answer that was cut off; `ended=False` takes the close away
    again, so that the model can tell the two apart.

    Args:
        prompt: a string, or messages ending with the turn to be answered.
        answer: the answer's text, without special tokens.
        ended: whether the answer's end token was produced.
    """
    end = tokenizer.eos_token if ended else ""
    if isinstance(prompt, str):
        return prompt + answer.removesuffix(tokenizer.eos_token) + end
    text = _rendered(tokenizer, prompt, answer)
    if ended:
        return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token
    # What the template writes after any answer, seen on one that occurs nowhere else.
    marker = "\u241fanswer\u241f"
    closing = _rendered(tokenizer, prompt, marker).rpartition(marker)[2]
    return text.removesuffix(closing)


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: Messages, answer: str) -> str:
    text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False)
    assert isinstance(text, str)
    return text.rstrip("\n")  # the score is read at the last token, which must be the end of the answer, not a newline


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, conversational: bool) -> list[list[int]]:
    """Token ids of texts built above; a chat template writes its own beginning-of-text token, a plain text gets one here."""
    return tokenizer(list(texts), add_special_tokens=not conversational)["input_ids"]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    *,
    ended: Sequence[bool] | None = None,
    max_length: int | None = None,
) -> tuple[list[list[int]], int]:
    """Ids of prompt and answer for a reward model; too long rows lose the beginning of the prompt, never the answer's end.

    Returns:
        the ids, and how many rows were cut.
    """
    ended = [True] * len(prompts) if ended is None else ended
    texts = [answer_text(tokenizer, p, a, ended=e) for p, a, e in zip(prompts, answers, ended, strict=True)]
    flags = [not isinstance(prompt, str) for prompt in prompts]
    assert len(set(flags)) <= 1, "a batch is either conversational or not"
    rows = encode(tokenizer, texts, conversational=flags[0]) if texts else []
    if max_length is None:
        return rows, 0
    cut = sum(len(row) > max_length for row in rows)
    return [row[-max_length:] for row in rows], cut


def plain(prompt: Prompt) -> str:
    """A prompt as a person or a gold function sees it: the text of its only turn, or "role: text" for each of several."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


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


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, conversational: bool, where: str) -> None:
    """Refuse a tokenizer that would make scores or stops meaningless; give it a padding token of its own if it has none.

    A padding token that equals the end token hides the end of every answer from a reward model and from the loss, so
    another unused special token is taken in its place.

    Raises:
        UserError: no end token, no chat template for conversations, or no token free to be the padding token.
    """
    if tokenizer.eos_token is None:
        raise UserError(
            f"{where}: the tokenizer has no end-of-sequence token; set `eos_token` in its tokenizer_config.json."
        )
    if conversational and not tokenizer.chat_template:
        raise UserError(
            f"{where}: the data are conversations but the tokenizer has no chat template; use an instruct model or plain text."
        )
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    used = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, None}
    spare: list[Any] = [
        token.content
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special
        and token.content not in used
        and any(x in token.content for x in ("pad", "PAD", "reserved", "extra", "unused", "endoftext"))
    ]
    if not spare:
        raise UserError(
            f"{where}: the tokenizer has no padding token other than its end token {tokenizer.eos_token!r}, and no reserved "
            "token to use instead; add one (`tokenizer.add_special_tokens({'pad_token': '<|pad|>'})`, then resize the "
            "model's embeddings) and save the checkpoint again."
        )
    tokenizer.pad_token = spare[0]
