"""Log-probabilities of sampled tokens from logits, in passes that stay in the cache and without a copy of the logits."""

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ELEMENTS_AT_ONCE = 2**20  # 4 MB of float32: what a core's cache holds


def token_logprobs(logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / T) at the tokens that were sampled, [b, r], float32, nats.

    A few rows at a time: the largest tensors of PPO are its logits [b, r, vocabulary], and softmax over them is bound by memory.
    The rows at work stay in the cache of a CPU, nothing of the logits' size is kept beside them, and the gradient
    d log p_i / d z_j = (1[i = j] - softmax(z)_j) / T is written once instead of being added up from four operations.
    Log-sum-exp is taken in float32 for 16-bit logits too.

    Args:
        logits: [b, r', v] with r' ≥ r; what follows the first r positions is not read (the logits after the last token).
        token_ids: [b, r].
        temperature: of the sampling, > 0.
    """
    result: Tensor = _TokenLogprobs.apply(logits, token_ids, temperature)
    return result


class Surprise(NamedTuple):
    """Moments of the surprise -log π(a) of a token a that is drawn from π, at every position.

    Attributes:
        entropy: [b, r] the mean, nats.
        variance: [b, r] nats².
        third: [b, r] the third central moment, nats³.
    """

    entropy: Tensor
    variance: Tensor
    third: Tensor


class ExpectedCounts(NamedTuple):
    """Where the expected counts of tokens are added up, for groups of rows or places.

    Attributes:
        weights: [b, groups, r] how much each place counts in each group; 0 at padding.
        sums: [groups, v] Σ over places of weight · π(token), float64; grows in place.
    """

    weights: Tensor
    sums: Tensor


@torch.no_grad()
def token_surprise(
    logits: Tensor, length: int, *, temperature: float = 1.0, expected: ExpectedCounts | None = None
) -> Surprise:
    """Return the moments of the surprise under softmax(logits / T) at the first `length` positions, float32, no gradient.

    With s = -log π: entropy = E[s], variance = E[s²] - E[s]², third = E[s³] - 3 E[s] E[s²] + 2 E[s]³, in passes over a few
    rows that stay in the cache. The probabilities that pass are added up in `expected`, where it is given.

    >>> surprise = token_surprise(torch.zeros(1, 1, 4), 1)
    >>> round(surprise.entropy.item(), 4), round(abs(surprise.variance.item()), 4)
    (1.3863, 0.0)
    """
    parts = []
    for rows in _few_rows(logits):
        log_softmax = torch.log_softmax(logits[rows, :length].float() / temperature, dim=-1)
        weighted = log_softmax.exp()
        if expected is not None:
            places = expected.weights[rows].transpose(0, 1).flatten(1)
            with torch.autocast(logits.device.type, enabled=False):  # it would round the sums to 16 bits
                expected.sums.add_(places.to(weighted) @ weighted.flatten(0, 1))
        moments = []
        for _ in range(3):
            weighted.mul_(log_softmax)
            moments.append(weighted.sum(dim=-1))
        first, second, third = -moments[0], moments[1], -moments[2]
        parts.append((first, (second - first**2).clamp(min=0), third - 3 * first * second + 2 * first**3))
    return Surprise(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _TokenLogprobs(torch.autograd.Function):
    """log softmax at given tokens, with a gradient of its own: the logits are all that is kept for it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
        length = token_ids.shape[1]
        logprobs = torch.empty(token_ids.shape, dtype=torch.float32, device=logits.device)
        normalizer = torch.empty_like(logprobs)
        for rows in _few_rows(logits):
            scaled = _scaled(logits[rows, :length], temperature)
            normalizer[rows] = torch.logsumexp(scaled, dim=-1)
            logprobs[rows] = scaled.gather(-1, token_ids[rows, :, None]).squeeze(-1) - normalizer[rows]
        ctx.save_for_backward(logits, token_ids, normalizer)
        ctx.temperature = temperature
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, token_ids, normalizer = ctx.saved_tensors
        length = token_ids.shape[1]
        scale = grad / ctx.temperature
        result = torch.empty_like(logits)
        result[:, length:] = 0
        for rows in _few_rows(logits):
            in_place = result[rows, :length] if result.dtype == torch.float32 else None
            scaled = _scaled(logits[rows, :length], ctx.temperature)
            softmax = torch.sub(scaled, normalizer[rows, :, None], out=in_place).exp_()
            softmax.mul_(-scale[rows, :, None])
            softmax.scatter_add_(-1, token_ids[rows, :, None], scale[rows, :, None])
            if in_place is None:
                result[rows, :length] = softmax
        return result, None, None


def _few_rows(logits: Tensor) -> Iterator[slice]:
    """Cut the rows into slices that fit in a core's cache."""
    step = max(1, ELEMENTS_AT_ONCE // max(1, logits[0].numel()))
    return (slice(start, start + step) for start in range(0, len(logits), step))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return logits / T in float32, without a copy where there is nothing to do."""
    logits = logits.float()
    return logits if temperature == 1.0 else logits / temperature


def position_ids(attention_mask: Tensor) -> Tensor:
    """Return positions [b, t] that do not count padding on the left; padding itself gets 0.

    >>> position_ids(torch.tensor([[0, 0, 1, 1, 1]]))
    tensor([[0, 0, 0, 1, 2]])
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def response_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_length: int) -> Tensor:
    """Return the logits [b, r + 1, vocabulary] from which the last r = `response_length` tokens were sampled, and one beyond.

    Args:
        model: a causal model, with or without an adapter.
        input_ids, attention_mask: [b, t], padding on either side.
    """
    arguments: dict[str, Any] = {}
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    keeps_last = "logits_to_keep" in inspect.signature(inner.forward).parameters
    if keeps_last:
        arguments["logits_to_keep"] = response_length + 1
    logits: Tensor = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
        **arguments,
    ).logits
    return logits if keeps_last else logits[:, -response_length - 1 :]


def response_logprobs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_length: int, temperature: float
) -> Tensor:
    """Return the log-probability [b, r] of the last r = `response_length` tokens, nats, at the sampling temperature."""
    logits = response_logits(model, input_ids, attention_mask, response_length)
    return token_logprobs(logits, input_ids[:, -response_length:], temperature=temperature)
