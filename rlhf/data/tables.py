"""Sources that are no single JSON file: tables of text, folders that `datasets` reads, and several files by a pattern."""

import csv
import glob
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from rlhf.data.limits import Unreadable, open_text
from rlhf.errors import UserError

TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
MOST_CHARACTERS = 64 * 2**20  # in one cell
# Columns whose cells are numbers wherever a table has them; the cells of all others are texts, also those that look like numbers.
NUMBERS = re.compile(
    r"(?:.*[_-])?(?:margin|confidence|soft_label|weight|agree|strength|rank|rating|score|helpfulness)(?:[_-].*)?"
)
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"


def is_pattern(source: str) -> bool:
    """Return whether a source stands for several files: it holds `*`, `?` or `[`, and nothing has that very name."""
    return any(sign in source for sign in "*?[") and not Path(source).expanduser().exists()


def is_saved(source: str) -> bool:
    """Return whether a source is a folder that `datasets` saved (`save_to_disk`): one data set, or several splits."""
    folder = Path(source).expanduser()
    return (folder / SAVED_DATASET).is_file() or (folder / SAVED_SPLITS).is_file()


def is_folder(source: str) -> bool:
    """Return whether a source is a folder, which `datasets` reads: one that it saved, or one of data files."""
    return bool(source) and Path(source).expanduser().is_dir()


def is_folder_of_files(source: str) -> bool:
    """Return whether a source is a folder of data files, whose names and README say which split each is of."""
    return is_folder(source) and not is_saved(source)


def matched_files(pattern: str) -> list[str]:
    """Return the files that a pattern stands for, by name.

    Raises:
        UserError: there is none.
    """
    files = sorted(name for name in glob.glob(str(Path(pattern).expanduser()), recursive=True) if Path(name).is_file())
    if not files:
        raise UserError(f"{pattern}: no file matches.")
    return files


def local_files(source: str) -> list[Path]:
    """Return all files that a local source consists of, by name; none where it is not there.

    Of a folder these are all but hidden ones, in folders below it too, as `datasets` has it: the name of a file may say which
    split it is of.
    """
    path = Path(source).expanduser()
    if is_pattern(source):
        return [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    if is_folder(source):
        return sorted(file for file in map(Path, glob.glob(f"{path}/**", recursive=True)) if file.is_file())
    return [path] if path.is_file() else []


def folder_rows(source: str, split: str, *, config: str | None, is_named: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of a folder.

    Args:
        split: of a folder with several; a folder with one only is read whole, unless `is_named`.
        config: of a folder of data files whose README names several.
        is_named: the split was asked for by name.

    Raises:
        UserError: it has no such split; `datasets` can't read it.
    """
    loaded = _loaded(source, config)
    if isinstance(loaded, dict):
        names = list(loaded)
        if split not in loaded and (is_named or len(names) > 1):
            raise UserError(f"{source}: has no split {split!r}; it has {', '.join(names)}. Name one by `split:`.")
        loaded = loaded.get(split, loaded[names[0]])
    elif is_named:
        raise UserError(f"{source}: is one data set without splits; take `split: {split}` out.")
    yield from cast(Iterator[dict[str, Any]], iter(loaded))


def folder_splits(source: str, config: str | None) -> list[str]:
    """Return the splits of a folder; none where it is no folder, or a single data set that was saved.

    Raises:
        UserError: `datasets` can't read it.
    """
    loaded = _loaded(source, config) if is_folder(source) else None
    return list(loaded) if isinstance(loaded, dict) else []


def _loaded(source: str, config: str | None) -> Any:
    """Return what `datasets` reads in a folder: data sets by split, or a single one that was saved.

    Raises:
        UserError: it can't read it.
    """
    from datasets import load_dataset, load_from_disk

    folder = str(Path(source).expanduser().resolve())  # whole: "csv" alone would be one of the library's own readers
    try:
        return load_from_disk(folder) if is_saved(source) else load_dataset(folder, config)
    except Exception as error:  # it raises anything, the reason often behind a general one
        reason = error.__cause__ or error
        words = str(reason).partition("\n")[0] or "no reason given"
        raise UserError(
            f"{source}: `datasets` can't read the files of this folder as one data set ({type(reason).__name__}: {words}); name "
            f"those that are meant, such as '{source.rstrip('/')}/*.jsonl'."
        ) from error


def table_rows(path: Path) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a table with a line of names at its head; in place of one that can't be read, the reason.

    An empty cell is None. Names are separated by commas in .csv (by semicolons, if they hold no comma) and by tabs in .tsv.

    Raises:
        UserError: no text in UTF-8, no names, a name that stands there twice, a quote that is never closed, or only rows later.
    """
    csv.field_size_limit(MOST_CHARACTERS)
    number = 0  # of the last row that was read
    try:
        with _open(path) as file:
            first = file.readline(MOST_CHARACTERS)
        with _open(path) as file:
            separator = "\t" if ".tsv" in path.name else ";" if ";" in first and "," not in first else ","
            reader = csv.reader(file, delimiter=separator, strict=True)
            names = next(reader, [])
            _check_names(path, names)
            for cells in reader:
                number += 1
                if separator == "\t" and _is_several_rows(names, cells):
                    raise UserError(
                        f"{path}: row {number}: a cell that begins with a quotation mark goes on over the rows after it, so this "
                        "table is written without quoting; put cells that hold quotation marks between quotation marks and "
                        "double those inside, or write the rows as JSON lines."
                    )
                if cells:
                    yield _row(names, cells)
    except UnicodeDecodeError:
        raise UserError(f"{path}: row {number + 1} is not UTF-8 text.") from None
    except Unreadable as reason:
        raise UserError(f"{path}: row {number + 1}: {reason}.") from None
    except csv.Error as error:
        raise UserError(f"{path}: row {number + 1} is no row of a table ({error}).") from None


def as_number(cell: object) -> object:
    """Return the number that a text stands for; anything else as it is.

    >>> as_number("0.5"), as_number("half"), as_number(2)
    (0.5, 'half', 2)
    """
    if not isinstance(cell, str):
        return cell
    try:
        return int(cell) if re.fullmatch(r"\s*[-+]?\d+\s*", cell) else float(cell)
    except ValueError:
        return cell


def _open(path: Path) -> TextIO:
    return io.TextIOWrapper(open_text(path), encoding="utf-8-sig", newline="")


def _check_names(path: Path, names: list[str]) -> None:
    if len(names) < 2:
        raise UserError(
            f"{path}: its first line must name two columns or more, separated by commas (.csv) or tabs (.tsv)."
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: the column {twice[0]!r} stands there twice; rename one.")


def _is_several_rows(names: list[str], cells: list[str]) -> bool:
    """Return whether each line of a row's text has as many tabs as a row: a quotation mark made one row of several."""
    lines = "\t".join(cells).split("\n")
    return len(lines) > 1 and all(line.count("\t") == len(names) - 1 for line in lines)


def _row(names: list[str], cells: list[str]) -> dict[str, Any] | str:
    if len(cells) != len(names):
        return f"has {len(cells)} cells, where the first line names {len(names)} columns"
    row: Mapping[str, str | None] = dict(zip(names, (cell or None for cell in cells), strict=True))
    return {name: as_number(cell) if NUMBERS.fullmatch(name) else cell for name, cell in row.items()}
