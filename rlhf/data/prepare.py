"""Read what a recipe names, split it by prompt, and write the five files that the stages read."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.canonical import demonstration, pair, prompt_only
from rlhf.data.read import BadRow, ReadReport, is_local, read_rows
from rlhf.errors import UserError

FILES = ("sft", "pairs", "test_pairs", "prompts", "test_prompts")


@dataclass(frozen=True)
class DataSources:
    """What to read; `prompts`, `test` and `test_prompts` may be absent."""

    preferences: str
    sft: str | None = None
    prompts: str | None = None
    test: str | None = None
    test_prompts: str | None = None
    test_fraction: float = 0.1
    max_sft: int | None = None
    max_pairs: int | None = None
    max_prompts: int | None = None


def prepare_data(folder: Path, sources: DataSources, *, seed: int) -> dict[str, Any]:
    """Write `sft.jsonl`, `pairs.jsonl`, `test_pairs.jsonl`, `prompts.jsonl` and `test_prompts.jsonl`.

    Splits are by prompt: all rows of one prompt lie on one side. Rows that say `split: test` are test rows; without
    such rows and without `data.test`, a share `test_fraction` of the prompts is held out. No prompt of the test side
    is practised on in SFT, reward training or PPO.

    Returns:
        rows written by file, and what every reader kept and dropped.

    Raises:
        UserError: a source holds nothing that can be used.
    """
    reports: list[ReadReport] = []

    # 1. Pairs, and which prompts are held out.
    pairs, marked_pairs = _read(sources.preferences, pair, reports, "pairs")
    if sources.test is not None:
        test_pairs, _ = _read(sources.test, pair, reports, "pairs", split="test")
        marked_pairs = []
    elif not marked_pairs and not is_local(sources.preferences):
        test_pairs, _ = _read(sources.preferences, pair, reports, "pairs", split="test")
    else:
        test_pairs = marked_pairs
    if not test_pairs:
        test_pairs = [row for row in pairs if _is_held_out(row, sources.test_fraction, seed)]
    test_keys = {prompt_key(row["prompt"]) for row in test_pairs}
    pairs = _without(pairs, test_keys, reports[0], "held out: its prompt is on the test side")
    pairs = _deduplicated(pairs, reports[0])

    # 2. Prompts: their own file, or those of the pairs.
    if sources.prompts is not None:
        prompts, marked = _read(sources.prompts, prompt_only, reports, "prompts")
    else:
        prompts, marked = [{"prompt": row["prompt"]} for row in pairs], []
    if sources.test_prompts is not None:
        test_prompts, _ = _read(sources.test_prompts, prompt_only, reports, "prompts")
    elif marked:
        test_prompts = marked
    elif sources.prompts is not None:
        test_prompts = [row for row in prompts if _is_held_out(row, sources.test_fraction, seed)]
    else:
        test_prompts = [{"prompt": row["prompt"]} for row in test_pairs]
    test_prompts = _unique(test_prompts)
    test_keys |= {prompt_key(row["prompt"]) for row in test_prompts}
    prompts = _unique([row for row in prompts if prompt_key(row["prompt"]) not in test_keys])
    pairs = _without(pairs, test_keys, reports[0], "held out: its prompt is on the test side")

    # 3. Demonstrations.
    sft: list[dict[str, Any]] = []
    if sources.sft is not None:
        sft, marked_sft = _read(sources.sft, demonstration, reports, "demonstrations")
        sft = _without(sft + marked_sft, test_keys, reports[-1], "held out: its prompt is on the test side")

    # 4. Caps, by a seeded draw, and files.
    rng = random.Random(seed)
    written = {
        "sft": _capped(sft, sources.max_sft, rng),
        "pairs": _capped(pairs, sources.max_pairs, rng),
        "test_pairs": test_pairs,
        "prompts": _capped(prompts, sources.max_prompts, rng),
        "test_prompts": test_prompts,
    }
    if sources.sft is None:
        del written["sft"]
    empty = [name for name, rows in written.items() if not rows]
    if empty:
        details = [sentence for report in reports for sentence in report.sentences()]
        raise UserError([f"data: nothing is left for {', '.join(empty)}.", *details])
    _same_columns(written["pairs"])
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in written.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {
        "rows": {name: len(rows) for name, rows in written.items()},
        "read": [report.as_dict() for report in reports],
        "sentences": [sentence for report in reports for sentence in report.sentences()],
    }


def prompt_key(prompt: list[dict[str, str]]) -> str:
    """Prompts that differ in blanks and case only are one prompt."""
    text = "\x1f".join(f"{m['role']}\x1e{' '.join(m['content'].split()).casefold()}" for m in prompt)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(
    source: str,
    convert: Callable[[dict[str, Any]], dict[str, Any]],
    reports: list[ReadReport],
    what: str,
    *,
    split: str = "train",
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Canonical rows, and apart from them those that the file itself marks as test rows."""
    report = ReadReport(f"{source} ({what}{', test' if split == 'test' else ''})")
    kept: list[dict[str, Any]] = []
    marked: list[dict[str, Any]] = []
    for number, row in read_rows(source, report, split=split):
        try:
            canonical = convert(row)
        except BadRow as reason:
            report.drop(number, str(reason))
            continue
        report.kept += 1
        (marked if row.get("split") == "test" and split != "test" else kept).append(canonical)
    reports.append(report)
    return kept, marked


