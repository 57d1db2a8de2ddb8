"""The columns of numbers that a loss reads, and the values that each may have."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf, isfinite
from typing import Any

from datasets import Dataset, IterableDataset

from rlhf.errors import UserError
from rlhf.recipe.objectives import PAIR_COLUMNS

RANGES = {
    "confidence": (0.0, 1.0), "weight": (0.0, inf), "flip_rate": (0.0, 1.0),
    "strength_std": (0.0, inf), "strength_share": (0.0, 1.0), "strength_votes": (1, inf),
}  # fmt: skip


def named_datasets(
    train_dataset: Dataset | None = None, eval_dataset: Dataset | Mapping[str, Dataset] | None = None, **_: Any
) -> Iterator[tuple[str, Dataset]]:
    """Yield a trainer's datasets, each with what a row of it is called."""
    if train_dataset is not None:
        yield "row", train_dataset
    several = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    yield from (("evaluation row", dataset) for dataset in several if dataset is not None)


def check_columns(
    dataset: Dataset, required: Sequence[str] = (), *, columns: Iterable[str] = PAIR_COLUMNS, rows: str = "row"
) -> None:
    """Refuse missing columns and values outside their range, all at once, before anything is trained.

    Args:
        required: columns of numbers that must be there.
        columns: those that may be.
        rows: what a row is called.

    Raises:
        UserError: naming column, first bad row and value.
    """
    problems = [
        f"reward: the dataset has no column {name!r}, which this objective needs."
        for name in required
        if name not in dataset.column_names
    ]
    for name in dict.fromkeys((*columns, *required)):
        if name not in dataset.column_names:
            continue
        low, high = RANGES.get(name, (-inf, inf))
        values = dataset[name]
        if name == "weight" and isinstance(dataset, Dataset) and len(values) and not any(values):
            problems.append(f"reward: column 'weight' is 0 in all {len(values)} {rows}s, so nothing would be learnt.")
        for row, value in enumerate(values):
            if not isinstance(value, int | float) or not isfinite(value) or not low <= value <= high:
                problems.append(
                    f"reward: {rows} {row}, column {name!r}: {value!r} is not a finite number in [{low}, {high}]."
                )
                break
    if problems:
        raise UserError(problems)


def warn_of_weightless(dataset: Dataset | IterableDataset, rows: str) -> None:
    """Say how many rows of a dataset have weight 0: they are read and teach nothing. Nothing is counted of a stream.

    Args:
        rows: what a row is called.
    """
    if isinstance(dataset, Dataset) and "weight" in dataset.column_names:
        weightless = sum(weight == 0 for weight in dataset["weight"])
        if weightless:
            warnings.warn(
                f"reward: {weightless} of {len(dataset)} {rows}s have weight 0; they are read and teach nothing.",
                stacklevel=3,
            )
