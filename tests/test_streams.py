"""Standard streams that are closed, full, narrow or read by nobody: the command does its work, or says why not."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf import cli
from rlhf.cli.console import prepare_streams

ROOT = Path(__file__).parents[1]


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run `rlhf …` with the shell's redirections."""
    line = command.replace("rlhf ", f"{sys.executable} -m rlhf ", 1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["sh", "-c", line], capture_output=True, env=environment, text=True, timeout=100, check=False)


@pytest.mark.fault("streams that are closed or full")
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("rlhf --version <&-", 0),
        ("rlhf --version >&-", 0),
        ("rlhf --version 2>&-", 0),
        ("rlhf --version <&- >&- 2>&-", 0),
        ("rlhf lineage nosuch 2>&-", 2),
    ],
)
def test_a_closed_stream_is_an_empty_one(command: str, code: int) -> None:
    """As daemons and some schedulers leave them."""
    result = shell(command)
    assert (result.returncode, result.stderr) == (code, "")


@pytest.mark.fault("streams that are closed or full")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("verb", ["--version", "--help", "check recipes/quickstart.yaml"])
def test_a_full_disk_behind_standard_output_is_a_sentence(verb: str) -> None:
    result = shell(f"cd {ROOT} && rlhf {verb} >/dev/full")
    assert result.returncode == 1
    assert result.stderr.startswith("standard output, or a file that was open: can't be read or written (No space left")
    assert "Traceback" not in result.stderr


def test_pages_of_help_that_nobody_reads_end_quietly() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "rlhf", "--help"]
    result = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, cwd=ROOT, timeout=100, check=False)
    os.close(write_end)
    assert (result.returncode, result.stderr) == (141, b"")


def test_a_reason_that_nobody_reads_leaves_the_exit_code() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "rlhf", "lineage", "nosuch"]
    result = subprocess.run(command, stderr=write_end, cwd=ROOT, timeout=100, check=False)
    os.close(write_end)
    assert result.returncode == 2


def test_letters_that_a_terminal_has_not_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    prepare_streams()
    print("é → e", flush=True)
    assert written.getvalue() == b"\\xe9 \\u2192 e\n"


def test_scores_are_json_in_utf8_whatever_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(sys, "argv", ["rlhf", "score", "model"])
    monkeypatch.setattr("rlhf.pipeline.model_commands.score_stream", lambda *_: iter([{"prompt": "é", "score": 1.0}]))
    assert cli._exit_code() == 0
    assert written.getvalue().decode() == '{"prompt": "é", "score": 1.0}\n'
