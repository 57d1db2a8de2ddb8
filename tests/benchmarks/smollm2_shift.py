"""Do MetaRM and SwAV help on a policy's own answers where the backbone is pretrained? SmolLM2, in the world of instructions.

python tests/benchmarks/smollm2_shift.py --json smollm2_shift.json RUN RUN RUN

Each RUN is a finished run of recipes/lab/instructions.yaml, all of other seeds. Every method trains on the same 240 of its
pairs, as the world's crowd labels them, and is judged by the true reward on

  a  pairs of answers of SFT to held-out prompts,
  b  pairs of answers of the run's own policy to the same prompts,
  c  the world's pairs about topics and demands that are held out.

MetaRM climbs on four answers of that policy to each of 32 training prompts (no labels), four prompts a step. `meta` has the
step that served best in shift.py, `swav` the paper's weight and dropout; `dropout` is SwAV's two views without its term.
A model is a LoRA in the last eight layers, 30 batches of 8, at the recipe's rank and learning rate: nothing is tuned.

Intervals are bootstraps over runs and prompts of the paired differences. Finished parts are kept beside FILE.
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from smollm2_noise import RECIPE, Array, crowd_errs, in_true_order, interval, judged_pairs
from transformers import AutoModelForCausalLM, set_seed
from trl import RewardConfig
from worlds import Rows

from rlhf import ContrastiveRewardTrainer, MetaRewardTrainer, PairRewardTrainer
from rlhf.data.rows import assistant_turn
from rlhf.files import read_jsonl
from rlhf.models.generate import sample_texts
from rlhf.models.load import build_reward_model, load_tokenizer, model_settings
from rlhf.models.text import plain
from rlhf.pipeline.training import quiet_libraries
from rlhf.reward.denoise import flip_pair
from rlhf.reward.meta import group_samples
from rlhf.reward.model import RewardModel
from rlhf.reward.sides import side_scores
from rlhf.reward.trainer import training_columns

PAIRS, BATCH, LAYERS = 240, 8, 8
META_PROMPTS, ANSWERS, TEST_PROMPTS = 32, 4, 48
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"extra": "swav", "extra_weight": 0.0},
    "swav": {"extra": "swav"},
    "meta": {"meta_step": 0.05, "meta_prompts": 4},
}
SETS = ("a", "b", "c")


def base_model(run: Path) -> Path:
    """The backbone that a run started from."""
    base = run / "round-0/base/model"
    return base if base.is_dir() else Path(yaml.safe_load((run / "recipe.yaml").read_text())["backbone"]["model"])


def prepared(run: Path, file: Path) -> dict[str, Rows]:
    """Training pairs, the three sets in true order, and the policy's unlabelled answers for MetaRM; kept on disk."""
    if file.is_file():
        return json.loads(file.read_text())
    seed, data = yaml.safe_load((run / "recipe.yaml").read_text())["seed"], run / "round-0/data/data"
    settings = yaml.safe_load(RECIPE.read_text())["ppo"]
    temperature = yaml.safe_load((run / "recipe.yaml").read_text())["sampling"].get("temperature", 1.0)
    tokenizer = load_tokenizer(base_model(run), conversational=True)
    backbone = AutoModelForCausalLM.from_pretrained(base_model(run), dtype=torch.float32)
    policy: Any = PeftModel.from_pretrained(backbone, run / "round-1/ppo/model").eval()
    set_seed(seed)

    def answers(prompts: list[Any], name: str) -> Rows:
        repeated = [prompt for prompt in prompts for _ in range(ANSWERS)]
        length = settings["max_completion_length"]
        lengths = {"batch_size": 64, "max_new_tokens": length, "label": name}
        texts, ended = sample_texts(policy, tokenizer, repeated, temperature=temperature, **lengths)
        return [{"prompt": p, "completion": x, "ended": e} for p, x, e in zip(repeated, texts, ended, strict=True)]

    sampled = answers(
        [row["prompt"] for row in read_jsonl(data / "test_prompts.jsonl")[:TEST_PROMPTS]], "judged answers"
    )
    sides = [assistant_turn(row["completion"], ended=row["ended"]) for row in sampled]
    policy_pairs: Any = [
        {"prompt": sampled[i]["prompt"], "chosen": sides[i], "rejected": sides[i + 1]}
        for i in range(0, len(sampled), 2)
    ]
    ordered = in_true_order(read_jsonl(data / "pairs.jsonl"))
    drawn = [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))[:PAIRS]]
    labelled = [flip_pair(row) if crowd_errs(row, random.Random(f"{seed}/{i}")) else row for i, row in enumerate(drawn)]
    first_two = [row for i, row in enumerate(judged_pairs(run)) if i % 4 == 0]
    sets: Any = {
        "train": labelled,
        "a": first_two,
        "b": in_true_order(policy_pairs),
        "c": in_true_order(read_jsonl(run / "round-0/lab/data/shift_test.jsonl")),
        "meta": answers(
            [row["prompt"] for row in read_jsonl(data / "prompts.jsonl")[:META_PROMPTS]], "MetaRM's answers"
        ),
    }
    file.write_text(json.dumps(sets))
    return sets


