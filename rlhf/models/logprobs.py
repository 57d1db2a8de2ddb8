"""Log-probabilities of sampled tokens from logits, in passes that stay in the cache and without a copy of the logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_logprobs(logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T) at the tokens that were sampled, [b, r], float32, nats.

    Row by row: the largest tensors of PPO are its logits [b, r, vocabulary], and softmax over them is bound by memory. A row
    at a time stays in the cache of a CPU, nothing of that size is kept beside the logits themselves, and the gradient
    d log p_i / d z_j = (1[i = j] - softmax(z)_j) / T is written once instead of being added up from four operations.
    Log-sum-exp is taken in float32 for 16-bit logits too.

    Args:
        logits: [b, r', v] with r' ≥ r; what follows the first r positions is not read (the logits after the last token).
        token_ids: [b, r].
        temperature: of the sampling, > 0.
    """
    result: Tensor = _TokenLogprobs.apply(logits, token_ids, temperature)
    return result


@torch.no_grad()
def token_entropy(logits: Tensor, length: int, *, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / T) at the first `length` positions, [b, length], float32, nats; without gradient."""
    rows = []
    for row in logits[:, :length]:
        log_softmax = torch.log_softmax(row.float() / temperature, dim=-1)
        rows.append(-(log_softmax.exp() * log_softmax).sum(dim=-1))
    return torch.stack(rows)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
        length = token_ids.shape[1]
        found = torch.empty(token_ids.shape, dtype=torch.float32, device=logits.device)
        normalizer = torch.empty_like(found)
        for index, (row, ids) in enumerate(zip(logits[:, :length], token_ids, strict=True)):
            scaled = _scaled(row, temperature)
            normalizer[index] = torch.logsumexp(scaled, dim=-1)
            found[index] = scaled.gather(-1, ids[:, None]).squeeze(-1) - normalizer[index]
        ctx.save_for_backward(logits, token_ids, normalizer)
        ctx.temperature = temperature
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, token_ids, normalizer = ctx.saved_tensors
        length = token_ids.shape[1]
        scale = grad / ctx.temperature
        result = torch.empty_like(logits)
        result[:, length:] = 0
        for index, row in enumerate(logits[:, :length]):
            in_place = result[index, :length] if result.dtype == torch.float32 else None
            softmax = torch.sub(_scaled(row, ctx.temperature), normalizer[index][:, None], out=in_place).exp_()
            softmax.mul_(-scale[index][:, None])
            softmax.scatter_add_(-1, token_ids[index][:, None], scale[index][:, None])
            if in_place is None:
                result[index, :length] = softmax
        return result, None, None


def _scaled(row: Tensor, temperature: float) -> Tensor:
    row = row.float()
    return row if temperature == 1.0 else row / temperature
