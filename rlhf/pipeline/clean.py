"""What may be deleted of a run's folder without anybody missing it: what a kill left behind, and work that is done."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rlhf.errors import UserError
from rlhf.pipeline.store import CHECKPOINTS, STARTED, Store, checkpoints_of, newest_checkpoint
from rlhf.report.records import MANIFEST

# As what is renamed later is named: by the number of the process that writes it.
HALF_WRITTEN = re.compile(r".+\.tmp-\d+")
FEATURES = "features.npy"  # of a trunk that members share; every attempt writes it again


class Freeable(NamedTuple):
    """A file or folder that nobody needs any more.

    Attributes:
        size: in bytes, of all files below it.
        reason: why nobody needs it.
    """

    path: Path
    size: int
    reason: str


def freeable(run: Path) -> list[Freeable]:
    """List what may be deleted of a run that nobody is at work in.

    What resuming, `report`, `serve` and `lineage` read is never among it: files that a manifest names, the newest whole
    checkpoint of a stage that was begun, labels. The older checkpoint that would be taken if the newest were damaged is.

    Raises:
        UserError: the folder holds no run.
    """
    if not run.is_dir() or not ((run / "recipe.yaml").is_file() or any(run.glob(f"round-*/*/{MANIFEST}"))):
        raise UserError(f"{run}: this folder holds no run.")
    rows = [*_half_written(run)]
    for stage in sorted(path for path in run.glob("round-*/*") if path.is_dir()):
        if (stage / MANIFEST).is_file():
            rows += _of_finished(stage)
        elif (stage / STARTED).is_file():  # another folder is a person's own
            rows += _of_begun(stage)
    return [Freeable(path, _size(path), reason) for path, reason in rows]


def clean(run: Path) -> list[Freeable]:
    """Delete what `freeable` lists, and return it.

    Raises:
        UserError: the folder holds no run, or a run is at work in it.
    """
    freeable(run)
    lock = Store(run).lock()
    try:
        rows = freeable(run)
        for row in rows:
            shutil.rmtree(row.path) if row.path.is_dir() and not row.path.is_symlink() else row.path.unlink()
    finally:
        lock.release()
    return rows


def _half_written(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield files and links that a process was about to rename when it was killed."""
    for path in folder.iterdir():
        if HALF_WRITTEN.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
            yield path, "half written, when a process was killed"


def _of_finished(stage: Path) -> Iterator[tuple[Path, str]]:
    """Yield what a finished stage does not need."""
    if (stage / CHECKPOINTS).is_dir():
        yield stage / CHECKPOINTS, "the stage is finished"
    yield from _half_written(stage)


def _of_begun(stage: Path) -> Iterator[tuple[Path, str]]:
    """Yield what a stage does not need to go on."""
    yield from _half_written(stage)
    yield from ((path, "every attempt writes it again") for path in stage.rglob(FEATURES))
    for folder in (path for path in stage.rglob(CHECKPOINTS) if path.is_dir()):
        newest, damaged = newest_checkpoint(folder)
        for path in checkpoints_of(folder):
            if path in damaged:
                yield path, "cut off or damaged"
            elif path != newest:
                yield path, f"older than the whole {newest.name if newest else 'one'}"


def _size(path: Path) -> int:
    """Return how many bytes a file, or the files below a folder, take."""
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir())
