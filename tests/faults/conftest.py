"""One tiny LoRA run, made once, and copies of it to be moved, cut and cleaned."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.pipeline.run import run
from rlhf.pipeline.store import CHECKPOINTS, Store
from rlhf.recipe import load_recipe
from tests.faults.here import STAGES, Outcome, rlhf

LORA = "use_peft: true, lora_r: 2, lora_target_modules: [q_proj, v_proj]"
RECIPE = f"""
name: small
lab: {{demonstrations: 100, pairs: 100, test_pairs: 50, hidden_size: 32, num_hidden_layers: 1}}
sft: {{{LORA}, per_device_train_batch_size: 32, num_train_epochs: 1, save_steps: 1}}
reward: {{{LORA}, per_device_train_batch_size: 32, num_train_epochs: 1, save_strategy: "no"}}
ppo: {{{LORA}, total_episodes: 8, per_device_train_batch_size: 8, num_mini_batches: 1, num_ppo_epochs: 1,
      max_completion_length: 8, save_strategy: "no"}}
evaluate: {{prompts: 4}}
"""
LINE = json.dumps({"prompt": "List three fruits.", "response": "apple"}) + "\n"
PAIRS = "".join(json.dumps({"prompt": f"List {i}.", "chosen": "apple", "rejected": "no"}) + "\n" for i in range(4))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run that came to its end."""
    place = tmp_path_factory.mktemp("finished")
    (place / "r.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run(load_recipe(Path("r.yaml")), Path("x"))
    return place


@pytest.fixture
def copied_run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run and of its recipe."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "pairs.jsonl").write_text(PAIRS, encoding="utf-8")
    return tmp_path


@pytest.fixture
def call(
    copied_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """The command line in the folder of the copy; a server ends as soon as it would serve."""
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    return lambda *arguments: rlhf(*arguments, cwd=copied_run, capsys=capsys, stdin=LINE)


@pytest.fixture
def killed(copied_run: Path, call: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of SFT's checkpoints, two whole ones, as a kill right before the end of the stage leaves them."""

    class KilledError(BaseException):
        """As SIGKILL."""

    def end(*_: object) -> None:
        raise KilledError

    for stage in STAGES[2:]:
        shutil.rmtree(copied_run / "x" / stage)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "finish", end)
        with pytest.raises(KilledError):
            call("sft", "r.yaml", "--out", "x")
    return copied_run / "x/round-0/sft" / CHECKPOINTS
