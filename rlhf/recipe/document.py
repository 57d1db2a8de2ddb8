"""A YAML document that remembers where every key stands, and refuses what YAML lets pass."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf.addresses import hide_secrets
from rlhf.errors import UserError

MAX_BYTES = 1_000_000
OPEN_PIPES = ("/dev/fd/", "/proc/")  # of a shell, `rlhf check <(…)`: somebody writes to them
SHOWN = 200  # characters of a key or an override in a message
LARGEST_INT = 2**63  # beyond which no number of a recipe can be meant
VALUES_AS_KEYS = (
    "preference",
)  # the mapping whose keys are values of a data file: 1 or true there, as they are written
WHOLE = ("attributes", "expert_weights", "columns", "preference")
Place = str  # "file:line"
KeyPath = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: `1e-4` is a number and not a string, `1:30` a string and not a number of base 60."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("int", "float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|\.[0-9_]+(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


@dataclass
class Document:
    """Values by nested key, and the place ("file:line") of each.

    Attributes:
        path: of an override, the one key that it gives.
        nulls: the keys for which `null` is written, and not nothing at all.
        problems: what is wrong with the text itself (a key twice, an alias), a sentence each; the rest of it was read.
    """

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    path: KeyPath = ()
    nulls: set[KeyPath] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def place(self, path: KeyPath) -> Place:
        """Return where a key stands, or the nearest key above it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "recipe")

    def says(self, key: Sequence[str | int], problems: Sequence[str]) -> bool:
        """Tell whether one of some sentences is about a key."""
        path = tuple(map(str, key))
        here = [problem for problem in problems if problem.startswith(f"{self.place(path)}: ")]
        return any(path[-1] in problem for problem in here) if path else False

    def merged_with(self, other: "Document") -> "Document":
        """Return this document with the other's keys on top.

        Settings are merged. A mapping whose keys are names of somebody's data (`WHOLE`), and a source of data, are values: they
        are replaced, unless an override names a key within (`reward.attributes.verbosity=0`).
        """
        values = _merge(self.values, other.values, (), other.path)
        return Document(values, {**self.places, **other.places}, problems=self.problems + other.problems)


def read_document(path: Path) -> Document:
    """Read one YAML file.

    Raises:
        UserError: unreadable, too large, broken, not a mapping.
    """
    try:
        if path.is_fifo() and not str(path).startswith(OPEN_PIPES):
            raise UserError(f"{path}: is a pipe, and nobody may ever write to it; name a file.")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe ({error.strerror}).") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path}: more than {MAX_BYTES} bytes is no recipe.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text.") from None
    document = Document()
    values = _read_yaml(text, (), lambda line: f"{path}:{line}", document)
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, and this file is not.")
    document.values = values
    return document


def read_override(text: str) -> Document:
    """Read one `section.key=value` of the command line.

    Raises:
        UserError: no `=`, or a value that is not YAML.
    """
    name, separator, value = text.partition("=")
    place = f"override '{hide_secrets(text) if len(text) <= SHOWN else text[:SHOWN] + '…'}'"
    if not separator or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
        raise UserError(f"{place}: an override looks like section.key=value.")
    if not value.strip():
        raise UserError(f"{place}: no value behind {name}=; give it one, or leave this override out.")
    path = tuple(name.split("."))
    document = Document(places={path[: i + 1]: place for i in range(len(path))}, path=path)
    parsed = _read_yaml(value, path, lambda _: place, document)
    inner = document.values
    for part in path[:-1]:
        inner = inner.setdefault(part, {})
    inner[path[-1]] = parsed
    return document


def differences(before: Mapping[str, object], now: Mapping[str, object], prefix: str = "") -> list[str]:
    """List what changed between two nested settings, a phrase each."""
    changes = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            changes.append(f"{prefix}{name} was {old!r}, is {new!r}")
    return changes


