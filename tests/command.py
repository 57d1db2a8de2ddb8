"""The `rlhf` command in processes of its own that start warm: forked from a server that has imported everything.

A cold start loads torch and TRL for several seconds, which the suite would pay for some sixty times. What a process does
is the same: its own memory, its own signals, killed by SIGKILL like any other. Some tests start cold all the same.
"""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

from tests.undrawn import DRAW

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.warm"])


class Result(NamedTuple):
    """As of `subprocess.run`."""

    returncode: int
    stdout: str
    stderr: str


class Process:
    """As of `subprocess.Popen`, as far as the tests ask."""

    def __init__(self, arguments: tuple[str, ...], cwd: Path, *, script: bool = False, **environment: str):
        _start_server()
        self._streams = [tempfile.NamedTemporaryFile(mode="r", encoding="utf-8") for _ in range(2)]  # noqa: SIM115
        names = [stream.name for stream in self._streams]
        target = _script if script else _command
        self._process: Any = _context.Process(target=_begin, args=(target, arguments, str(cwd), environment, *names))
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """To this process, if it is still there."""
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    def wait(self, timeout: float = 240) -> Result:
        """Its exit code and what it wrote."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} s"
        stdout, stderr = (stream.read() for stream in self._streams)
        return Result(self._process.exitcode, stdout, stderr)


def rlhf(*arguments: str, cwd: Path, draws: bool = False) -> Result:
    """The command, run to its end; in every finished run of the suite PPO's KL and the evaluation's agree.

    Args:
        draws: its figures, which somebody looks at.
    """
    result = Process(arguments, cwd, **({DRAW: "1"} if draws else {})).wait()
    if "--out" in arguments and result.returncode == 0:
        summary = cwd / arguments[arguments.index("--out") + 1] / "summary.json"
        checks = json.loads(summary.read_text(encoding="utf-8"))["checks"] if summary.is_file() else {}
        check = checks.get("KL agrees with evaluation")
        assert check is None or check["held"], check
    return result


def run_script(file: str, *arguments: str, cwd: Path, processes: int = 1, seconds: float = 200) -> None:
    """Run a script in warm processes; several are told of each other as `torchrun` tells them, and end as they like.

    A cold launch takes some ten seconds of each core. That `torchrun` itself works is tested elsewhere.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo"}
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    launched = [
        Process(
            (file, *arguments),
            cwd,
            script=True,
            **({"RANK": str(rank), "LOCAL_RANK": str(rank), **world, **address} if processes > 1 else {}),
        )
        for rank in range(processes)
    ]
    for process in launched:
        result = process.wait(seconds)
        assert result.returncode == 0, result.stderr[-3000:]


def wait_for(condition: Any, process: Process | None = None, *, seconds: float = 120) -> None:
    """Look every two milliseconds until a condition holds, the process has ended, or the time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and (process is None or process.poll() is None) and not condition():
        time.sleep(0.002)


def _start_server() -> None:
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    forkserver.ensure_running()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _begin(
    target: Callable[[tuple[str, ...]], None],
    arguments: tuple[str, ...],
    cwd: str,
    environment: dict[str, str],
    stdout: str,
    stderr: str,
) -> None:
    for number, name in ((1, stdout), (2, stderr)):
        descriptor = os.open(name, os.O_WRONLY)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(cwd)
    os.environ.update(ENVIRONMENT | environment)
    target(arguments)


def _command(arguments: tuple[str, ...]) -> None:
    sys.argv = ["rlhf", *arguments]
    from rlhf.cli import main

    main()


def _script(arguments: tuple[str, ...]) -> None:
    sys.argv = list(arguments)
    runpy.run_path(arguments[0], run_name="__main__")
