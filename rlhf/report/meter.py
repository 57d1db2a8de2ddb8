"""What labels are worth and what more of them would bring, in sentences: for the audit's page and the terminal."""

from collections.abc import Sequence

from rlhf.report.records import Facts


def meter_sentences(meter: Facts) -> list[str]:
    """Say what these labels are worth, and what more labels and experts' verdicts would bring; or why that can't be said.

    Args:
        meter: of `audit.json`.

    >>> meter_sentences({"reason": "90 labels are too few to say what more would bring; the meter needs 250."})
    ['Meter: 90 labels are too few to say what more would bring; the meter needs 250.']
    """
    if "reason" in meter:
        return [f"Meter: {meter['reason']}"]
    look = meter["second_look"]
    more = "; ".join(f"{entry['labels']:,} more, {_percent(entry['accuracy'])}" for entry in meter["more"])
    return [
        f"Meter: {meter['labels']:,} labels, {_percent(meter['wrong'])} wrong, worth {_count(meter['worth'])} clean ones.",
        f"A reward model trained on them as these voters are has {_percent(meter['accuracy'])} of such pairs in the true order. "
        f"With labels of the same kind: {more}; however many, {_percent(meter['limit'])}.",
        f"{look['verdicts']:,} expert verdicts on the pairs in most doubt would do what {_count(look['labels'])} more such labels "
        f"do: {_percent(look['accuracy'])} (experts who err in {look['expert_error']:.0%}).",
    ]


def _percent(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{100 * mean:.1f} % [{100 * max(low, 0):.1f}, {100 * min(high, 1):.1f}]"


def _count(values: Sequence[float]) -> str:
    """Return a count with its interval, to two digits: more would look surer than it is.

    >>> _count([1312.0, 980.2, 1690.0])
    '1,300 [980, 1,700]'
    """
    mean, low, high = (float(f"{max(value, 0):.2g}") for value in values)
    return f"{mean:,.0f} [{low:,.0f}, {high:,.0f}]"


def priced_before(meter: Facts, budget: int | None, expert_error: float) -> list[str]:
    """Say that a finished meter prices other verdicts than those that are asked for; nothing where it does not.

    Args:
        meter: as of `audit.json`.
        budget: how many verdicts are asked for; None for any.

    >>> priced_before({"second_look": {"verdicts": 50, "expert_error": 0.05}}, None, 0.05)
    []
    """
    priced = meter.get("second_look")
    if priced is None or (budget in (None, priced["verdicts"]) and expert_error == priced["expert_error"]):
        return []
    return [
        f"its meter prices {priced['verdicts']} verdicts that are wrong in {priced['expert_error']:.0%}, as was asked when it had "
        "its voters; choose another --out for another price."
    ]
