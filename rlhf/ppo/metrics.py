"""Numbers for people: sums over answers and tokens, taken as means over all processes when something is logged."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.models.generate import Completions
from rlhf.objectives.kl import kl_k3
from rlhf.ppo.rollout import Experience, distinct_pairs


class Meter:
    """Means of whatever is counted between two logs. Counting waits for nobody; taking is done by all processes together."""

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self._sums: dict[str, list[float]] = {}

    def count(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add to the sum and to the number of a metric."""
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += float(total)
        entry[1] += float(count)

    def take(self) -> dict[str, float]:
        """Means of everything counted since the last time, over all processes."""
        names = sorted(self._sums)
        table = torch.tensor([self._sums[name] for name in names], dtype=torch.float64, device=self.accelerator.device)
        self._sums.clear()
        if not names:
            return {}
        table = self.accelerator.reduce(table, reduction="sum")
        return {name: (row[0] / row[1]).item() for name, row in zip(names, table, strict=True) if row[1] > 0}

    def count_experience(
        self,
        seen: Experience,
        completions: Completions,
        *,
        raw: Tensor,
        shaped: Tensor,
        at_clip: Tensor | None,
        disagreement: Tensor | None,
        longest_prompt: int | None,
        monitored: Mapping[str, Sequence[float]],
    ) -> None:
        """Everything that a log says of sampled answers.

        Args:
            raw, shaped: [b] score of the first source, and what is optimised.
            at_clip: [b] which scores were cut to the bound, if there is one.
            disagreement: [b] between the members of an ensemble, if there is one.
            longest_prompt: tokens a prompt may have.
            monitored: what the monitoring functions say, by name.
        """
        mask, rows = seen.response_mask, len(raw)

        def masked(values: Tensor) -> Tensor:
            return torch.where(mask.bool(), values, torch.zeros_like(values)).sum()

        # 1. Of answers.
        self.count("reward_proxy", raw.sum(), rows)
        self.count("reward", shaped.sum(), rows)
        self.count("kl", masked(seen.kl), rows)
        self.count("kl_k3", masked(kl_k3(seen.outputs.logprobs, seen.logprobs_reference)), rows)
        self.count("length", mask.sum(), rows)
        self.count("share_without_eos", (~completions.ended).sum(), rows)
        if longest_prompt is not None:
            self.count("prompts_cut", (completions.prompt_mask.sum(dim=1) >= longest_prompt).sum(), rows)
        if at_clip is not None:
            self.count("clipped_rewards", at_clip.sum(), rows)
        if disagreement is not None:
            self.count("disagreement", disagreement.sum(), rows)
        for name, values in monitored.items():
            self.count(f"reward_{name}", sum(values), len(values))

        # 2. Of tokens.
        self.count("entropy", (seen.outputs.entropy * mask).sum(), mask.sum())
        self.count("nll_reference", -masked(seen.logprobs_reference), mask.sum())
        self.count("distinct_2", *distinct_pairs(completions.response_ids, mask))
        if completions.logprobs_sampler is not None:
            self.count(
                "sampler_difference", masked((seen.outputs.logprobs - completions.logprobs_sampler).abs()), mask.sum()
            )