def trained(base: Path, sets: dict[str, Rows], seed: int, **method: Any) -> RewardModel:
    """One reward model, by the same seed whatever the method."""
    recipe = yaml.safe_load(RECIPE.read_text())["reward"]
    tokenizer = load_tokenizer(base, conversational=True)
    lora = {name: recipe[name] for name in ("use_peft", "lora_r", "lora_alpha", "lora_dropout")}
    places = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}
    places |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp")
    depth = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    last = range(depth - LAYERS, depth)
    lora["lora_target_modules"] = [f"layers.{i}.{place}.{name}" for i in last for name, place in places.items()]
    set_seed(seed)
    model: Any = build_reward_model(base, model_settings(lora), pad_token_id=tokenizer.pad_token_id)
    kept = ("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs")
    with tempfile.TemporaryDirectory() as work:
        args = RewardConfig(
            work, **{name: recipe[name] for name in kept}, per_device_train_batch_size=BATCH, seed=seed, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
            logging_steps=1000,
        )  # fmt: skip
        trainer_class: Any = PairRewardTrainer
        if "meta_step" in method:
            trainer_class = MetaRewardTrainer
            method["meta_samples"] = group_samples(sets["meta"])[0]
        elif "extra" in method:
            trainer_class = ContrastiveRewardTrainer
        data = Dataset.from_list(training_columns(sets["train"]))
        trainer = trainer_class(model, args, train_dataset=data, processing_class=tokenizer, **method)
        trainer.train()
    return RewardModel(trainer.model.eval(), tokenizer, conversational=True)


def measured(run: Path, name: str, folder: Path) -> dict[str, Any]:
    """One method on one run, kept on disk: what it says of each set, chosen less rejected in true order."""
    file = folder / f"{name}.json"
    if file.is_file():
        return json.loads(file.read_text())
    sets = prepared(run, folder / "sets.json")
    begin = time.monotonic()
    reward = trained(base_model(run), sets, yaml.safe_load((run / "recipe.yaml").read_text())["seed"], **METHODS[name])
    said: dict[str, Any] = {"seconds": time.monotonic() - begin}
    for which in SETS:
        rows: Any = sets[which]
        said[which] = (side_scores(reward, rows, "chosen") - side_scores(reward, rows, "rejected")).tolist()
    file.write_text(json.dumps(said))
    right = {which: float(np.mean(np.array(said[which]) > 0)) for which in SETS}
    print(f"{run.name} {name}: {right}, {said['seconds']:.0f} s", flush=True)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    quiet_libraries()
    folders = [arguments.json.with_suffix("") / run.name for run in arguments.runs]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    runs = list(zip(arguments.runs, folders, strict=True))
    found = {name: [measured(run, name, folder) for run, folder in runs] for name in METHODS}
    sets = [prepared(run, folder / "sets.json") for run, folder in runs]
    table: dict[str, Any] = {"pairs": {which: [len(one[which]) for one in sets] for which in SETS}}
    print("| method | a | b | c | above `plain` on a | on b | on c | s |\n|---|---|---|---|---|---|---|---|")
    for name in METHODS:
        table[name] = {"seconds": float(np.mean([one["seconds"] for one in found[name]]))}
        cells, gaps = [], []
        for which in SETS:
            values: dict[str, list[Array]] = {
                method: [np.array(one[which]) for one in found[method]] for method in {name, "plain"}
            }
            clusters = [[plain(row["prompt"]) for row in one[which]] for one in sets]
            accuracy = float(np.mean([(x > 0).mean() for x in values[name]]))
            mean, low, high = interval(values, clusters, name, "plain")
            table[name][which] = {"accuracy": accuracy, "above_plain": [mean, low, high]}
            cells.append(f"{accuracy:.3f}")
            gaps.append("" if name == "plain" else f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
        print(f"| {name} | {' | '.join(cells)} | {' | '.join(gaps)} | {table[name]['seconds']:.0f} |")
    arguments.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
