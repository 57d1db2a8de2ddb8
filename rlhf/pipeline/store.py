"""Stage folders and their manifests. A manifest is written last, by rename: its existence means that the stage is done."""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlhf.errors import UserError
from rlhf.files import digest, file_digest, share_weights, write_text
from rlhf.invariants.checks import Check
from rlhf.invariants.files import finished_files_unchanged
from rlhf.pipeline.digests import changes, known_digest
from rlhf.report.records import MANIFEST, read_record, sealed
from rlhf.versions import version_of

CHECKPOINTS = "checkpoints"
EVENTS = "runs"  # among the checkpoints: where the Trainer's `report_to: tensorboard` writes
MARK = "complete.json"
LOCK = ".lock"
STARTED = "started.json"
PASSING = (MANIFEST, STARTED, "README.md", "certificate.json")  # no results: written again without the stage
METRICS = "metrics.jsonl"
SECONDS = "seconds.json"  # beside checkpoints: how long the work that they hold has taken
CONTENTS = (".safetensors", ".jsonl")
POLL_SECONDS = 0.2
PACKAGES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "rlhf-pipeline")


@dataclass(frozen=True)
class Stage:
    """One stage of a plan: what it is called, where it writes, and everything its result depends on.

    Attributes:
        name: of the table of stages (`rlhf.pipeline.stage_table`).
        folder: relative to the run, "round-0/sft".
        settings: of this stage alone, as the recipe has them.
        parents: role → stage whose result it reads.
    """

    name: str
    folder: str
    settings: Mapping[str, Any]
    seed: int
    parents: Mapping[str, "Stage"] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Return the sha256 of name, settings, seed and the parents' keys, which is known before anything runs.

        Kept: a stage of a late round reads stages that read the same ones, and the ways to the data grow sixfold a round.
        """
        return digest(
            {
                "stage": self.name,
                "settings": self.settings,
                "seed": self.seed,
                "parents": {role: parent.key for role, parent in self.parents.items()},
            }
        )


class Store:
    """The folder of one run."""

    def __init__(self, root: Path):
        self.root = root

    def path(self, stage: Stage) -> Path:
        """Return the stage's folder."""
        return self.root / stage.folder

    def is_done(self, stage: Stage) -> bool:
        """Return whether the folder holds this very stage, finished.

        Raises:
            UserError: it holds another one, finished or begun (settings or files have changed since); or it was made of a parent
                that was made anew since.
        """
        manifest = self.manifest(stage)
        record = manifest or self._started(stage)
        if record is not None and record["key"] != stage.key:
            verb = "made" if manifest is not None else "begun"
            raise UserError(
                f"{self.path(stage)}: {verb} with other settings, data or parents than this recipe's "
                f"({changes(record.get('settings'), stage.settings)}); take the change back, "
                "choose another --out, or delete the folder, and those of later stages, to make them again."
            )
        if manifest is not None:
            self._check_parents(stage, manifest)
        return manifest is not None

    def _check_parents(self, stage: Stage, manifest: Mapping[str, Any]) -> None:
        """Refuse a finished stage whose parent lies there with other contents than it was made of.

        A key says what a stage was told to do, and not what came of it: corrected labels have the key of the wrong ones.
        """
        for role, parent in stage.parents.items():
            read = manifest["parents"][role].get("contents")  # none: of a run that was made before this was noted
            now = self.manifest(parent)
            if read is not None and now is not None and read != contents_of(now):
                raise UserError(
                    f"{self.path(stage)}: was made of another {self.path(parent)} than lies there now, which was made again since; "
                    "delete the folder, and those of later stages, and the same command makes them again."
                )

    def manifest(self, stage: Stage) -> dict[str, Any] | None:
        """Return the stage's manifest, or None if it is not done.

        Raises:
            UserError: it is damaged.
        """
        return read_record(self.path(stage) / MANIFEST)

    def _started(self, stage: Stage) -> dict[str, Any] | None:
        """Return what the stage noted when it began, or None if it has not begun, or is done."""
        return read_record(self.path(stage) / STARTED)

    def check_files(self, stages: Iterable[Stage]) -> Check:
        """Compare the files of finished stages with the digests of their manifests, but for metrics, which no stage reads.

        A file that this process wrote or compared before is not read again while its size and time of change stay.
        """
        recorded: dict[str, str] = {}
        current: dict[str, str | None] = {}
        for stage in stages:
            manifest = self.manifest(stage)
            for entry in manifest["files"] if manifest is not None else ():
                if entry["path"] != METRICS and Path(entry["path"]).name not in PASSING:
                    path = self.path(stage) / entry["path"]
                    recorded[str(path)] = entry["sha256"]
                    current[str(path)] = known_digest(path) if path.is_file() else None
        return finished_files_unchanged(recorded, current)

    def missing_files(self, stages: Iterable[Stage]) -> list[str]:
        """List files of finished stages that are gone or have another size now; their contents are not read.

        A model's metrics are left out, which no stage reads, and so is what `rlhf clean` may have freed.
        """
        missing = []
        for stage in stages:
            for entry in (self.manifest(stage) or {}).get("files", []):
                path = self.path(stage) / entry["path"]
                is_passing = entry["path"] == METRICS or path.name in PASSING
                if not is_passing and not (path.is_file() and path.stat().st_size == entry["size"]):
                    missing.append(str(path))
        return missing

    def other_versions(self, stages: Iterable[Stage]) -> str | None:
        """Say which stages were made or begun with other versions than those that are installed, or return None."""
        now, folders = versions(), []
        changes: dict[str, str] = {}
        for stage in stages:
            before = (self.manifest(stage) or self._started(stage) or {}).get("versions", {})
            differing = {
                name: f"{name} {before[name]} → {now[name]}" for name in now if before.get(name, now[name]) != now[name]
            }
            folders += [stage.folder] if differing else []
            changes |= differing
        if not folders:
            return None
        return (
            f"{', '.join(folders)}: made with other versions ({', '.join(changes.values())}). What is done stays as it is; what is "
            "made from now on may differ in its last digits from a run with one set of versions. For the same bits install those."
        )

    def open(self, stage: Stage) -> Path:
        """Open a stage for writing: empty its folder, but for checkpoints and metrics of an earlier attempt at this very stage.

        What an earlier attempt left goes too where a parent was made anew since, with other contents.

        Returns:
            the folder.
        """
        folder = self.path(stage)
        started = self._started(stage)
        if folder.exists():
            keep = {STARTED, CHECKPOINTS, METRICS} if started is not None and self._is_of(started, stage) else set()
            for entry in folder.iterdir():
                if entry.name not in keep:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "key": stage.key,
            "stage": stage.name,
            "settings": dict(stage.settings),
            "parents": {role: self._as_parent(parent) for role, parent in stage.parents.items()},
            "versions": versions(),
        }
        write_text(folder / STARTED, json.dumps(sealed(record)))
        return folder

    def is_begun_of_others(self, stage: Stage) -> bool:
        """Return whether an earlier attempt at a stage began with other contents of its parents than lie there now."""
        started = self._started(stage)
        return started is not None and started["key"] == stage.key and not self._is_of(started, stage)

    def _is_of(self, started: Mapping[str, Any], stage: Stage) -> bool:
        """Return whether what a stage noted when it began is of this stage, and of its parents as they are."""
        if started["key"] != stage.key:
            return False
        for role, parent in stage.parents.items():
            read = started.get("parents", {}).get(role, {}).get("contents")  # none: begun before this was noted
            now = self.manifest(parent)
            if read is not None and now is not None and read != contents_of(now):
                return False
        return True

    def seconds_kept(self, stage: Stage) -> float:
        """Return how long earlier attempts at an open stage worked on what lies in its checkpoints.

        The time is noted at every checkpoint, so SIGKILL loses at most the seconds after the last one; that work is done
        again and counted then. The sum is about what the stage would have taken without the interruption.
        """
        return sum(read_seconds(file.parent) for file in self.path(stage).rglob(SECONDS))

    def wait_until_open(self, stage: Stage) -> Path:
        """Wait until the first process of a distributed run has opened the stage, and return its folder."""
        while (started := self._started(stage)) is None or not self._is_of(started, stage):
            time.sleep(POLL_SECONDS)
        return self.path(stage)

    def wait_until_done(self, stage: Stage) -> None:
        """Wait until the first process of a distributed run has finished the stage; if it fails, the launcher ends all of them."""
        while not self.is_done(stage):
            time.sleep(POLL_SECONDS)

    def finish(self, stage: Stage, facts: Mapping[str, object], seconds: float) -> None:
        """Write the manifest, then remove what only an unfinished stage needs: killed in between, it has lost nothing.

        Args:
            seconds: that the stage took, with those of earlier attempts that it went on from (`seconds_kept`).
        """
        folder = self.path(stage)
        share_weights(folder)
        manifest = {
            "stage": stage.name,
            "key": stage.key,
            "seed": stage.seed,
            "settings": dict(stage.settings),
            "parents": {role: self._as_parent(parent) for role, parent in stage.parents.items()},
            "facts": dict(facts),
            "seconds": round(seconds, 3),
            "files": list_files(folder),
            "versions": versions(),
            "code": code_state(),
        }
        write_text(folder / MANIFEST, json.dumps(sealed(manifest), indent=1))
        (folder / STARTED).unlink(missing_ok=True)
        if (folder / CHECKPOINTS / EVENTS).is_dir():
            (folder / CHECKPOINTS / EVENTS).replace(folder / "tensorboard")
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)

    def _as_parent(self, parent: Stage) -> dict[str, str]:
        """Return what a manifest notes of a stage that was read: its folder, its key and what was in it."""
        manifest = self.manifest(parent)
        contents = {} if manifest is None else {"contents": contents_of(manifest)}
        return {"folder": parent.folder, "key": parent.key, **contents}

    def lock(self) -> FileLock:
        """Lock the folder against a second run.

        Raises:
            UserError: another process holds it, or nobody can write there.
        """
        lock = FileLock(self.root / LOCK)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{self.root}: another run is at work in this folder; wait for it, or choose another --out."
            ) from None
        except OSError as error:
            raise UserError(f"{self.root}: can't be written to ({error.strerror}); choose another --out.") from error
        return lock


