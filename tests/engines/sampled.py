"""Answers outside PPO by a real vLLM engine; run by vLLM's own environment: sampled.py BASE OUT full|lora.

Writes OUT: `agreement`, the share of the engine's tokens at a temperature near 0 that plain transformers hold most likely,
each behind the engine's own tokens; `agreement_base`, the same of the base's weights; `again`, whether a second call with
the same seed gave the same answers at temperature 1; `drawn`, how many of 16 answers to one prompt differ.
"""

import json
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.models.engine import engine_answers
from tests.engines.colocated import LENGTH, PROMPTS, agreement


def main(base: str, out: str, layout: str) -> None:
    """Sample, compare, write."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if layout == "lora":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)).eval()
    prompts = [[{"role": "user", "content": f"list {i}"}] for i in range(PROMPTS)]
    texts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    settings = {"end_ids": [tokenizer.eos_token_id], "max_new_tokens": LENGTH}
    cold = engine_answers(model, rows, **settings, temperature=0.01)
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        drawn.append(engine_answers(model, [rows[0]] * PROMPTS, **settings))
    whole = model.merge_and_unload() if layout == "lora" else model
    facts = {
        "agreement": agreement(whole, rows, cold),
        "agreement_base": agreement(AutoModelForCausalLM.from_pretrained(base).eval(), rows, cold),
        "again": drawn[0] == drawn[1],
        "drawn": len({tuple(answer) for answer in drawn[0]}),
    }
    with open(out, "w", encoding="utf-8") as file:
        json.dump(facts, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
