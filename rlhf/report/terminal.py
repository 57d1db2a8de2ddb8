"""What a finished run says at the terminal."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf.report.rounds import known_columns, last_judged


def show_summary(out: Path, output: Console) -> None:
    """Print the run in numbers."""
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    last = last_judged(summary)
    table = Table(title=f"{summary['recipe']}, seed {summary['seed']}")
    table.add_column("")
    for heading in ("SFT", "policy", "best of 16\nby reward", "best of 16\nby gold"):
        table.add_column(heading, justify="right")

    sections = (summary["sft"], last["policy"], summary["best_of_16"]["by_reward"], summary["best_of_16"]["by_gold"])
    for name, label in (
        ("gold", "true reward"),
        ("proxy", "reward model"),
        ("kl", "KL to SFT, nats"),
        ("win_rate", "win rate vs SFT"),
    ):
        cells = [_cell(section, name) for section in sections]
        if any(text != "-" for text in cells):
            table.add_row(label, *cells)
    if table.row_count:
        output.print(table)
    if len(summary["rounds"]) > 1:
        output.print(_rounds_table(summary))
    if summary["gold_gap_closed"] is not None:
        output.print(f"gold gap closed: {summary['gold_gap_closed']:.3f}", markup=False)
    total = sum(summary["seconds"].values())
    output.print(f"{out / 'report.html'}   {out / 'summary.json'}   {total:.0f} s", markup=False, soft_wrap=True)


def _rounds_table(summary: dict[str, Any]) -> Table:
    rows = []
    for entry in summary["rounds"]:
        change, policy, fresh = entry["change_in_gold"], entry["policy"], entry["labels"]["fresh"]
        rows.append(
            {
                "round": str(entry["round"]),
                "labels": "-" if fresh is None else str(fresh),
                "reward accuracy": _cell(entry["reward"], "accuracy"),
                "true reward": _cell(policy, "gold"),
                "change": f"{change['difference']:+.3f}" if change else "-",
                "in hindsight": "-" if policy["gold"] is not None else _cell(entry["hindsight"] or {}, "win_rate"),
                "KL": _cell(policy, "kl"),
                "win rate": _cell(policy, "win_rate"),
            }
        )
    rows = known_columns(rows)
    table = Table(title=f"{len(summary['rounds'])} rounds, the best is {summary['best_round']}")
    for heading in rows[0]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row.values())
    return table


def estimates_table(name: str, stages: Sequence[Any]) -> Table:
    """What a recipe's stages will cost (`rlhf.cost.estimate.Estimate`), and all of them together."""
    table = Table(title=f"{name}: estimates")
    table.add_column("stage")
    for heading in ("rows", "tokens", "steps", "memory, GiB", "time"):
        table.add_column(heading, justify="right")
    for stage in stages:
        numbers = (f"{stage.rows:,}", f"{stage.tokens:,}", f"{stage.steps:,}", f"{stage.bytes / 2**30:.1f}")
        table.add_row(stage.folder, *numbers, _duration(stage.seconds))
    table.add_section()
    peak = max(stage.bytes for stage in stages) / 2**30
    total = sum(stage.seconds for stage in stages)
    table.add_row("all", "", "", "", f"{peak:.1f}", _duration(total))
    return table


def _duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a person says it.

    >>> _duration(41.6), _duration(200), _duration(9000)
    ('42 s', '3.3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _cell(section: dict[str, Any], name: str) -> str:
    value, interval = section.get(name), section.get(f"{name}_ci")
    if value is None:
        return "-"
    return f"{value:.2f}" + (f" ±{(interval[1] - interval[0]) / 2:.2f}" if interval else "")
