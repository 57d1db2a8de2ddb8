"""`TextRewardTrainer`: GRM (arXiv:2406.10216), a reward model whose states must go on writing the chosen answers."""

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from trl import RewardConfig

from rlhf.errors import UserError
from rlhf.models.scalar_head import score_head
from rlhf.objectives.text import mixed, text_loss
from rlhf.recipe.objectives import EXTRAS
from rlhf.reward.answer_logprobs import AnswerLogprobsRewardTrainer
from rlhf.reward.trainer import Scored


class TextRewardTrainer(AnswerLogprobsRewardTrainer):
    """Any pair loss of `PairRewardTrainer`, and GRM's text regularisation: (1 - α) L_pair - α log σ(β log π(y_c | x)).

    log π is what a language model's output layer says of the chosen answer, read from the very states that the reward head
    reads. That layer is the SFT model's own (`rlhf.models.heads.language_head`) and is not trained, so it is no part of what
    is saved: an ordinary reward model. Both losses are of a pair, so the global division holds for their sum.

    Args:
        language_head: a causal model of which the output layer is read.
        extra_weight: α, a share in [0, 1); the paper's is 0.01.
        beta: β.

    Raises:
        UserError: an encoder, which writes no text; a share that leaves no pair loss.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        extra_weight: float | None = None,
        beta: float = 0.1,
        **arguments: Any,
    ):
        if score_head(model) is None:
            raise UserError("reward.extra: an encoder writes no text, so `text` has nothing to keep; leave it out.")
        share = EXTRAS["text"].weight if extra_weight is None else extra_weight
        if not 0 <= share < 1:
            raise UserError(f"reward.extra_weight is {share}: of `text` it is a share of the loss, in [0, 1).")
        super().__init__(model, args, **arguments)
        self.text_share, self.beta = share, beta

    def losses(self, scored: Scored, columns: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each pair, [b] nats; of held-out pairs the pair loss alone."""
        losses = super().losses(scored, columns, inputs)
        if scored.states is None:
            return losses
        logprobs = self.answer_logprobs("chosen", scored, inputs)
        self._metrics["train"]["logprobs_chosen"].append(logprobs.mean().item())
        text_losses = columns.get("weight", 1.0) * text_loss(logprobs, beta=self.beta)
        return mixed(losses, text_losses, share=self.text_share)
