"""SIGTERM and Ctrl-C: the first asks a training stage to save and stop, the second ends it at once.

A manager of processes sends SIGTERM to all of a step, and torchrun to its workers once more: within seconds that is one wish.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

ONE_WISH_SECONDS = 5.0


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


def install() -> None:
    """Take over SIGTERM and SIGINT for this process."""
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, _on_signal)


def ignore() -> None:
    """Take no more signals: this process is about to end, and must be able to say why."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _on_signal(signum: int, _: object) -> None:
    """Note the signal where somebody has patience, else raise it."""
    if _State.patient and _State.requested is None:
        _State.requested, _State.since = signum, time.monotonic()
        return
    is_repeated = signum == signal.SIGTERM == _State.requested and time.monotonic() - _State.since < ONE_WISH_SECONDS
    if not (_State.patient and is_repeated):
        raise Interrupted(signum)


def requested() -> bool:
    """Return whether somebody asked the running stage to stop."""
    return _State.requested is not None


def request() -> None:
    """Ask the running stage of this process to stop, since another process of the run was asked."""
    if _State.requested is None:
        _State.requested = signal.SIGTERM


@contextmanager
def patience() -> Iterator[None]:
    """Note a first signal while training, and raise it on leaving.

    Raises:
        Interrupted: a signal came while training, which has saved and stopped since.
    """
    _State.patient, _State.requested = True, None
    try:
        yield
    finally:
        _State.patient = False
    if _State.requested is not None:
        raise Interrupted(_State.requested)
