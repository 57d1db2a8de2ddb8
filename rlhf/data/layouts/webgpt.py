"""WebGPT comparisons: a question, two answers, and a score of each in [-1, 1]."""

from collections.abc import Mapping

from rlhf.data.layouts.layout import Comparison, Layout, number
from rlhf.data.read import BadRow
from rlhf.data.sides import Side


def comparison(row: Mapping[str, object], label: str) -> Comparison:
    """Return the two answers; the higher score is better, equal scores are a tie."""
    question = row["question"]
    prompt = question.get("full_text") if isinstance(question, Mapping) else question
    if not isinstance(prompt, str):
        raise BadRow("question has no full_text")
    first, second = number(row["score_0"], "score_0"), number(row["score_1"], "score_1")
    better: Side = "first" if first > second else "second" if first < second else "tie"
    beside = {"rating_gap": abs(first - second)}
    scores = f"{first:g} and {second:g}"
    return Comparison(prompt, row["answer_0"], row["answer_1"], better, ("score_0, score_1", scores), beside)


WEBGPT = Layout(
    "WebGPT",
    "`question` (with `full_text`), `answer_0`, `answer_1`, `score_0`, `score_1` (the higher one is better)",
    columns=("question", "answer_0", "answer_1", "score_0", "score_1"),
    compares=comparison,
)
