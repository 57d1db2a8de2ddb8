"""Log-probabilities of sampled tokens from logits, in passes that stay in the cache and without a copy of the logits."""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from rlhf.models.unpadded import position_ids, token_states
from rlhf.objectives.intrinsic import self_certainty

ELEMENTS_AT_ONCE = 2**20  # 4 MB of float32: what a core's cache holds
LOGITS_AT_ONCE = 2**24  # 64 MB of float32: 341 places of a vocabulary of 49,152


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
    """Moments of the surprise -log π(a) of a token a that is drawn from π, at every position, and how far π is from uniform.

    Attributes:
        entropy: [b, r] the mean, nats.
        variance: [b, r] nats².
        third: [b, r] the third central moment, nats³.
        certainty: [b, r] KL(U || π), nats (`rlhf.objectives.intrinsic.self_certainty`).
    """

    entropy: Tensor
    variance: Tensor
    third: Tensor
    certainty: Tensor


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
        certainty = self_certainty(log_softmax)
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
        parts.append((first, (second - first**2).clamp(min=0), third - 3 * first * second + 2 * first**3, certainty))
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


class AnswerStatistics(NamedTuple):
    """What a causal model says of the tokens of answers; nothing that means anything at padding.

    Attributes:
        logprobs: [b, r] log π(token), nats, at the sampling temperature.
        surprise: moments of -log π; None unless asked for.
    """

    logprobs: Tensor
    surprise: Surprise | None


def response_logprobs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_length: int, temperature: float
) -> Tensor:
    """Return the log-probability [b, r] of the last r = `response_length` tokens, nats, at the sampling temperature."""
    return response_statistics(model, input_ids, attention_mask, response_length, temperature).logprobs


def response_statistics(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_length: int,
    temperature: float,
    *,
    moments: bool = False,
    expected: ExpectedCounts | None = None,
) -> AnswerStatistics:
    """Return log-probabilities of the last r = `response_length` tokens, and the moments of their surprise.

    Padding is read by neither the decoder nor the output layer. Where the logits of all answers would take more than
    `LOGITS_AT_ONCE`, the output layer reads a part of the tokens at a time; with gradients, a part's logits are computed a second
    time in the backward pass instead of being kept.

    Args:
        model: a causal model, with or without an adapter.
        input_ids, attention_mask: [b, t], padding on either side.
        moments: also return the surprise; without gradients.
        expected: where the expected counts of tokens are added up, with `moments`.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    ids = input_ids[:, -response_length:]
    if not reads_states(inner):
        logits = response_logits(model, input_ids, attention_mask, response_length)
        logprobs = token_logprobs(logits, ids, temperature=temperature)
        if not moments:
            return AnswerStatistics(logprobs, None)
        surprise = token_surprise(logits, response_length, temperature=temperature, expected=expected)
        return AnswerStatistics(logprobs, surprise)

    # 1. The state before each of the n tokens of answers, and the token.
    is_token = attention_mask.bool()
    keep, tokens = is_token[:, -response_length:], ids[is_token[:, -response_length:]]
    number = is_token.flatten().cumsum(dim=0).view_as(is_token) - 1
    states = token_states(getattr(inner, inner.base_model_prefix), input_ids, attention_mask)
    states = states[number[:, -response_length - 1 : -1][keep]]

    # 2. The model's own way from states to logits, so many tokens at a time, each a row of its own.
    weights = torch.empty(0) if expected is None else expected.weights.transpose(1, 2)[keep][:, :, None]

    def part_columns(part: Tensor, rows: slice) -> tuple[Tensor, ...]:
        logits = logits_of_states(inner, part[:, None])
        columns: tuple[Tensor, ...] = (token_logprobs(logits, tokens[rows, None], temperature=temperature),)
        if moments:
            counts = None if expected is None else ExpectedCounts(weights[rows], expected.sums)
            columns += token_surprise(logits, 1, temperature=temperature, expected=counts)
        return tuple(column[:, 0] for column in columns)

    parts: list[tuple[Tensor, ...]] = []
    size = max(1, LOGITS_AT_ONCE // inner.config.get_text_config().vocab_size)
    for rows in (slice(start, start + size) for start in range(0, len(tokens), size)):
        if torch.is_grad_enabled() and len(tokens) > size:
            parts.append(checkpoint(part_columns, states[rows], rows, use_reentrant=False))
        else:
            parts.append(part_columns(states[rows], rows))

    # 3. Back to their places.
    def placed(values: Sequence[Tensor]) -> Tensor:
        return states.new_zeros(keep.shape, dtype=torch.float32).masked_scatter(keep, torch.cat(list(values)))

    logprobs, *rest = (placed(column) for column in zip(*parts, strict=True))
    return AnswerStatistics(logprobs, Surprise(*rest) if rest else None)


@dataclass
class _DecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Every field that a causal model's forward asks its decoder for."""

    router_logits: tuple[Tensor, ...] | None = None


