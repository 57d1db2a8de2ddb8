"""What the checks of a run cost, and whether they raise false alarms: the quickstart with them and without, alternating.

python tests/benchmarks/check_cost.py --seeds 0-9 --pairs 3 --work cost --json check_cost.json

Every seed runs with checks, the first `--pairs` of them without too, each run in a process of its own; finished ones are kept in
`--work` and not repeated. Without: every check that costs a forward or a pass over the logits is replaced by nothing (`OFF`),
in the child process alone; what is sampled and learnt is the same, and the policies of a pair are compared bit for bit.
Cost is compared in seconds of CPU time and by the clock; memory is the peak resident size of the process. Beside it stands the
share of its CPU time that a run spends inside the functions of the checks (`in_checks`), which no other work on the machine
and no other run comes into: with all of `token_surprise`, also the entropy that PPO logs without checks.
"""

import argparse
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.models.logprobs import _few_rows as few_rows
from rlhf.pipeline.run import run
from rlhf.recipe import load_recipe

# Name in a module → what stands there instead.
OFF = {
    "rlhf.pipeline.stages.check_ends_before_ppo": "lambda *_: None",
    "rlhf.pipeline.stages.check_nothing_lost": "lambda *_: None",
    "rlhf.ppo.checks.check_sampling": "lambda *_: None",
    "rlhf.ppo.checks.check_first_ratio": "lambda *_: None",
    "rlhf.ppo.checks.hold_reference": "lambda *_: None",
    "rlhf.ppo.checks.require_reference": "lambda *_: None",
    "rlhf.ppo.checks.check_policy_is_reference": "lambda *_: None",
    "rlhf.reward.load.check_scores": "lambda *_, **__: None",
    "rlhf.models.logprobs.ExpectedCounts": "lambda *_: None",
    "rlhf.models.logprobs.token_surprise": "entropy_alone",
}


@torch.no_grad()
def entropy_alone(
    logits: Tensor, length: int, *, temperature: float = 1.0, **_: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the entropy in the place of all three moments: PPO logs it, with checks or without."""
    parts = []
    for rows in few_rows(logits):
        log_softmax = torch.log_softmax(logits[rows, :length].float() / temperature, dim=-1)
        parts.append(-log_softmax.exp().mul_(log_softmax).sum(dim=-1))
    entropy = torch.cat(parts)
    return entropy, entropy, entropy


def replace_everywhere(dotted: str, change: Callable[[Any], Any]) -> None:
    """Put what `change` makes of a function in its place, in every module that holds it."""
    module, _, name = dotted.rpartition(".")
    old = getattr(importlib.import_module(module), name)
    new = change(old)
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").startswith("rlhf") and getattr(other, name, None) is old:
            setattr(other, name, new)


def timed(function: Callable[..., Any], seconds: list[float], depth: list[int]) -> Callable[..., Any]:
    """Return a function that adds up the CPU seconds it takes; inside another one that is timed it counts nothing."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        started, depth[0] = time.process_time(), depth[0] + 1
        try:
            return function(*arguments, **named)
        finally:
            depth[0] -= 1
            if depth[0] == 0:
                seconds[0] += time.process_time() - started

    return wrapper


def evaluated(_: Any, text: str) -> Any:
    """What stands in place of a check."""
    return eval(text)


def child(recipe: Path, seed: int, out: Path, *, checks: bool) -> None:
    """Run a recipe in this process, with the checks, which are timed, or without."""
    seconds, depth = [0.0], [0]
    importlib.import_module("rlhf.ppo.trainer")
    for dotted, replacement in OFF.items():
        if not checks:
            replace_everywhere(dotted, functools.partial(evaluated, text=replacement))
        elif not dotted.endswith("ExpectedCounts"):
            replace_everywhere(dotted, lambda old: timed(old, seconds, depth))
    run(load_recipe(recipe, [f"seed={seed}"]), out, say=lambda _: None)
    out.with_suffix(".seconds").write_text(json.dumps(seconds[0]))


def measure(recipe: Path, seed: int, work: Path, *, checks: bool) -> dict[str, Any]:
    """Run a recipe in a process of its own; return seconds, CPU seconds, peak bytes, the policy's digest and the checks."""
    name = f"{'with' if checks else 'without'}-{seed}"
    out, kept = work / name, work / f"{name}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    command = [sys.executable, __file__, "--child", str(recipe), str(seed), str(out), *(["--checks"] if checks else [])]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": "."})
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"seed {seed}, {name}: ended with {os.waitstatus_to_exitcode(status)}")
    ppo = json.loads((out / "round-1/ppo/manifest.json").read_text())
    summary = json.loads((out / "summary.json").read_text())
    result = {
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "in_checks": json.loads(out.with_suffix(".seconds").read_text()),
        "peak": usage.ru_maxrss * 1024,
        "policy": [file["sha256"] for file in ppo["files"] if file["path"] == "model/model.safetensors"],
        "gap_closed": summary["gold_gap_closed"],
        "checks": {name: [c["statistic"], c["bound"], c["held"]] for name, c in summary["checks"].items()},
    }
    kept.write_text(json.dumps(result))
    shutil.rmtree(out)
    return result


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.yaml"))
    parser.add_argument("--seeds", default="0-9", help="FIRST-LAST")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("check_cost"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("RECIPE", "SEED", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--checks", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        recipe, seed, out = args.child
        child(Path(recipe), int(seed), Path(out), checks=args.checks)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    first, last = map(int, args.seeds.split("-"))
    runs: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for seed in range(first, last + 1):
        sides = (True, False) if seed % 2 == 0 else (False, True)
        for checks in sides if seed - first < args.pairs else (True,):
            runs[checks].append(measure(args.recipe, seed, args.work, checks=checks))
            print("with" if checks else "without", runs[checks][-1], flush=True)
    pairs = list(zip(runs[True], runs[False], strict=False))
    result = {
        "runs": len(runs[True]),
        "alarms": sum(not held for one in runs[True] for _, _, held in one["checks"].values()),
        "gap_closed": [one["gap_closed"] for one in runs[True]],
        "more_cpu_time": [float(w["cpu_seconds"]) / float(o["cpu_seconds"]) - 1 for w, o in pairs],
        "in_checks": [one["in_checks"] / one["cpu_seconds"] for one in runs[True] if one.get("in_checks")],
        "more_time": [float(w["seconds"]) / float(o["seconds"]) - 1 for w, o in pairs],
        "more_memory": [int(w["peak"]) / int(o["peak"]) - 1 for w, o in pairs],
        "same_bits": all(w["policy"] == o["policy"] for w, o in pairs),
        "with": runs[True],
        "without": runs[False],
    }
    print(json.dumps({name: value for name, value in result.items() if name not in ("with", "without")}, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
