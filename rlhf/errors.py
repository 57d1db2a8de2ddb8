"""Errors that a person can mend, in plain sentences; whatever else fails is a fault of this package and keeps its traceback."""

import errno
from collections.abc import Mapping, Sequence

# How libraries say that there is not enough memory, where they raise no MemoryError.
NO_MEMORY = (
    "out of memory",
    "t allocate memory",
    "ot enough memory",
    "annot allocate memory",
    "bad_alloc",
    "ALLOC_FAILED",
)


class UserError(Exception):
    """One or more mistakes in a recipe, a command or a file. The command line prints them and exits with 2.

    Args:
        problems: plain sentences, each naming what is wrong, where (file, line, row, key) and what to do.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        assert self.problems, "a UserError needs at least one sentence"
        super().__init__("\n".join(self.problems))


class TrainingError(Exception):
    """Training cannot go on (a non-finite loss, a reward source that fails). The command line exits with 1.

    Args:
        rows: the samples it stopped at, if they are not the batch in hand; the stage writes them beside its metrics.
    """

    def __init__(self, message: str, *, rows: Sequence[Mapping[str, object]] = ()):
        self.rows = [dict(row) for row in rows]
        super().__init__(message)


class OtherProcessError(TrainingError):
    """This process stops because another one of the launch has failed, which says why. The command line exits with 1."""


class Waiting(Exception):
    """A run that can't go on before people have done something; its state is saved. The command line exits with 3."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, is too little memory, of an accelerator or of this machine.

    >>> is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    True
    """
    while error is not None:
        says_so = isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in NO_MEMORY)
        if (
            says_so or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        ):  # the last is torch's
            return True
        error = error.__cause__ or error.__context__
    return False


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, is a full disk, in the words of Python, safetensors, torch or sqlite."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in ("os error 28", "No space left", "inline_container", "disk is full")):
            return True
        error = error.__cause__ or error.__context__
    return False
