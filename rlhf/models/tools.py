"""Tool calls and tools' turns, where a model's own chat template has a place for them.

A prompt keeps them as they are: the template writes them. An answer is a text everywhere in this package, so a call in an
answer becomes the text that the template writes for it.
"""

import copy
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data.read import BadRow
from rlhf.data.rows import Message, Messages
from rlhf.models.templates import closing, rendered

# Stand for a function's name, its arguments and a tool's words, so that it is seen whether a template writes them.
NAME, ARGUMENT, WORDS = "rlhf_marked_name", "rlhf_marked_argument", "rlhf marked words"


class ToolTemplate:
    """Writes canonical rows with tool calls as a model's chat template does.

    Args:
        load: gives the tokenizer; asked once, when the first such row comes.
        name: whose tokenizer it is, for messages.
    """

    def __init__(self, load: Callable[[], PreTrainedTokenizerBase], name: str) -> None:
        self._load, self._name = load, name
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row whose answers are texts, and whose prompt the template can write.

        Raises:
            BadRow: the template leaves out calls or tools' turns, or a call can't be written as an answer's text.
        """
        if self._tokenizer is None:
            self._tokenizer = self._load()
        self._check_place(row["prompt"])
        fitted = dict(row)
        for side in ("chosen", "rejected", "completion"):
            if side in row and "tool_calls" in row[side][0]:
                fitted[side] = [Message(role="assistant", content=self._call_text(row["prompt"], row[side][0]))]
        if fitted.get("chosen") is not None and fitted["chosen"] == fitted["rejected"]:
            raise BadRow(f"the chat template of {self._name} writes both answers alike")
        return fitted

    def _call_text(self, prompt: Messages, answer: Message) -> str:
        """Return what the template writes for a call between the beginning and the close of an answer."""
        tokenizer = self._require_tokenizer()
        self._check_place([*prompt, answer])
        whole = rendered(tokenizer, [*prompt, answer])
        head, close = rendered(tokenizer, prompt, asks=True), closing(tokenizer, prompt)
        text = whole.removeprefix(head).removesuffix(close)
        as_text = Message(role="assistant", content=text)
        if not text.strip() or rendered(tokenizer, [*prompt, as_text]) != whole:
            raise BadRow(f"the chat template of {self._name} can't write this tool call as the text of an answer")
        return text

    def _check_place(self, turns: Messages) -> None:
        """Refuse turns of which the template leaves something out."""
        marked, expected = _marked(turns)
        try:
            text = rendered(self._require_tokenizer(), marked)
        except Exception as error:  # a template may raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadRow(
                f"the chat template of {self._name} refuses its tool calls or tools' turns ({reason})"
            ) from None
        missing = [kind for mark, kind in expected.items() if mark not in text]
        if missing:
            raise BadRow(f"the chat template of {self._name} has no place for {' and '.join(sorted(set(missing)))}")

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
