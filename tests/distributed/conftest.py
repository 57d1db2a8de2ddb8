"""What these tests share: a launch of two processes of which one is killed, and two warm processes for all other commands."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from tests.command import run_script
from tests.distributed.sharded import SHARDED

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
RECIPE = """
name: small
lab: {demonstrations: 100, pairs: 100, test_pairs: 50, hidden_size: 32, num_hidden_layers: 2}
sft: {learning_rate: 3.0e-3, per_device_train_batch_size: 8, num_train_epochs: 1, logging_steps: 1, max_grad_norm: 1.0e+9,
  dataloader_drop_last: true}
vote: {members: 2, folds: 2, per_device_train_batch_size: 8, learning_rate: 1.0e-3}
reward: {learning_rate: 1.0e-3, per_device_train_batch_size: 16, num_train_epochs: 2, logging_steps: 1, max_grad_norm: 1.0e+9,
  dataloader_drop_last: true}
ppo: {total_episodes: 48, per_device_train_batch_size: 8, num_ppo_epochs: 1, learning_rate: 1.0e-3, max_completion_length: 12,
  max_grad_norm: 1.0e+9, logging_steps: 1}
evaluate: {prompts: 16}
"""
# What runs ask for beside it: four roles on one base; models of their own, and the two terms that take gradients of theirs.
LORA = ["reward.use_peft=true", "reward.lora_dropout=0.0", "ppo.use_peft=true", "ppo.lora_dropout=0.0"]
TERMS = ["reward.objective=posterior", "reward.extra=simcse", "reward.meta=true", "reward.meta_pool=12"]
SWAV = ["reward.extra=swav"]
# One process makes each step of as many micro-batches as two processes have.
HALF = {stage: f"{stage}.gradient_accumulation_steps=2" for stage in ("sft", "reward", "ppo")}
FIXED = {"FIXED_ANSWERS": "true"}
WORLD, SFT, REWARD = ["round-0/lab", "round-0/data"], "round-0/sft", "round-1/reward"


@dataclass(frozen=True)
class Command:
    """One `rlhf ppo r.yaml --out OUT …` of a plan.

    Attributes:
        takes: stages of runs before that this one need not repeat, as paths.
        processes: two, or 1 for the first alone.
    """

    out: str
    overrides: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    takes: list[str] = field(default_factory=list)
    processes: int = 2
    verb: str = "ppo"


def of(run: str, *stages: str) -> list[str]:
    return [f"{run}/{stage}" for stage in stages]


def stopped(stage: str, step: int) -> dict[str, str]:
    return {"STOP_AFTER": f"{stage}:{step}"}


KILLED = Command("killed", LORA, SHARDED)
FIXED_SHARDED = {**SHARDED, **FIXED}
COMMANDS = [
    # Killed in PPO, and again; not killed; data parallelism.
    KILLED,
    Command("lora", LORA, SHARDED, [*of("killed", *WORLD, SFT, REWARD)]),
    Command("lora-ddp", LORA, {}, of("killed", *WORLD)),
    # Models of their own, with MetaRM and a contrastive term.
    Command("terms", TERMS, SHARDED, of("killed", *WORLD, SFT)),
    Command("terms-ddp", TERMS, {}, of("killed", *WORLD, SFT)),
    Command("swav", SWAV, SHARDED, of("killed", *WORLD, SFT), verb="reward"),
    Command("swav-ddp", SWAV, {}, of("killed", *WORLD, SFT), verb="reward"),
    # One process against two. PPO takes the reward model of two, whose scale is that of answers sampled by chance.
    Command("one", [HALF["sft"], HALF["reward"]], {}, of("killed", *WORLD), 1, "reward"),
    Command("two", [], FIXED_SHARDED, of("killed", *WORLD, SFT)),
    Command("one-ppo", [HALF["ppo"]], FIXED, of("two", *WORLD, SFT, REWARD), 1),
    Command("one-lora", [*LORA, HALF["reward"]], {}, of("killed", *WORLD, SFT), 1, "reward"),
    Command("one-lora-ppo", [*LORA, HALF["ppo"]], FIXED, of("killed", *WORLD, SFT, REWARD), 1),
    Command("two-lora", LORA, FIXED_SHARDED, of("killed", *WORLD, SFT, REWARD)),
    # Two processes, one, two.
    Command("moved", [], {**FIXED_SHARDED, **stopped("reward", 2)}, of("killed", *WORLD, SFT)),
    Command("moved", [], {**FIXED, **stopped("reward", 4)}, processes=1),
    Command("moved", [], {**FIXED_SHARDED, **stopped("ppo", 1)}),
    Command("moved", [], {**FIXED, **stopped("ppo", 2)}, processes=1),
    Command("moved", [], FIXED_SHARDED),
    # Refused.
    Command("idle", [], {k: v for k, v in SHARDED.items() if k != "SHARD_ON_CPU"}, of("killed", *WORLD)),
    Command("fsdp1", [], {**SHARDED, "FSDP_VERSION": "1"}, of("killed", *WORLD)),
]


@dataclass(frozen=True)
class Launch:
    """What all commands left behind.

    Attributes:
        folder: of the runs.
        seconds: that the other process lived on after one was killed.
    """

    folder: Path
    seconds: float

    def rows(self, run: str, stage: str) -> list[dict[str, Any]]:
        """Metrics of each step."""
        return [row for row in self._lines(run, stage) if "step" in row]

    def resumed_from(self, run: str, stage: str) -> list[int]:
        """The steps after which a stage went on."""
        return [row["resumed_from"] for row in self._lines(run, stage) if "resumed_from" in row]

    def _lines(self, run: str, stage: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / run / stage / "metrics.jsonl").read_text().splitlines()]

    def weights(self, run: str, stage: str) -> dict[str, torch.Tensor]:
        (file,) = (self.folder / run / stage / "model").glob("*model.safetensors")
        return load_file(file)

    def results(self, run: str) -> list[dict[str, Any]]:
        """Exit code and standard error of the first process, of each command of a run."""
        numbers = [number for number, command in enumerate(COMMANDS) if command.out == run]
        return [json.loads((self.folder / f"result-{number}-0.json").read_text()) for number in numbers]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def launcher(*arguments: str) -> list[str]:
    """A command that starts two processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]


