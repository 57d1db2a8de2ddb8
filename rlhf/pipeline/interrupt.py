"""SIGTERM and Ctrl-C: the first asks a training stage to save and stop, the second ends it at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """Unwinds everything, so that locks and files are left in order; the command line exits with 128 + the signal."""

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


class _State:
    """One a process, as signals are."""

    requested: int | None = None
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
        _State.requested = signum
    else:
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
