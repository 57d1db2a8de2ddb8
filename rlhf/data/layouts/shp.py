"""Stanford Human Preferences (SHP): a post, two comments, which one is preferred, and the score of each."""

from collections.abc import Mapping

from rlhf.data.layouts.layout import Comparison, Layout, better_of, number
from rlhf.data.sides import Side


def comparison(row: Mapping[str, object], label: str) -> Comparison:
    """Return the two comments; `labels` is 1 where A is preferred and 0 where B is, the scores are votes of readers."""
    better: Side = "first" if better_of(row["labels"], "labels") == "second" else "second"
    beside: dict[str, object] = {}
    if isinstance(row.get("domain"), str):
        beside["subset"] = row["domain"]
    if row.get("score_A") is not None and row.get("score_B") is not None:
        gap = number(row["score_A"], "score_A") - number(row["score_B"], "score_B")
        beside["rating_gap"] = gap if better == "first" else -gap
    return Comparison(row["history"], row["human_ref_A"], row["human_ref_B"], better, ("labels", row["labels"]), beside)


SHP = Layout(
    "SHP",
    "`history`, `human_ref_A`, `human_ref_B`, `labels` (1: A is better); `rating_gap` from `score_A`, `score_B`",
    columns=("history", "human_ref_A", "human_ref_B", "labels"),
    compares=comparison,
)
