"""`AnswerTokensRewardTrainer`: beside the ids of each answer, how many of them are the answer's own."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig

from rlhf.data.rows import SIDES
from rlhf.errors import UserError
from rlhf.models.generate import answer_starts
from rlhf.models.text import before_last_turn
from rlhf.reward.trainer import PairRewardTrainer

TOKENS = tuple(f"{side}_tokens" for side in SIDES)


class AnswerTokensRewardTrainer(PairRewardTrainer):
    """`PairRewardTrainer` whose batches hold `chosen_tokens` and `rejected_tokens`, [b]: each answer's length, its end included.

    Raises:
        UserError: the pairs have no prompt, so nobody can tell where their answers begin.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, args: RewardConfig | None = None, **arguments: Any):
        dataset = arguments.get("train_dataset")
        names = [] if dataset is None else dataset.column_names or list(next(iter(dataset)))
        if "prompt" not in names and not {*TOKENS} <= {*names}:
            raise UserError(
                "reward.extra: pairs without a prompt don't say where an answer begins; give them a column `prompt`."
            )
        super().__init__(model, args, **arguments)
        self.data_collator.columns += TOKENS

    @staticmethod
    def tokenize(batch: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
        """Return a batch of pairs as token ids, and how many of them are each answer's."""
        rows = PairRewardTrainer.tokenize(batch, tokenizer)
        for side in SIDES:
            prompts = list(map(before_last_turn, batch["prompt"], batch[side]))
            starts = answer_starts(tokenizer, prompts, rows[f"{side}_ids"])
            rows[f"{side}_tokens"] = [len(ids) - start for ids, start in zip(rows[f"{side}_ids"], starts, strict=True)]
        return rows

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), *TOKENS]))
