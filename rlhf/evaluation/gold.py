"""A true reward from a user's own file: `evaluate.gold: FILE.py:function`."""

from rlhf.data.functions import TextFunction, load_function

GoldFunction = TextFunction


def load_gold(reference: str) -> GoldFunction:
    """Import the true reward that `evaluate.gold` names, "FILE.py:function", of prompts and completions as texts.

    Raises:
        UserError: no such file or function; later, from the function, a wrong number or kind of values.
    """
    return load_function(reference, key="evaluate.gold")
