"""How good the estimates of `rlhf plan` are: a recipe is planned, then run, and both are shown for every stage.

python tests/benchmarks/plan_cost.py recipes/quickstart.yaml --work plan --json plan_cost.json

The plan and each stage run in a process of their own, one after the other, on as many threads as OMP_NUM_THREADS says; set it
to 1. Seconds are CPU time of the process, in the plan too, where `rlhf plan` asks the clock on the wall: on one thread that
waits for nothing both are the same, and CPU time is what other work on the machine comes into least. Memory is the peak
resident size of the process. Finished stages are kept in `--work` and not repeated.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

GIB = 2**30


def planned(recipe_file: Path, overrides: list[str]) -> dict[str, Any]:
    """Return seconds and bytes of every stage by `rlhf plan`, timed by the CPU time of this process."""
    from rlhf.cost import slices
    from rlhf.pipeline.estimate import estimate
    from rlhf.recipe import load_recipe

    slices.clock = time.process_time
    stages, notes = estimate(load_recipe(recipe_file, overrides))
    took = time.process_time()
    return {
        "stages": {s.folder: {"seconds": s.seconds, "bytes": s.bytes} for s in stages},
        "notes": notes,
        "took": took,
    }


def measured(recipe_file: Path, overrides: list[str], out: Path, stage: str) -> dict[str, float]:
    """Run one stage, those before it being done, and return its seconds and the peak of this process."""
    from rlhf.pipeline.run import run
    from rlhf.recipe import load_recipe

    for module in ("stages", "reward", "vote"):  # what a whole run imports once is no stage's
        import_module(f"rlhf.pipeline.{module}")
    marks: dict[str, tuple[float, float]] = {}

    def note(line: str) -> None:
        print(line, flush=True)
        folder, _, event = line.partition(": ")
        if event == "begins" or event.startswith("done in"):
            marks[f"{folder} {event.split()[0]}"] = (time.process_time(), time.monotonic())

    run(load_recipe(recipe_file, overrides), out, until=stage, say=note)
    begin, end = marks[f"{stage} begins"], marks[f"{stage} done"]
    peak = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": end[0] - begin[0], "wall": end[1] - begin[1], "bytes": peak}


def child(arguments: argparse.Namespace, result: Path, *more: str) -> dict[str, Any]:
    """Run this file once more in a process of its own and read what it wrote."""
    command = [sys.executable, __file__, str(arguments.recipe), *arguments.overrides]
    command += ["--work", str(arguments.work), "--result", str(result), *more]
    subprocess.run(command, check=True, stdout=sys.stderr)
    written: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return written


def main() -> None:
    """Compare the plan with the run, or be one of their processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    run_folder = arguments.work / "run"

    # 1. A child: the plan, or one stage.
    if arguments.result is not None:
        if arguments.stage is None:
            outcome: dict[str, Any] = planned(arguments.recipe, arguments.overrides)
        else:
            outcome = measured(arguments.recipe, arguments.overrides, run_folder, arguments.stage)
        arguments.result.write_text(json.dumps(outcome), encoding="utf-8")
        return

    # 2. The plan, and every stage that it speaks of; what comes before one runs with it.
    arguments.work.mkdir(parents=True, exist_ok=True)
    estimates = child(arguments, arguments.work / "plan.json")
    stages: dict[str, dict[str, float]] = {}
    for folder in estimates["stages"]:
        kept = arguments.work / f"{folder.replace('/', '-')}.json"
        if kept.is_file():
            stages[folder] = json.loads(kept.read_text(encoding="utf-8"))
        else:
            stages[folder] = child(arguments, kept, "--stage", folder)

    # 3. Side by side.
    rows = [
        {
            "stage": folder,
            **{f"{name}_planned": estimate[name] for name in ("seconds", "bytes")},
            **{f"{name}_measured": stages[folder][name] for name in ("seconds", "bytes", "wall")},
        }
        for folder, estimate in estimates["stages"].items()
    ]
    for row in rows:
        print(
            f"{row['stage']:24} CPU s {row['seconds_planned']:8.1f} : {row['seconds_measured']:8.1f} = "
            f"{row['seconds_planned'] / row['seconds_measured']:5.2f}   GiB {row['bytes_planned'] / GIB:5.2f} : "
            f"{row['bytes_measured'] / GIB:5.2f} = {row['bytes_planned'] / row['bytes_measured']:5.2f}   "
            f"wall s {row['wall_measured']:8.1f}"
        )
    print(f"the plan itself took {estimates['took']:.1f} s of CPU time, its imports included")
    if arguments.json is not None:
        text = json.dumps({"threads": os.environ.get("OMP_NUM_THREADS"), "stages": rows, **estimates}, indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