def _is_held_out(row: dict[str, Any], fraction: float, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed}:{prompt_key(row['prompt'])}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def _without(rows: list[dict[str, Any]], keys: set[str], report: ReadReport, reason: str) -> list[dict[str, Any]]:
    kept = [row for row in rows if prompt_key(row["prompt"]) not in keys]
    if len(kept) < len(rows):
        report.drop(None, reason, count=len(rows) - len(kept))
        report.kept -= len(rows) - len(kept)
    return kept


def _deduplicated(rows: list[dict[str, Any]], report: ReadReport) -> list[dict[str, Any]]:
    """Each pair once; a pair that stands in both orders is left out both times, for nobody knows which is right."""
    orders: dict[tuple[str, frozenset[str]], set[str]] = {}
    for row in rows:
        chosen, rejected = row["chosen"][0]["content"].strip(), row["rejected"][0]["content"].strip()
        orders.setdefault((prompt_key(row["prompt"]), frozenset((chosen, rejected))), set()).add(chosen)
    kept: list[dict[str, Any]] = []
    seen: set[tuple[str, frozenset[str]]] = set()
    duplicates = contradictions = 0
    for row in rows:
        answers = frozenset((row["chosen"][0]["content"].strip(), row["rejected"][0]["content"].strip()))
        key = (prompt_key(row["prompt"]), answers)
        if len(orders[key]) > 1:
            contradictions += 1
        elif key in seen:
            duplicates += 1
        else:
            seen.add(key)
            kept.append(row)
    for reason, count in (("stands in both orders", contradictions), ("repeats another pair", duplicates)):
        if count:
            report.drop(None, reason, count=count)
            report.kept -= count
    return kept


def _unique(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({prompt_key(row["prompt"]): row for row in reversed(rows)}.values())[::-1]


def _capped(rows: list[dict[str, Any]], most: int | None, rng: random.Random) -> list[dict[str, Any]]:
    if most is None or len(rows) <= most:
        return rows
    chosen = sorted(rng.sample(range(len(rows)), most))
    return [rows[index] for index in chosen]


def _same_columns(rows: list[dict[str, Any]]) -> None:
    """A column that only some pairs have can't be trained on; nothing is filled in."""
    columns = {name for row in rows for name in row} & {"margin", "confidence", "weight"}
    problems = [
        f"data.preferences: {missing} of {len(rows)} pairs have no {name!r}; give it to all or to none."
        for name in sorted(columns)
        if (missing := sum(name not in row for row in rows))
    ]
    if problems:
        raise UserError(problems)
