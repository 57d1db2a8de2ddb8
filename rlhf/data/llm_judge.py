"""A language model as annotator, behind any endpoint that speaks OpenAI's chat completions."""

import os
import re

import requests

from rlhf.addresses import hide_secrets, secret_problem, secrets_in, spell_out
from rlhf.data.http import post_json
from rlhf.data.labels import Question
from rlhf.data.rows import Messages, user_turn
from rlhf.errors import TrainingError, UserError

TIMEOUT = 120.0  # seconds a try: a judge thinks
# What every language model is asked, whether it writes its verdict or is read at one token.
COMPARISON = """\
Two assistants answered the same request. Judge which answer is better: correct, complete, safe, and no longer than \
it needs to be. The order of the answers says nothing about them.

[Request]
{prompt}

[Answer A]
{first}
[End of A]

[Answer B]
{second}
[End of B]

"""
ASK = COMPARISON + "Think briefly, then end with exactly one of [[A]], [[B]], or [[C]] for a tie."
VERDICT_OF = {"A": "first", "B": "second", "C": "tie"}


class LanguageModelJudge:
    """An annotator that asks a model about both orders of the answers; a verdict that turns with the order is a tie.

    A verdict in one order only is none: it may be the place that was liked, which nobody can tell from the answer.

    Args:
        url: of the API, e.g. http://localhost:8000/v1; secrets in it may be named by environment variables, `${NAME}`.
        model: its name there, and the annotator's in our files.
        key_variable: environment variable that holds the key; None for servers that want none.
        budget: requests that may be sent in all; two a question.

    Attributes:
        sent, unreadable: requests so far; answers without a verdict.
        order_decided, one_order: questions whose verdict turned with the order; those that have one in one order only.
    """

    def __init__(self, url: str, model: str, *, key_variable: str | None = None, budget: int | None = None):
        if (problem := secret_problem(url)) is not None:
            raise UserError(f"rounds.judge_url: {problem}")
        place, mark, query = spell_out(url).partition("?")
        self.url = f"{place.rstrip('/')}/chat/completions{mark}{query}"
        self.model, self.budget = model, budget
        key = os.environ.get(key_variable) if key_variable else None
        if key_variable and not key:
            raise UserError(f"rounds.judge_key: the environment variable {key_variable} is empty; put the key there.")
        self._secrets = [key] if key else []
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.sent = self.unreadable = self.order_decided = self.one_order = 0

    def can_ask(self) -> bool:
        """Return whether the budget has room for another question."""
        return self.budget is None or self.sent + 2 <= self.budget

    def label(self, question: Question) -> str:
        """Return the model's verdict: first, second, tie, or skip where not both orders gave one.

        Raises:
            TrainingError: nobody answers, or the endpoint refuses.
        """
        forward = self._ask(question, question.first, question.second)
        backward = self._ask(question, question.second, question.first)
        backward = {"first": "second", "second": "first", "tie": "tie", None: None}[backward]
        if forward is None or backward is None:
            self.one_order += forward != backward
            return "skip"
        if forward != backward:
            self.order_decided += 1
            return "tie"
        return forward

    def _ask(self, question: Question, first: str, second: str) -> str | None:
        content = ASK.format(prompt=_with_speakers(question.prompt), first=first, second=second)
        body = {"model": self.model, "messages": user_turn(content), "temperature": 0}
        try:
            reply = post_json(self.url, body, timeout=TIMEOUT, headers=self._headers)
            text = str(reply["choices"][0]["message"]["content"])
        except (requests.RequestException, KeyError, IndexError, TypeError) as error:
            sentence = (
                f"The judge at {self.url} gave no answer ({type(error).__name__}: {error}); what it said so far is kept, and "
                "the same command goes on."
            )
            # The error's own text names the address.
            raise TrainingError(hide_secrets(sentence, [*secrets_in(self.url), *self._secrets])) from None
        self.sent += 1
        letters = re.findall(r"\[\[([ABC])\]\]", text)
        if not letters:
            self.unreadable += 1
            return None
        return VERDICT_OF[letters[-1]]


def _with_speakers(prompt: Messages) -> str:
    """Return the text of a prompt's only turn, or "role: text" for each turn."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
