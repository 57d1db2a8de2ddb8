"""Tool calls and tools' turns, where a model's own chat template has a place for them.

A turn is a role and a text everywhere in this package, so a call becomes the text that the template writes for it. What a
model reads stays the same to the last character, which is compared row by row. A special token that the template writes into
a call (Mistral's `[TOOL_CALLS]`) would be letters in a text, so such calls are refused.
"""

import copy
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf.data.read import BadRow
from rlhf.data.rows import Message, Messages, has_ended
from rlhf.models.templates import closing, rendered
from rlhf.models.typed import spelled

# Stand for a function's name, its arguments and a tool's words, so that it is seen whether a template writes them.
NAME, ARGUMENT, WORDS = "rlhf_marked_name", "rlhf_marked_argument", "rlhf marked words"


class ToolTemplate:
    """Writes canonical rows with tool calls as a model's chat template does.

    Args:
        load: gives the tokenizer; asked once, when the first such row comes.
        name: whose tokenizer it is, for messages.
    """

    def __init__(self, load: Callable[[], PreTrainedTokenizerBase], name: str) -> None:
        self.load, self.name = load, name
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def used(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer whose template was asked; None while no row had tool calls."""
        return self._tokenizer

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row whose turns are texts: every call is what the template writes for it.

        Raises:
            BadRow: the template leaves out calls or tools' turns, or a call can't be written as a turn's text, as where the
                template writes special tokens in it.
        """
        if self._tokenizer is None:
            self._tokenizer = self.load()
        try:
            return self._fitted(row)
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise BadRow(f"the chat template of {self.name} can't write its tool calls: {error}") from error

    def _fitted(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row whose turns are texts."""
        sides = [side for side in ("chosen", "rejected", "completion") if side in row]
        for turns in [[*row["prompt"], *row[side]] for side in sides] or [row["prompt"]]:
            self._check_place(turns)
        fitted = dict(row)
        prompt = fitted["prompt"] = self._as_texts([], row["prompt"])
        for side in sides:
            fitted[side] = self._as_texts(prompt, row[side])
        if fitted.get("chosen") is not None and fitted["chosen"] == fitted["rejected"]:
            raise BadRow(f"the chat template of {self.name} writes both answers alike")
        return fitted

    def _as_texts(self, before: Messages, turns: Messages) -> Messages:
        """Return the turns that follow others, each with nothing but role and content, and whether it was cut off."""
        texts = list(before)
        for turn in turns:
            text = self._as_text(texts, turn)
            texts.append(text if has_ended([turn]) else {**text, "ended": False})
        if self._rendered(texts) != self._rendered([*before, *turns]):
            raise self._unwritable()
        return texts[len(before) :]

    def _as_text(self, before: Messages, turn: Message) -> Message:
        """Return a turn with nothing but role and content; a call is what stands between the beginning and close of an answer."""
        if "tool_calls" not in turn:
            return Message(role=turn["role"], content=turn["content"])
        content = self._written(before, turn)
        as_text = Message(role="assistant", content=content)
        if not content.strip() or self._rendered([*before, as_text]) != self._rendered([*before, turn]):
            raise self._unwritable()
        tokens = spelled(self._require_tokenizer()).findall(self._written(before, _marked([turn])[0][0]))
        if len(tokens) > len(spelled(self._require_tokenizer()).findall(turn["content"])):
            raise BadRow(
                f"the chat template of {self.name} writes the special token {tokens[0]!r} in its tool calls, which the text of "
                "a turn can't hold"
            )
        return as_text

    def _written(self, before: Messages, turn: Message) -> str:
        """Return what the template writes for an assistant's turn between the beginning and the close of an answer."""
        tokenizer = self._require_tokenizer()
        whole = self._rendered([*before, turn])
        return whole.removeprefix(rendered(tokenizer, before, asks=True)).removesuffix(closing(tokenizer, before))

    def _rendered(self, turns: Messages) -> str:
        return rendered(self._require_tokenizer(), turns)

    def _unwritable(self) -> BadRow:
        return BadRow(f"the chat template of {self.name} can't write its tool calls as the text of a turn")

    def _check_place(self, turns: Messages) -> None:
        """Refuse turns of which the template leaves something out."""
        marked, expected = _marked(turns)
        try:
            text = rendered(self._require_tokenizer(), marked)
        except Exception as error:  # a template may raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadRow(
                f"the chat template of {self.name} refuses its tool calls or tools' turns ({reason})"
            ) from None
        missing = [kind for mark, kind in expected.items() if mark not in text]
        if missing:
            raise BadRow(f"the chat template of {self.name} has no place for {' and '.join(sorted(set(missing)))}")

    def _require_tokenizer(self) -> PreTrainedTokenizerBase:
        assert self._tokenizer is not None, "it was loaded when the first row came"
        return self._tokenizer


def _marked(turns: Messages) -> tuple[Messages, dict[str, str]]:
    """Return turns with marks in place of calls and tools' words, and what each mark stands for."""
    marked: Messages = []
    expected: dict[str, str] = {}
    for place, turn in enumerate(turns):
        changed = copy.deepcopy(turn)
        if turn["role"] == "tool":
            changed["content"] = f"{WORDS} {place}."
            expected[changed["content"]] = "a tool's turn"
        for number, call in enumerate(turn.get("tool_calls", [])):
            name, argument = f"{NAME}_{place}_{number}_", f"{ARGUMENT}_{place}_{number}_"
            changed["tool_calls"][number] = {**call, "function": {"name": name, "arguments": {argument: 0}}}
            expected |= {name: "tool calls", argument: "a tool call's arguments"}
        marked.append(changed)
    return marked, expected
