"""A lab small enough for seconds, and what its stages made."""

import json
import os
from pathlib import Path

RECIPE = """
name: small
lab: {demonstrations: 300, pairs: 200, test_pairs: 60, hidden_size: 64, num_hidden_layers: 1}
sft: {learning_rate: 3.0e-3, per_device_train_batch_size: 32, num_train_epochs: 2, logging_steps: 1, save_steps: 2}
reward: {learning_rate: 1.0e-3, per_device_train_batch_size: 16, num_train_epochs: 2, logging_steps: 1, save_steps: 4}
ppo: {total_episodes: 64, per_device_train_batch_size: 8, num_mini_batches: 2, num_ppo_epochs: 2, learning_rate: 1.0e-3,
      max_completion_length: 12, save_steps: 4}
evaluate: {prompts: 24}
"""
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
STAGES = ["round-0/lab", "round-0/data", "round-0/sft", "round-1/reward", "round-1/ppo", "round-1/evaluate"]


def digests(run: Path, until: str = STAGES[-1]) -> dict[str, str]:
    """sha256 of every weight file of the stages up to this one."""
    files = {}
    for stage in STAGES[: STAGES.index(until) + 1]:
        for file in json.loads((run / stage / "manifest.json").read_text())["files"]:
            if file["path"].startswith("model/") and file["path"].endswith(".safetensors"):
                files[f"{stage}/{file['path']}"] = file["sha256"]
    return files
