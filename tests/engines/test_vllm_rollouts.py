"""PPO's rollouts by a real vLLM engine: it has the weights that were trained, and samples from the same policy.

Skipped where there is no environment for vLLM; `make_vllm_environment.sh` makes one.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.engines import vllm

pytestmark = pytest.mark.skipif(vllm.absent() is not None, reason=vllm.absent() or "")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", ["full", "lora"])
def test_the_engine_follows_the_policy(layout: str, base_folder: Path, reward_folder: Path, tmp_path: Path) -> None:
    """Ten updates with the engine in the process; its greedy answers are then those of plain transformers."""
    # As a module: beside this file lies a vllm.py of ours, which a script would import in place of the engine.
    arguments = [str(base_folder), str(reward_folder), "out", layout]
    command = [os.environ[vllm.PYTHON], "-m", "tests.engines.colocated", *arguments]
    environment = {**os.environ, **vllm.SETTINGS, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    facts = json.loads((tmp_path / "out.json").read_text())
    differences = [row["sampler_difference"] for row in facts["rollouts"]]
    kl = [row["kl"] for row in facts["rollouts"]]
    print({**facts, "rollouts": len(differences), "differences": differences, "kl": kl})
    assert len(differences) == 10
    # Nats a token. The engine computes in bfloat16, eight bits, what this test trains in float32: 0.021 to 0.024 were measured.
    assert max(differences) <= 0.03
    assert facts["agreement"] >= 0.95
    assert facts["agreement_before"] < 0.8, "an engine that still had the base's weights would agree with these"
