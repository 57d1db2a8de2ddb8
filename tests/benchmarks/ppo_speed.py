"""Episodes a second and memory of `rlhf.PPOTrainer` beside TRL's last PPO (1.12), on the same models.

pip install --no-deps --target TRL112 trl==1.12.0
python tests/benchmarks/ppo_speed.py --trl TRL112 --json ppo_speed.json

Speed: full fine-tuning in fp32 of a causal model of 20M parameters with a vocabulary of 30k; rollouts of 32 answers of
exactly 32 tokens, two minibatches of 16 and two PPO epochs, so four optimizer steps, on both sides; no gradient
checkpointing. Prompts have 128 tokens (`full`, and `lora` with LoRA policies): four times the answer, where the summaries on
which these trainers were tuned have about seven times; `full_short` has prompts of 16, where there is least to save (the
benchmark's first shape: the main row became 128 after that one had been seen); `full_14m` is a model of 14M parameters, in
which the vocabulary weighs more. Each side runs in a process of its own, A B A B; a rollout is the warm-up, the next two are
timed.

`full_hh` has real lengths: 16 prompts that stand for all of HH helpful (evenly spaced in its order of length, 9 to 512 tokens),
and answers of at most 256 tokens that end by themselves. A random model never ends an answer, so its end token has a fixed
logit, on both sides, by which an answer ends after 57 tokens on average, with a deviation of 54: those of HH's chosen
answers. Both sides sample at temperature 1, where TRL's own is 0.7, by which that logit would end answers after about five tokens.
The tokenizer is trained on the same texts (29k tokens). One rollout of 16, in two minibatches of 8, is timed, without a
warm-up: TRL takes minutes for it.

Seconds are those that a process works itself, so that others on the machine count little.

Memory: a base of 110M parameters; ours with four roles on one base (LoRA), TRL's as lean as it goes (`peft_config`,
`ref_model=None`, its critic and reward model whole). Peak resident size less that after the imports.

Finished parts are kept beside FILE. `--before DIR` is another version of this project, timed as a third side. `gpu` is a
row for a CUDA machine: a 7B-shaped model with random weights, four roles.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SPEED = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 30_000,
}
SMALL = {**SPEED, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 3}
MEMORY = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 9,
    "num_attention_heads": 12,
    "vocab_size": 30_000,
}
SEVEN_B = {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32_000}  # fmt: skip
BATCH, MINIBATCHES, EPOCHS, ANSWER = 16, 2, 2, 32
PROMPT = {"full": 128, "lora": 128, "full_short": 16, "full_14m": 128, "memory": 16, "gpu": 512}
HH_BATCH, HH_PROMPT, HH_ANSWER, HH_MEAN = 8, 512, 256, 58  # tokens: the longest of each, and an answer's on average
PAIRS = Path("/work/shared/data/pairs_hh_helpful.jsonl.gz")
ROLLOUTS = {"memory": 2, "full_hh": 1}  # elsewhere 3; where there are several, the first is the warm-up


def words_tokenizer(size: int) -> Any:
    """A word-level tokenizer of w3, w4, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, size)}}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def hh_prompts_and_answers(pairs: Path) -> tuple[list[str], list[str]]:
    import gzip

    with gzip.open(pairs, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    names = {"user": "Human", "assistant": "Assistant"}
    prompts = ["".join(f"\n\n{names[m['role']]}: {m['content']}" for m in row["prompt"]) for row in rows]
    return [prompt + "\n\nAssistant:" for prompt in prompts], [" " + row["chosen"][-1]["content"] for row in rows]


def build(folder: Path, sizes: dict[str, int], pairs: Path | None = None) -> None:
    """A causal model, a scalar-headed one, adapters on the first, a tokenizer of that vocabulary; the prompts of `pairs`."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    if (folder / "policy/config.json").is_file():
        return
    if pairs is None:
        tokenizer = words_tokenizer(sizes["vocab_size"])
    else:
        from rlhf.models.scratch import train_tokenizer

        texts, answers = hh_prompts_and_answers(pairs)
        tokenizer = train_tokenizer(texts + answers, vocab_size=sizes["vocab_size"], model_max_length=1024)
        sizes = {**sizes, "vocab_size": len(tokenizer)}
        rows = sorted((tokenizer(text).input_ids[-HH_PROMPT:] for text in texts), key=len)
        count = HH_BATCH * MINIBATCHES
        chosen = [rows[int((i + 0.5) / count * len(rows))] for i in range(count)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prompts.json").write_text(json.dumps(tokenizer.batch_decode(chosen)))
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=1024, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    config.num_labels, config.problem_type = 1, "regression"
    scorer = LlamaForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
    scorer.config.pad_token_id = 0
    scorer.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    lora = LoraConfig(r=16, target_modules="all-linear", task_type=TaskType.SEQ_CLS)
    samples = [("w5 w6", f"w{i}") for i in range(8, 24)]
    from rlhf.reward.load import save_reward_model

    adapted: Any = get_peft_model(
        LlamaForSequenceClassification.from_pretrained(folder / "policy", num_labels=1, pad_token_id=0), lora
    )
    save_reward_model(folder / "reward-adapter", adapted, tokenizer, samples=samples)


def prompts(folder: Path, length: int | None, count: int = 256) -> list[str]:
    """Prompts of so many tokens; with None, the real ones."""
    import random

    if length is None:
        real: list[str] = json.loads((folder / "prompts.json").read_text())
        return real

    rng = random.Random(0)
    return [" ".join(f"w{rng.randrange(3, 30_000)}" for _ in range(length)) for _ in range(count)]


def fix_end(model: Any, mean_length: int | None) -> None:
    """Give the end token a fixed logit, so that an answer ends after so many tokens on average; with None, never.

    The other logits of a random model are near 0: their exponentials add up to about the size of the vocabulary.
    """
    import torch

    logit = -1e9 if mean_length is None else math.log(model.config.vocab_size / (mean_length - 1))
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([1], device=out.device), logit))


def now() -> float:
    """Seconds: of this process's own work, so that others on the machine don't count; of the clock, where a GPU works."""
    import torch

    return time.monotonic() if torch.cuda.is_available() else time.process_time()


def resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def run_ours(folder: Path, *, lora: bool, prompt_length: int | None, rollouts: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    import rlhf.ppo.trainer  # noqa: F401
    from rlhf import PPOConfig, PPOTrainer
    from rlhf.models.load import load_policy, model_settings

    batch = BATCH if prompt_length else HH_BATCH
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    before = resident("VmRSS")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    args = PPOConfig(
        str(folder / "out-ours"), total_episodes=batch * MINIBATCHES * rollouts, per_device_train_batch_size=batch,
        num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS, learning_rate=1e-6,
        max_completion_length=ANSWER if prompt_length else HH_ANSWER,
        missing_eos_penalty=None, use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available(),
        gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    settings = {"use_peft": True, "lora_r": 16, "lora_target_modules": ["all-linear"]} if lora else {}
    policy: Any = load_policy(folder / "policy", model_settings(settings))
    fix_end(policy, None if prompt_length else HH_MEAN)
    if lora:
        source: Any = str(folder / "reward-adapter")
    else:
        from transformers import AutoModelForSequenceClassification

        source = AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    trainer = PPOTrainer(
        policy,
        source,
        args,
        Dataset.from_list([{"prompt": p} for p in prompts(folder, prompt_length)]),
        processing_class=tokenizer,
    )
    clock: list[float] = []
    lengths: list[float] = []
    parts = {"generation": 0.0, "forwards and reward": 0.0}
    sample, experience = trainer.sample, trainer.experience

    def timed_sample(rows: Any) -> Any:
        begin = now()
        found = sample(rows)
        parts["generation"] += now() - begin
        lengths.append(found.response_mask.sum(dim=1).float().mean().item())
        assert prompt_length is None or (found.response_mask.sum(dim=1) == ANSWER).all()
        return found

    def timed_experience(rows: Any) -> Any:
        clock.append(now())
        if len(clock) == 2:
            parts.update({name: 0.0 for name in parts})
        begin, before_sampling = now(), parts["generation"]
        found = experience(rows)
        parts["forwards and reward"] += now() - begin - (parts["generation"] - before_sampling)
        return found

    trainer.sample, trainer.experience = timed_sample, timed_experience
    trainer.train()
    warm = 1 if rollouts > 1 else 0
    seconds = now() - clock[warm]
    parts["update"] = seconds - sum(parts.values())
    found: dict[str, Any] = {
        "episodes_per_second": batch * MINIBATCHES * (rollouts - warm) / seconds,
        "mib": resident("VmHWM") - before,
        "parts": {name: value / seconds for name, value in parts.items()},
        "answer_tokens": statistics.mean(lengths[warm:]),
        "parameters": sum(p.numel() for n, p in policy.named_parameters() if "lora_" not in n),
    }
    if torch.cuda.is_available():
        found["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["tokens_per_second"] = found["episodes_per_second"] * (PROMPT["gpu"] + ANSWER)
    return found


def run_trl(folder: Path, *, lora: bool, lean: bool, prompt_length: int | None, rollouts: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    batch = BATCH if prompt_length else HH_BATCH
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    before = resident("VmRSS")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    args = PPOConfig(
        str(folder / "out-trl"), total_episodes=batch * MINIBATCHES * rollouts, per_device_train_batch_size=batch * MINIBATCHES,
        num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS, learning_rate=1e-6,
        response_length=ANSWER if prompt_length else HH_ANSWER, stop_token=None if prompt_length else "eos", temperature=1.0, local_rollout_forward_batch_size=batch * MINIBATCHES, num_sample_generations=0, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    ids = [{"input_ids": tokenizer(p).input_ids} for p in prompts(folder, prompt_length)]
    load = {"dtype": torch.float32}
    policy: Any = AutoModelForCausalLM.from_pretrained(folder / "policy", **load)
    fix_end(policy, None if prompt_length else HH_MEAN)
    reference = None if lora or lean else AutoModelForCausalLM.from_pretrained(folder / "policy", **load)
    reward, value = (AutoModelForSequenceClassification.from_pretrained(folder / "reward", **load) for _ in range(2))

    class Clock(TrainerCallback):
        ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(now())

    trainer = PPOTrainer(
        args=args, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value,
        train_dataset=Dataset.from_list(ids), eval_dataset=Dataset.from_list(ids[:16]), callbacks=[Clock()],
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora or lean else None,
    )  # fmt: skip
    begin = now()
    trainer.train()
    ends = Clock.ends
    assert len(ends) == rollouts, (len(ends), "TRL counts a batch as a step")
    warm, first = (1, ends[0]) if rollouts > 1 else (0, begin)
    return {
        "episodes_per_second": batch * MINIBATCHES * (rollouts - warm) / (ends[-1] - first),
        "mib": resident("VmHWM") - before,
    }


def in_a_process(side: str, kind: str, folder: Path, libraries: Path | None) -> dict[str, Any]:
    """One side in a process of its own, with what it is to be found in."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(libraries),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-P", __file__, "--json", "unused", "--side", side, kind, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def comparison(runs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians of every side, and of the ratios of pairs: [median, smallest, largest]."""
    found: dict[str, Any] = {"repetitions": len(runs), "parts": runs[0]["ours"].get("parts")}
    for side in runs[0]:
        for key in ("episodes_per_second", "mib", "answer_tokens"):
            values = [run[side][key] for run in runs if key in run[side]]
            if values:
                found[f"{key}_{side}"] = statistics.median(values)
        for key in ("episodes_per_second", "mib"):
            if side != "ours":
                ratios = [run["ours"][key] / run[side][key] for run in runs]
                found[f"{key}_ratio_to_{side}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--trl", type=Path, help="folder of trl==1.12.0")
    parser.add_argument("--before", type=Path, help="folder of another version of this project: a third side")
    parser.add_argument("--pairs", type=Path, default=PAIRS, help="pairs of HH helpful, whose prompts `full_hh` takes")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="one repetition of both sides each")
    parser.add_argument("--variants", default="full_hh,full,full_14m,full_short,lora,memory")
    parser.add_argument("--quick", action="store_true", help="one layer: whether it runs, not how fast")
    parser.add_argument("--side", nargs=3, metavar=("SIDE", "KIND", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side, kind, name = arguments.side
        rollouts = ROLLOUTS.get(kind, 3)
        if side == "ours":
            lora = not kind.startswith("full")
            found = run_ours(Path(name), lora=lora, prompt_length=PROMPT.get(kind), rollouts=rollouts)
        else:
            found = run_trl(
                Path(name),
                lora=kind == "lora",
                lean=kind == "memory",
                prompt_length=PROMPT.get(kind),
                rollouts=rollouts,
            )
        print(json.dumps(found))
        return
    folder = arguments.json.with_suffix("")
    result: dict[str, Any] = {"threads": int(os.environ.get("OMP_NUM_THREADS", "2"))}
    for kind in arguments.variants.split(","):
        sizes = {"memory": MEMORY, "gpu": SEVEN_B, "full_14m": SMALL}.get(kind, SPEED)
        if arguments.quick:
            sizes = {**sizes, "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2}
        models = folder / (f"hidden-{sizes['hidden_size']}" + "-hh" * (kind == "full_hh") + "-quick" * arguments.quick)
        build(models, sizes, arguments.pairs if kind == "full_hh" else None)
        here = Path(__file__).parents[2]
        if kind == "gpu":
            result["gpu"] = in_a_process("ours", "gpu", models, here)
            continue
        sides = {"trl": arguments.trl, "before": arguments.before, "ours": here}
        runs: list[dict[str, dict[str, Any]]] = []
        for seed in arguments.seeds.split(",")[: 1 if kind == "memory" else None]:
            file = folder / f"{kind}-{seed}{'-quick' if arguments.quick else ''}.json"
            run = json.loads(file.read_text()) if file.is_file() else {}
            for side, libraries in sides.items():
                if side not in run and libraries is not None:
                    run[side] = in_a_process("trl" if side == "trl" else "ours", kind, models, libraries)
                    file.write_text(json.dumps(run, indent=1))
            runs.append(run)
            rates = "; ".join(
                f"{n} {r['episodes_per_second']:.2f} episodes/s, {r['mib']:.0f} MiB" for n, r in run.items()
            )
            print(f"{kind} {seed}: {rates}", flush=True)
        result[kind] = comparison(runs) | {"parameters": runs[0]["ours"]["parameters"]}
    arguments.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
