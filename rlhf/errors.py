"""Errors that a person can mend, in plain sentences; whatever else fails is a fault of this package and keeps its traceback."""

from collections.abc import Mapping, Sequence


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
