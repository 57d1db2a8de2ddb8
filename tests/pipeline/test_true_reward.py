"""The share of labels that contradict the true reward."""

from typing import Any

from rlhf.data.rows import TIE, assistant_turn, user_turn
from rlhf.pipeline.true_reward import wrong_labels


def length(prompts: list[str], completions: list[str]) -> list[float]:
    assert completions, "a function of somebody's own may fail on nothing"
    return [float(len(text)) for text in completions]


def labelled(chosen: str, rejected: str, **columns: Any) -> Any:
    return {"prompt": user_turn("a"), "chosen": assistant_turn(chosen), "rejected": assistant_turn(rejected), **columns}


def test_ties_are_no_wrong_labels() -> None:
    """Of a tie one answer stands as the chosen one all the same; answers that are truly as good can't be labelled wrongly."""
    rows = [
        labelled("yes", "no"),
        labelled("no", "yes"),
        labelled("yes", "no", confidence=0.75),
        labelled("no", "yes", confidence=TIE),
        labelled("no", "me"),
    ]
    assert wrong_labels(rows, length) == 1 / 3
    assert wrong_labels(rows[3:], length) is None
    assert wrong_labels(rows[3:4], length) is None
    assert wrong_labels(rows, None) is None