def _read_yaml(text: str, path: KeyPath, place_of: Callable[[int], Place], document: Document) -> Any:
    """Return the value that a YAML text holds, and note in a document the place of every key in it, and every mistake.

    Args:
        path: of the value in the document.
        place_of: line → place.

    Raises:
        UserError: broken YAML.
    """
    try:
        reader = _Reader(_Loader(text), place_of, document)
        node = reader.loader.get_single_node()
        value = None if node is None else reader.construct(node, path)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{place_of(line)}: broken YAML: {error.problem}.") from None
    except yaml.YAMLError as error:  # a character that YAML does not have
        raise UserError(f"{place_of(1)}: broken YAML: {str(error).splitlines()[0]}.") from None
    except RecursionError:
        raise UserError(f"{place_of(1)}: nested deeper than any recipe is.") from None
    document.problems += reader.problems
    return value


@dataclass
class _Reader:
    """Values out of the nodes of one YAML text; every mistake is noted, and the reading goes on."""

    loader: _Loader
    place_of: Callable[[int], Place]
    document: Document
    problems: list[str] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def construct(self, node: yaml.Node, path: KeyPath) -> Any:
        """Build the value of a node, and note the place of every key and every mistake below it."""
        place = self.place_of(node.start_mark.line + 1)
        if id(node) in self.seen:
            self.problems.append(f"{place}: aliases (*name) are not allowed in a recipe; write the value again.")
            return None
        self.seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = self._key(key_node, path)
                if key is None:
                    continue
                if key in values:
                    self.problems.append(
                        f"{self.place_of(key_node.start_mark.line + 1)}: the key {'.'.join((*path, key))!r} stands here a second "
                        "time; keep one."
                    )
                self.document.places[(*path, key)] = self.place_of(key_node.start_mark.line + 1)
                values[key] = self.construct(value_node, (*path, key))
            return values
        if isinstance(node, yaml.SequenceNode):
            return [self.construct(item, path) for item in node.value]
        try:
            value = self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError):
            self.problems.append(f"{place}: cannot read the value of {'.'.join(path)!r}.")
            return None
        if value is None and node.value:
            self.document.nulls.add(path)
        if (reason := _unusable(value)) is not None:
            self.problems.append(f"{place}: {'.'.join(path)!r} is {reason}.")
        return value

    def _key(self, node: yaml.Node, path: KeyPath) -> str | None:
        """Return the key of a node, or None where it is none, which is noted."""
        place = self.place_of(node.start_mark.line + 1)
        try:
            key = node.value if path[-1:] == VALUES_AS_KEYS else self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError):
            shown = str(node.value)[:SHOWN]
            self.problems.append(f"{place}: the key {shown!r} is merged or has a tag; write plain keys.")
            return None
        if not isinstance(key, str):
            self.problems.append(f"{place}: the key {str(node.value)[:SHOWN]!r} is not a string; quote it.")
            return None
        return key


def _unusable(value: object) -> str | None:
    """Say why no key of a recipe can have this value, or return None."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}, which is not a finite number"
    if isinstance(value, int) and abs(value) >= LARGEST_INT:
        return "a number of too many digits"
    if isinstance(value, str) and value.startswith("~"):
        try:
            Path(value).expanduser()
        except RuntimeError:
            return f"{value[:SHOWN]!r}, and there is no such user on this machine"
    return None


def _merge(below: dict[str, Any], above: dict[str, Any], at: KeyPath, override: KeyPath) -> dict[str, Any]:
    """Return settings with others on top.

    Args:
        at: where both stand in the recipe.
        override: the key that an override gives; empty for a file.
    """
    merged = dict(below)
    for key, value in above.items():
        path = (*at, key)
        is_within = len(override) > len(path) and override[: len(path)] == path
        is_settings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        if is_settings and (is_within or (key not in WHOLE and "source" not in value)):
            merged[key] = _merge(merged[key], value, path, override)
        else:
            merged[key] = value
    return merged
