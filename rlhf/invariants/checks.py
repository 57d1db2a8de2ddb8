"""The record of what was checked: one entry a check, holding the statistic that came nearest to its bound, or beyond it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict

from rlhf.errors import TrainingError


class CheckEntry(TypedDict):
    """A check as it stands in a stage's manifest and in `summary.json`.

    `statistic` and `bound` are in the unit that `unit` names; `low` is the lower bound of a two-sided check, else null.
    `times` is how often it was checked, `sentence` what a person is told where it does not hold, and empty where it holds.
    """

    statistic: float
    low: float | None
    bound: float
    unit: str
    held: bool
    times: int
    sentence: str


@dataclass(frozen=True)
class Check:
    """One look at one thing that must hold.

    Attributes:
        name: short, the same for every run: "sampler true".
        statistic: what was measured.
        bound: the largest value that is allowed; not a number or infinite statistics never hold.
        unit: of both: "nats a token", "standard errors".
        sentence: what a person is told where it does not hold: what it means, and the likely causes.
        low: the smallest value that is allowed; None where only the upper bound counts.
    """

    name: str
    statistic: float
    bound: float
    unit: str
    sentence: str
    low: float | None = None

    @property
    def held(self) -> bool:
        """Return whether the statistic lies within its bounds."""
        return self.statistic <= self.bound and (self.low is None or self.statistic >= self.low)

    @property
    def closeness(self) -> float:
        """Return how near the statistic came to its bound: 1 at the bound, above 1 beyond it."""
        if not self.held:
            return float("inf")
        limit = self.low if self.low is not None and self.statistic < 0 else self.bound
        return abs(self.statistic) / abs(limit) if limit else 0.0

    def message(self) -> str:
        """Return the sentence for a person, with the figures."""
        limits = f"{self.bound:.3g}" if self.low is None else f"[{self.low:.3g}, {self.bound:.3g}]"
        return f"check {self.name!r} failed: {self.statistic:.3g} {self.unit}, allowed {limits}. {self.sentence}"


class InvariantError(TrainingError):
    """Something that must hold in every run does not; nothing was updated since. The command line exits with 1."""


@dataclass
class CheckBook:
    """All checks of a stage, by name, in the order in which they were first made."""

    entries: dict[str, CheckEntry] = field(default_factory=dict)
    _closest: dict[str, float] = field(default_factory=dict)

    def record(self, check: Check) -> None:
        """Enter a check without stopping, for whoever decides later."""
        before = self.entries.get(check.name)
        times = 1 if before is None else before["times"] + 1
        if before is None or (before["held"] and check.closeness >= self._closest.get(check.name, 0.0)):
            self._closest[check.name] = check.closeness
            self.entries[check.name] = CheckEntry(
                statistic=check.statistic,
                low=check.low,
                bound=check.bound,
                unit=check.unit,
                held=check.held,
                times=times,
                sentence="" if check.held else check.sentence,
            )
        else:
            before["times"] = times

    def require(self, check: Check) -> None:
        """Enter a check, and stop where it does not hold.

        Raises:
            InvariantError: with the check's sentence and figures.
        """
        self.record(check)
        if not check.held:
            raise InvariantError(check.message())

    def merge(self, entries: Mapping[str, CheckEntry]) -> None:
        """Take over entries of another book, such as that of an attempt that was resumed: the worse one of each stays."""
        for name, entry in entries.items():
            check = Check(name, entry["statistic"], entry["bound"], entry["unit"], entry["sentence"], entry["low"])
            times = entry["times"] + (self.entries[name]["times"] if name in self.entries else 0)
            self.record(check)
            self.entries[name]["times"] = times
