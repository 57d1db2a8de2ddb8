"""The file that a person names for a result: nothing but an earlier result of the same command is ever replaced."""

import json
from pathlib import Path

from rlhf.errors import UserError


def check_result_file(file: Path, option: str, *, key: str | None = None) -> None:
    """Check that a result can be written to the file that a person named; before any work.

    Args:
        option: its name on the command line.
        key: of such results. A file that holds one, or nothing at all, is replaced; without `key` no file is.

    Raises:
        UserError: its folder is not there; it is a folder, or something else than such a result.
    """
    if not file.absolute().parent.is_dir():
        raise UserError(f"{option} {file}: no such folder; make it first.")
    if file.is_dir():
        raise UserError(f"{option} {file}: is a folder; name a file in it.")
    if file.exists() and not (key is not None and file.is_file() and _holds_result(file, key)):
        what = "is there already" if key is None else "is there already, and is no earlier result of this command"
        raise UserError(f"{option} {file}: {what}; choose a new file.")


def _holds_result(file: Path, key: str) -> bool:
    try:
        text = file.read_text(encoding="utf-8")
        result = json.loads(text) if text else {key: None}
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(result, dict) and key in result