def contents_of(manifest: Mapping[str, Any]) -> str:
    """Return the digest of the weights and rows that a finished stage left; other files may name folders, metrics hold times."""
    return digest(
        [
            (entry["path"], entry["sha256"])
            for entry in manifest["files"]
            if entry["path"].endswith(CONTENTS) and entry["path"] != METRICS
        ]
    )


def list_files(folder: Path) -> list[dict[str, Any]]:
    """List path, size and sha256 of every file that a stage leaves, but for model cards, which later stages write again."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in PASSING and path.relative_to(folder).parts[0] != CHECKPOINTS
    )
    return [{"path": str(p.relative_to(folder)), "size": p.stat().st_size, "sha256": known_digest(p)} for p in files]


def mark_checkpoint(folder: Path) -> None:
    """Declare a checkpoint whole: its files are flushed to disk, and the mark, which holds their digests, is written last.

    The digests cost one more reading of what was just written, out of memory: 0.7 to 1.5 GB a second with sha256.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARK]
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    write_text(folder / MARK, json.dumps({str(p.relative_to(folder)): file_digest(p) for p in files}))


def write_seconds(folder: Path, seconds: float) -> None:
    """Note beside checkpoints how long the work that they hold has taken, over all attempts."""
    write_text(folder / SECONDS, json.dumps(round(seconds, 3)))


