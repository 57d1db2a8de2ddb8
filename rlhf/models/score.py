"""Scores: one for each text from a reward model, one for each token from a critic."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.rows import Prompt
from rlhf.models.batching import TOKENS_TOGETHER, batches_by_length, pad_batch, run_batches
from rlhf.models.scalar_head import score_head
from rlhf.models.unpadded import token_states


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
def score_rows(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    *,
    pad_token_id: int | None,
    batch_size: int = 64,
    batch_tokens: int = TOKENS_TOGETHER,
) -> Tensor:
    """Return the raw scores of token rows, computed in batches of similar length.

    Args:
        model: a one-label sequence classifier in evaluation mode.
        rows: token ids, without padding.
        pad_token_id: the tokenizer's; None where it has none.
        batch_size: rows that are scored together, fewer where they are long.
        batch_tokens: most tokens in a forward, padding included; a row alone may be longer.

    Returns:
        [n] float32 on the CPU, in the order of the rows.
    """
    device = next(model.parameters()).device

    def score(batch: list[int]) -> list[float]:
        texts = [rows[i] for i in batch]
        with padding_of(model, pad_token_id, texts) as pad:
            ids, mask = pad_batch(texts, pad_token_id=pad)
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        return logits.squeeze(-1).float().tolist()

    lengths = [len(row) for row in rows]
    return torch.tensor(run_batches(score, batches_by_length(lengths, batch_size, most_tokens=batch_tokens)))


@contextmanager
def padding_of(model: nn.Module, pad_token_id: int | None, rows: Sequence[Sequence[int]]) -> Iterator[int]:
    """Give a classifier, for a while, a padding id that none of the rows ends in; the value is that id.

    A decoder of transformers reads its score at the last token that is not its configuration's padding id, whatever
    the attention mask says. Where that id ends a text (many checkpoints pad with the end token) or is not the one in
    the batch, it reads another token. An encoder reads its first token and may count positions by its own padding id,
    so there the configuration decides.
    """
    config = getattr(model, "config", None)
    configs = [] if config is None else list({id(c): c for c in (config, config.get_text_config())}.values())
    declared = getattr(configs[-1], "pad_token_id", None) if configs else None
    if score_head(model) is None and isinstance(declared, int):
        yield declared
        return
    last = {row[-1] for row in rows if row}
    size = configs[-1].vocab_size if configs else inf  # a token that was added to the tokenizer alone has no embedding
    candidates = [pad_token_id, *range(len(last) + 1)]
    pad = next(x for x in candidates if x is not None and x not in last and x < size)
    # A configuration that wraps that of the text, as Gemma 3's, has no such id.
    before = [(c, c.pad_token_id) for c in configs if hasattr(c, "pad_token_id")]
    for c, _ in before:
        c.pad_token_id = pad
    try:
        yield pad
    finally:
        for c, value in before:
            c.pad_token_id = value


def token_scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return what the scalar head says at every token, and 0 at padding.

    One function for two roles: a reward model is read at the last token of an answer, a critic at every token.

    Args:
        model: a decoder with a linear `score` head, with or without an adapter.
        input_ids, attention_mask: [b, t], padding on either side.

    Returns:
        [b, t] in the head's dtype.
    """
    inner: Any = model.base_model.model if isinstance(model, PeftModel) else model
    states = token_states(getattr(inner, inner.base_model_prefix), input_ids, attention_mask)
    head = score_head(model)
    assert head is not None, "check_critic refuses models without a linear score head"
    scores: Tensor = inner.score(states.to(head.weight.dtype)).squeeze(-1)
    return scores.new_zeros(attention_mask.shape).masked_scatter(attention_mask.bool(), scores)


def position_limit(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens a model can read: an encoder has no positions beyond, a decoder was not trained on them.

    RoBERTa and its like count positions from behind their padding id, so of 514 there are 512 for tokens.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:
        tables = [getattr(module, "position_embeddings", None) for module in model.modules()]
        unused = [t.padding_idx + 1 for t in tables if isinstance(t, nn.Embedding) and t.padding_idx is not None]
        positions -= max(unused, default=0)
    return int(min(tokenizer.model_max_length, positions or tokenizer.model_max_length))
