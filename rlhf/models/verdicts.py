"""A causal model as annotator, read at one token: which of two answers it would call better, A or B, asked in both orders."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.llm_judge import COMPARISON
from rlhf.data.rows import Prompt, user_turn
from rlhf.errors import UserError
from rlhf.models.batching import TOKENS_TOGETHER, batches_by_length, run_batches
from rlhf.models.generate import pad_left
from rlhf.models.load import encoder_type, load_policy, load_tokenizer, model_settings
from rlhf.models.logprobs import response_logits
from rlhf.models.score import position_limit
from rlhf.models.text import check_vocabulary, encode_answers, plain
from rlhf.objectives.verdicts import TwoOrders, average_orders

QUESTION = COMPARISON + "Which answer is better? Say one letter only: A or B."
LETTERS = ("A", "B")


@dataclass(frozen=True)
class Verdicts:
    """What a model says of n pairs of answers; one that does not fit in its context has no verdict, and zeros stand there.

    Attributes:
        fits: [n] bool, whether the questions of a pair fit.
        orders: log-odds that the first answer is better, and the bias towards A, [n] nats each.
        share: [n] how much of the model's next-token probability lies on A and B, the mean of both orders. A small share means
            that it would not answer with a letter, so its verdict says little.
    """

    fits: Tensor
    orders: TwoOrders
    share: Tensor


class VerdictModel:
    """A causal model that is asked which of two answers to a prompt is better.

    Attributes:
        too_long: how many pairs did not fit in the model's context so far.

    Args:
        model: in evaluation mode.
        tokenizer: the model's; its chat template writes the question.
        name: whose they are, for messages.
        batch_size: questions in a forward.

    Raises:
        UserError: the tokenizer does not write the letters as one token each.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, *, name: str, batch_size: int = 16
    ):
        self.model, self.tokenizer, self.name, self.batch_size = model, tokenizer, name, batch_size
        self.letter_ids = _letter_ids(tokenizer, name)
        self.too_long = 0

    def compare(
        self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str], *, label: str | None = None
    ) -> Verdicts:
        """Compare two answers to each prompt, in both orders.

        Args:
            firsts, seconds: the answers' texts.
            label: what people know this work by; shows how far it is.

        Returns:
            float32 on the CPU, in the order given.
        """
        # 1. Every question in both orders, up to where the model says its letter.
        n = len(prompts)
        rows = self._questions(prompts, firsts, seconds)

        # 2. The log-probabilities of the two letters there; of a pair that does not fit, in either order, nothing is known.
        fits = self._fit(rows)
        asked = [i for i in range(2 * n) if fits[i % n]]
        self.too_long += n - int(fits.sum())
        logprobs = torch.full((2 * n, 2), -torch.inf)
        if asked:
            logprobs[asked] = self._letter_logprobs([rows[i] for i in asked], label)

        # 3. What is said of the answers, and what of the order.
        log_odds = torch.where(fits.repeat(2), logprobs[:, 0] - logprobs[:, 1], torch.zeros(2 * n))
        share = logprobs.exp().sum(dim=1)
        return Verdicts(fits, average_orders(log_odds[:n], log_odds[n:]), (share[:n] + share[n:]) / 2)

    def fit(self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]) -> Tensor:
        """Tell which pairs of answers fit in the model's context, in both orders, [n] bool."""
        return self._fit(self._questions(prompts, firsts, seconds))

    def _questions(self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]) -> list[list[int]]:
        """Return the token rows of all questions in one order, then of all in the other, up to the letter."""
        texts = [plain(prompt) for prompt in prompts]
        questions = [
            QUESTION.format(prompt=text, first=one, second=other)
            for ones, others in [(firsts, seconds), (seconds, firsts)]
            for text, one, other in zip(texts, ones, others, strict=True)
        ]
        return _rows_before_letter(self.tokenizer, questions)

    def _fit(self, rows: Sequence[Sequence[int]]) -> Tensor:
        longest, n = position_limit(self.model, self.tokenizer), len(rows) // 2
        return torch.tensor([max(len(rows[i]), len(rows[n + i])) <= longest for i in range(n)], dtype=torch.bool)

    @torch.no_grad()
    def _letter_logprobs(self, rows: Sequence[Sequence[int]], label: str | None) -> Tensor:
        """Return log p(A) and log p(B) as the next token of each row, [n, 2] nats."""
        # What stands in masked places is never read.
        device, pad, letters = self.model.device, rows[0][0], list(self.letter_ids)

        def letter_logprobs(batch: list[int]) -> Iterator[list[float]]:
            ids, mask = (x.to(device) for x in pad_left([rows[i] for i in batch], pad))
            logits = response_logits(self.model, ids, mask, 0)[:, -1]
            yield from torch.log_softmax(logits.float(), dim=-1)[:, letters].tolist()

        batches = batches_by_length([len(row) for row in rows], self.batch_size, most_tokens=TOKENS_TOGETHER)
        return torch.tensor(run_batches(letter_logprobs, batches, label=label))


def load_verdict_model(name: str) -> VerdictModel:
    """Load a causal model from a folder or the hub, as it was saved, to ask it for verdicts.

    Raises:
        UserError: it can't be opened, is an encoder, or does not write the letters as one token each.
    """
    tokenizer = check_verdict_model(name)
    model = load_policy(name, model_settings({"dtype": "auto"}), trainable=False).eval().requires_grad_(False)
    check_vocabulary(tokenizer, model.config, name=name)
    return VerdictModel(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, name=name)


def check_verdict_model(name: str) -> PreTrainedTokenizerBase:
    """Refuse a model that can't be asked for verdicts, before its weights are read; return its tokenizer.

    Raises:
        UserError: it is an encoder, or does not write the letters as one token each.
    """
    if encoder_type(name) is not None:
        raise UserError(f"{name}: an encoder says no next token, so it gives no verdict; take a causal model.")
    tokenizer = load_tokenizer(name, conversational=True, pads=False)
    _letter_ids(tokenizer, name)
    return tokenizer


def _rows_before_letter(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[list[int]]:
    """Return the token ids of questions up to the place of the letter, with all that the template writes before an answer."""
    prompts: list[Prompt] = [user_turn(question) for question in questions]
    rows, _ = encode_answers(tokenizer, prompts, [LETTERS[0]] * len(prompts), ended=[False] * len(prompts))
    return [row[:-1] for row in rows]


def _letter_ids(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[int, int]:
    """Return the token ids of the two letters, as answers behind the model's own template.

    Raises:
        UserError: they are not one token each, different ones that the tokenizer knows.
    """
    question: list[Prompt] = [user_turn("Which?")] * len(LETTERS)
    (of_a, of_b), _ = encode_answers(tokenizer, question, LETTERS, ended=[False, False])
    known = tokenizer.unk_token_id not in (of_a[-1], of_b[-1])
    if of_a[:-1] != of_b[:-1] or of_a[-1] == of_b[-1] or not known:
        raise UserError(
            f"{name}: its tokenizer does not write the answers {LETTERS[0]} and {LETTERS[1]} as one token each, two different "
            "ones, so their probabilities can't be read; take another model."
        )
    return of_a[-1], of_b[-1]
