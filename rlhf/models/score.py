"""Scores: one for each text from a reward model, one for each token from a critic."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from rlhf.data.rows import Prompt
from rlhf.models.batching import batches_by_length, pad_batch, run_batches
from rlhf.models.load import score_head


class Scorer(Protocol):
    """Whatever gives an answer a score: a reward model, experts, an ensemble."""

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> Tensor:
        """Return raw scores [n], float32 on the CPU, in the order given.

        Args:
            prompts: strings, or conversations that end with the turn to be answered.
            responses: texts without special tokens.
            ended: whether each answer came to its end; None if all did.
        """
        ...


@torch.no_grad()
def score_rows(model: nn.Module, rows: Sequence[Sequence[int]], *, pad_token_id: int, batch_size: int = 64) -> Tensor:
    """Return the raw scores of token rows, computed in batches of similar length.

    Args:
        model: a one-label sequence classifier in evaluation mode.
        rows: token ids, without padding.
        pad_token_id: that of the model's configuration, which finds the last token by it.
        batch_size: rows that are scored together.

    Returns:
        [n] float32 on the CPU, in the order of the rows.
    """
    device = next(model.parameters()).device

    def score(batch: list[int]) -> list[float]:
        ids, mask = pad_batch([rows[i] for i in batch], pad_token_id=pad_token_id)
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        return logits.squeeze(-1).float().tolist()

    return torch.tensor(run_batches(score, batches_by_length([len(row) for row in rows], batch_size)))


def token_scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
    """Return what the scalar head says at every token.

    One function for two roles: a reward model is read at the last token of an answer, a critic at every token.

    Args:
        model: a decoder with a linear `score` head, with or without an adapter.
        input_ids, attention_mask, position_ids: [b, t], padding on either side.

    Returns:
        [b, t] in the head's dtype.
    """
    inner: Any = model.base_model.model if isinstance(model, PeftModel) else model
    backbone = getattr(inner, inner.base_model_prefix)
    hidden = backbone(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    head = score_head(model)
    assert head is not None, "check_critic refuses models without a linear score head"
    scores: Tensor = inner.score(hidden.to(head.weight.dtype)).squeeze(-1)
    return scores
