"""`CritiqueRewardModel`: a reward model that writes a critique of every answer, and gives its score behind that."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models.critiques import CritiqueForm, Critiques, request_ids, write_critiques
from rlhf.objectives.critiques import self_consistent
from rlhf.reward.model import Network, RewardModel


class CritiqueRewardModel(RewardModel):
    """`RewardModel` whose scores are read at the end of critiques; used as any other.

    With one critique an answer, that is the likeliest one, token by token; with several they are sampled, and the score is the
    mean over them. Samples are a function of the answer, so a text has one score.

    Attributes:
        writer: a causal model on the network's own decoder (`rlhf.models.critiques.writer_on`).
        form: how critiques are asked for.
        critiques: how many were written so far.
        endless: how many of these never came to their end, and were cut.
    """

    counted = (*RewardModel.counted, "critiques", "endless")

    def __init__(
        self,
        model: Network,
        tokenizer: PreTrainedTokenizerBase,
        *,
        writer: PreTrainedModel,
        form: CritiqueForm,
        **arguments: Any,
    ):
        super().__init__(model, tokenizer, **arguments)
        self.writer, self.form = writer, form
        self.request = request_ids(tokenizer, form["request"])
        self.max_length -= len(self.request) + form["tokens"]
        self.critiques = self.endless = 0

    def score_rows(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return raw scores [n] of token rows of prompt and answer, float32 on the CPU."""
        samples = [None] if self.form["samples"] == 1 else range(self.form["samples"])
        return self_consistent(torch.stack([self.score_at_end(self.rows_read(rows, sample)) for sample in samples]))

    def score_at_end(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the scores [n] that are read at the end of rows as they are: what a server says that writes no critique."""
        return super().score_rows(rows)

    def rows_read(self, rows: Sequence[Sequence[int]], sample: int | None = None) -> list[list[int]]:
        """Return rows with a critique behind each: what the head reads."""
        written = self.write(rows, sample=sample)
        return [[*row, *self.request, *critique] for row, critique in zip(rows, written.rows, strict=True)]

    def write(self, rows: Sequence[Sequence[int]], *, sample: int | None = None, label: str | None = None) -> Critiques:
        """Write a critique of each answer, and count it.

        Args:
            rows: token ids of prompts and answers.
            sample, label: as `rlhf.models.critiques.write_critiques` takes them.
        """
        was_training = self.model.training
        self.model.eval()
        asked = [[*row, *self.request] for row in rows]
        written = write_critiques(
            self.writer,
            self.tokenizer,
            asked,
            tokens=self.form["tokens"],
            sample=sample,
            batch_size=self.batch_size,
            label=label,
        )
        self.model.train(was_training)
        self.critiques += len(rows)
        self.endless += written.ended.count(False)
        return written

    def cuts(self, name: str) -> list[str]:
        """Return a sentence for each way in which texts, or critiques, were too long."""
        sentences = super().cuts(name)
        if self.endless:
            sentences.append(
                f"{name}: {self.endless} of {self.critiques} critiques never came to their end and were cut after "
                f"{self.form['tokens']} tokens; their scores are read there."
            )
        return sentences
