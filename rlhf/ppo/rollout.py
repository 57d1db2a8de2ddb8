"""One rollout: sample answers, score them, and work out what each token was worth."""

from dataclasses import dataclass, fields
from typing import NamedTuple, NotRequired, TypedDict, cast

import torch
from torch import Tensor

from rlhf.data.rows import Prompt
from rlhf.ppo.roles import TokenOutputs


class PromptRow(TypedDict):
    """A row of the training data: a prompt, and beside it any other columns, which reach the reward functions."""

    prompt: Prompt


class MicroBatch(TypedDict):
    """Rows of a `Rollout` as a Trainer's batch, named and shaped as there, without columns that are padding in all of them.

    `roles` names those that a forward is for, where it is not for all that are trained.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    logprobs_old: Tensor
    logprobs_reference: Tensor
    values_old: Tensor
    advantages: Tensor
    returns: Tensor
    sampler_weights: Tensor
    roles: NotRequired[tuple[str, ...]]


class Experience(NamedTuple):
    """Sampled answers and what every role says of them, on one process.

    Attributes:
        input_ids, attention_mask: [b, p + r] prompt (left-padded) and answer (right-padded).
        response_mask: [b, r] 1 on the answer's tokens, its end token included.
        scores: [b] all sources as one, before shaping and KL.
        dense: [b, r] rewards of single tokens, of the sources and of PPO's own (`rlhf.ppo.token_rewards`); 0 elsewhere.
        ended: [b] bool, whether the answer stopped by itself.
        kl: [b, r] k1 of each token, nats.
        outputs: policy and critic.
        logprobs_reference: [b, r] nats.
        sampler_weights: [b, r] how much each token counts; 1 unless another engine sampled it.
        expected_counts: [2, v] how often the policy has each token, summed over the even rows' places and the odd ones'.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    scores: Tensor
    dense: Tensor
    ended: Tensor
    kl: Tensor
    outputs: TokenOutputs
    logprobs_reference: Tensor
    sampler_weights: Tensor
    expected_counts: Tensor


@dataclass
class Rollout:
    """A batch of experience. Prompts are padded on the left, answers on the right; masks are explicit everywhere.

    Attributes:
        input_ids, attention_mask: [b, p + r] prompt and answer.
        response_mask: [b, r] 1 on the answer's tokens, its end token included.
        logprobs_old, logprobs_reference: [b, r] nats, at the sampling temperature.
        values_old: [b, r] V before each token, normalised score units.
        advantages, returns: [b, r] normalised score units (advantages whitened, where asked for).
        sampler_weights: [b, r] how much each token counts in the policy's loss.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    logprobs_old: Tensor
    logprobs_reference: Tensor
    values_old: Tensor
    advantages: Tensor
    returns: Tensor
    sampler_weights: Tensor

    def rows(self, index: Tensor) -> MicroBatch:
        """Return the named rows without the columns that are padding in all of them."""
        columns = {field.name: getattr(self, field.name)[index] for field in fields(self)}
        prompt, answer = used_columns(columns["attention_mask"], columns["response_mask"])
        whole_texts = {
            name: columns.pop(name)[:, prompt.start : answer.stop] for name in ("input_ids", "attention_mask")
        }
        width = answer.stop - prompt.stop
        return cast(MicroBatch, whole_texts | {name: column[:, :width] for name, column in columns.items()})


def used_columns(attention_mask: Tensor, response_mask: Tensor) -> tuple[slice, slice]:
    """Return the columns of prompt and answer that are not padding in every row.

    >>> used_columns(torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]]), torch.tensor([[1, 0, 0], [1, 1, 0]]))
    (slice(1, 3, None), slice(3, 5, None))
    """
    prompt_length = attention_mask.shape[1] - response_mask.shape[1]
    begin = int(attention_mask[:, :prompt_length].amax(dim=0).argmax())
    longest = int(response_mask.sum(dim=1).amax())
    return slice(begin, prompt_length), slice(prompt_length, prompt_length + longest)


@dataclass
class Sample:
    """One answer as a person reads it, with its raw scores."""

    prompt: Prompt
    completion: str
    proxy: float
    gold: float | None
    kl: float
    ended: bool

    def as_row(self) -> dict[str, object]:
        """Return it as a row of `samples.jsonl`."""
        return dict(self.__dict__)


def distinct_pairs(response_ids: Tensor, response_mask: Tensor) -> tuple[int, int]:
    """Count the different pairs of neighbouring tokens in some answers, and all pairs.

    >>> distinct_pairs(torch.tensor([[7, 7, 7], [7, 8, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]))
    (2, 3)
    """
    both = response_mask[:, 1:].bool() & response_mask[:, :-1].bool()
    pairs = torch.stack([response_ids[:, :-1][both], response_ids[:, 1:][both]], dim=1)
    return len(torch.unique(pairs, dim=0)), len(pairs)


def shuffled_minibatches(size: int, minibatches: int, *, seed: int, rollout: int, epoch: int) -> list[Tensor]:
    """Cut a fresh permutation of a rollout's rows into equal minibatches; the same numbers give the same order.

    >>> [x.tolist() for x in shuffled_minibatches(4, 2, seed=0, rollout=0, epoch=0)] == [
    ...     x.tolist() for x in shuffled_minibatches(4, 2, seed=0, rollout=0, epoch=0)]
    True
    """
    assert size % minibatches == 0, "a rollout is a whole number of minibatches by construction"
    generator = torch.Generator().manual_seed(hash_seed(seed, rollout, epoch))
    return list(torch.randperm(size, generator=generator).chunk(minibatches))


def prompt_indices(dataset_size: int, rollout_size: int, *, seed: int, rollout: int) -> list[int]:
    """Choose the prompts of a rollout: passes over the data, each in an order of its own, cut into rollouts.

    The choice depends on (seed, rollout) alone, so a resumed run goes on exactly where the other stopped.

    Returns:
        row numbers of the training data, `rollout_size` of them.
    """
    indices: list[int] = []
    position = rollout * rollout_size
    while len(indices) < rollout_size:
        data_pass, offset = divmod(position + len(indices), dataset_size)
        generator = torch.Generator().manual_seed(hash_seed(seed, data_pass, -1))
        order = torch.randperm(dataset_size, generator=generator).tolist()
        indices += order[offset : offset + rollout_size - len(indices)]
    return indices


def hash_seed(*numbers: int) -> int:
    """Mix several numbers into one seed, the same on every machine and in every process."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = ((mixed ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed & 0x7FFFFFFFFFFFFFFF
