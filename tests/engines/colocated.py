"""PPO with a real vLLM engine in the same process; run by vLLM's own environment: colocated.py BASE REWARD OUT full|lora.

Writes OUT.json: `rollouts`, what training logged of each; `agreement`, the share of the engine's greedy tokens after training
that plain transformers choose too, each behind the engine's own tokens; `agreement_before`, the same with the base's weights.
"""

import json
import os
import sys
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from rlhf import PPOConfig, PPOTrainer
from rlhf.models.load import load_policy, load_tokenizer, model_settings

LENGTH, PROMPTS = 24, 16


def likeliest(model: Any, row: list[int], answer: list[int]) -> list[int]:
    """Return the token that a model holds most likely at each place of an answer, given what stands before it there."""
    with torch.no_grad():
        logits = model(torch.tensor([row + answer])).logits[0]
    return logits[len(row) - 1 : -1].argmax(dim=-1).tolist()


def agreement(model: Any, rows: list[list[int]], answers: list[list[int]]) -> float:
    """Return the share of an engine's greedy tokens that a model would choose too."""
    same = [
        one == other
        for row, answer in zip(rows, answers, strict=True)
        for one, other in zip(answer, likeliest(model, row, answer), strict=True)
    ]
    return sum(same) / len(same)


def main(base: str, reward: str, out: str, layout: str) -> None:
    """Train, compare, write."""
    from vllm import SamplingParams  # here, since whoever collects tests in another environment imports this file too

    prompts = [[{"role": "user", "content": f"list {i}"}] for i in range(PROMPTS)]
    args = PPOConfig(
        out,
        total_episodes=160,
        per_device_train_batch_size=16,
        num_ppo_epochs=1,
        learning_rate=3e-3,
        max_completion_length=LENGTH,
        use_vllm=True,
        vllm_max_model_length=96,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    lora = {"use_peft": True, "lora_r": 8, "lora_target_modules": ["all-linear"]} if layout == "lora" else {}
    torch.manual_seed(0)
    tokenizer = load_tokenizer(base, conversational=True)
    policy = load_policy(base, model_settings(lora))
    data = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer = PPOTrainer(policy, reward, args, data, processing_class=tokenizer)
    trainer.train()

    engine = trainer.vllm.engine  # type: ignore[union-attr]
    engine.sync_weights()
    texts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    sampling = SamplingParams(temperature=0, max_tokens=LENGTH)
    replies = engine.llm.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
    by_engine = [list(reply.outputs[0].token_ids) for reply in replies]
    trained = trainer.accelerator.unwrap_model(trainer.model).policy
    if layout == "lora":
        trained = trained.merge_and_unload()
    before = AutoModelForCausalLM.from_pretrained(base)
    facts = {
        "rollouts": [row for row in trainer.state.log_history if "sampler_difference" in row],
        "agreement": agreement(trained.eval(), rows, by_engine),
        "agreement_before": agreement(before.eval(), rows, by_engine),
    }
    with open(f"{out}.json", "w", encoding="utf-8") as file:
        json.dump(facts, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # the engine's own processes may wait for each other as they are taken down
