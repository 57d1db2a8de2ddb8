"""In which order rows are written: whoever reads the first ones of a file reads of all sources and topics."""

import random
from collections.abc import Sequence

from rlhf.data.sources import Canonical, Row, share_of_text


def in_drawn_order(rows: Sequence[Row[Canonical]], name: str, seed: int) -> list[Row[Canonical]]:
    """Return rows in an order drawn at random; of the test side always in the same one, whatever is trained on and by which seed.

    So runs that differ in these are evaluated on the same prompts, and more test rows leave the others' order as it was.
    """
    if name.startswith("test_"):
        return sorted(rows, key=lambda row: share_of_text(row.key, f"order of {name}"))
    return random.Random(f"order of {name} {seed}").sample(rows, len(rows))
