"""What a run's folder must hold of its finished stages."""

from collections.abc import Sequence
from pathlib import Path

from rlhf.errors import UserError
from rlhf.pipeline.plan import plan
from rlhf.pipeline.store import Stage, Store
from rlhf.recipe.schema import Recipe

NAMED_FILES = 3  # of those that are missing


def check_place(out: Path) -> None:
    """Refuse a place where no folder can be.

    Raises:
        UserError: it is a file, or can't be looked at.
    """
    try:
        out.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{out}: can't be a run's folder ({error.strerror}); choose another --out.") from error
    if not out.is_dir():
        raise UserError(f"{out}: a file, or a link that leads to no folder; choose another --out.")


def require_files(store: Store, stages: Sequence[Stage]) -> None:
    """Refuse a run of which files of finished stages were deleted or cut.

    Raises:
        UserError: naming some of them.
    """
    missing = store.missing_files(stages)
    if missing:
        more = f" and {len(missing) - NAMED_FILES} more" if len(missing) > NAMED_FILES else ""
        raise UserError(
            f"{store.root}: of finished stages, {', '.join(missing[:NAMED_FILES])}{more} are gone or were changed. Put the old "
            "files back, or delete the stage's folder and those after it to make them again."
        )


def require_data(recipe: Recipe, out: Path) -> None:
    """Refuse a folder where a recipe's data are not, or not whole.

    Raises:
        UserError: it is none; its data are not made, are those of other settings, or some of their files are gone.
    """
    check_place(out)
    store = Store(out)
    made = [stage for stage in plan(recipe) if stage.name in ("lab", "data")]
    missing = [store.path(stage) for stage in made if not store.is_done(stage)]
    if missing:
        raise UserError(f"{missing[-1]}: not there; run the recipe with `--until data` first, or leave --out away.")
    require_files(store, made)


def made_of_what_is_gone(store: Store, stages: Sequence[Stage]) -> str | None:
    """Say which finished stages were made of others that are not there any more, or return None."""
    done = {stage.folder: stage for stage in stages if store.manifest(stage) is not None}
    made_of = [(parent.folder, stage.folder) for stage in done.values() for parent in stage.parents.values()]
    lost = [(parent, child) for parent, child in made_of if parent not in done]
    if not lost:
        return None
    parents, children = (", ".join(sorted(set(folders))) for folders in zip(*lost, strict=True))
    return (
        f"{parents}: gone, and {children} made of it. It is made again; if that does not give the same bits (another machine, a "
        "GPU), the run ends behind it and asks to delete what was made of it."
    )
