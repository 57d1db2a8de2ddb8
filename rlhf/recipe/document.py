"""A YAML document that remembers where every key stands, and refuses what YAML lets pass."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf.errors import UserError

MAX_BYTES = 1_000_000
VALUES_AS_KEYS = (
    "preference",
)  # the mapping whose keys are values of a data file: 1 or true there, as they are written
Place = str  # "file:line"
KeyPath = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: `1e-4` is a number, not a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$|^[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


@dataclass
class Document:
    """Values by nested key, and the place ("file:line") of each."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)

    def place(self, path: KeyPath) -> Place:
        """Return where a key stands, or the nearest key above it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "recipe")

    def merged_with(self, other: "Document") -> "Document":
        """Return this document with the other's keys on top; sections are merged, anything else is replaced."""
        return Document(_merge(self.values, other.values), {**self.places, **other.places})


def read_document(path: Path) -> Document:
    """Read one YAML file.

    Raises:
        UserError: unreadable, too large, broken, not a mapping, a duplicate key, an alias.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe ({error.strerror}).") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path}: {len(raw)} bytes is no recipe; the limit is {MAX_BYTES}.")
    try:
        loader = _Loader(raw.decode("utf-8"))
        node = loader.get_single_node()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: broken YAML: {error.problem}.") from None
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: a recipe is a mapping of sections, and this file is not.")
    document, problems = Document(), list[str]()
    document.values = _construct(loader, node, (), str(path), document, problems, set())
    if problems:
        raise UserError(problems)
    return document


def read_override(text: str) -> Document:
    """Read one `section.key=value` of the command line.

    Raises:
        UserError: no `=`, or a value that is not YAML.
    """
    name, separator, value = text.partition("=")
    place = f"override '{text}'"
    if not separator or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
        raise UserError(f"{place}: an override looks like section.key=value.")
    path = tuple(name.split("."))
    try:
        parsed = yaml.load(value, _Loader) if value else None
    except yaml.YAMLError:
        raise UserError(f"{place}: {value!r} is not a YAML value; quote it.") from None
    document = Document(places={path[: i + 1]: place for i in range(len(path))})
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


def _construct(
    loader: _Loader, node: yaml.Node, path: KeyPath, file: str, document: Document, problems: list[str], seen: set[int]
) -> Any:
    """Build the value of a node, and note the place of every key and every mistake below it."""
    line = node.start_mark.line + 1
    if id(node) in seen:
        problems.append(f"{file}:{line}: aliases (*name) are not allowed in a recipe; write the value again.")
        return None
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if path[-1:] == VALUES_AS_KEYS else loader.construct_object(key_node)
            key_line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                problems.append(f"{file}:{key_line}: the key {key!r} is not a string; quote it.")
                continue
            if key in values:
                problems.append(
                    f"{file}:{key_line}: the key {'.'.join((*path, key))!r} stands here a second time; keep one."
                )
            document.places[(*path, key)] = f"{file}:{key_line}"
            values[key] = _construct(loader, value_node, (*path, key), file, document, problems, seen)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, path, file, document, problems, seen) for item in node.value]
    try:
        value = loader.construct_object(node)
    except (yaml.YAMLError, ValueError):
        problems.append(f"{file}:{line}: cannot read the value of {'.'.join(path)!r}.")
        return None
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{file}:{line}: {'.'.join(path)!r} is {value}, which is not a finite number.")
    return value


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged
