"""What a vote says of labels in words: as much as its evidence carries, and what it is not evidence of."""

from rlhf.report.records import Facts

NO_BETTER_THAN_CHANCE = "The votes agree with the labels no more than chance, so they say nothing about them."


def wrong_labels(noise: Facts) -> list[str]:
    """Return sentences on how many labels are wrong.

    What sure votes contradict is proved (`low`, 95 %), as far as votes are right where they are sure: voters of one base may
    all be wrong about one kind of pairs. All contradictions are labels' faults only if no vote errs (`high`), and labels that
    err as the votes do are contradicted by none. The estimate by confident learning rests on how sure the votes say they are,
    which nothing here tests: it is no headline.

    Args:
        noise: `flip_rate`, `low`, `high` and `scale` as in `rlhf.reward.noise.NoiseEstimate`.

    >>> wrong_labels({"flip_rate": 0.31, "low": 0.0, "high": 0.36, "scale": 1.2})[0]
    'The votes do not show that any label is wrong: their own errors can explain all their contradictions (95 % interval).'
    >>> wrong_labels({"flip_rate": 0.24, "low": 0.12, "high": 0.3, "scale": 1.2})[0]
    'At least 12.0% of the labels are wrong (95 % interval), if votes are right where they are sure: read the most suspicious rows.'
    """
    if noise["scale"] == 0:
        return [NO_BETTER_THAN_CHANCE]
    most = f"If every contradiction were the label's fault, {noise['high']:.1%} would be wrong at most, if labels err at random"
    estimate = f"{noise['flip_rate']:.1%}, the estimate by confident learning"
    if noise["low"] > 0:
        low = f"{noise['low']:.{1 if noise['low'] >= 0.001 else 2}%}"
        return [
            f"At least {low} of the labels are wrong (95 % interval), if votes are right where they are sure: read the most "
            "suspicious rows.",
            f"{most}; {estimate}, is not proved.",
        ]
    return [
        "The votes do not show that any label is wrong: their own errors can explain all their contradictions (95 % interval).",
        f"{most}; {estimate}, is not evidence, for it takes errors of these votes for those of labels.",
    ]


def taken_to_be_wrong(noise: Facts, objective: str) -> list[str]:
    """Say how many labels an objective takes to be wrong though the votes prove none; nothing where they do, or it takes none.

    >>> taken_to_be_wrong({"fitted": 0.171, "low": 0.0, "scale": 1.2}, "posterior")
    ['`posterior` takes 17.1% to be wrong all the same: that is what they leave likely.']
    >>> taken_to_be_wrong({"fitted": 0.171, "low": 0.1, "scale": 1.2}, "posterior")
    []
    """
    if objective not in ("posterior", "weight") or noise["low"] > 0 or noise["scale"] == 0:
        return []
    return [f"`{objective}` takes {noise['fitted']:.1%} to be wrong all the same: that is what they leave likely."]


def suspects(noise: Facts, count: int, *, by_annotator: bool = False) -> str:
    """Return a sentence on the rows that an audit lists, and leaves out of `cleaned.jsonl`.

    Args:
        by_annotator: each label was judged by the error rate of who gave it, not by one for all.

    >>> suspects({"flip_rate": 0.24, "low": 0.12}, 7)
    '7 rows are more likely wrong than right, if 24.0% of all labels are wrong.'
    >>> suspects({"flip_rate": 0.24, "low": 0.12}, 9, by_annotator=True)
    '9 rows are more likely wrong than right, by the error rate of who labelled each and all labels of its pair.'
    """
    if noise["low"] > 0 and by_annotator:
        return f"{count} rows are more likely wrong than right, by the error rate of who labelled each and all labels of its pair."
    if noise["low"] > 0:
        return f"{count} rows are more likely wrong than right, if {noise['flip_rate']:.1%} of all labels are wrong."
    return f"{count} rows are the ones to read first; neither is shown: that they are wrong, nor that cleaned.jsonl is better."


def worth(result: Facts) -> list[str]:
    """Say how many clean labels these are worth, at the two bounds of the share of wrong ones.

    >>> worth({"kept_pairs": 6000, "worth": {"low": 900.2, "high": 3400.0}, "noise_rate": {"low": 0.12, "high": 0.3}})
    ['If 12% to 30% are wrong at random, these 6,000 labels are worth 900 to 3,400 clean ones.']
    """
    if result["worth"] is None:
        return []
    rates, clean = result["noise_rate"], result["worth"]
    return [
        f"If {rates['low']:.0%} to {rates['high']:.0%} are wrong at random, these {result['kept_pairs']:,} labels are worth "
        f"{clean['low']:,.0f} to {clean['high']:,.0f} clean ones."
    ]


def wanted(wants: Facts) -> list[str]:
    """Say which traits of an answer the labels follow, and how well these traits alone predict them."""
    if wants["accuracy"] is None:
        return []
    low, high = wants["accuracy_ci"]
    alone = f"Traits that anyone can count predict {wants['accuracy']:.0%} [{low:.0%}, {high:.0%}] of the labels"
    if not wants["wanted"]:
        return [f"{alone}; no single one is wanted beyond chance."]
    names = [f"{wants['traits'][name]['wanted']} {name}" for name in wants["wanted"]]
    return [
        f"{alone}. What these labels want: {', '.join(names)}. They may be right to; read the examples in audit.html."
    ]
