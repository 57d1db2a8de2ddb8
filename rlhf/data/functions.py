"""Functions of a person's own that score answers as texts, each named `FILE.py:function`."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

from rlhf.errors import UserError

TextFunction = Callable[[list[str], list[str]], list[float]]


def load_function(reference: str, *, key: str) -> TextFunction:
    """Import `function` from `FILE.py`, and wrap it so that wrong values are refused where they are given.

    Args:
        reference: "FILE.py:function"; the function takes prompts and completions as texts and returns one finite
            number for each.
        key: the recipe's key that names it, for messages.

    Raises:
        UserError: no such file or function; later, from the wrapped function, a wrong number or kind of values.
    """
    file, _, name = reference.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"{key}: {path.absolute()}: no such file.")
    spec = importlib.util.spec_from_file_location(f"rlhf_function_{path.stem}", path)
    assert spec is not None, "a path that ends in .py has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{key}: {path} has no function {name!r}.")

    def checked(prompts: list[str], completions: list[str]) -> list[float]:
        values = [float(value) for value in function(prompts, completions)]
        if len(values) != len(prompts) or not all(math.isfinite(value) for value in values):
            raise UserError(f"{key}: {reference} must return one finite number for each of {len(prompts)} answers.")
        return values

    return checked
