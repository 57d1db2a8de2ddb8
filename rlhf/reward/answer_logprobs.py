"""`AnswerLogprobsRewardTrainer`: what an output layer says of answers, read from the states that the reward head reads."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import RewardConfig

from rlhf.data.rows import SIDES, Side
from rlhf.models.logprobs import logprobs_of_states
from rlhf.models.packing import Packed, tokens_read, unpack
from rlhf.reward.answer_tokens import AnswerTokensRewardTrainer
from rlhf.reward.contrastive import head_input
from rlhf.reward.trainer import Scored


class AnswerLogprobsRewardTrainer(AnswerTokensRewardTrainer):
    """`AnswerTokensRewardTrainer` with an output layer beside the reward head: log π of answers, without a second forward.

    Args:
        language_head: a causal model of which the output layer is read.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        language_head: PreTrainedModel,
        **arguments: Any,
    ):
        super().__init__(model, args, **arguments)
        self.language_head = language_head.to(self.args.device)

    def scored(self, model: nn.Module, inputs: dict[str, Any]) -> Scored:
        """Score a batch's answers; in training with the states that the head reads."""
        if not self.model.training:
            return super().scored(model, inputs)
        with head_input(self.model) as head_inputs:
            scored = super().scored(model, inputs)
        return replace(scored, states=head_inputs[-1])

    def answer_logprobs(self, side: Side, scored: Scored, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return log π of one answer of each pair, [b] nats, its end token included.

        Args:
            scored: of a batch in training, with its states.
        """
        # 1. Where each answer lies: its row, and the columns of prompt and answer.
        states = scored.states
        assert states is not None, "a batch in training has them"
        ids, all_places = self._tokens_read(inputs)
        places = [all_places[answer] for answer in scored.pairs[:, SIDES.index(side)].tolist()]

        # 2. Its tokens, and the state before each; a prompt of no token leaves the first one out.
        counts = [min(int(n), len(c) - 1) for n, (_, c) in zip(inputs[f"{side}_tokens"].tolist(), places, strict=True)]
        # From the beginning, for an answer may have no token: one without text that was cut off.
        rows = [(row, columns, len(columns) - n) for n, (row, columns) in zip(counts, places, strict=True)]
        tokens = torch.cat([ids[row, columns[start:]] for row, columns, start in rows])
        before = torch.cat([states[row, columns[start - 1 : -1]] for row, columns, start in rows])

        # 3. Their log-probabilities, added up for each answer.
        dtype = self.language_head.dtype
        logprobs = logprobs_of_states(self.language_head, before.to(dtype), tokens)
        owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(logprobs.device)
        return logprobs.new_zeros(len(counts)).index_add(0, owner, logprobs)

    def _tokens_read(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        """Return token ids as they lay in the forward, and for each answer its row and the columns of what it reads."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if "segments" in inputs:
            packed = Packed(*(inputs[field.name] for field in fields(Packed)))
            if self._shares:
                return packed.input_ids, tokens_read(packed)
            ids, mask = unpack(packed, pad_token_id=0)
        assert mask is not None, "padded answers have one"
        return ids, [(row, is_read.nonzero()[:, 0]) for row, is_read in enumerate(mask)]
