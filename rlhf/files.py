"""Files: JSON lines, writes that a reader never sees half of, digests."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read_jsonl(path: Path) -> list[Any]:
    r"""Read a file of JSON lines, all rows at once.

    A line ends at "\n" and nowhere else: texts may hold U+2028, U+2029 and U+0085, which JSON does not escape and at which
    `str.splitlines` cuts.

    Returns:
        the value of each line; what a row holds is for the caller to say (`rows: list[Pair] = read_jsonl(path)`).
    """
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write a file of JSON lines, all rows at once; a stage's manifest is what says that the file is whole."""
    path.write_text(json_lines(rows), encoding="utf-8")


def json_lines(rows: Iterable[Mapping[str, object]]) -> str:
    r"""Return rows as JSON lines, each ended by "\n"; text stays as it is, without escapes for what is not ASCII.

    >>> json_lines([{"a": "é"}, {"a": 1}])
    '{"a": "é"}\n{"a": 1}\n'
    """
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_text(path: Path, text: str) -> None:
    """Write a text beside its target, flush it to disk, rename it: a reader sees the old file or the new one, never a half."""
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def digest(value: object) -> str:
    """Return the sha256 of a value's canonical JSON (sorted keys, no blanks)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def share_weights(folder: Path) -> None:
    """Give the weights in a folder the mode that any new file has here: safetensors writes them for their owner alone.

    A server that runs as another user, or a colleague on a shared disk, could not read them.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o666 & ~umask)
