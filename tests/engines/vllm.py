"""A real vLLM server in an environment of its own (`make_vllm_environment.sh`), on this machine's loopback address."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

PYTHON = "RLHF_VLLM_PYTHON"
SECONDS_TO_START = 600  # one core, everything imported cold
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # its own processes talk over this address
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def absent() -> str | None:
    """Return why there is no vLLM to test with; None if there is one."""
    python = os.environ.get(PYTHON)
    if python is None:
        return f"{PYTHON} is not set; tests/engines/make_vllm_environment.sh makes an environment"
    if not Path(python).is_file():
        return f"{PYTHON}={python}: no such file"
    return None


@contextmanager
def served(*arguments: str, log: Path, name: str) -> Iterator[str]:
    """Run `vllm serve` as a pooling server, and give its address once it answers.

    Args:
        arguments: what follows `vllm serve`.
        log: where its output goes.
        name: by which requests name the model.
    """
    python = Path(os.environ[PYTHON])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(python.parent / "vllm"), "serve", *arguments, "--runner", "pooling", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
    environment = {**os.environ, **SETTINGS, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until a server answers.

    Raises:
        RuntimeError: it ended, or did not answer in time; the end of its output.
    """
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except requests.RequestException:
            time.sleep(1)
    raise RuntimeError(f"vLLM did not start (exit code {process.poll()}):\n{log.read_text()[-3000:]}")
