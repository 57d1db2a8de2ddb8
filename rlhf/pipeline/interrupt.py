"""SIGTERM and Ctrl-C: the first asks a training stage to save and stop, the second ends it at once.

A manager of processes sends SIGTERM to all of a step, and torchrun to its workers once more: within seconds that is one wish.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

ONE_WISH_SECONDS = 5.0
STDERR = 2


class Interrupted(BaseException):
    """Unwinds everything, so that locks and files are left in order; the command line exits with 128 + the signal."""

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


class _State:
    """One a process, as signals are."""

    requested: int | None = None
    since: float = 0.0
    patient: bool = False
    stops_after: str = ""


def install() -> None:
    """Take over SIGTERM and SIGINT for this process."""
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, _on_signal)


def ignore() -> None:
    """Take no more signals: this process is about to end, and must be able to say why."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _on_signal(signum: int, _: object) -> None:
    """Note the signal where somebody has patience, and say so; else raise it."""
    if _State.patient and _State.requested is None:
        _State.requested, _State.since = signum, time.monotonic()
        _tell(
            f"{signal.Signals(signum).name}: training saves and stops after this {_State.stops_after}. A second one, some seconds "
            "later, ends it at once; then the last checkpoint is what stays."
        )
        return
    is_repeated = signum == signal.SIGTERM == _State.requested and time.monotonic() - _State.since < ONE_WISH_SECONDS
    if not (_State.patient and is_repeated):
        raise Interrupted(signum)


def _tell(line: str) -> None:
    """Print a line to standard error, on one process of a launch, past Python's streams: one of them may be in use right now."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(STDERR, f"\n{line}\n".encode())


def requested() -> bool:
    """Return whether somebody asked the running stage to stop."""
    return _State.requested is not None


def request() -> None:
    """Ask the running stage of this process to stop, since another process of the run was asked."""
    if _State.requested is None:
        _State.requested = signal.SIGTERM


@contextmanager
def patience(stops_after: str = "step") -> Iterator[None]:
    """Note a first signal while training, say what will happen, and raise it on leaving.

    Args:
        stops_after: what is still to be finished then, for people: a step, a rollout.

    Raises:
        Interrupted: a signal came while training, which has saved and stopped since.
    """
    _State.patient, _State.requested, _State.stops_after = True, None, stops_after
    try:
        yield
    finally:
        _State.patient = False
    if _State.requested is not None:
        raise Interrupted(_State.requested)
