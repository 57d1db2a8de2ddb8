"""The LMSYS arena: two whole conversations, and which model's is better; ties are labels too."""

from collections.abc import Mapping

from rlhf.data.layouts.layout import Comparison, Layout
from rlhf.data.read import BadRow
from rlhf.data.sides import Side, is_tie, named_side
from rlhf.data.tables import as_number


def comparison(row: Mapping[str, object], label: str) -> Comparison:
    """Return the two conversations; `winner` is model_a, model_b, tie or tie (bothbad), `judge` the annotator.

    MT-Bench's judgments have a `turn` too: the verdict is about the conversations as far as their answer of this number.
    """
    beside = {"annotator": row["judge"]} if row.get("judge") is not None else {}
    better = _better(row["winner"])
    first, second = (_judged_part(row[name], row.get("turn")) for name in ("conversation_a", "conversation_b"))
    # The conversations begin with the prompt: it is what they share.
    return Comparison(None, first, second, better, ("winner", row["winner"]), beside)


def _judged_part(conversation: object, turn: object) -> object:
    """Return a conversation's turns up to its answer of a number, 1 for the first; all where no answer behind it is there.

    The arena's own files say by `turn` how many answers there are.
    """
    if not isinstance(conversation, list):
        return conversation
    answers = [i for i, one in enumerate(conversation) if isinstance(one, Mapping) and one.get("role") == "assistant"]
    number = None if isinstance(turn, bool) else as_number(turn)  # a text in a CSV, 1.0 where another row has none
    if isinstance(number, int | float) and number in range(1, len(answers)):
        return conversation[: answers[int(number) - 1] + 1]
    return conversation


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
