"""Measure `rlhf verify` on random reward models of many families: false alarms on healthy servers, planted faults named.

Twenty models: ten pairs of an architecture and a chat template, each in float32 and in bfloat16. Every model is served
healthily by a stand-in for vLLM (eager attention), one for OpenRLHF, this package's own server, and plain transformers. With
--planted each is also served with every fault of tests/reward/test_verify.py.

    python tests/benchmarks/verify_healthy.py --out verify_healthy.json --planted
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from rlhf.reward.load import load_reward_model
from rlhf.serve.reward import reward_app
from tests.models.test_templates import ALL
from tests.reward.planted import Served, listening, make_reward_model
from tests.reward.test_verify import PLANTED, check, named
from tests.serve.running import running

FAMILIES = [
    ("llama", "llama-3"),
    ("qwen2", "chatml"),
    ("qwen3", "chatml"),
    ("mistral", "mistral"),
    ("gemma", "gemma"),
    ("phi3", "zephyr"),
    ("gpt_neox", "nothing"),
    ("gpt2", "padded"),
    ("llama", None),
    ("qwen3", "zephyr"),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--planted", action="store_true")
    parser.add_argument("--models", type=int, default=len(FAMILIES))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for number, (architecture, template) in enumerate(FAMILIES[: options.models]):
        for dtype in (torch.float32, torch.bfloat16):
            with tempfile.TemporaryDirectory() as name:
                rows.append(
                    measure(Path(name), architecture, template, dtype, seed=number, with_faults=options.planted)
                )
            options.out.write_text(json.dumps(summary(rows), indent=1) + "\n")
            print(json.dumps({key: rows[-1][key] for key in ("model", "alarms", "missed", "wrong")}), flush=True)
    print(json.dumps({key: value for key, value in summary(rows).items() if key != "rows"}, indent=1))


def measure(
    folder: Path, architecture: str, template: str | None, dtype: torch.dtype, *, seed: int, with_faults: bool
) -> dict[str, Any]:
    """What verify says of one model's servers."""
    make_reward_model(folder, architecture=architecture, template=template and ALL[template], dtype=dtype, seed=seed)
    model = f"{architecture} {template} {str(dtype).removeprefix('torch.')}"
    apps = {
        "vllm": Served(folder).app(),
        "openrlhf": Served(folder).openrlhf(),
    }
    wanted = {}
    for name, (plant, by_form) in PLANTED.items() if with_faults else ():
        if name == "cut" or (name == "precision" and dtype != torch.float32):
            continue  # texts of bytes are all long; bfloat16 is right where it is expected
        served = Served(folder)
        plant(served)
        apps[name.replace(" ", "-")] = served.app()
        wanted[name] = set().union(*by_form.values())
    row: dict[str, Any] = {"model": model, "alarms": {}, "missed": {}, "wrong": {}, "checks": 0, "largest": {}}
    with listening(apps) as url, running(reward_app(load_reward_model(folder), "reward")) as ours:
        targets = {
            "vllm": f"{url}/vllm",
            "pooling": f"{url}/vllm/pooling",
            "openrlhf": f"{url}/openrlhf",
            "ours": ours,
            "folder": str(folder),
        }
        for name, target in targets.items():
            verdict = check(target, folder)
            row["checks"] += len(verdict["forms"])
            allowed = verdict["tolerance"][verdict["dtype"]]
            shares = [
                f[f"difference_{way}"] / allowed
                for f in verdict["forms"]
                for way in ("alone", "together")
                if f["together"]
            ]
            row["largest"][name] = max(shares, default=None)
            if not verdict["held"]:
                row["alarms"][name] = [fault["sentence"] for fault in verdict["faults"]]
        for name, faults in wanted.items():
            verdict = check(f"{url}/{name.replace(' ', '-')}", folder)
            seen = set().union(*named(verdict).values())
            also = {x for fault in verdict["faults"] for x in fault["also"]}
            if not seen:
                row["missed"][name] = sorted(faults)
            elif not seen & faults:
                row["wrong"][name] = {"named": sorted(seen), "also": sorted(also)}
        row["planted"] = len(wanted)
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "models": len(rows),
        "checks": sum(row["checks"] for row in rows),
        "false_alarms": sum(len(row["alarms"]) for row in rows),
        "largest_share_of_tolerance": max(max(x for x in row["largest"].values() if x is not None) for row in rows),
        "planted": sum(row["planted"] for row in rows),
        "missed": sum(len(row["missed"]) for row in rows),
        "named_wrongly": sum(len(row["wrong"]) for row in rows),
        "rows": rows,
    }


if __name__ == "__main__":
    main()
