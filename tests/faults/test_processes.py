"""Several processes, of which one fails: the launcher ends the others, and nobody waits for ever."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = """
name: small
lab: {demonstrations: 100, pairs: 100, test_pairs: 50, hidden_size: 32, num_hidden_layers: 1}
sft: {per_device_train_batch_size: 32, num_train_epochs: 1, save_strategy: "no"}
reward: {per_device_train_batch_size: 32, save_strategy: "no"}
ppo: {total_episodes: 32, per_device_train_batch_size: 8, num_mini_batches: 1, num_ppo_epochs: 1, max_completion_length: 8,
      extra_rewards: ["mine.py:f"]}
evaluate: {prompts: 8}
"""
FAILS = """
import os
def f(prompts, completions):
    if os.environ["RANK"] == "1":
        raise ValueError("this one fails")
    return [0.0] * len(prompts)
"""


@pytest.mark.slow
@pytest.mark.fault("a process fails")
@pytest.mark.timeout(240)
def test_one_process_that_fails_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "mine.py").write_text(FAILS, encoding="utf-8")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "rlhf", "ppo", "r.yaml", "--out", "x"]
    begin = time.monotonic()
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    seconds = time.monotonic() - begin
    assert result.returncode != 0
    assert "ppo.extra_rewards: mine.py:f failed: ValueError: this one fails" in result.stderr
    assert "rlhf/ppo" not in result.stderr, "no traceback of ours"
    assert not (tmp_path / "x/round-1/ppo/manifest.json").exists()
    assert seconds < 150, f"{seconds:.0f} s"
