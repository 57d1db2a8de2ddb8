"""Runs that are killed, signalled, out of disk, or come back to damaged files: the same command ends with the same weights."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import Process, rlhf, wait_for
from tests.pipeline.small import ENVIRONMENT, RECIPE, STAGES, digests


def begin_again_at(stage: str, finished: Path, folder: Path, *arguments: str) -> Process:
    """Copy a finished run without this stage and all after it, and start the command."""
    (folder / "r.yaml").write_text(RECIPE)
    shutil.copytree(finished / "x", folder / "x", symlinks=True)
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(folder / "x" / later)
    return Process(("run", "r.yaml", "--out", "x", *arguments), folder)


def a_checkpoint(run: Path, stage: str) -> bool:
    return any((run / stage).glob("checkpoints/checkpoint-*/complete.json"))


# Of each trained stage: its steps an epoch, how often it saves, and the checkpoint after which it is killed. PPO's epochs
# here are rollouts of 2 minibatches x 2 PPO epochs.
KILLS = [
    ("round-0/sft", 10, 2, 4),
    ("round-0/sft", 10, 2, 12),
    ("round-1/reward", 13, 4, 4),
    ("round-1/reward", 13, 4, 16),
    ("round-1/ppo", 4, 4, 4),
    ("round-1/ppo", 4, 4, 8),
]


@pytest.mark.fault("kill at any moment")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "epoch_steps", "save_steps", "after"),
    KILLS,
    ids=[f"{stage.split('/')[1]} in epoch {-(-after // steps)}" for stage, steps, _, after in KILLS],
)
def test_kill_9_and_the_same_command_again(
    finished: Path, tmp_path: Path, stage: str, epoch_steps: int, save_steps: int, after: int
) -> None:
    """Killed after a checkpoint, the run goes on from its last one, repeats at most `save_steps` updates, and ends with
    the same weights, bit for bit."""
    until = STAGES[-1] if after == KILLS[1][-1] else stage  # one of them to the end: what follows is the same too
    process = begin_again_at(stage, finished, tmp_path, "--until", until.split("/")[1])
    mark = tmp_path / "x" / stage / f"checkpoints/checkpoint-{after}/complete.json"
    wait_for(mark.is_file, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    assert mark.is_file()
    assert not (tmp_path / "x" / stage / "manifest.json").exists(), "the kill came too late to mean anything"
    result = rlhf("run", "r.yaml", "--out", "x", "--until", until.split("/")[1], cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert digests(tmp_path / "x", until) == digests(finished / "x", until)
    rows = [json.loads(line) for line in (tmp_path / "x" / stage / "metrics.jsonl").read_text().splitlines()]
    (resumed,) = [i for i, row in enumerate(rows) if "resumed_from" in row]
    step = rows[resumed]["resumed_from"]
    assert step >= after
    reached = max(row["step"] for row in rows[:resumed])
    assert 0 <= reached - step <= save_steps, "what is repeated"
    assert min(row["step"] for row in rows[resumed + 1 :]) > step, "no step before the checkpoint is repeated"
    assert rows[-1]["step"] > epoch_steps, "the stage has more than one epoch"


@pytest.mark.fault("kill at any moment")
def test_kill_9_in_the_evaluation(finished: Path, tmp_path: Path) -> None:
    process = begin_again_at("round-1/evaluate", finished, tmp_path)
    wait_for((tmp_path / "x/round-1/evaluate/started.json").is_file, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "x/round-1/evaluate/manifest.json").exists(), "the kill came too late to mean anything"
    assert rlhf("run", "r.yaml", "--out", "x", cwd=tmp_path).returncode == 0
    before, after = (json.loads((run / "x/summary.json").read_text()) for run in (finished, tmp_path))
    assert {**before, "seconds": 0} == {**after, "seconds": 0}


@pytest.mark.fault("damaged checkpoint", "checkpoint zeroed")
@pytest.mark.parametrize(
    ("stage", "damaged"), [("round-0/sft", "complete.json"), ("round-1/ppo", "critic/model.safetensors")]
)
def test_a_damaged_checkpoint_gives_way_to_the_older_one(
    finished: Path, tmp_path: Path, stage: str, damaged: str
) -> None:
    """The mark cut off, or a file of the right size full of zeros, and a last metric that was cut off: said, and the same bits."""
    until = stage.split("/")[1]
    process = begin_again_at(stage, finished, tmp_path, "--until", until)
    checkpoints = tmp_path / "x" / stage / "checkpoints"
    wait_for((checkpoints / "checkpoint-8/complete.json").is_file, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest, older = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))[:2]
    file = newest / damaged
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2] if damaged == "complete.json" else bytes(size))
    with (tmp_path / "x" / stage / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 9, "lo')
    result = rlhf("run", "r.yaml", "--out", "x", "--until", until, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"leaves out {newest.name}, whose writing was cut off or whose files are damaged" in result.stdout
    assert f"goes on from {older.name}" in result.stdout
    assert "leaves out the last line of metrics.jsonl" in result.stdout
    assert digests(tmp_path / "x", stage) == digests(finished / "x", stage)


@pytest.mark.fault("weights replaced")
@pytest.mark.parametrize("damage", ["replaced", "missing"])
def test_a_finished_file_that_changed_is_refused_by_name(finished: Path, tmp_path: Path, damage: str) -> None:
    process = begin_again_at("round-1/evaluate", finished, tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    file = tmp_path / "x/round-1/ppo/model/model.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        weights = file.read_bytes()
        file.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    result = rlhf("run", "r.yaml", "--out", "x", cwd=tmp_path)
    assert result.returncode == 2
    before = {"replaced": "round-1/evaluate: Since their stage was done: ", "missing": "x: of finished stages, "}
    assert f"{before[damage]}x/round-1/ppo/model/model.safetensors" in result.stderr
    assert "Traceback" not in result.stderr


FULL_DISK = """
import errno, sys
from transformers import Trainer
write = Trainer._save_optimizer_and_scheduler
def full(self, folder):
    if self.state.global_step >= 8:
        raise OSError(errno.ENOSPC, "No space left on device", folder)
    write(self, folder)
