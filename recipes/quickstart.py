"""The pipeline of `quickstart.yaml` through the Python API: a lab, SFT, a reward model, PPO. About four minutes on two cores.

python recipes/quickstart.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RewardConfig, SFTConfig, SFTTrainer

from rlhf import PairRewardTrainer, PPOConfig, PPOTrainer, build_reward_model, generate, save_reward_model
from rlhf.lab import LabSettings, build_lab, gold


def main(folder: Path, settings: LabSettings | None = None, sft_epochs: int = 3, episodes: int = 6144) -> float:
    """Run everything into `folder` and return how much true reward PPO gained over SFT on held-out prompts."""
    here = {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
    }
    here |= {"gradient_checkpointing": False, "lr_scheduler_type": "cosine"}

    # 1. A world whose true reward is known: base model, demonstrations, pairs that a noisy crowd labelled, prompts.
    build_lab(folder, settings or LabSettings())
    data = {
        name: load_dataset("json", data_files=str(folder / f"data/{name}.jsonl"), split="train")
        for name in ("sft", "preferences", "prompts", "test_prompts")
    }
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    # 2. Supervised fine-tuning.
    args = SFTConfig(
        str(folder / "sft"), learning_rate=3e-3, per_device_train_batch_size=64, num_train_epochs=sft_epochs, **here
    )
    sft = SFTTrainer(str(folder / "model"), args, train_dataset=data["sft"], processing_class=tokenizer)
    sft.train()
    sft.save_model()

    # 3. A reward model on the pairs; its scale is measured on answers of the SFT policy.
    reward_model = build_reward_model(folder / "sft", pad_token_id=tokenizer.pad_token_id)
    args = RewardConfig(
        str(folder / "reward"), learning_rate=5e-4, per_device_train_batch_size=32, num_train_epochs=1, **here
    )
    trainer = PairRewardTrainer(
        reward_model, args, train_dataset=data["preferences"].remove_columns("annotator"), processing_class=tokenizer
    )
    trainer.train()
    prompts = data["prompts"]["prompt"][:256]
    answers = generate(sft.model.eval(), tokenizer, prompts, max_new_tokens=40)
    save_reward_model(
        folder / "reward", trainer.model, tokenizer, samples=list(zip(prompts, answers.texts, strict=True))
    )

    # 4. PPO against it. The true reward is watched, never optimised.
    args = PPOConfig(
        str(folder / "ppo"), total_episodes=episodes, per_device_train_batch_size=64, num_mini_batches=2, num_ppo_epochs=2,
        learning_rate=3e-4, critic_learning_rate=1e-3, kl_coef=0.15, max_completion_length=40, **here,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(folder / "sft")
    ppo = PPOTrainer(
        policy, str(folder / "reward"), args, data["prompts"], processing_class=tokenizer, monitor_funcs={"gold": gold}
    )
    ppo.train()
    ppo.save_model(str(folder / "ppo"))

    # 5. True reward on held-out prompts, before and after.
    held_out = data["test_prompts"]["prompt"]
    texts = [prompt[0]["content"] for prompt in held_out]
    before, after = (
        sum(gold(texts, generate(model.eval(), tokenizer, held_out, max_new_tokens=40).texts)) / len(texts)
        for model in (sft.model, policy)
    )
    print(f"true reward on {len(texts)} held-out prompts: SFT {before:.2f}, PPO {after:.2f}")
    return after - before


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart-api"))
