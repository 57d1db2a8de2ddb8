"""How far long work is: a bar on a terminal; a line a minute where standard error is a file or a pipe."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import ClassVar, TypeVar

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 60.0


@dataclass(eq=False)
class Work:
    """Something that takes a while.

    Attributes:
        label: what people know it by: "sft", "vote 3/10".
        total: how many units there are; None where nobody knows.
        unit: what is counted: "steps".
        done: units done so far.
        done_before: those of them that were done before this process began.
        figures: the latest numbers that people watch.
        begin: when it began, on the monotonic clock.
    """

    label: str
    total: int | None = None
    unit: str = ""
    done: int = 0
    done_before: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)

    def line(self, now: float) -> str:
        """Return what a log says of it: label, done/total, elapsed, remaining, figures.

        What remains is taken to go as fast as what was done since the work began here.

        Args:
            now: on the monotonic clock, seconds.

        >>> Work("sft", total=300, unit="steps", done=120, done_before=20, figures={"loss": 1.234}, begin=0.0).line(180.0)
        'sft: 120/300 steps, 3.0 min elapsed, 5.4 min remaining, loss 1.23'
        >>> Work("score", unit="lines", done=512, begin=0.0).line(60.0)
        'score: 512 lines, 60 s elapsed'
        >>> Work("round-1/reward", begin=0.0).line(7200.0)
        'round-1/reward: 2.0 h elapsed'
        """
        elapsed, since = now - self.begin, self.done - self.done_before
        parts = []
        if self.unit:
            parts.append(f"{self.done}{'' if self.total is None else f'/{self.total}'} {self.unit}")
        parts.append(f"{duration(elapsed)} elapsed")
        if self.total is not None and since > 0:
            parts.append(f"{duration(elapsed / since * (self.total - self.done))} remaining")
        parts += [f"{name} {value:.3g}" for name, value in self.figures.items()]
        return f"{self.label}: {', '.join(parts)}"


class _AtWork:
    """One a process: what it is at, the work inside other work last."""

    works: ClassVar[list[Work]] = []


@contextmanager
def a_line_a_minute(work: Work) -> Iterator[Work]:
    """Write a line to standard error every minute while the body runs, unless that is a terminal.

    Of work inside other work only the inner one is told. With several processes the first one tells.
    """
    if sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield work
        return
    is_outermost, end = not _AtWork.works, Event()
    _AtWork.works.append(work)
    if is_outermost:
        Thread(target=_tell, args=(end,), daemon=True).start()
    try:
        yield work
    finally:
        _AtWork.works.remove(work)
        end.set()


def _tell(end: Event) -> None:
    """Write a line a minute until the outermost work is done."""
    while not end.wait(SECONDS_BETWEEN_LINES):
        for work in _AtWork.works[-1:]:
            print(work.line(time.monotonic()), file=sys.stderr, flush=True)


def track(items: Sequence[Item], label: str, *, unit: str = "batches") -> Iterator[Item]:
    """Yield one item after the other and show how far the work on them is.

    Args:
        label: what people know the work by.
        unit: what the items are.
    """
    if sys.stderr.isatty():
        from tqdm.auto import tqdm

        yield from tqdm(items, desc=label)
        return
    with a_line_a_minute(Work(label, len(items), unit)) as work:
        for item in items:
            yield item
            work.done += 1


def duration(seconds: float) -> str:
    """Return seconds, minutes or hours, as a person says it.

    >>> duration(41.6), duration(200), duration(9000)
    ('42 s', '3.3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
