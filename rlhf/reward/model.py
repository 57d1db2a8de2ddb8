"""A reward model as it is used: text in, raw scalar out."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.rows import Message, Messages, Prompt
from rlhf.errors import UserError
from rlhf.invariants.checks import CheckBook
from rlhf.models.batching import TOKENS_TOGETHER, batches_by_length, pad_batch, run_batches
from rlhf.models.scalar_head import score_head
from rlhf.models.score import position_limit, score_rows
from rlhf.models.text import closed_text, encode_answers, encode_texts, is_rendered
from rlhf.models.typed import is_typed
from rlhf.reward.cloud import LatentCloud

# A one-label classifier of transformers, with or without an adapter, or a module that is called like one.
Network: TypeAlias = PreTrainedModel | PeftModel
NO_FEATURES = "reward model: no single linear head, so its features are not known; take pairs at random."


class RewardModel:
    """A reward model with its tokenizer, and the scale of its scores.

    Attributes:
        kind: what it is called where models are listed.
        reads_prompt_apart: whether a prompt decides how its answers are scored, so that prompt and answer must come apart.
        counted: the names of what is counted while texts are scored, for `cuts`.
        model: the network, frozen.
        tokenizer: the network's; the policy may have another one.
        mean, std: mean and deviation of raw scores on SFT samples; `(score - mean) / std` has unit scale there.
        conversational: whether it was trained on conversations; a prompt that is a string is then read as one user turn.
        max_length: in tokens; longer texts lose the beginning of their prompt. Default: the model's positions.
        batch_size, batch_tokens: most texts and most tokens in a forward.
        cut: how many texts have lost the beginning of their prompt so far.
        cut_answers: how many of these have lost the beginning of their answer too.
        checks: what was checked when it was opened.
        cloud: where the codes of the SFT policy's answers lie, where a bottleneck left one.
    """

    kind: ClassVar[str] = "reward model"
    reads_prompt_apart: ClassVar[bool] = False
    counted: ClassVar[tuple[str, ...]] = ("cut", "cut_answers")
    is_counting = True

    def __init__(
        self,
        model: Network,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mean: float = 0.0,
        std: float = 1.0,
        conversational: bool = False,
        max_length: int | None = None,
        batch_size: int = 64,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.mean, self.std = mean, std
        self.conversational = conversational
        self.max_length = position_limit(model, tokenizer) if max_length is None else max_length
        self.batch_size, self.batch_tokens = batch_size, TOKENS_TOGETHER
        self.cut = self.cut_answers = 0
        self.checks = CheckBook()
        self.cloud: LatentCloud | None = None

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> Tensor:
        """Return raw scores [n], float32 on the CPU, in the order given.

        Args:
            prompts: conversations that end with the turn to be answered, or strings: the user's words, or what the chat
                template has rendered of a conversation.
            responses: texts, with or without their end token.
            ended: whether each answer came to its end; None if all did.
        """
        return self.score_rows(self.encode(prompts, responses, ended))

    def score_texts(self, texts: Sequence[str], *, ended: Sequence[bool] | None = None) -> Tensor:
        """Return raw scores [n] of texts that a template has rendered already, prompt and answer in one.

        Arguments as in `encode_texts`.
        """
        return self.score_rows(self.encode_texts(texts, ended))

    def encode_texts(self, texts: Sequence[str], ended: Sequence[bool] | None) -> list[list[int]]:
        """Return the token rows of texts that a template has rendered already, and count in `cut` those that were too long.

        No second template is laid around them; the end token is there once (`closed_text`).

        Args:
            texts: as a policy read and wrote them.
            ended: whether each answer came to its end; None if all did.
        """
        flags = [True] * len(texts) if ended is None else ended
        whole = [
            closed_text(self.tokenizer, text, conversational=self.conversational, ended=flag)
            for text, flag in zip(texts, flags, strict=True)
        ]
        rows, cut = encode_texts(self.tokenizer, whole, conversational=self.conversational, max_length=self.max_length)
        self.cut += cut
        return rows

    def is_rendered(self, prompt: str) -> bool:
        """Tell whether a prompt is text that a chat template has rendered already."""
        return is_rendered(self.tokenizer, prompt)

    def score_rows(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return raw scores [n] of token rows, as `encode` and `encode_texts` give them, float32 on the CPU."""
        was_training = self.model.training
        self.model.eval()
        scores = score_rows(
            self.model,
            rows,
            pad_token_id=self.tokenizer.pad_token_id,
            batch_size=self.batch_size,
            batch_tokens=self.batch_tokens,
        )
        self.model.train(was_training)
        return scores

    def copy_of_network(self) -> Network:
        """Return a copy of the network with one label, for a critic to start from."""
        return copy.deepcopy(self.model)

    def scale_of_copy(self, mean: float, std: float) -> tuple[float, float]:
        """Return the mean and deviation by which what the copy says is on the scale of (score - mean) / std, as near as may be."""
        return mean, std

    def rows_read(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return token rows up to where the head reads: of prompt and answer, as they are."""
        return [list(row) for row in rows]

    @torch.no_grad()
    def features(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> Tensor:
        """Return what the linear head reads at each answer's last token, [n, h], float32 on the CPU; arguments as `score`.

        Raises:
            UserError: the network has no linear head (it is an encoder).
        """
        head = score_head(self.model)
        if head is None:
            raise UserError(NO_FEATURES)
        with self.uncounted():  # its answers are scored too, and counted there
            rows = self.rows_read(self.encode(prompts, responses, ended))
        read: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].detach()))
        device = next(self.model.parameters()).device

        def last_features(batch: list[int]) -> Tensor:
            ids, mask = pad_batch([rows[i] for i in batch], pad_token_id=0)
            self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
            states, lengths = read.pop(), mask.sum(dim=1)
            # A role on another's backbone gives its head all tokens, text by text.
            last = lengths.cumsum(0) - 1 if states.dim() == 2 else (torch.arange(len(batch)), lengths - 1)
            return states[last].float().cpu()

        try:
            lengths = [len(row) for row in rows]
            batches = batches_by_length(lengths, self.batch_size, most_tokens=TOKENS_TOGETHER)
            features = run_batches(last_features, batches)
        finally:
            handle.remove()
        return torch.stack(features) if features else torch.empty(0, head.in_features)

    @torch.no_grad()
    def score_of_rendering(self, prompt: Messages, response: str) -> float | None:
        """Return the score at the last token of what transformers renders and tokenises; None if that is too long.

        Nothing is padded, and no padding id is looked at: it is read as model cards read it. Cards read special tokens that
        somebody typed as tokens, so there is no such score for a text that holds some: None.
        """
        messages = [*prompt, Message(role="assistant", content=response)]
        if is_typed(self.tokenizer, messages):
            return None
        ids = self.tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
        if ids.shape[1] > self.max_length:
            return None
        head = score_head(self.model)
        read: list[Tensor] = []
        handle = None if head is None else head.register_forward_hook(lambda *arguments: read.append(arguments[2]))
        was_training = self.model.training
        self.model.eval()
        try:
            ids = ids.to(next(self.model.parameters()).device)
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        finally:
            self.model.train(was_training)
            if handle is not None:
                handle.remove()
        # The head may be given the text's states [1, t, hidden], or those of its tokens alone, [t, hidden].
        score: float = (read[-1].flatten(0, -2)[-1] if read else logits).float().item()
        return score

    def encode(
        self, prompts: Sequence[Prompt], responses: Sequence[str], ended: Sequence[bool] | None
    ) -> list[list[int]]:
        """Return the token rows that the model reads, and count in `cut` the texts that were too long.

        A model of plain texts reads a prompt that is a string as it stands, also beside one that is a conversation.
        """
        flags = [True] * len(prompts) if ended is None else ended
        kinds = [self.conversational or not isinstance(prompt, str) for prompt in prompts]
        rows: list[list[int]] = [[]] * len(prompts)
        cut = 0
        for kind in sorted(set(kinds)):
            numbers = [i for i, other in enumerate(kinds) if other == kind]
            encoded, too_long = encode_answers(
                self.tokenizer,
                [prompts[i] for i in numbers],
                [responses[i] for i in numbers],
                ended=[flags[i] for i in numbers],
                max_length=self.max_length,
                conversational=kind,
            )
            cut += too_long
            for i, row in zip(numbers, encoded, strict=True):
                rows[i] = row
        self.cut += cut
        if cut:
            longest = [response for row, response in zip(rows, responses, strict=True) if len(row) >= self.max_length]
            lengths = [len(row) for row in self.tokenizer(longest, add_special_tokens=False)["input_ids"]]
            self.cut_answers += sum(length >= self.max_length for length in lengths)
        return rows

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave all counts as they are, while texts are read that count elsewhere or are nobody's answers."""
        counts, was_counting = self.counts(), self.is_counting
        self.is_counting = False
        try:
            yield
        finally:
            self.count_from(counts)
            self.is_counting = was_counting

    def counts(self) -> list[int]:
        """Return what was counted so far, in the order of `counted`."""
        return [getattr(self, name) for name in self.counted]

    def count_from(self, counts: Sequence[int]) -> None:
        """Let counting go on from what `counts` gave; what an earlier version did not count stays as it is."""
        for name, count in zip(self.counted, counts, strict=False):
            setattr(self, name, count)

    def is_cut(self, prompt: Prompt, response: str, ended: bool) -> bool:
        """Tell whether a text, with its end where it has one, is too long for the model and loses its beginning; not counted."""
        with self.uncounted():
            before = self.cut
            self.encode([prompt], [response], [ended])
            return self.cut > before

    def cuts(self, name: str) -> list[str]:
        """Return a sentence for each way in which texts were too long for the model.

        Args:
            name: of the model, for the sentences.
        """
        sentences = []
        if self.cut:
            sentences.append(
                f"{name}: {self.cut} texts are longer than {self.max_length} tokens and lost the beginning of their prompt."
            )
        if self.cut_answers:
            sentences.append(
                f"{name}: {self.cut_answers} answers alone are longer than that: they lost their own beginning, and answers that "
                "end alike get the same score. Leave them out, or take a model that reads more."
            )
        return sentences
