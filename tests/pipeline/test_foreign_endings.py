"""Code that is not ours may not end a run in the middle, whatever stage it is called in."""

from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import TrainingError
from rlhf.pipeline.run import _run_stage
from rlhf.pipeline.stage_table import STAGES, StageFunction
from rlhf.pipeline.store import Stage, Store
from rlhf.recipe import load_recipe


@pytest.mark.fault("functions that end the process")
@pytest.mark.parametrize(
    "ending", [SystemExit(0), SystemExit(), KeyboardInterrupt()], ids=["exit 0", "exit", "interrupt"]
)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_ended_from_inside_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ending: BaseException
) -> None:
    def end(_: Any) -> dict[str, Any]:
        raise ending

    monkeypatch.setattr(StageFunction, "load", lambda self: end)
    (tmp_path / "r.yaml").write_text("name: x\nlab: {}\n")
    stage, store = Stage(name, f"round-1/{name}", {}, 0), Store(tmp_path / "out")
    with pytest.raises(TrainingError, match=f"round-1/{name}: something raised {type(ending).__name__} in the middle"):
        _run_stage(stage, load_recipe(tmp_path / "r.yaml"), store, is_main=True, say=lambda _: None)
    assert not store.is_done(stage)
