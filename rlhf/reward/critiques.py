"""`CritiqueRewardTrainer`: Critique-out-Loud (arXiv:2408.11791), a score that is read behind a critique which the model writes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig

from rlhf.data.rows import CRITIQUES, SIDES
from rlhf.errors import UserError
from rlhf.models.critiques import critique_ids, request_ids, writer_on
from rlhf.models.scalar_head import score_head
from rlhf.objectives.critiques import critique_loss, joint_loss
from rlhf.recipe.objectives import EXTRAS
from rlhf.reward.answer_logprobs import AnswerLogprobsRewardTrainer
from rlhf.reward.answer_tokens import TOKENS
from rlhf.reward.trainer import PairRewardTrainer, Scored

ENDED = tuple(f"{name}_ended" for name in CRITIQUES)


class CritiqueRewardTrainer(AnswerLogprobsRewardTrainer):
    """Any pair loss of `PairRewardTrainer` on scores read at the end of critiques, and the loss of writing them: L_pair + λ L_LM.

    A row has `critique_chosen` and `critique_rejected`, and where it has `…_ended` too, that says whether each came to its end.
    An answer is followed by the turn that asks for its critique, and by that critique (`rlhf.models.critiques`).

    The language head's output layer becomes a part of the model: of a whole model it is trained, of an adapter it is the base's.

    Args:
        language_head: a causal model of which the output layer is taken (`rlhf.models.heads.language_head`).
        extra_weight: λ; the paper's is 1.25 for 8 B parameters and 0.75 for 70 B.

    Raises:
        UserError: an encoder, which writes no critique; pairs without critiques; FSDP.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        language_head: PreTrainedModel,
        extra_weight: float | None = None,
        **arguments: Any,
    ):
        if score_head(model) is None:
            raise UserError("reward.extra: an encoder writes no text, so it can't write a `critique`; leave it out.")
        for name in ("train_dataset", "eval_dataset"):
            dataset = arguments.get(name)
            if dataset is not None and not {*CRITIQUES} <= {*dataset.column_names}:
                raise UserError(
                    f"reward.extra: critique: the rows of {name} have no {' and '.join(CRITIQUES)}; give every pair both."
                )
        self.writer = writer_on(model, language_head)
        super().__init__(model, args, language_head=self.writer, **arguments)
        if self.is_fsdp_enabled:
            raise UserError("reward.extra: critique: FSDP shards the decoder that must write; use data parallelism.")
        self.extra_weight = EXTRAS["critique"].weight if extra_weight is None else extra_weight

    @staticmethod
    def tokenize(batch: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
        """Return a batch of pairs as token ids up to the end of each critique, and how many of them are the critique's."""
        answers, request = PairRewardTrainer.tokenize(batch, tokenizer), request_ids(tokenizer)
        rows: dict[str, list[Any]] = {}
        for side, critiques, ended, tokens in zip(SIDES, CRITIQUES, ENDED, TOKENS, strict=True):
            written = critique_ids(tokenizer, batch[critiques], batch.get(ended) or [True] * len(batch[critiques]))
            rows[f"{side}_ids"] = [
                [*answer, *request, *critique] for answer, critique in zip(answers[f"{side}_ids"], written, strict=True)
            ]
            rows[tokens] = [len(critique) for critique in written]
        return rows

    def losses(self, scored: Scored, columns: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each pair, [b] nats; of held-out pairs the pair loss alone."""
        losses = super().losses(scored, columns, inputs)
        if scored.states is None:
            return losses
        logprobs = torch.stack([self.answer_logprobs(side, scored, inputs) for side in SIDES], dim=1)
        written = critique_loss(logprobs, torch.stack([inputs[name] for name in TOKENS], dim=1))
        self._metrics["train"]["critique_loss"].append(written.mean().item())
        return joint_loss(losses, columns.get("weight", 1.0) * written, weight=self.extra_weight)
