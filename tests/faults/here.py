"""The command line in this process: as fast as a function, with its own exit code, and everything it wrote."""

import io
import signal
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

from rlhf.cli import main

# The stages of the run that tests of runs copy, and its models.
STAGES = ["round-0/lab", "round-0/data", "round-0/sft", "round-1/reward", "round-1/ppo", "round-1/evaluate"]
REWARD, POLICY = "round-1/reward/model", "round-1/ppo/model"


class Outcome(NamedTuple):
    """What a command left behind.

    `created` are the files and folders that it made or changed below its working directory.
    """

    code: int
    stdout: str
    stderr: str
    created: list[str]

    @property
    def sentences(self) -> list[str]:
        """The lines of standard error, but for notes and what readers of data say."""
        lines = [line for line in self.stderr.splitlines() if line.strip() and not line.startswith("Note: ")]
        return [line for line in lines if not line.endswith("rows kept.")]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder, with size and time of change of the files."""
    paths = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else (0, 0)
        for path in paths
    }


def rlhf(*arguments: str, cwd: Path, capsys: pytest.CaptureFixture[str], stdin: str = "") -> Outcome:
    """Run the command, whatever it does to this process's signals and warnings."""
    before, handlers = tree(cwd), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["rlhf", *arguments])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            main()
        except SystemExit as ending:
            code = ending.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert isinstance(code, int)
    written = capsys.readouterr()
    after = tree(cwd)
    return Outcome(code, written.out, written.err, sorted(path for path in after if after[path] != before.get(path)))


def require_refusal(outcome: Outcome, *, says: str = "") -> None:
    """One sentence, exit 2, nothing created, no traceback."""
    assert outcome.code == 2, f"exit {outcome.code}: {outcome.stdout[-500:]}{outcome.stderr[-2000:]}"
    assert "Traceback" not in outcome.stderr
    assert len(outcome.sentences) == 1, outcome.sentences
    assert says in outcome.sentences[0], outcome.sentences
    assert outcome.created == []
