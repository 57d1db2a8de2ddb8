"""The LMSYS arena: two whole conversations, and which model's is better; ties are labels too."""

from collections.abc import Mapping

from rlhf.data.layouts.layout import Comparison, Layout
from rlhf.data.read import BadRow
from rlhf.data.sides import Side, is_tie, named_side


def comparison(row: Mapping[str, object], label: str) -> Comparison:
    """Return the two conversations; `winner` is model_a, model_b, tie or tie (bothbad), `judge` the annotator."""
    beside = {"annotator": row["judge"]} if row.get("judge") is not None else {}
    better = _better(row["winner"])
    # The conversations begin with the prompt: it is what they share.
    return Comparison(None, row["conversation_a"], row["conversation_b"], better, ("winner", row["winner"]), beside)


def _better(winner: object) -> Side:
    side = named_side(winner) if isinstance(winner, str) else None
    if side is None and not is_tie(winner):
        raise BadRow(f"winner is {winner!r}, neither model_a, model_b nor a tie")
    return side or "tie"


ARENA = Layout(
    "arena",
    "`conversation_a`, `conversation_b`, `winner` (model_a, model_b, tie; a tie has confidence 0.5)",
    columns=("conversation_a", "conversation_b", "winner"),
    compares=comparison,
)