Trainer._save_optimizer_and_scheduler = full
sys.argv = ["rlhf", "run", "r.yaml", "--out", "x", "--until", "reward"]
from rlhf.cli import main
main()
"""


@pytest.mark.fault("full disk")
@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint(finished: Path, tmp_path: Path) -> None:
    """The third checkpoint of the reward model cannot be written: one sentence, exit 1, and the second is resumed from."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    shutil.copytree(finished / "x", tmp_path / "x", symlinks=True)
    for later in STAGES[STAGES.index("round-1/reward") :]:
        shutil.rmtree(tmp_path / "x" / later)
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )  # fmt: skip
    assert result.returncode == 1
    assert "round-1/reward: no space left on the device that holds x." in result.stderr
    assert "Traceback" not in result.stderr
    result = rlhf("run", "r.yaml", "--out", "x", "--until", "reward", cwd=tmp_path)
    assert "leaves out checkpoint-8, whose writing was cut off" in result.stdout
    assert "goes on from checkpoint-4" in result.stdout
    assert digests(tmp_path / "x", "round-1/reward") == digests(finished / "x", "round-1/reward")


@pytest.mark.fault("signals")
@pytest.mark.parametrize(
    ("stage", "sent", "code"), [("round-0/sft", signal.SIGTERM, 143), ("round-1/ppo", signal.SIGINT, 130)]
)
def test_a_signal_saves_and_exits(finished: Path, tmp_path: Path, stage: str, sent: signal.Signals, code: int) -> None:
    """The checkpoint is of the step that the signal found, and going on from it gives the uninterrupted weights."""
    until = stage.split("/")[1]
    process = begin_again_at(stage, finished, tmp_path, "--until", until)
    wait_for((tmp_path / "x" / stage / "metrics.jsonl").is_file, process)
    process.send_signal(sent)
    stopped = process.wait(60)
    assert stopped.returncode == code, stopped.stderr[-2000:]
    unit = "rollout" if stage.endswith("ppo") else "step"
    first, last = (
        f"{sent.name}: training saves and stops after this {unit}.",
        f"{sent.name}: stopped. The same command goes on",
    )
    assert 0 <= stopped.stderr.find(first) < stopped.stderr.find(last)
    assert stopped.stderr.count(first) == 1
    assert a_checkpoint(tmp_path / "x", stage)
    noted = tmp_path / "x" / stage / "checkpoints/seconds.json"
    assert 0 < json.loads(noted.read_text()) < 60
    noted.write_text("1000")  # a stage of which this much had been done
    again = rlhf("run", "r.yaml", "--out", "x", "--until", until, cwd=tmp_path)
    assert again.returncode == 0
    assert "1000 s of them before it was interrupted" in again.stdout
    assert 1000 < json.loads((tmp_path / "x" / stage / "manifest.json").read_text())["seconds"] < 1060
    assert 1000 < json.loads((tmp_path / "x/summary.json").read_text())["seconds"][until] < 1060
    assert digests(tmp_path / "x", stage) == digests(finished / "x", stage)
