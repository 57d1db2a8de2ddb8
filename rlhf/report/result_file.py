"""The file or folder that a person names for a result: nothing but an earlier result of the same command is ever replaced."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import UserError


def check_result_file(
    file: Path, option: str, *, key: str | None = None, result: str = "result of this command"
) -> None:
    """Check that a result can be written to the file that a person named; before any work.

    Args:
        option: its name on the command line.
        key: of such results. A file that holds one, or nothing at all, may be named; without `key` no file may.
        result: what such a result is called.

    Raises:
        UserError: its folder is not there, or can't be written to; it is a folder, a link, or something else than such a result.
    """
    folder = file.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{option} {file}: no such folder; make it first.")
    if file.is_dir():
        raise UserError(f"{option} {file}: is a folder; name a file in it.")
    if file.is_symlink():  # it would be replaced, and what it leads to would stay as it is
        raise UserError(f"{option} {file}: is a link; name the file itself.")
    if file.exists() and not (key is not None and file.is_file() and _holds_result(file, key)):
        what = "is there already" if key is None else f"is there already, and is no earlier {result}"
        raise UserError(f"{option} {file}: {what}; choose a new file.")
    _check_writable(folder, f"{option} {file}")


def check_new_folder(folder: Path, option: str) -> None:
    """Check that a person's folder for results is new, or empty, and that it can be made; before any work.

    Args:
        option: its name on the command line.

    Raises:
        UserError: it holds something; it is a file, or a link that leads to no folder; its place can't be written to.
    """
    name = f"{option} {folder}"
    if folder.is_symlink() and not folder.is_dir():
        raise UserError(f"{name}: is a link that leads to no folder; choose a new folder.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{name}: is a file; choose a new folder.")
    try:
        is_empty = not folder.exists() or next(folder.iterdir(), None) is None
    except OSError as error:
        raise UserError(f"{name}: can't be read ({error.strerror}); choose another place.") from error
    if not is_empty:
        raise UserError(f"{name}: not empty; choose a new folder.")
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{name}: {place} is a file; choose another place.")
    _check_writable(place, name)


def _check_writable(folder: Path, name: str) -> None:
    """Make a file without a name, which is gone at once: rights alone don't say what a read-only or a full disk will."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{name}: {folder} can't be written to ({error.strerror}); choose another place.") from error


def _holds_result(file: Path, key: str) -> bool:
    try:
        text = file.read_text(encoding="utf-8")
        result = json.loads(text) if text else {key: None}
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(result, dict) and key in result


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[None]:
    """Delete a new folder where filling it fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
