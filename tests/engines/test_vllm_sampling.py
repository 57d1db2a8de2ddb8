"""Answers outside PPO by a real vLLM engine in a process of its own: it has the model's weights, and follows the seed.

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
def test_the_engine_has_the_models_weights(layout: str, base_folder: Path, tmp_path: Path) -> None:
    command = [os.environ[vllm.PYTHON], "-m", "tests.engines.sampled", str(base_folder), "out.json", layout]
    environment = {**os.environ, **vllm.SETTINGS, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    facts = json.loads((tmp_path / "out.json").read_text())
    print(facts)
    assert (
        facts["agreement"] >= 0.95
    )  # at a temperature of 0.01 the second of two tokens within a few hundredths comes too
    assert (facts["agreement_base"] < 0.9) == (layout == "lora")
    assert facts["again"]
    assert facts["drawn"] > 8
