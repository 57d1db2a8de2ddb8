"""What is read of a file, and no more: so long a line, so deep a nesting, so dense a compression; a file that is text at all.

A file from outside may be anything. What is over a limit costs its row where a row can be told, and else the file, in one
sentence that names the row; memory stays within a small multiple of `MOST_LINE`, or of `MOST_FILE` for a single JSON list.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import AnyStr, BinaryIO

from rlhf.errors import UserError

MIB = 2**20
MOST_LINE = 64 * MIB  # bytes of a line (characters of one that comes as text)
MOST_LEVELS = 200  # of lists and objects within each other
# Of what a compressed file holds to what it takes; texts of people reach 10, and tables of one word 100.
MOST_RATIO = 200
RATIO_FROM = 4 * MIB  # small files may be as dense as they like
MOST_FILE = 1024 * MIB  # of a .json file, which can only be read as one piece
LOOKED_AT = 64 * 1024  # at the head of a file, for bytes that no text holds

TOO_LONG = f"longer than {MOST_LINE // MIB} MiB"
TOO_DEEP = f"nested deeper than {MOST_LEVELS} levels"


class Unreadable(Exception):
    """What is wrong with a file from here on."""


class _Unpacked(io.RawIOBase):
    """What a gzip file holds, as far as it is no bomb.

    Raises:
        Unreadable: on reading, where it is damaged, cut off, or holds more than `MOST_RATIO` times what it takes.
    """

    def __init__(self, path: Path):
        self._packed = path.open("rb")
        self._file = gzip.GzipFile(fileobj=self._packed)
        self._count = 0

    def readable(self) -> bool:
        """Return True, as a file for reading must."""
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        """Read the next bytes into a buffer; return how many."""
        try:
            content = self._file.read1(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Unreadable(f"the compressed file is cut off or damaged ({error})") from None
        self._count += len(content)
        if self._count > max(RATIO_FROM, MOST_RATIO * self._packed.tell()):
            raise Unreadable(
                f"the file unpacks to more than {MOST_RATIO} times its size, as no texts of people do; unpack it yourself if it is "
                "in order"
            )
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Close both files."""
        if not self.closed:
            self._file.close()
            self._packed.close()
        super().close()


def open_text(path: Path) -> BinaryIO:
    """Open a file of text for reading its bytes, unpacked if its name ends in .gz.

    Raises:
        UserError: it is no text, or compressed under another name.
    """
    raw: io.RawIOBase = _Unpacked(path) if path.name.endswith(".gz") else io.FileIO(path)
    file = io.BufferedReader(raw, LOOKED_AT)
    try:
        head = file.peek(LOOKED_AT)
    except Unreadable as reason:
        raise UserError(f"{path}: row 1: {reason}.") from None
    if head.startswith(b"\x1f\x8b"):
        raise UserError(f"{path}: row 1: this is a gzip file; let its name end in .gz.")
    if (place := head.find(b"\0")) != -1:
        row = head.count(b"\n", 0, place) + 1
        raise UserError(
            f"{path}: row {row}: no text: it holds a zero byte, as binary files and UTF-16 do; save it as text in UTF-8."
        )
    return file


def numbered_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield the lines of a file with their numbers, from 1; None in place of a line of more than `MOST_LINE` bytes.

    Raises:
        UserError: the file cannot be read on.
    """
    number = 0
    try:
        for number, line in enumerate(bounded_lines(file.readline), start=1):
            yield number, line
    except Unreadable as reason:
        raise UserError(f"{path}: row {number + 1}: {reason}.") from None


def bounded_lines(readline: Callable[[int], AnyStr]) -> Iterator[AnyStr | None]:
    """Yield lines of bytes or of text; None in place of one that is too long, which is read to its end and forgotten.

    Args:
        readline: of a file: returns the rest of the line, but no more than so many bytes or characters.
    """
    while line := readline(MOST_LINE + 1):
        if len(line) <= MOST_LINE:
            yield line
            continue
        while line and line[-1:] not in (b"\n", "\n"):
            line = readline(MIB)
        yield None


def read_whole(file: BinaryIO, path: Path) -> bytes:
    """Read a file to its end.

    Raises:
        UserError: it cannot be read, or holds more than `MOST_FILE` bytes.
    """
    try:
        content = file.read(MOST_FILE + 1)
    except Unreadable as reason:
        raise UserError(f"{path}: {reason}.") from None
    if len(content) > MOST_FILE:
        raise UserError(
            f"{path}: one list of more than {MOST_FILE // MIB} MiB; write one object a line into a .jsonl file."
        )
    return content


def is_too_deep(value: object) -> bool:
    """Tell whether a value has lists and objects within each other over more than `MOST_LEVELS` levels."""
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
