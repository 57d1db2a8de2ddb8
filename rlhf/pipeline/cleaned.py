"""`cleaned.jsonl` of an audit: the audited file again, its own rows and columns, without what is suspicious."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from rlhf.data.lines import own_lines
from rlhf.data.rows import Pair
from rlhf.data.sources import Row, Source


def write_cleaned(
    file: Path, source: Source, rows: Sequence[Row[Pair]], suspicious: Sequence[Row[Pair]]
) -> dict[str, int]:
    """Write the rows of a source whose pairs are all kept, each as it stands there; in .jsonl files byte for byte.

    A row that holds several pairs, or a prompt whose rows are compared with one another, may lose some of them only: in its
    place stand the pairs that are left, as canonical rows. Rows that hold no usable pair are left out.

    Args:
        rows: the source's pairs, each with the number of the row that it was read from.
        suspicious: those of them that are not to be kept.

    Returns:
        `rows` kept as they were, `pairs` written in place of rows that lost some, `left_out` rows of the others.
    """
    # 1. Which rows lose a pair, and what is left of them.
    suspicious_ids = {id(row) for row in suspicious}
    used = {number for row in rows for number in (row.number, *row.others)}
    touched = {number for row in suspicious for number in (row.number, *row.others)}
    left: dict[int, list[Pair]] = {}
    for row in rows:
        if row.number in touched and id(row) not in suspicious_ids:
            left.setdefault(row.number, []).append(row.values)

    # 2. The file again.
    beside = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    kept, total = 0, 0
    with beside.open("wb") as cleaned:
        for number, line in own_lines(source):
            total += 1
            if number in touched:
                cleaned.writelines(
                    json.dumps(pair, ensure_ascii=False).encode() + b"\n" for pair in left.get(number, ())
                )
            elif number in used:
                kept += 1
                cleaned.write(line)
    os.replace(beside, file)
    return {"rows": kept, "pairs": sum(map(len, left.values())), "left_out": total - kept - len(left)}
