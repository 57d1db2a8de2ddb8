"""What the checks of a run cost: the quickstart with them and without, alternating, each in a process of its own.

python tests/benchmarks/check_cost.py --pairs 3 --json check_cost.json

Without: every check that costs a forward or a pass over the logits is replaced by nothing (`OFF`), in the child process alone;
what is sampled and learnt is the same, and the two runs' policies are compared bit for bit. Seconds are those of the stages
as their manifests say; memory is the peak resident size of the child. Run it on a quiet machine.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

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
}


def child(recipe: Path, out: Path, *, checks: bool) -> None:
    """Run a recipe in this process, with the checks or without."""
    import importlib

    from rlhf.pipeline.run import run
    from rlhf.recipe import load_recipe

    if not checks:
        for dotted, replacement in OFF.items():
            module, _, name = dotted.rpartition(".")
            loaded = importlib.import_module(module)
            old = getattr(loaded, name)
            new = eval(replacement)
            for other in list(sys.modules.values()):  # a name that was imported elsewhere stands there too
                if getattr(other, "__name__", "").startswith("rlhf") and getattr(other, name, None) is old:
                    setattr(other, name, new)
    run(load_recipe(recipe), out, say=lambda _: None)
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def measure(recipe: Path, folder: Path, *, checks: bool) -> dict[str, object]:
    """Run a recipe in a process of its own; return seconds a stage, peak bytes and the policy's digest."""
    out = folder / ("with" if checks else "without")
    command = [sys.executable, __file__, "--child", str(recipe), str(out), *(["--checks"] if checks else [])]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."})
    manifests = [json.loads(file.read_text()) for file in sorted(out.glob("round-*/*/manifest.json"))]
    ppo = json.loads((out / "round-1/ppo/manifest.json").read_text())
    weights = [file["sha256"] for file in ppo["files"] if file["path"] == "model/model.safetensors"]
    seconds = sum(manifest["seconds"] for manifest in manifests)
    return {"seconds": seconds, "policy": weights, **json.loads(result.stdout.splitlines()[-1])}


def main() -> None:
    """Measure pairs of runs, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.yaml"))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, type=Path, metavar=("RECIPE", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--checks", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(*args.child, checks=args.checks)
        return
    runs: dict[bool, list[dict[str, object]]] = {True: [], False: []}
    for pair in range(args.pairs):
        for checks in (True, False) if pair % 2 == 0 else (False, True):
            with tempfile.TemporaryDirectory() as folder:
                runs[checks].append(measure(args.recipe, Path(folder), checks=checks))
            print("with" if checks else "without", runs[checks][-1], flush=True)
    ratios = [float(w["seconds"]) / float(o["seconds"]) - 1 for w, o in zip(runs[True], runs[False], strict=True)]
    result = {
        "with": runs[True],
        "without": runs[False],
        "more_time": ratios,
        "more_time_mean": statistics.fmean(ratios),
        "more_memory": max(r["peak"] for r in runs[True]) / max(r["peak"] for r in runs[False]) - 1,
        "same_bits": len({str(run["policy"]) for side in runs.values() for run in side}) == 1,
    }
    print(json.dumps(result, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
