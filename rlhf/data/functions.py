"""Functions of a person's own that score answers as texts, each named `FILE.py:function`."""

import hashlib
import importlib.util
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from rlhf.bounded import TimeIsUp, at_most
from rlhf.errors import UserError

LARGEST = 1e15  # of a value: means and squares of such values are still numbers in float32
# Seconds that a file has to be imported, and a function has for one call and for each answer of it.
SECONDS_TO_IMPORT, SECONDS_A_CALL, SECONDS_AN_ANSWER = 600.0, 600.0, 10.0
TextFunction = Callable[[list[str], list[str]], list[float]]
# Of all generators at one moment: Python's, numpy's, torch's, and torch's on the devices that are in use.
States = tuple[Any, Any, torch.Tensor, list[torch.Tensor] | None]


class RandomNumbers:
    """The random numbers of one function, which go on from call to call as if nobody else drew.

    They begin with the run's seed and the function's name, so that two functions, or a function and the run, draw different
    ones. A stage that is resumed begins them anew.
    """

    def __init__(self, name: str):
        digest = hashlib.sha256(f"{torch.initial_seed()} {name}".encode()).digest()
        self.seed = int.from_bytes(digest[:4])
        self.states: States | None = None

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Let the code inside draw them; what it leaves is where the next call goes on."""
        if self.states is not None:
            _set_states(self.states)
        else:
            # `torch.manual_seed` would also seed devices that are first used later, and so the run's own numbers there.
            random.seed(self.seed)
            np.random.seed(self.seed)
            torch.default_generator.manual_seed(self.seed)
        try:
            yield
        finally:
            self.states = _states()


def _states() -> States:
    is_in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = torch.cuda.get_rng_state_all() if is_in_use else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices


def _set_states(states: States) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state_all(states[3])


@contextmanager
def foreign_code(key: str, reference: str, *, seconds: float) -> Iterator[None]:
    """Run code that is not ours: it can't end the run without a word, keep it for ever, or move its random numbers.

    The states of Python's, numpy's and torch's generators are put back afterwards, so that a function that draws or
    seeds changes nothing but its values. The command line turns a real Ctrl-C into an exception of its own; where
    nobody does, KeyboardInterrupt may be one and goes on.

    Args:
        key: the recipe's key that names the code, for messages.
        reference: the code, "FILE.py:function".
        seconds: that it may take.

    Raises:
        UserError: it raised SystemExit or KeyboardInterrupt, or took longer.
    """
    states = _states()
    try:
        with at_most(seconds):
            yield
    except TimeIsUp:
        raise UserError(
            f"{key}: {reference} was not done after {seconds:.0f} s; make it faster, or let it give up by itself."
        ) from None
    except (SystemExit, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            raise
        code = f"({error.code})" if isinstance(error, SystemExit) else ""
        raise UserError(
            f"{key}: {reference} raised {type(error).__name__}{code}, which would end the run in the middle; raise an exception "
            "that says what is wrong, or return a number."
        ) from error
    finally:
        _set_states(states)


def load_function(reference: str, *, key: str) -> TextFunction:
    """Import `function` from `FILE.py`, and wrap it so that wrong values are refused where they are given.

    Args:
        reference: "FILE.py:function"; the function takes prompts and completions as texts and returns one finite
            number for each. The lists are copies, and its random numbers are `RandomNumbers`.
        key: the recipe's key that names it, for messages.

    Raises:
        UserError: no such file or function, or it can't be imported; later, from the wrapped function, an exception, or a
            wrong number or kind of values.
    """
    file, _, name = reference.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"{key}: {path.absolute()}: no such file.")
    numbers = RandomNumbers(f"{key} {name}")
    function = getattr(_import(path, key, reference, numbers), name, None)
    if not callable(function):
        raise UserError(f"{key}: {path} has no function {name!r}.")

    def checked(prompts: list[str], completions: list[str]) -> list[float]:
        try:
            seconds = SECONDS_A_CALL + SECONDS_AN_ANSWER * len(prompts)
            with foreign_code(key, reference, seconds=seconds), numbers.drawn():
                returned = function(list(prompts), list(completions))
                values = _as_numbers(returned)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{key}: {reference} failed: {type(error).__name__}: {error}") from error
        if values is None or len(values) != len(prompts) or not all(abs(value) <= LARGEST for value in values):
            raise UserError(
                f"{key}: {reference} must return one finite number for each of {len(prompts)} answers, none beyond "
                f"{LARGEST:g}; it returned {_described(returned, values)}."
            )
        return values

    return checked


def _as_numbers(returned: Any) -> list[float] | None:
    """Return what a function returned as numbers; None where it is no row of them.

    Tensors of any device and arrays are rows, and so is whatever gives its values one by one; texts, sets and mappings
    are none, nor is a text a number.

    Raises:
        Exception: whatever a value that is no number raises.
    """
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        return None
    values = list(values)
    if any(isinstance(value, str | bytes) for value in values):
        return None
    return [float(value) for value in values]


def _described(returned: Any, values: list[float] | None) -> str:
    """Say what a function returned that it should not."""
    if values is None:
        kind = type(returned).__name__
        return "texts" if isinstance(returned, list | tuple) else f"something else ({kind})"
    unusable = [value for value in values if not abs(value) <= LARGEST]
    return f"{len(values)} numbers" + (f", of which {unusable[0]} is the first that is unusable" if unusable else "")


def _import(path: Path, key: str, reference: str, numbers: RandomNumbers) -> ModuleType:
    """Run a person's file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"rlhf_function_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{key}: {path}: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        with foreign_code(key, reference, seconds=SECONDS_TO_IMPORT), numbers.drawn():
            spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key}: {path} can't be imported: {type(error).__name__}: {error}") from error
    return module
