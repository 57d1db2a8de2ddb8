"""Functions of a person's own that score answers as texts, each named `FILE.py:function`."""

import importlib.util
import math
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from rlhf.errors import UserError

TextFunction = Callable[[list[str], list[str]], list[float]]


@contextmanager
def foreign_code(key: str, reference: str) -> Iterator[None]:
    """Run code that is not ours: it can't end the run without a word, nor move its random numbers.

    The states of Python's, numpy's and torch's generators are put back afterwards, so that a function that draws or
    seeds changes nothing but its own values. The command line turns a real Ctrl-C into an exception of its own; where
    nobody does, KeyboardInterrupt may be one and goes on.

    Args:
        key: the recipe's key that names the code, for messages.
        reference: the code, "FILE.py:function".

    Raises:
        UserError: it raised SystemExit or KeyboardInterrupt.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            raise
        code = f"({error.code})" if isinstance(error, SystemExit) else ""
        raise UserError(
            f"{key}: {reference} raised {type(error).__name__}{code}, which would end the run in the middle; raise an exception "
            "that says what is wrong, or return a number."
        ) from error
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)


def load_function(reference: str, *, key: str) -> TextFunction:
    """Import `function` from `FILE.py`, and wrap it so that wrong values are refused where they are given.

    Args:
        reference: "FILE.py:function"; the function takes prompts and completions as texts and returns one finite
            number for each. The lists are copies.
        key: the recipe's key that names it, for messages.

    Raises:
        UserError: no such file or function, or it can't be imported; later, from the wrapped function, an exception, or a
            wrong number or kind of values.
    """
    file, _, name = reference.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"{key}: {path.absolute()}: no such file.")
    function = getattr(_import(path, key, reference), name, None)
    if not callable(function):
        raise UserError(f"{key}: {path} has no function {name!r}.")

    def checked(prompts: list[str], completions: list[str]) -> list[float]:
        try:
            with foreign_code(key, reference):
                values = [float(value) for value in function(list(prompts), list(completions))]
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{key}: {reference} failed: {type(error).__name__}: {error}") from error
        if len(values) != len(prompts) or not all(math.isfinite(value) for value in values):
            raise UserError(f"{key}: {reference} must return one finite number for each of {len(prompts)} answers.")
        return values

    return checked


def _import(path: Path, key: str, reference: str) -> ModuleType:
    """Run a person's file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"rlhf_function_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{key}: {path}: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        with foreign_code(key, reference):
            spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key}: {path} can't be imported: {type(error).__name__}: {error}") from error
    return module
