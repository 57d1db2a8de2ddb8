"""`LengthRewardTrainer`: ODIN (arXiv:2402.07319), a quality head that knows nothing of length, and a length head to take it up."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from trl import RewardConfig

from rlhf.models.heads import label_layer
from rlhf.objectives.length import correlation, length_gradient, overlap
from rlhf.recipe.objectives import EXTRAS
from rlhf.reward.answer_tokens import TOKENS, AnswerTokensRewardTrainer
from rlhf.reward.merged import MergedHeadRewardTrainer
from rlhf.reward.trainer import Scored

HEADS = ("quality", "length")


class LengthRewardTrainer(MergedHeadRewardTrainer, AnswerTokensRewardTrainer):
    """Any pair loss of `PairRewardTrainer` on r_Q + r_L, and ODIN's terms: L_pair + λ (L_L + L_O).

    L_L is a correlation with length over all answers of an optimizer step, each counted once for every pair that it is in, so
    it is no mean over pairs. Its value and its derivatives by every reward are computed once, from the rewards of all
    micro-batches and processes; each micro-batch then adds Σ g_i r_i over its own answers. So 1 x 16, 4 x 4 and two ranks
    x 8 give the same gradient. With accumulation the rewards are computed twice, the first time without gradients: training
    takes about a third longer, and dropout, where it is on, differs between the two.

    The model's head has the labels of `HEADS`; held-out pairs are compared by quality alone, and `merge_head` keeps nothing else.

    Args:
        extra_weight: λ; the paper's is 1 for both terms.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        extra_weight: float | None = None,
        **arguments: Any,
    ):
        super().__init__(model, args, labels=len(HEADS), **arguments)
        self.extra_weight = EXTRAS["length"].weight if extra_weight is None else extra_weight
        self._computed_before: deque[tuple[Tensor, Tensor]] = deque()

    def label_weights(self) -> Tensor:
        """Return the weight of each head in the score: quality alone."""
        return torch.tensor([1.0, 0.0])

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return all micro-batches of one optimizer step; with several, the correlation over all of them is computed first."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and num_batches > 1:
            # A resumed Trainer restores the random state only after this.
            with torch.no_grad(), torch.random.fork_rng(), self.compute_loss_context_manager():
                torch.manual_seed(self.args.seed + self.state.global_step)
                self.model.train()
                scored = [
                    self._by_pair(self.scored(self.model, batch), batch) for batch in map(self._prepare_inputs, batches)
                ]
            self._computed_before.extend(self._length_terms(scored))
        return batches, count

    def losses(self, scored: Scored, columns: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the pair loss of each pair, [b] nats, and in training the terms, of which every pair carries the same value."""
        if not self.model.training:
            return super().losses(replace(scored, rewards=self.scores_of(scored.rewards)), columns, inputs)
        losses = super().losses(replace(scored, rewards=scored.rewards.sum(dim=1)), columns, inputs)
        both, lengths = self._by_pair(scored, inputs)
        if not self._computed_before:
            self._computed_before.extend(self._length_terms([(both.detach(), lengths)]))
        value, gradients = self._computed_before.popleft()
        # The losses are divided by the number of pairs; the derivatives are of the whole step already.
        by_pair = (gradients * both).sum(dim=(1, 2))
        between = overlap(label_layer(self.model, len(HEADS)).weight.float())
        self._metrics["train"]["head_overlap"].append(between.item())
        return losses + value + (by_pair - by_pair.detach()) + self.extra_weight * between

    def _by_pair(self, scored: Scored, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what both heads say of the answers of each pair, [b, 2, 2], and the answers' lengths, [b, 2]."""
        return scored.rewards[scored.pairs], torch.stack([inputs[name] for name in TOKENS], dim=1)

    def _length_terms(self, parts: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Return λ L_L of a step, and N λ ∂L_L/∂r for the answers of each of this process's parts, [b, 2, 2]; N pairs in all.

        Args:
            parts: of this process: what both heads say, [b, 2, 2], and the lengths, [b, 2].
        """
        # 1. All answers of all processes, which may have different numbers of pairs.
        rows = torch.cat([torch.cat([both.flatten(0, 1), n.flatten()[:, None]], dim=1) for both, n in parts])
        padded = self.accelerator.pad_across_processes(rows, dim=0, pad_index=float("nan"))
        everyone = self.accelerator.gather(padded)
        is_there = ~everyone.isnan().any(dim=1)

        # 2. The correlations, and their derivatives, again in everybody's places.
        quality, length, tokens = everyone[is_there].unbind(dim=1)
        value, gradients = length_gradient(quality, length, tokens, weight=self.extra_weight)
        metrics = self._metrics["train"]
        metrics["length_in_quality"].append(correlation(quality, tokens).item())
        metrics["length_in_length"].append(correlation(length, tokens).item())
        places = torch.zeros(len(everyone), 2, device=everyone.device)
        places[is_there] = gradients * (len(quality) / 2)

        # 3. Those of this process, part by part.
        start = self.accelerator.process_index * len(padded)
        counts = [both.shape[0] for both, _ in parts]
        by_pair = places[start : start + len(rows)].reshape(-1, 2, 2)
        return [(value, part) for part in by_pair.split(counts)]
