"""The part of a run's page, and the line at the terminal, that is about what the run checked about itself."""

from collections.abc import Mapping

from rlhf.report.records import CheckRow, Facts, Summary


def checks_line(summary: Summary) -> str | None:
    """Return how many checks held, and the names of those that did not; None where nothing was checked."""
    checks = summary.get("checks") or {}
    if not checks:
        return None
    failed = [name for name, row in checks.items() if not row["held"]]
    held = len(checks) - len(failed)
    line = f"{held} {'check' if held == 1 else 'checks'} held"
    return f"{line}, {len(failed)} did not: {', '.join(failed)}" if failed else line


def check_rows(summary: Summary, facts: Mapping[str, Facts]) -> list[dict[str, object]]:
    """Return a row a check for the template: name, figures as text, whether it held, where, how often, and its sentence where
    it did not hold.

    Args:
        facts: of every finished stage, by its folder; the sentences stand there.
    """
    return [
        {
            "name": name,
            "statistic": "not a finite number" if row["statistic"] is None else _figure(row["statistic"]),
            "allowed": _allowed(row),
            "unit": row["unit"],
            "held": row["held"],
            "stage": row["stage"],
            "times": row["times"],
            "sentence": None if row["held"] else _sentence(facts.get(row["stage"], {}), name),
        }
        for name, row in (summary.get("checks") or {}).items()
    ]


def _sentence(facts: Facts, name: str) -> str:
    """Return what a stage says of a check that did not hold; its folder may have been deleted since."""
    sentence: str = facts.get("checks", {}).get(name, {}).get("sentence", "Its stage is not there any more.")
    return sentence


def _allowed(row: CheckRow) -> str:
    """Return the bounds in words.

    >>> _allowed({"statistic": 0, "low": -4.5, "bound": 4.5, "unit": "", "held": True, "times": 1, "stage": ""})
    '-4.5 to 4.5'
    """
    bound = _figure(row["bound"])
    return f"at most {bound}" if row["low"] is None else f"{_figure(row['low'])} to {bound}"


def _figure(value: float) -> str:
    """Return a number with three digits.

    >>> _figure(0.0), _figure(12.3456), _figure(1e-7)
    ('0', '12.3', '1e-07')
    """
    return f"{value:.3g}"
