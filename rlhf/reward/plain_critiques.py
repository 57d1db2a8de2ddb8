"""Critiques as a stranger has them written, in plain transformers and PEFT: greedy `generate` behind the turn that asks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.models.critiques import CritiqueForm, request_ids
from rlhf.models.load import find_source
from rlhf.models.open import expand


def plain_critic(
    folder: str, tokenizer: PreTrainedTokenizerBase, form: CritiqueForm
) -> Callable[[Sequence[int]], list[int]]:
    """Return what puts a critique behind a row of prompt and answer, by the causal model that the same folder holds.

    Raises:
        UserError: scores are means over samples, which nobody else can draw.
    """
    if form["samples"] > 1:
        raise UserError(
            f"{folder}: its scores are means over {form['samples']} sampled critiques, and other programs draw other samples; "
            "verify a server of `rlhf serve`, or train with reward.critiques: 1."
        )
    path = Path(expand(folder))
    source = find_source(path)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.base, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    model = model if source.adapter is None else PeftModel.from_pretrained(model, str(path))
    model.eval()
    request, end = request_ids(tokenizer, form["request"]), tokenizer.eos_token_id

    def with_critique(row: Sequence[int]) -> list[int]:
        ids = torch.tensor([[*row, *request]])
        options = {"do_sample": False, "max_new_tokens": form["tokens"], "eos_token_id": end, "pad_token_id": end}
        with torch.no_grad():
            written: list[int] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[
                0
            ].tolist()
        return written

    return with_critique
