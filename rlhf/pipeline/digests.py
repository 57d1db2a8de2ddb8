"""Digests of files: of what a recipe names beside its data (code, models), and of what stages wrote. Loads no torch."""

import ast
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rlhf.files import file_digest
from rlhf.models.gguf import SUFFIX as GGUF_SUFFIX
from rlhf.recipe.document import differences

# Of a model's folder, what a loader reads: weights, configuration, tokenizer, template, a reward model's card.
MODEL_SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt")
DIGESTS = ("files", "sha256")  # the settings of a stage that hold digests by file name


def known_digest(path: Path) -> str:
    """Return the sha256 of a file, read once a process for as long as its size and time of change stay."""
    stat = path.stat()
    return _digest(path.resolve(), stat.st_size, stat.st_mtime_ns)


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    return file_digest(path)


def named_digests(names: Iterable[str | None]) -> dict[str, str]:
    """Return the sha256 of every local file that some names of a recipe stand for, by its path as the recipe has it.

    A name is a function's `FILE.py:function`, of which the modules that it imports from its own folder count too; or a model:
    a folder, of which every file that a loader reads counts, and of an adapter its base too. Addresses, hub ids and None stand
    for no local file, nor do installed packages.
    """
    files: dict[str, Path] = {}
    for name in names:
        if name is not None and not name.startswith(("http://", "https://")):
            files |= _code_file(name) if ".py:" in name else _model_files(name)
    return {name: known_digest(path) for name, path in sorted(files.items())}


def _code_file(name: str) -> dict[str, Path]:
    file = name.rpartition(":")[0]
    path = Path(file).expanduser()
    if not path.is_file():
        return {}
    beside = {str(Path(file).parent / module.relative_to(path.parent)): module for module in imported_files(path)}
    return {file: path} | beside


def imported_files(file: Path) -> list[Path]:
    """Return the Python files in a file's folder and below it that it imports, and that these import; nothing is run.

    What is imported by a name that is made while the code runs is not found (`importlib.import_module`). A file that is no
    Python imports nothing; who loads it says what is wrong with it. This package itself is left out.
    """
    folder, waiting = file.parent, [file]
    imported: set[Path] = set()
    while waiting:
        for name in _imported_names(waiting.pop(), folder):
            for module in _module_files(folder, name):
                if module != file and module not in imported:
                    imported.add(module)
                    waiting.append(module)
    return sorted(imported)


def _imported_names(file: Path, folder: Path) -> Iterator[tuple[str, ...]]:
    """Yield the parts of every dotted name that a file may import; of `from a import b`, b may be a module or not."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    package = file.relative_to(folder).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = (*start, *(node.module.split(".") if node.module else ()))
            yield from ((*module, alias.name) for alias in node.names)


def _module_files(folder: Path, name: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files that are run when a dotted name is imported from a folder, packages first."""
    if name[:1] == (__name__.partition(".")[0],):
        return
    for length in range(1, len(name) + 1):
        place = folder.joinpath(*name[:length])
        yield from (path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file())


def _model_files(name: str) -> dict[str, Path]:
    folder = Path(name).expanduser()
    if folder.suffix.lower() in (GGUF_SUFFIX, ".jinja", ".json") and folder.is_file():
        return {name: folder}
    if not folder.is_dir():
        return {}
    places = [folder, *sorted(folder.glob("expert-*/"))]
    files = {
        f"{name.rstrip('/')}/{path.relative_to(folder)}": path
        for place in places
        for path in place.iterdir()
        if path.suffix.lower() in MODEL_SUFFIXES and path.is_file()
    }
    base = _base_of_adapter(folder)
    is_adapter = base is not None and (Path(base).expanduser() / "adapter_config.json").is_file()  # which no base is
    return files if base is None or is_adapter else files | _model_files(base)


def _base_of_adapter(folder: Path) -> str | None:
    """Return what an adapter says that its base is; None where the folder holds no adapter, or one that can't be read."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        file = folder / "expert-0" / "adapter_config.json"
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return base if isinstance(base, str) else None


def changes(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """Say in a phrase what differs between two stages' settings; a file's digest says no more than that it changed."""
    if before is None:
        return "its settings, parents or seed changed"
    phrases = []
    for name in DIGESTS:
        old, new = before.get(name) or {}, now.get(name) or {}
        phrases += [f"{file} has changed" for file in sorted(old.keys() & new.keys()) if old[file] != new[file]]
        phrases += [f"{file} is not there any more" for file in sorted(old.keys() - new.keys())]
        phrases += [f"{file} was not there" for file in sorted(new.keys() - old.keys())]
    old, new = ({key: value for key, value in settings.items() if key not in DIGESTS} for settings in (before, now))
    return "; ".join(phrases + differences(old, new)) or "its parents or seed changed"
