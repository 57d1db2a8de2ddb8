"""A sharded run that is interrupted: killed, it goes on to the same bits; with other processes, to the same numbers."""

import hashlib
from pathlib import Path

import pytest

from tests.distributed.conftest import REWARD, Launch
from tests.distributed.test_fsdp2 import PPO, assert_same

STOPPED = 128 + 15


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_process_ends_all_and_the_same_command_gives_the_same_bits(launch: Launch) -> None:
    """Seconds: torchrun gives the others thirty to end by themselves."""
    assert launch.seconds < 30
    (result,) = launch.results("killed")
    assert result["code"] == 0, result["stderr"]
    assert launch.resumed_from("killed", PPO) == [1]
    assert digests(launch.folder / "killed" / PPO / "model") == digests(launch.folder / "lora" / PPO / "model") != {}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_goes_on_with_one_process_and_with_two_again(launch: Launch) -> None:
    """The reward stage: two processes with shards, one without, two. PPO: the same. Every step is made once.

    An epoch of the reward stage has three steps, so it goes on in the middle of the first and of the second.
    Steps are of the same rows, so the numbers are those of a run that was not interrupted, to 1e-5; the same bits are
    promised to as many processes only. PPO's answers are planted, since other processes sample others.
    """
    assert [result["code"] for result in launch.results("moved")] == [STOPPED] * 4 + [0]
    for stage, resumed in ((REWARD, [2, 4]), (PPO, [1, 2])):
        assert launch.resumed_from("moved", stage) == resumed
        assert_same(launch, stage, "two", "moved")
    said = [result["stdout"] for result in launch.results("moved")]
    assert "which 2 processes wrote, with 1 process: each makes 2 micro-batches of a step instead of 1" in said[1]
    assert "which 1 process wrote, with 2 processes: each makes 1 micro-batches of a step instead of 2" in said[2]
