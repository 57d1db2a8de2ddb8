"""Where a model came from, read from manifests alone."""

from pathlib import Path

from rich.tree import Tree

from rlhf.errors import UserError
from rlhf.pipeline.store import MANIFEST, read_record


def lineage(run: Path, stage: str | None = None) -> Tree:
    """Draw a tree from a stage down to the data, each stage with its key, seed, code, versions and what it read.

    Args:
        stage: folder within the run, "round-1/ppo"; by default the last stage that is done.

    Raises:
        UserError: the folder holds no run, or no such stage is done in it.
    """
    done = sorted(
        (path.parent for path in run.glob(f"round-*/*/{MANIFEST}")), key=lambda p: (p / MANIFEST).stat().st_mtime
    )
    if not done:
        raise UserError(f"{run}: no finished stage; this folder holds no run.")
    names = [str(path.relative_to(run)) for path in done]
    if stage is not None and stage not in names:
        raise UserError(f"{run}: no finished stage {stage!r}; there are {', '.join(names)}.")
    return _branch(run, stage or names[-1], None)


def _branch(run: Path, folder: str, role: str | None) -> Tree:
    """Draw one stage and, under it, its parents."""
    manifest = read_record(run / folder / MANIFEST)
    assert manifest is not None, "a stage that was read is done"
    versions = manifest["versions"]
    made_with = (
        f"trl {versions['trl']}, torch {versions['torch']}, code {manifest['code'] or versions['rlhf-pipeline']}"
    )
    label = f"[bold]{folder}[/bold]  key {manifest['key'][:12]}  seed {manifest['seed']}  {manifest['seconds']:.0f} s  {made_with}"
    tree = Tree(f"{role}: {label}" if role else label)
    for read in manifest["facts"].get("read", []):
        tree.add(f"{read['source']}: {read['kept']} of {read['rows']} rows")
    for name, parent in manifest["parents"].items():
        tree.add(_branch(run, parent["folder"], name))
    return tree