def write_plan(folder: Path, commands: list[Command]) -> None:
    (folder / "plan.json").write_text(json.dumps([vars(command) for command in commands]))


def start(folder: Path, commands: list[Command]) -> "subprocess.Popen[bytes]":
    write_plan(folder, commands)
    with (folder / "log").open("ab") as log:
        worker = launcher(str(HERE / "sharded.py"), "plan.json")
        return subprocess.Popen(worker, cwd=folder, env=environment(), stdout=log, stderr=log)


def kill_one(folder: Path) -> float:
    """Start a run, kill one of its processes after PPO's first checkpoint; return how long the launch lived on."""
    launched = start(folder, [KILLED])
    checkpoints = folder / "killed" / "round-1/ppo/checkpoints"
    while launched.poll() is None and not list(checkpoints.glob("checkpoint-*/complete.json")):
        time.sleep(0.02)
    assert launched.poll() is None, (folder / "log").read_text()[-3000:]
    processes = psutil.Process(launched.pid).children(recursive=True)
    ranks = [process for process in processes if "sharded.py" in " ".join(process.cmdline())]
    assert len(ranks) == 2
    ranks[-1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert launched.wait(timeout=60) != 0
    return time.monotonic() - killed


def run_all(folder: Path) -> Launch:
    (folder / "r.yaml").write_text(RECIPE)
    seconds = kill_one(folder)
    for file in folder.glob("re*-*"):  # of the killed command
        file.unlink()
    write_plan(folder, COMMANDS)
    run_script(str(HERE / "sharded.py"), "plan.json", cwd=folder, processes=2, seconds=280)
    (folder / "seconds").write_text(str(seconds))
    return Launch(folder, seconds)


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """All commands, run once a session, also where several workers of pytest ask for them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributed"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if (folder / "seconds").exists():
            return Launch(folder, float((folder / "seconds").read_text()))
        return run_all(folder)