class _StatesInstead(nn.Module):
    """Stands in for a decoder for a moment: whatever is asked, these states are the answer."""

    def __init__(self, states: Tensor):
        super().__init__()
        self.states = states

    def forward(self, *_: object, **__: object) -> _DecoderOutput:
        """Return the states as a decoder returns its own."""
        return _DecoderOutput(last_hidden_state=self.states)


def logits_of_states(inner: Any, states: Tensor) -> Tensor:
    """Return the logits [b, r, vocabulary] that a causal model makes of its decoder's last states [b, r, hidden].

    The model's own forward makes them, so scaled and softly capped logits are what they are in that architecture.
    """
    decoder = getattr(inner, inner.base_model_prefix)
    setattr(inner, inner.base_model_prefix, _StatesInstead(states))
    try:
        logits: Tensor = type(inner).forward(inner, inputs_embeds=states, use_cache=False).logits
    finally:
        setattr(inner, inner.base_model_prefix, decoder)
    return logits


def logprobs_of_states(inner: Any, states: Tensor, tokens: Tensor) -> Tensor:
    """Return log π(token) [n], nats, from the decoder's states before each token, [n, hidden], a part of them at a time.

    A part's logits are computed a second time in the backward pass instead of being kept.

    Args:
        inner: a causal model that `reads_states`; of it the output layer alone is used.
        tokens: [n].
    """

    def part_logprobs(part: Tensor, part_tokens: Tensor) -> Tensor:
        return token_logprobs(logits_of_states(inner, part[None]), part_tokens[None])[0]

    size = max(1, LOGITS_AT_ONCE // inner.config.get_text_config().vocab_size)
    parts = zip(states.split(size), tokens.split(size), strict=True)
    return torch.cat([checkpoint(part_logprobs, *part, use_reentrant=False) for part in parts])


@torch.no_grad()
def reads_states(inner: Any) -> bool:
    """Tell whether a causal model's forward asks its decoder for states and makes logits of them, and of nothing else.

    Found out once for each class, with a state of zeros: some forwards reach into their decoder, which a stand-in does not have.
    Those are warned of once.
    """
    kind = type(inner)
    if kind not in _READS_STATES:
        try:
            weight = inner.get_output_embeddings().weight
            states = torch.zeros(1, 1, weight.shape[1], device=weight.device, dtype=weight.dtype)
            logits = logits_of_states(inner, states)
            _READS_STATES[kind] = logits.shape[:2] == (1, 1)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            _READS_STATES[kind] = False
        if not _READS_STATES[kind]:
            warnings.warn(
                f"{kind.__name__}: its forward needs more than the decoder's last states, so log-probabilities are not made "
                "in parts: the logits of a whole batch are in memory at once.",
                stacklevel=2,
            )
    return _READS_STATES[kind]


_READS_STATES: dict[type, bool] = {}


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
