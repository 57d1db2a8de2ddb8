"""Which reward models still tell good answers from bad ones when the answers, or the requests, are others than in training.

python tests/benchmarks/shift.py --json shift.json --seeds 5,6,7,8,9 --method-b swav --method-c meta

Every method trains on the same 3,000 pairs as the crowd labelled them and is judged by the true reward on

  a  held-out pairs of the same writers,
  b  pairs of answers of the policy that PPO made with the plain reward model, to held-out prompts,
  c  held-out pairs about kinds of things that no annotator was asked about.

MetaRM climbs on answers of that same policy (no labels): to training prompts, or (`meta_ood`) to other prompts about the
unseen kinds. Experts are trained on the pairs about harmless and on those about dangerous things. `--choose` prints which
method is best on b and on c over its seeds (0-4); the other call judges those two, on seeds that chose nothing. Intervals
are of the difference to `plain` of its own kind (full fine-tuning, or LoRA for experts), t over seeds; the p-values of all
other methods are corrected after Holm. Finished parts are kept beside FILE.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from scipy.stats import ttest_1samp
from transformers import AutoModelForCausalLM, set_seed
from trl import RewardConfig
from worlds import RECIPE, Rows, decided, differences, in_true_order, interval, reward_settings

from rlhf import ContrastiveRewardTrainer, MetaRewardTrainer, PairRewardTrainer
from rlhf.lab.world import HELD_OUT_DANGEROUS, HELD_OUT_HARMLESS, all_prompts, gold, parse_request
from rlhf.models.generate import sample_texts
from rlhf.models.load import build_reward_model, load_scorer, load_tokenizer, model_settings
from rlhf.models.save import save_model
from rlhf.models.text import plain
from rlhf.pipeline.training import quiet_libraries
from rlhf.reward.experts import merge_experts, open_experts, save_experts
from rlhf.reward.gate import fit_gate
from rlhf.reward.meta import group_samples
from rlhf.reward.model import RewardModel
from rlhf.reward.trainer import training_columns

PAIRS, TEST, META_PROMPTS, K = 3000, 2000, 512, 5
LORA = {"use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}
LEARNING_RATE, LORA_LEARNING_RATE = 5e-4, 2e-3
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"extra": "simcse", "extra_weight": 0.0},  # two views and no term: what dropout alone does
    "simcse": {"extra": "simcse"},
    "simcse_light": {"extra": "simcse", "extra_weight": 0.1},
    "simcse_diff": {"extra": "simcse_diff"},
    "simcse_diff_light": {"extra": "simcse_diff", "extra_weight": 0.1},
    "swav": {"extra": "swav"},
    "swav_diff": {"extra": "swav_diff"},
    "meta_paper": {"meta": "b", "meta_step": 5e-6, "meta_normalized": False},
    "meta_small": {"meta": "b", "meta_step": 0.01},
    "meta": {"meta": "b", "meta_step": 0.05},
    "meta_large": {"meta": "b", "meta_step": 0.2},
    "meta_ood": {"meta": "c", "meta_step": 0.05},
    "likelihood": {"flip_rate": 0.2},
    "likelihood_swav_meta": {"flip_rate": 0.2, "extra": "swav", "meta": "b", "meta_step": 0.05},
    "lora": {"lora": True},
    "experts": {"experts": True},  # combined in three ways: _gate, _equal, _merged
    "experts_likelihood": {"experts": True, "flip_rate": 0.2},
}


def user(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def read(file: Path) -> Rows:
    return [json.loads(line) for line in file.read_text().splitlines()]


def lived_in(out: Path, seed: int, *, quick: bool) -> Path:
    """A world with SFT model, plain reward model, and the policy that PPO made of both."""
    if not (out / "round-1/ppo/manifest.json").is_file():
        command = [sys.executable, "-m", "rlhf", "ppo", str(RECIPE), "--out", str(out), f"seed={seed}"]
        sizes = ["lab.pairs=300", "lab.test_pairs=200", "lab.demonstrations=800", "ppo.total_episodes=256"]
        command += sizes if quick else [f"lab.pairs={PAIRS}", f"lab.test_pairs={TEST}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def prepared(out: Path, seed: int, *, quick: bool = False) -> dict[str, Any]:
    """Training pairs, the three test sets in true order, and unlabelled answers of the policy for MetaRM; kept on disk."""
    file = out / "shift.json"
    if file.is_file():
        return json.loads(file.read_text())
    data, lab = out / "round-0/data/data", out / "round-0/lab/data"
    policy_folder = out / "round-1/ppo/model"
    tokenizer = load_tokenizer(policy_folder, conversational=True)
    policy: Any = AutoModelForCausalLM.from_pretrained(policy_folder).eval()
    set_seed(seed)

    def answers(prompts: list[Any], count: int) -> Rows:
        repeated = [prompt for prompt in prompts for _ in range(count)]
        texts, ended = sample_texts(policy, tokenizer, repeated, batch_size=256, max_new_tokens=40)
        return [{"prompt": p, "completion": x, "ended": e} for p, x, e in zip(repeated, texts, ended, strict=True)]

    count = META_PROMPTS // 10 if quick else META_PROMPTS
    sampled = answers([row["prompt"] for row in read(data / "test_prompts.jsonl")[: count if quick else None]], 4)
    pairs = [
        {"prompt": a["prompt"]} | {side: [{"role": "assistant", "content": x["completion"]}] for side, x in sides}
        for start in range(0, len(sampled), 4)
        for a, b in combinations(sampled[start : start + 4], 2)
        for sides in [(("chosen", a), ("rejected", b))]
    ]
    seen = {plain(row["prompt"]) for row in read(lab / "shift_test.jsonl")}
    unseen = [x for x in all_prompts([*HELD_OUT_HARMLESS, *HELD_OUT_DANGEROUS]) if x not in seen]
    random.Random(seed).shuffle(unseen)
    found = {
        "train": read(data / "pairs.jsonl"),
        "a": in_true_order(decided(read(data / "test_pairs.jsonl"))),
        "b": in_true_order(decided(pairs)),
        "c": in_true_order(decided(read(lab / "shift_test.jsonl"))),
        "meta_b": answers([row["prompt"] for row in read(data / "prompts.jsonl")[:count]], K),
        "meta_c": answers([user(prompt) for prompt in unseen[:count]], K),
        "gold": statistics.mean(gold([plain(r["prompt"]) for r in sampled], [r["completion"] for r in sampled])),
    }
    file.write_text(json.dumps(found))
    return found


def trained(base: Path, rows: Rows, seed: int, samples: dict[str, Rows], **how: Any) -> Any:
    """One trainer, run to its end, by the same seed whatever the method."""
    lora, meta = how.pop("lora", False), how.pop("meta", None)
    set_seed(seed)
    tokenizer = load_tokenizer(base, conversational=True)
    model: Any = build_reward_model(base, model_settings(LORA if lora else {}), pad_token_id=tokenizer.pad_token_id)
    args = RewardConfig(
        tempfile.mkdtemp(),
        **reward_settings(LORA_LEARNING_RATE if lora else LEARNING_RATE, 1),
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1000,
    )
    cls: Any = MetaRewardTrainer if meta else ContrastiveRewardTrainer if how.get("extra") else PairRewardTrainer
    if meta:
        how["meta_samples"] = group_samples(samples[f"meta_{meta}"])[0]
    data = Dataset.from_list(training_columns(rows))
    trainer = cls(model, args, train_dataset=data, processing_class=tokenizer, **how)
    trainer.train()
    return trainer


def experts(base: Path, sets: dict[str, Any], seed: int, folder: Path, **how: Any) -> dict[str, RewardModel]:
    """Two experts, combined by a gate, with equal weights, and by averaging their weights."""
    domains: dict[str, Rows] = {"harmless": [], "helpful": []}
    for row in sets["train"]:
        domains["harmless" if parse_request(plain(row["prompt"])).is_dangerous else "helpful"].append(row)
    tokenizer = load_tokenizer(base, conversational=True)
    for number, rows in enumerate(domains.values()):
        trainer = trained(base, rows, seed, sets, lora=True, **how)
        save_model(trainer.model, tokenizer, folder / f"expert-{number}")
    tokenizer.save_pretrained(folder)
    save_experts(folder, list(domains), torch.tensor([[0.0, 1.0]] * 2), weights=[0.5, 0.5], gate=None)
    both = open_experts(folder, tokenizer, conversational=True)
    sft: Any = AutoModelForCausalLM.from_pretrained(base).eval()
    prompts = [row["prompt"] for row in sets["train"]]
    set_seed(seed)
    texts, ended = sample_texts(sft, tokenizer, prompts[:256], batch_size=256, max_new_tokens=40)
    raw = both.score_each(prompts[:256], texts, ended=ended)
    scales = torch.stack([raw.mean(dim=0), raw.std(dim=0)], dim=1)
    sides = [
        both.score_each(prompts, [row[side][0]["content"] for row in sets["train"]]) for side in ("chosen", "rejected")
    ]
    gate, _ = fit_gate(both.prompt_features(prompts), (sides[0] - sides[1]) / scales[:, 1])
    found: dict[str, RewardModel] = {}
    for name, weights in (("gate", None), ("equal", [0.5, 0.5])):
        save_experts(folder, list(domains), scales, weights=weights, gate=gate if weights is None else None)
        found[name] = open_experts(folder, tokenizer, conversational=True)
    merged = folder / "merged"
    heads = [0.5 / std for std in scales[:, 1].tolist()]
    merge_experts([folder / "expert-0", folder / "expert-1"], [0.5, 0.5], heads, merged)
    tokenizer.save_pretrained(merged)
    found["merged"] = RewardModel(load_scorer(merged), tokenizer, conversational=True)
    return found


def judged(reward: RewardModel, sets: dict[str, Any]) -> dict[str, Any]:
    """Accuracy on each set, and how far rewards of the policy's answers to one prompt lie apart."""
    found: dict[str, Any] = {}
    for name in ("a", "b", "c"):
        found[name] = (differences(reward, sets[name]) > 0).double().mean().item()
    samples = sets["meta_b"]
    scores = reward.score([row["prompt"] for row in samples], [row["completion"] for row in samples])
    groups = scores.reshape(-1, K)
    first, second = torch.triu_indices(K, K, offset=1)
    # As in the paper's figure: differences over the range of all rewards. Share of pairs in its lowest fifth.
    apart = (groups[:, first] - groups[:, second]).abs() / (scores.max() - scores.min())
    found["spread"] = apart.mean().item()
    found["lowest_fifth"] = (apart < 0.2).double().mean().item()
    return found


