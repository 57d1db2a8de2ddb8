"""Reward training and PPO on one process and on two, the same work in each: seconds, memory, and the loss curves side by side.

python tests/benchmarks/scale.py --work scale --json scale.json

The lab's small models on a CPU, one thread a process; the batch of a step has as many rows in every way. Two processes run
under torchrun with gloo: data parallelism, and FSDP2 through the helper of `tests/distributed`. With two processes the reward
stage groups other batches by length than one process does, so there the curves of the two ways are to be the same, and those
of one process alike. Seconds are those of the Trainer's loop, on the clock and of the processor, the latter of all processes
together: on a machine with other work only the latter say what sharing costs. Finished ways are kept in `--work`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GLOBAL_BATCH = 32
RECIPE = """
name: scale
lab: {demonstrations: 400, pairs: 800, test_pairs: 100}
sft: {learning_rate: 3.0e-3, num_train_epochs: 1, logging_steps: 1}
reward: {learning_rate: 1.0e-3, num_train_epochs: 1, logging_steps: 1}
ppo: {learning_rate: 3.0e-4, critic_learning_rate: 1.0e-3, total_episodes: 512, num_mini_batches: 2, num_ppo_epochs: 1,
  max_completion_length: 24, logging_steps: 1}
"""
WAYS = {"one process": (1, False), "DDP": (2, False), "FSDP2": (2, True)}
STAGES = ("reward", "ppo")


def launched(work: Path, way: str) -> None:
    """Run SFT, reward training and PPO in one way."""
    from tests.distributed.sharded import FSDP2

    processes, sharded = WAYS[way]
    rows = GLOBAL_BATCH // processes
    overrides = [f"{section}.per_device_train_batch_size={rows}" for section in ("sft", *STAGES)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [__file__, "--child", str(work / folder_of(way)), *overrides]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= FSDP2 | {"SHARD_ON_CPU": "true"} if sharded else {}
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)


def child(out: Path, overrides: list[str]) -> None:
    """Be one of the processes: run `rlhf ppo`, and note what each training took."""
    import torch
    import transformers.trainer
    from transformers import TrainerCallback

    from tests.distributed.sharded import shard_on_cpu

    torch.set_num_threads(1)
    if os.environ.get("SHARD_ON_CPU") == "true":
        shard_on_cpu()

    class Clock(TrainerCallback):
        """Writes seconds and peak memory of a training into the run's folder, a file a process."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            self.begin = time.monotonic(), time.process_time()

        def on_train_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            wall, cpu = self.begin
            lines = Path("/proc/self/status").read_text().splitlines()
            facts = {
                "seconds": time.monotonic() - wall,
                "cpu": time.process_time() - cpu,
                "peak_kib": next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")),
            }
            stage, _, run, *_ = Path(args.output_dir).parents
            (run / f"{stage.name}-{args.process_index}.json").write_text(json.dumps(facts))

    transformers.trainer.DEFAULT_CALLBACKS.append(Clock)
    from rlhf.cli import main

    recipe = out.parent / "recipe.yaml"
    sys.argv = ["rlhf", "ppo", str(recipe), "--out", str(out), *overrides]
    main()


def folder_of(way: str) -> str:
    """Return the name of a way's folder."""
    return way.lower().replace(" ", "-")


def measured(run: Path) -> dict[str, Any]:
    """Return what the stages of a finished run took, and their rows of metrics."""
    result: dict[str, Any] = {}
    for stage in STAGES:
        facts = [json.loads(file.read_text()) for file in sorted(run.glob(f"{stage}-*.json"))]
        metrics = (run / "round-1" / stage / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, metrics) if "loss" in row]
        result[stage] = {
            "seconds": max(fact["seconds"] for fact in facts),
            "cpu": sum(fact["cpu"] for fact in facts),
            "peak_mib": max(fact["peak_kib"] for fact in facts) / 1024,
            "curves": {key: [row[key] for row in rows] for key in ("loss", "grad_norm", "kl") if key in rows[0]},
        }
    return result


def compare(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return, of each stage and way, its seconds beside those of one process, and how far curves lie apart."""
    table: dict[str, Any] = {}
    for stage in STAGES:
        one, ddp, fsdp = (found[way][stage] for way in WAYS)
        table[stage] = {
            "efficiency": {way: one["seconds"] / (WAYS[way][0] * found[way][stage]["seconds"]) for way in WAYS},
            "work": {way: found[way][stage]["cpu"] / one["cpu"] for way in WAYS},
            "largest_difference_of_fsdp2_from_ddp": {
                key: max(abs(a - b) for a, b in zip(ddp["curves"][key], fsdp["curves"][key], strict=True))
                for key in ddp["curves"]
            },
        }
    return table


def main() -> None:
    """Measure every way that is not finished, or be one of the processes of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=Path("scale"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child, arguments.overrides)
        return

    # 1. Each way; what was kept is not repeated.
    arguments.work.mkdir(parents=True, exist_ok=True)
    (arguments.work / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    found: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        file = arguments.work / f"{folder_of(way)}.json"
        if not file.is_file():
            load = os.getloadavg()[0]
            launched(arguments.work, way)
            machine = {"load_before": load, "load_after": os.getloadavg()[0]}
            file.write_text(json.dumps(measured(arguments.work / folder_of(way)) | machine), encoding="utf-8")
        found[way] = json.loads(file.read_text(encoding="utf-8"))

    # 2. Side by side.
    compared = compare(found)
    for stage in STAGES:
        for way, facts in found.items():
            numbers, curve = facts[stage], facts[stage]["curves"]["loss"]
            few = "  ".join(f"{loss:8.5f}" for loss in curve[:: max(1, len(curve) // 6)])
            print(
                f"{stage:7} {way:12} {numbers['seconds']:6.1f} s  {numbers['cpu']:6.1f} CPU s  {numbers['peak_mib']:5.0f} MiB  "
                f"efficiency {compared[stage]['efficiency'][way]:.2f}  work {compared[stage]['work'][way]:.2f}  "
                f"load {facts['load_before']:.1f} to {facts['load_after']:.1f}  loss {few}"
            )
        print(stage, compared[stage]["largest_difference_of_fsdp2_from_ddp"])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"ways": found, "compared": compared}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
