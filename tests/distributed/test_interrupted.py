"""A process of a sharded run that is killed: all end soon, the same command goes on, and the models are the same to the bit."""

import hashlib
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.sharded import FSDP2
from tests.distributed.test_fsdp2 import RECIPE, RUNS, command, environment, run

SHARDED = {**FSDP2, "SHARD_ON_CPU": "true"}
STAGES = ("round-0/sft", "round-1/reward", "round-1/ppo")
OVERRIDES = [*RUNS["lora"], "ppo.total_episodes=64", "reward.save_steps=2"]


def kill_one(folder: Path, name: str, stage: str) -> float:
    """Start a run on two processes, kill one of them after the first checkpoint of a stage; return how long the others lived."""
    launched = subprocess.Popen(
        command("ppo", name, *OVERRIDES),
        cwd=folder,
        env=environment(**SHARDED),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = folder / name / stage / "checkpoints"
    while launched.poll() is None and not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.05)
    assert launched.poll() is None, "the run ended before its first checkpoint"
    ranks = [x for x in psutil.Process(launched.pid).children(recursive=True) if "sharded.py" in " ".join(x.cmdline())]
    assert len(ranks) == 2
    ranks[-1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert launched.wait(timeout=60) != 0
    return time.monotonic() - killed


def digests(run_folder: Path) -> dict[str, str]:
    files = [file for stage in STAGES for file in sorted((run_folder / stage / "model").glob("*.safetensors"))]
    return {str(file.relative_to(run_folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_process_ends_all_and_the_same_command_gives_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    whole = run(tmp_path, "whole", *OVERRIDES, **SHARDED)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert (
        kill_one(tmp_path, "killed", "round-1/ppo") < 30
    )  # seconds; torchrun gives the others as many to end by themselves
    resumed = run(tmp_path, "killed", *OVERRIDES, **SHARDED)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert len(digests(tmp_path / "whole")) == len(STAGES)


def test_fsdp_1_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path, "x", **{**SHARDED, "FSDP_VERSION": "1"})
    assert result.returncode != 0
    assert "FSDP 1 is not supported; set fsdp_version: 2 in accelerate's configuration." in result.stderr
