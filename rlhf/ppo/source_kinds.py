"""The kinds of reward sources: by what each is recognised, what is checked before a run, and what opens it.

A new kind is a row of `KINDS`, and the function or class that its `opener` names. A source that is a name, as in a
recipe, is recognised and checked without torch; whatever opens it is imported when it is opened.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from rlhf.addresses import secret_problem
from rlhf.errors import UserError


def _no_problem(_: str) -> str | None:
    return None


@dataclass(frozen=True)
class SourceKind:
    """One kind of reward source.

    Attributes:
        name: for a person.
        matches: whether a source is of this kind; a source has the first kind of the table that it matches.
        opener: dotted name, `module:function`, of what turns the source into a `RewardModel` or a function as TRL calls
            its own; None where the source is one of the two already.
        takes_tokenizer: whether the opener is also given the tokenizer that came with the source.
        problem: what is wrong with a name before anything of it is opened, in a sentence, or None.
    """

    name: str
    matches: Callable[[object], bool]
    opener: str | None
    takes_tokenizer: bool = False
    problem: Callable[[str], str | None] = _no_problem

    def open(self, source: object, tokenizer: object = None) -> object:
        """Return the source as a `RewardModel` or a function as TRL calls its own."""
        if self.opener is None:
            return source
        module, _, function = self.opener.partition(":")
        arguments = (source, tokenizer) if self.takes_tokenizer else (source,)
        return getattr(import_module(module), function)(*arguments)


def _is_address(source: object) -> bool:
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def is_function_in_a_file(source: object) -> bool:
    """Tell whether a source is `FILE.py:function`."""
    return isinstance(source, str) and ".py:" in source


def _is_name(source: object) -> bool:
    return isinstance(source, str)


def _is_reward_model(source: object) -> bool:
    from rlhf.reward.load import RewardModel

    return isinstance(source, RewardModel)


def _is_module(source: object) -> bool:
    from torch import nn

    return isinstance(source, nn.Module)


def _missing_file(name: str) -> str | None:
    file = Path(name.rpartition(":")[0]).expanduser()
    return None if file.exists() else f"{file}: no such file."


def _missing_folder(name: str) -> str | None:
    folder = Path(name).expanduser()
    return None if folder.exists() else f"{folder}: no such folder."


def missing_model(name: str) -> str | None:
    """Return that the folder of a model is not there, in a sentence, or None; what may be a hub id is not looked for."""
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
    return f"{name}: no such folder." if is_path and not Path(name).expanduser().exists() else None


def verdict_model(source: object) -> str | None:
    """Return the causal model of `verdicts:MODEL`, a folder or hub id; None for other sources."""
    return source.removeprefix(PREFIX) if isinstance(source, str) and source.startswith(PREFIX) else None


PREFIX = "verdicts:"
VERDICTS = SourceKind(
    "verdicts:MODEL, a causal model that is asked which answer is better",
    lambda source: verdict_model(source) is not None,
    "rlhf.ppo.verdict_reward:VerdictReward",
    problem=lambda name: missing_model(name.removeprefix(PREFIX)),
)
FOLDER = SourceKind(
    "the folder of a reward model", _is_name, "rlhf.reward.load:load_reward_model", problem=_missing_folder
)
KINDS = (
    SourceKind(
        "the http address of a reward server", _is_address, "rlhf.ppo.remote:RemoteReward", problem=secret_problem
    ),
    SourceKind(
        "a function in a file, FILE.py:function",
        is_function_in_a_file,
        "rlhf.ppo.file_reward:FileReward",
        problem=_missing_file,
    ),
    VERDICTS,
    FOLDER,  # any other name
    SourceKind("a loaded reward model", _is_reward_model, None),
    SourceKind(
        "a one-label classifier, with its tokenizer",
        _is_module,
        "rlhf.ppo.rewards:as_reward_model",
        takes_tokenizer=True,
    ),
    SourceKind("a function as TRL calls its own", callable, None),
)


def kind_of(source: object) -> SourceKind:
    """Find the kind of a reward source.

    Raises:
        UserError: it is of none.
    """
    for kind in KINDS:
        if kind.matches(source):
            return kind
    raise UserError(f"ppo: {source!r} is no source of rewards; give {', or '.join(kind.name for kind in KINDS)}.")


def source_problem(name: str) -> str | None:
    """Return what is wrong with a source that a recipe names, in a sentence, or None; nothing of it is opened."""
    return kind_of(name).problem(name)