def read_seconds(folder: Path) -> float:
    """Return what was noted beside checkpoints; 0 where nothing was, or nothing that can be read."""
    try:
        return float(json.loads((folder / SECONDS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return 0.0


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """Find the newest checkpoint whose mark is there and whose files have the digests that the mark names.

    Returns:
        the checkpoint or None, and the newer ones whose writing was cut off or whose files were damaged since.
    """
    broken: list[Path] = []
    for candidate in checkpoints_of(folder):
        if is_whole(candidate):
            return candidate, broken
        broken.append(candidate)
    return None, broken


def checkpoints_of(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, whole or not, the newest first."""
    named = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(named, key=lambda path: -int(path.name.rpartition("-")[2]))


def free_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of one model of several in a stage, which is trained and saved; the time it took stays noted."""
    for path in checkpoints_of(folder / CHECKPOINTS):
        shutil.rmtree(path)


def is_whole(folder: Path) -> bool:
    """Return whether a marked folder, a checkpoint for one, holds what it held when it was marked."""
    try:
        digests: dict[str, str] = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return len(digests) > 0 and all(file_digest(folder / name) == digests[name] for name in digests)
    except (OSError, ValueError, TypeError):  # no mark, a damaged one, a missing file
        return False


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    return {"python": platform.python_version()} | {name: version_of(name) for name in PACKAGES}


def code_state() -> str | None:
    """Return the commit that this package was run from, with "-dirty" for uncommitted changes; None outside a checkout."""
    package = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=package,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    in_checkout = result.returncode == 0 and "site-packages" not in str(package)
    return result.stdout.strip() if in_checkout else None
