"""Bounds on work of which nobody knows what it does: chat templates that come with a model, functions of a person."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STATM = Path("/proc/self/statm")  # Linux: this process's size, in pages
FAILED, TOO_LARGE, TOO_LONG = 120, 121, 122  # how work in a process of its own may end; lower numbers are the work's
POLL_SECONDS = 0.002


class TimeIsUp(BaseException):
    """Work was not done in its time; no `except Exception` of the work itself holds it."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stop what goes on inside after some time, where it is Python that goes on.

    That needs a signal, so work outside the main thread is not bounded, nor is any on Windows.

    Raises:
        TimeIsUp: it was not done.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    handler = signal.signal(signal.SIGALRM, _stop)
    began = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # somebody else's alarm
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.001), interval)


def _stop(*_: object) -> None:
    raise TimeIsUp


def try_in_child(work: Callable[[], int], *, seconds: float, more_bytes: int) -> int:
    """Try work in a child process, which is killed whatever it is at, and leaves nothing behind here.

    The work must not touch an accelerator. Where processes can't be forked (Windows), nothing is tried.

    Args:
        work: returns a number of its own below `FAILED`.
        more_bytes: of memory that it may ask for beside what there is.

    Returns:
        the work's number; or `FAILED`, `TOO_LARGE`, `TOO_LONG`.
    """
    if not hasattr(os, "fork"):
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # the child starts no thread and takes no lock of another one
        child = os.fork()
    if child == 0:
        _work_and_exit(work, more_bytes)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                child = 0
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else FAILED
            time.sleep(POLL_SECONDS)
        return TOO_LONG
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _work_and_exit(work: Callable[[], int], more_bytes: int) -> None:
    """Do the work of a child process, and end it without what an interpreter does at its end."""
    code = FAILED
    try:
        with suppress(OSError, ValueError, ImportError):
            _bound_memory(more_bytes)
        code = work()
    except MemoryError:
        code = TOO_LARGE
    finally:
        os._exit(code)


def _bound_memory(more_bytes: int) -> None:
    """Bound the memory of this process, where the system counts it."""
    import resource  # Unix alone has it

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = int(STATM.read_text().split()[0]) * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (bound if soft == resource.RLIM_INFINITY else min(bound, soft), hard))
