"""Where a model came from, read from manifests alone."""

from collections.abc import Mapping
from pathlib import Path

from rich.tree import Tree

from rlhf.errors import UserError
from rlhf.report.records import Manifest, read_manifests


def lineage(run: Path, stage: str | None = None) -> Tree:
    """Draw a tree from a stage down to the data, each stage with its key, seed, code, versions and what it read.

    Args:
        stage: folder within the run, "round-1/ppo"; by default the last stage that is done.

    Raises:
        UserError: the folder holds no run, or no such stage is done in it.
    """
    done = read_manifests(run)
    if not done:
        raise UserError(f"{run}: no finished stage; this folder holds no run.")
    if stage is not None and stage not in done:
        raise UserError(f"{run}: no finished stage {stage!r}; there are {', '.join(done)}.")
    return _branch(done, stage or list(done)[-1], None, set())


def _branch(done: Mapping[str, Manifest], folder: str, role: str | None, drawn: set[str]) -> Tree:
    """Draw one stage and, under it, its parents; of one that was deleted since, or is drawn above, no more than its name.

    Args:
        drawn: the stages that are drawn already; takes up this one and those under it.
    """
    if folder in drawn:
        return Tree(f"{role}: [bold]{folder}[/bold]  as above")
    drawn.add(folder)
    if folder not in done:
        return Tree(f"{role}: [bold]{folder}[/bold]  not there any more")
    manifest = done[folder]
    versions = manifest["versions"]
    made_with = (
        f"trl {versions['trl']}, torch {versions['torch']}, code {manifest['code'] or versions['rlhf-pipeline']}"
    )
    label = f"[bold]{folder}[/bold]  key {manifest['key'][:12]}  seed {manifest['seed']}  {manifest['seconds']:.0f} s  {made_with}"
    tree = Tree(f"{role}: {label}" if role else label)
    for read in manifest["facts"].get("read", []):
        tree.add(f"{read['source']}: {read['kept']} of {read['rows']} rows")
    for name, parent in manifest["parents"].items():
        tree.add(_branch(done, parent["folder"], name, drawn))
    return tree