def measured(folder: Path, seed: int, method: str, *, quick: bool) -> dict[str, dict[str, Any]]:
    """One method on one seed, kept on disk."""
    file = folder / f"{method}-{seed}{'-quick' if quick else ''}.json"
    if file.is_file():
        return json.loads(file.read_text())
    out = lived_in(folder / f"world-{seed}{'-quick' if quick else ''}", seed, quick=quick)
    sets, base = prepared(out, seed, quick=quick), out / "round-0/sft/model"
    begin = time.monotonic()
    how = dict(METHODS[method])
    if how.pop("experts", False):
        with tempfile.TemporaryDirectory() as work:
            made = experts(base, sets, seed, Path(work), **how)
            found = {f"{method}_{name}": judged(reward, sets) for name, reward in made.items()}
    else:
        trainer = trained(base, sets["train"], seed, sets, **how)
        reward = RewardModel(trainer.model.eval(), trainer.processing_class, conversational=True)
        row = next(r for r in reversed(trainer.state.log_history) if "accuracy" in r)
        watched = ("contrastive", "view_similarity", "meta_spread", "meta_gradient", "grad_norm")
        found = {method: judged(reward, sets) | {name: row[name] for name in watched if name in row}}
    seconds = time.monotonic() - begin
    for name, result in found.items():
        result["seconds"] = seconds
        print(f"seed {seed} {name:22s} " + " ".join(f"{k} {v:.3f}" for k, v in result.items()), flush=True)
    file.write_text(json.dumps(found))
    return found


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Corrected for being several."""
    corrected, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, p * (len(p_values) - rank)))
        corrected[name] = highest
    return corrected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="5,6,7,8,9")
    parser.add_argument("--variants", default=",".join(METHODS))
    parser.add_argument("--choose", action="store_true", help="say which method is best on b and on c")
    parser.add_argument("--method-b", help="the one chosen for b")
    parser.add_argument("--method-c", help="the one chosen for c")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, the first seed")
    arguments = parser.parse_args()
    quiet_libraries()
    folder = arguments.json.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in arguments.seeds.split(",")][: 1 if arguments.quick else None]
    variants = arguments.variants.split(",")
    table: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        for method in variants:
            for name, result in measured(folder, seed, method, quick=arguments.quick).items():
                table.setdefault(name, []).append(result)

    gains = {
        name: {s: [x[s] - y[s] for x, y in zip(rows, table["plain"], strict=True)] for s in ("a", "b", "c")}
        for name, rows in table.items()
    }
    others = [name for name in table if name != "plain"]
    if arguments.choose:
        for s in ("b", "c"):
            best = max(others, key=lambda name: statistics.mean(gains[name][s]))
            print(f"best on {s}: {best}, {statistics.mean(gains[best][s]):+.4f}")
    found: dict[str, Any] = {
        "methods": {
            name: {s: interval([row[s] for row in rows]) for s in ("a", "b", "c")} for name, rows in table.items()
        },
        "gains": {name: {s: interval(gains[name][s]) for s in ("a", "b", "c")} for name in others},
        "accuracy_plain": {s: interval([row[s] for row in table["plain"]]) for s in ("a", "b", "c")},
        "watched": {
            name: {k: statistics.mean(row[k] for row in rows) for k in rows[0] if k not in ("a", "b", "c")}
            for name, rows in table.items()
        },
        "threads": torch.get_num_threads(),
    }
    for s, method in (("b", arguments.method_b), ("c", arguments.method_c)):
        if method is not None:
            mean, low, high = interval(gains[method][s])
            found[f"test_{s}"] = {"method": method, "mean": mean, "low": low, "high": high}
            rest = {name: float(ttest_1samp(gains[name][s], 0).pvalue) for name in others if name != method}
            found[f"holm_{s}"] = holm(rest)
    if "lora" in table and "experts_gate" in table:
        paired = zip(table["experts_gate"], table["lora"], strict=True)
        found["gate_above_one_model_c"] = interval([x["c"] - y["c"] for x, y in paired])
    arguments.json.write_text(json.dumps(found, indent=1))
    print("| method | a | b | c | gain on b | gain on c | spread | s |\n|---|---|---|---|---|---|---|---|")
    for name in table:
        cells = [f"{found['methods'][name][s][0]:.3f}" for s in ("a", "b", "c")]
        for s in ("b", "c"):
            mean, low, high = interval(gains[name][s])
            cells.append("" if name == "plain" else f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
        watched = found["watched"][name]
        print(f"| {name} | " + " | ".join(cells) + f" | {watched['spread']:.3f} | {watched['seconds']:.0f} |")
    print({key: found[key] for key in found if key.startswith(("test_", "gate_", "holm_"))})


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
