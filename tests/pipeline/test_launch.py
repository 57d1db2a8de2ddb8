"""The processes of a launch: steps as before where there are others, and one of them that says what went wrong."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rlhf import cli
from rlhf.errors import OtherProcessError, UserError
from rlhf.pipeline.launch import Launch, accumulation_as_before, check_launch, is_first_to_stop, write_launch
from rlhf.pipeline.run import leave_process_group


@pytest.mark.parametrize(
    ("before", "now", "accumulation"),
    [(Launch(2, 1), 1, 2), (Launch(1, 2), 2, 1), (Launch(4, 3), 6, 2), (Launch(2, 5), 2, 5)],
)
def test_steps_stay_as_large_as_they_were(
    before: Launch, now: int, accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches of a step, over all processes: 2, 2, 12, 10."""
    monkeypatch.setenv("WORLD_SIZE", str(now))
    assert accumulation_as_before(tmp_path, 7) == 7, "nothing was begun"
    write_launch(tmp_path, before)
    assert accumulation_as_before(tmp_path, 7) == accumulation


def test_processes_that_cannot_share_a_step_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    write_launch(tmp_path, Launch(2, 3))
    with pytest.raises(UserError, match=r"6 micro-batches to a step, which 4 processes can't share.*\(1, 2, 3, 6\)"):
        accumulation_as_before(tmp_path, 3)


def test_deepspeed_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under it four roles on one base are wrong by a whole step of Adam, and models of ZeRO-3 are saved empty."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="asked for DeepSpeed, which no stage supports; take FSDP2"):
        check_launch()


def test_the_first_process_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Torchrun's store counts them; without it each says its own. One that stops for another's sake never does."""
    store = TCPStore("localhost", 0, is_master=True)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(name, value)
    assert [is_first_to_stop() for _ in range(2)] == [True, True]
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def fail(error: Exception) -> int:
        def command(**_: object) -> None:
            raise error

        monkeypatch.setattr(cli, "app", command)
        return cli._exit_code()

    assert fail(OtherProcessError("ppo: another process stopped")) == 1
    assert [fail(UserError(f"mistake {i}")) for i in range(2)] == [2, 2]
    assert capsys.readouterr().err == "mistake 0\n"


def test_an_engine_of_this_process_ends_before_the_group_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run ended with vLLM's traceback, which looked for its groups when Python ended: `Invalid process group`."""
    ended: list[str] = []
    engine = SimpleNamespace(cleanup_dist_env_and_memory=lambda: ended.append("engine"))
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", engine)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append("group"))
    leave_process_group()
    assert ended == ["engine", "group"]
