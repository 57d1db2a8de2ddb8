"""Launches that go wrong: all processes end soon, and one of them says why."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.conftest import RECIPE, environment, launcher


def launched(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder with a recipe."""
    (folder / "r.yaml").write_text(RECIPE)
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.slow
def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    """Both processes find it and exit with 2, the code of a person's mistake; torchrun itself always exits with 1."""
    result = launched(tmp_path, *launcher("-m", "rlhf", "run", "r.yaml", "--out", "x", "ppo.kl_coeff=1"))
    assert result.returncode == 1
    assert result.stderr.count("unknown key ppo.kl_coeff; did you mean 'kl_coef'?") == 1
    assert "exitcode  : 2" in result.stderr
    assert not (tmp_path / "x").exists()


def test_a_launch_that_started_one_process_is_refused(tmp_path: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing."""
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    result = launched(tmp_path, *accelerate, "-m", "rlhf", "run", "r.yaml", "--out", "x")
    assert result.returncode != 0
    assert "accelerate was asked for 2 processes and started one" in result.stderr
    assert "torchrun --nproc_per_node 2 -m rlhf" in result.stderr
    assert not (tmp_path / "x").exists()
