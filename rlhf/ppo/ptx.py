"""The ptx mixture: demonstrations beside PPO's own loss, so that the policy forgets less (InstructGPT, arXiv:2203.02155 eq. 2)."""

import copy
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Demonstration, Prompt, has_ended
from rlhf.models.demonstrations import encode_behind_prompts
from rlhf.models.logprobs import token_logprobs
from rlhf.models.templates import end_at_end_token
from rlhf.models.text import last_turn, without_beginning


class Demonstrations:
    """Tokenised demonstrations, drawn at random; the draw is from the global generator, which checkpoints hold.

    Attributes:
        texts: prompts and answers as they were given, and whether each came to its end.

    Args:
        rows: `prompt` (a string or a conversation) and `completion` (a string, or an assistant's turn in a list).
        max_length: longer ones lose the beginning of their prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Demonstration], *, max_length: int | None):
        tokenizer = copy.copy(tokenizer)
        end_at_end_token(tokenizer)
        prompts = [row["prompt"] for row in rows]
        answers = [last_turn(row["completion"]) for row in rows]
        ended = [has_ended(row["completion"]) for row in rows]
        self.texts: list[tuple[Prompt, str, bool]] = list(zip(prompts, answers, ended, strict=True))
        uncut_rows, starts = encode_behind_prompts(tokenizer, prompts, answers, ended)
        most = max(map(len, uncut_rows)) if max_length is None else max_length
        self.rows = [without_beginning(row, most, tokenizer.bos_token_id) for row in uncut_rows]
        # What was cut off a row's beginning is missing from its prompt.
        self.answer_starts = [
            start - (len(uncut) - len(row)) for start, uncut, row in zip(starts, uncut_rows, self.rows, strict=True)
        ]
        assert isinstance(tokenizer.pad_token_id, int)
        self.pad_token_id = tokenizer.pad_token_id

    def draw_texts(self, count: int) -> list[tuple[Prompt, str, bool]]:
        """Draw prompts and answers with replacement, and whether each came to its end."""
        return [self.texts[i] for i in torch.randint(len(self.texts), (count,)).tolist()]

    def draw(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw rows with replacement: ids [n, t], padded on the right, and a mask [n, t] of the completions' tokens."""
        drawn = torch.randint(len(self.rows), (count,)).tolist()
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(self.rows[i]) for i in drawn], batch_first=True, padding_value=self.pad_token_id
        )
        places = torch.arange(ids.shape[1])
        starts = torch.tensor([self.answer_starts[i] for i in drawn])[:, None]
        ends = torch.tensor([len(self.rows[i]) for i in drawn])[:, None]
        return ids.to(device), ((places >= starts) & (places < ends)).to(device)

    def loss(self, policy: nn.Module, count: int) -> Tensor:
        """Return the loss of so many drawn rows, nats a token."""
        return demonstration_loss(policy, *self.draw(count, next(policy.parameters()).device))


def demonstration_loss(policy: nn.Module, ids: Tensor, is_completion: Tensor) -> Tensor:
    """Return the mean of -log π over the completions' tokens, nats a token; rows are padded on the right.

    Causal attention never looks at padding on the right, so no attention mask is needed.
    """
    model = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    logprobs = token_logprobs(model(input_ids=ids, use_cache=False).logits, ids[:, 1:])
    keep = is_completion[:, 1:]
    loss: Tensor = -(logprobs * keep).sum() / keep.sum().clamp(min=1)
    return loss
