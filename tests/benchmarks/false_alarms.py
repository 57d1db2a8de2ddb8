"""Do the checks of a run alarm where nothing is wrong? Whole small runs of every kind, and what their checks came to.

python tests/benchmarks/false_alarms.py --work alarms --json false_alarms.json
python tests/benchmarks/false_alarms.py --work alarms --model SMOLLM2 --encoder MINILM --pairs pairs.jsonl --json …

In the lab: full and LoRA, float32 and bf16 autocast, one and two processes, two rounds. With folders of real weights and a file of
pairs: a language model through SFT-less reward training and PPO with LoRA, a reward model on an encoder. Finished runs are kept in
`--work` and not repeated. An alarm ends a run with exit code 1; the table shows how near each check came to its bound (1 is
the bound).
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SMALL = [
    "lab.demonstrations=2000",
    "lab.pairs=1200",
    "lab.test_pairs=200",
    "lab.hidden_size=64",
    "evaluate.prompts=64",
    "ppo.total_episodes=1024",
]
LORA = {"use_peft": True, "lora_r": 8, "lora_target_modules": "[all-linear]"}
PEFT = [f"{stage}.{key}={value}" for stage in ("sft", "reward", "ppo") for key, value in LORA.items()]
BF16 = [f"{stage}.bf16=true" for stage in ("sft", "reward", "ppo")]
PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "rlhf"]
REAL_PPO = {
    "use_peft": True,
    "total_episodes": 64,
    "per_device_train_batch_size": 16,
    "max_completion_length": 48,
    "max_prompt_length": 128,
}


def lab_runs() -> dict[str, tuple[list[str], list[str]]]:
    """Return name → how the program is started, and its arguments."""
    runs = {}
    for tuning, dtype, processes in itertools.product(("full", "lora"), ("fp32", "bf16"), (1, 2)):
        settings = [*SMALL, *(PEFT if tuning == "lora" else []), *(BF16 if dtype == "bf16" else [])]
        start = [sys.executable, "-m", "rlhf"] if processes == 1 else PROCESSES
        runs[f"{tuning} {dtype} {processes}"] = (start, ["run", "recipes/quickstart.yaml", *settings])
    runs["two rounds"] = (
        [sys.executable, "-m", "rlhf"],
        ["run", "recipes/lab/rounds.yaml", *SMALL, "rounds.count=2", "rounds.labels=300", "rounds.prompts=200"],
    )
    return runs


def real_runs(args: argparse.Namespace) -> dict[str, tuple[list[str], list[str]]]:
    """Return the runs on real weights that were asked for, their recipes written into the work folder."""
    start, runs, data = [sys.executable, "-m", "rlhf"], {}, {"preferences": str(args.pairs)}
    if args.model is not None:
        recipe = args.work / "recipe-model.json"  # JSON is YAML
        sections = {"backbone": {"model": str(args.model)}, "data": data, "reward": {"use_peft": True}, "ppo": REAL_PPO}
        recipe.write_text(json.dumps({"name": "model", **sections, "evaluate": {"prompts": 16}}))
        runs["model, lora"] = (start, ["run", str(recipe)])
    if args.encoder is not None:
        recipe = args.work / "recipe-encoder.json"
        recipe.write_text(json.dumps({"name": "encoder", "backbone": {"model": str(args.encoder)}, "data": data}))
        runs["encoder"] = (start, ["reward", str(recipe)])
    return runs


def measure(name: str, start: list[str], arguments: list[str], work: Path) -> dict[str, Any]:
    """Run once; return exit code, seconds and the checks of every stage."""
    out, kept = work / name.replace(" ", "_").replace(",", ""), work / f"{name.replace(' ', '_')}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": ".", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*start, *arguments, "--out", str(out)], capture_output=True, text=True, env=environment, check=False
    )
    checks: dict[str, dict[str, float]] = {}
    for manifest in sorted(out.glob("round-*/*/manifest.json")):
        for check, entry in json.loads(manifest.read_text()).get("facts", {}).get("checks", {}).items():
            limit = entry["low"] if entry["low"] is not None and entry["statistic"] < 0 else entry["bound"]
            near = abs(entry["statistic"] / limit) if limit else float(not entry["held"])
            before = checks.get(check, {"nearest": 0.0, "times": 0, "alarms": 0})
            checks[check] = {
                "nearest": max(before["nearest"], near),
                "times": before["times"] + entry["times"],
                "alarms": before["alarms"] + (not entry["held"]),
            }
    result = {"exit": process.returncode, "seconds": time.perf_counter() - started, "checks": checks}
    if process.returncode:
        result["end"] = process.stderr[-2000:]
    kept.write_text(json.dumps(result))
    return result


def main() -> None:
    """Run what was asked for, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("false_alarms"))
    parser.add_argument("--model", type=Path, help="a causal model's folder")
    parser.add_argument("--encoder", type=Path, help="an encoder's folder")
    parser.add_argument("--pairs", type=Path, help="preferences for the two")
    parser.add_argument("--runs", nargs="*", help="names of runs, as they are printed; without: all")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    runs = {**lab_runs(), **real_runs(args)}
    runs = {name: run for name, run in runs.items() if args.runs is None or name in args.runs}
    results = {}
    for name, (start, arguments) in runs.items():
        results[name] = measure(name, start, arguments, args.work)
        alarms = sum(check["alarms"] for check in results[name]["checks"].values())
        looks = sum(check["times"] for check in results[name]["checks"].values())
        print(
            f"{name}: exit {results[name]['exit']}, {results[name]['seconds']:.0f} s, {looks} looks, {alarms} alarms",
            flush=True,
        )
    args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
