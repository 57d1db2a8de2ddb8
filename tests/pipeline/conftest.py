"""One finished run of the small recipe, which tests of this room read or copy."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.small import ENVIRONMENT, RECIPE


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run from a cold start, as a user starts it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "r.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "rlhf", "run", "r.yaml", "--out", "x"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder
