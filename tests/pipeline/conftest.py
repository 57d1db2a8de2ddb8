"""Finished runs of the small recipes, which tests of this room read or copy."""

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


@pytest.fixture(scope="session")
def two_rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two rounds, `x`."""
    from rlhf.pipeline.run import run
    from tests.pipeline.two_rounds import recipe

    folder = tmp_path_factory.mktemp("rounds")
    run(recipe(folder), folder / "x", say=lambda _: None)
    return folder
