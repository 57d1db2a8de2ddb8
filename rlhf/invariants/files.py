"""Finished files unchanged: do the files of finished stages still hold what was written when the stages were done?"""

from collections.abc import Mapping

from rlhf.invariants.checks import Check

SHOWN = 5


def finished_files_unchanged(recorded: Mapping[str, str], current: Mapping[str, str | None]) -> Check:
    """Compare the digests of a manifest with those of the files that lie there now.

    The bound is 0: a digest is equal or it is not, and nothing of this package writes into a finished stage but model cards
    (`README.md`), which no manifest lists.

    Args:
        recorded: path → sha256, as written when the stage was done.
        current: path → sha256 of today; None for a file that is not there.
    """
    missing = [path for path in recorded if current.get(path) is None]
    replaced = [path for path in recorded if path not in missing and current[path] != recorded[path]]
    phrases = [f"{path} is not there any more" for path in missing] + [f"{path} has changed" for path in replaced]
    more = f", and {len(phrases) - SHOWN} more" if len(phrases) > SHOWN else ""
    return Check(
        name="finished files unchanged",
        statistic=float(len(phrases)),
        bound=0.0,
        unit="files",
        sentence=f"Since their stage was done: {', '.join(phrases[:SHOWN])}{more}. What follows would be made of something else. "
        "Put the old files back, or delete the stage's folder and those after it to make them again.",
    )
