"""`TextRewardTrainer`: GRM (arXiv:2406.10216), a reward model whose states must go on writing the chosen answers."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import RewardConfig

from rlhf.errors import UserError
from rlhf.models.load import score_head
from rlhf.models.logprobs import logprobs_of_states
from rlhf.models.packing import Packed, tokens_read, unpack
from rlhf.objectives.text import mixed, text_loss
from rlhf.recipe.objectives import EXTRAS
from rlhf.reward.answer_tokens import AnswerTokensRewardTrainer
from rlhf.reward.contrastive import head_input
from rlhf.reward.trainer import Scored


class TextRewardTrainer(AnswerTokensRewardTrainer):
    """Any pair loss of `PairRewardTrainer`, and GRM's text regularisation: (1 - α) L_pair - α log σ(β log π(y_c | x)).

    log π is what a language model's output layer says of the chosen answer, read from the very states that the reward head
    reads. That layer is the SFT model's own (`rlhf.models.heads.language_head`) and is not trained, so it is no part of what
    is saved: an ordinary reward model. Both losses are of a pair, so the global division holds for their sum.

    Args:
        language_head: a causal model of which the output layer is read.
        extra_weight: α; the paper's is 0.01.
        beta: β.

    Raises:
        UserError: an encoder, which writes no text.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        language_head: PreTrainedModel,
        extra_weight: float | None = None,
        beta: float = 0.1,
        **arguments: Any,
    ):
        if score_head(model) is None:
            raise UserError("reward.extra: an encoder writes no text, so `text` has nothing to keep; leave it out.")
        super().__init__(model, args, **arguments)
        self.language_head = language_head.to(self.args.device)
        self.text_share, self.beta = EXTRAS["text"].weight if extra_weight is None else extra_weight, beta

    def scored(self, model: nn.Module, inputs: dict[str, Any]) -> Scored:
        """Score a batch's answers; in training with the states that the head reads."""
        if not self.model.training:
            return super().scored(model, inputs)
        with head_input(self.model) as head_inputs:
            scored = super().scored(model, inputs)
        return replace(scored, states=head_inputs[-1])

    def losses(self, scored: Scored, columns: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each pair, [b] nats; of held-out pairs the pair loss alone."""
        losses = super().losses(scored, columns, inputs)
        if scored.states is None:
            return losses
        logprobs = self._logprobs_chosen(scored, scored.states, inputs)
        self._metrics["train"]["logprobs_chosen"].append(logprobs.mean().item())
        return mixed(losses, text_loss(logprobs, beta=self.beta), share=self.text_share)

    def _logprobs_chosen(self, scored: Scored, states: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return log π of each pair's chosen answer, [b] nats, its end token included.

        Args:
            states: [rows, t, h] what the head reads, of packed rows or of answers each by itself.
        """
        # 1. Where each chosen answer lies: its row, and the columns of prompt and answer.
        ids, all_places = self._tokens_read(inputs)
        places = [all_places[answer] for answer in scored.pairs[:, 0].tolist()]

        # 2. Its tokens, and the state before each; a prompt of no token leaves the first one out.
        counts = [min(int(n), len(c) - 1) for n, (_, c) in zip(inputs["chosen_tokens"].tolist(), places, strict=True)]
        tokens = torch.cat([ids[row, columns[-n:]] for n, (row, columns) in zip(counts, places, strict=True)])
        before = torch.cat(
            [states[row, columns[-n - 1 : -1]] for n, (row, columns) in zip(counts, places, strict=True)]
        )

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
