"""What `rlhf doctor` checks of a policy's answers: were they sampled from it, and does it say the same of them again?"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.invariants.checks import Check
from rlhf.invariants.forward import batched_forward
from rlhf.invariants.ratio import check_ratio, largest_ratio_deviation
from rlhf.invariants.sampler import (
    ROUNDING,
    MomentSums,
    check_counts,
    check_sampler,
    count_sums,
    halves_of_rows,
    sampled_counts,
    surprise_sums,
)
from rlhf.models.dropout import switch_off_dropout
from rlhf.models.generate import Completions
from rlhf.models.load import computed_dtype
from rlhf.models.logprobs import ExpectedCounts, response_logprobs, response_statistics
from rlhf.pipeline.affordable import FEW
from rlhf.ppo.config import PPOConfig


def _few_rows(completions: Completions) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield whole texts, their masks, the answers and their masks, [8, …] each: logits of more rows take much memory."""
    ids = torch.cat([completions.prompt_ids, completions.response_ids], dim=1)
    mask = torch.cat([completions.prompt_mask, completions.response_mask], dim=1)
    columns = (ids, mask, completions.response_ids, completions.response_mask)
    yield from zip(*(column.split(FEW) for column in columns), strict=True)


def sampling_checks(model: PreTrainedModel, completions: Sequence[Completions], temperature: float) -> list[Check]:
    """Return the checks "sampler true" and "token counts true" of some rollouts as one."""
    surprise, vocabulary = torch.zeros(4, dtype=torch.float64), model.config.get_text_config().vocab_size
    sampled, expected = torch.zeros(2, 2, vocabulary, dtype=torch.float64, device=model.device)
    for rollout in completions:
        for ids, mask, answers, answer_mask in _few_rows(rollout):
            length = answers.shape[1]
            counts = ExpectedCounts(halves_of_rows(answer_mask), expected)
            logprobs, moments = response_statistics(
                model, ids, mask, length, temperature, moments=True, expected=counts
            )
            assert moments is not None, "asked for"
            surprise += surprise_sums(logprobs, *moments[:3], answer_mask).cpu()
            sampled += sampled_counts(answers, answer_mask, vocabulary)
    rounding = ROUNDING[computed_dtype(model)]
    return [
        check_sampler(MomentSums(*surprise.tolist()), tests=2, rounding=rounding),
        check_counts(count_sums(sampled, expected), tests=2, rounding=rounding),
    ]


def forward_checks(model: PreTrainedModel, completions: Completions, args: PPOConfig) -> list[Check]:
    """Return the checks of one batch of answers: each alone, and all of them a second time in training mode."""
    ids, mask, answers, answer_mask = next(_few_rows(completions))
    length, keep = answers.shape[1], answer_mask.bool()
    together = response_logprobs(model, ids, mask, length, args.temperature)
    alone = []
    for row, seen, answered in zip(ids, mask.bool(), keep, strict=True):
        text = row[seen][None]
        logprobs = response_logprobs(model, text, torch.ones_like(text), int(answered.sum()), args.temperature)
        alone.append(logprobs[0])
    checks = [batched_forward(torch.cat(alone), together[keep], dtype=computed_dtype(model))]
    if args.disable_dropout:
        switch_off_dropout(model)
        model.train()
        again = response_logprobs(model, ids, mask, length, args.temperature)
        model.eval()
        checks.append(check_ratio(largest_ratio_deviation(again, together, keep).item(), computed_dtype(model)))
    return checks
