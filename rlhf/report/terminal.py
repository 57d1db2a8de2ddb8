"""Tables and sentences at the terminal: a finished run, an estimate, the doctor's checks."""

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf.progress import duration
from rlhf.report.annotators import annotator_sentences
from rlhf.report.change import GOLD, SCORE, change_sentence
from rlhf.report.checks import checks_line
from rlhf.report.meter import meter_sentences
from rlhf.report.noise import suspects, wanted, worth, wrong_labels
from rlhf.report.records import Facts, Summary, read_summary, start_name
from rlhf.report.rounds import known_columns, last_evaluated, number


def show_summary(out: Path, output: Console) -> None:
    """Print the run in numbers."""
    summary = read_summary(out)
    last, start = last_evaluated(summary), start_name(summary)
    best = summary["best_of_16"]
    sections = {
        start.removeprefix("the "): summary["sft"],
        "policy": last["policy"],
        "best of 16\nby reward": best["by_reward"],
        "best of 16\nby gold": best["by_gold"],
    }
    names = {
        "gold": "true reward",
        "proxy": "reward model",
        "kl": f"KL to {start}, nats",
        "win_rate": f"win rate vs {start}",
    }
    rows = [
        {"": label, **{heading: number(section, name) for heading, section in sections.items()}}
        for name, label in names.items()
    ]
    rows = [row for row in rows if set(row.values()) != {row[""], "-"}]
    if rows:
        rows = known_columns(rows)
        table = Table(title=f"{summary['recipe']}, seed {summary['seed']}")
        for heading in rows[0]:
            table.add_column(heading, justify="right" if heading else "left")
        for row in rows:
            table.add_row(*row.values())
        output.print(table)
    for subject, name in ((GOLD, "gold"), (SCORE, "proxy")):
        if last["policy"][name] is not None:
            sentence = change_sentence(subject, last["policy"], summary["sft"], name, start_name=start)
            output.print(sentence, markup=False, soft_wrap=True)
    if len(summary["rounds"]) > 1:
        output.print(_rounds_table(summary))
    if summary["gold_gap_closed"] is not None:
        interval = summary.get("gold_gap_closed_ci")
        span = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        output.print(f"gold gap closed: {summary['gold_gap_closed']:.3f}{span}", markup=False)
    line = checks_line(summary)
    if line is not None:
        output.print(line, markup=False)
    total = sum(summary["seconds"].values())
    output.print(f"{out / 'report.html'}   {out / 'summary.json'}   {total:.0f} s", markup=False, soft_wrap=True)


def _rounds_table(summary: Summary) -> Table:
    rows = []
    for entry in summary["rounds"]:
        change, policy, fresh = entry["change_in_gold"], entry["policy"], entry["labels"]["fresh"]
        rows.append(
            {
                "round": str(entry["round"]),
                "labels": "-" if fresh is None else str(fresh),
                "reward accuracy": number(entry["reward"], "accuracy"),
                "true reward": number(policy, "gold"),
                "change": f"{change['difference']:+.3f}" if change else "-",
                "in hindsight": "-" if policy["gold"] is not None else number(entry["hindsight"] or {}, "win_rate"),
                "KL": number(policy, "kl"),
                "win rate": number(policy, "win_rate"),
            }
        )
    rows = known_columns(rows)
    table = Table(title=f"{len(summary['rounds'])} rounds, the best is {summary['best_round']}")
    for heading in rows[0]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row.values())
    return table


class _Stage(Protocol):
    """A planned stage, as `rlhf.pipeline.store` knows it."""

    @property
    def folder(self) -> str: ...
    @property
    def parents(self) -> Mapping[str, "_Stage"]: ...


def plan_table(title: str, stages: Sequence[_Stage], done: Container[str]) -> Table:
    """Build the table of a dry run: what each stage reads, and whether its folder is among those that are done."""
    table = Table(title=title)
    for heading in ("stage", "reads", "state"):
        table.add_column(heading)
    for stage in stages:
        state = "done" if stage.folder in done else "to do"
        table.add_row(stage.folder, ", ".join(parent.folder for parent in stage.parents.values()) or "-", state)
    return table


class _Estimate(Protocol):
    """What a stage will cost, as `rlhf.cost.estimate` says it: memory in bytes at the peak, time in seconds."""

    @property
    def folder(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def bytes(self) -> float: ...
    @property
    def seconds(self) -> float: ...


def estimates_table(name: str, stages: Sequence[_Estimate]) -> Table:
    """Build the table of what a recipe's stages will cost, and all of them together."""
    table = Table(title=f"{name}: estimates")
    table.add_column("stage")
    for heading in ("rows", "tokens", "steps", "memory, GiB", "time"):
        table.add_column(heading, justify="right")
    for stage in stages:
        numbers = (f"{stage.rows:,}", f"{stage.tokens:,}", f"{stage.steps:,}", f"{stage.bytes / 2**30:.1f}")
        table.add_row(stage.folder, *numbers, duration(stage.seconds))
    table.add_section()
    peak = max(stage.bytes for stage in stages) / 2**30
    total = sum(stage.seconds for stage in stages)
    table.add_row("all", "", "", "", f"{peak:.1f}", duration(total))
    return table


class _Share(Protocol):
    """What a process holds of a role, in bytes, as `rlhf.cost.memory` says it."""

    @property
    def name(self) -> str: ...
    @property
    def weights(self) -> float: ...
    @property
    def gradients(self) -> float: ...
    @property
    def moments(self) -> float: ...


class _Memory(Protocol):
    """What a process holds at the peak of a stage."""

    @property
    def shares(self) -> Sequence[_Share]: ...
    @property
    def exchanged(self) -> float: ...
    @property
    def activations(self) -> float: ...
    @property
    def bytes(self) -> float: ...


class _StageMemory(Protocol):
    """A stage and its memory, as `rlhf.cost.estimate` says it."""

    @property
    def folder(self) -> str: ...
    @property
    def memory(self) -> _Memory: ...


DIVIDED = {
    "ddp": "Each process holds all weights, gradients and moments; exchanged: the copy of the gradients that is sent.",
    "fsdp2": "Weights, gradients and moments are divided. Not divided: activations with logits, and exchanged: layers, embeddings "
    "and head that are whole for now; in a rollout all weights.",
}


def memory_table(name: str, stages: Sequence[_StageMemory], *, processes: int, sharding: str) -> Table:
    """Build the table of what one process holds at the peak of each stage, by role, in GiB."""
    caption = f"{DIVIDED[sharding]} Gradients may come while activations go; then a peak has the larger of both."
    table = Table(
        title=f"{name}: memory of one of {processes} processes, {sharding}, GiB",
        caption=caption,
        caption_justify="left",
    )
    table.add_column("stage")
    table.add_column("role")
    for heading in ("weights", "gradients", "moments", "exchanged", "activations", "peak"):
        table.add_column(heading, justify="right")
    for stage in stages:
        memory = stage.memory
        for place, share in enumerate(memory.shares):
            held = (share.weights, share.gradients, share.moments)
            of_stage = (memory.exchanged, memory.activations, memory.bytes) if place == 0 else ()
            figures = (f"{value / 2**30:.2f}" for value in (*held, *of_stage))
            table.add_row("" if place else stage.folder, share.name, *figures)
    return table


class _Check(Protocol):
    """What was measured and how much is allowed, as `rlhf.invariants.checks` says it."""

    @property
    def name(self) -> str: ...
    @property
    def statistic(self) -> float: ...
    @property
    def low(self) -> float | None: ...
    @property
    def bound(self) -> float: ...
    @property
    def unit(self) -> str: ...
    @property
    def held(self) -> bool: ...


class _Finding(Protocol):
    """A check of one thing, as `rlhf.pipeline.doctor` makes it."""

    @property
    def subject(self) -> str: ...
    @property
    def check(self) -> _Check: ...


def findings_table(name: str, findings: Sequence[_Finding]) -> Table:
    """Build the table of `rlhf doctor`: one row a check."""
    held = sum(finding.check.held for finding in findings)
    caption = f"{held} of {len(findings)} checks hold."
    table = Table(
        title=f"{name}: what can be checked before anything is trained", caption=caption, caption_justify="left"
    )
    for heading in ("of", "check", "measured", "allowed", "unit", ""):
        table.add_column(heading, justify="right" if heading in ("measured", "allowed") else "left")
    before = None
    for finding in findings:
        check = finding.check
        subject = "" if finding.subject == before else finding.subject
        limits = f"{check.bound:.3g}" if check.low is None else f"{check.low:.3g} to {check.bound:.3g}"
        table.add_row(
            escape(subject),
            check.name,
            f"{check.statistic:.3g}",
            "any" if limits == "inf" else limits,
            check.unit,
            "[green]holds[/]" if check.held else "[red]FAILS[/]",
        )
        before = finding.subject
    return table


def audit_lines(result: Facts) -> list[str]:
    """Return what `rlhf audit` found, a sentence a line."""
    noise, suspicious = result["vote"], result["suspicious"]
    sentences = wrong_labels(noise)
    if noise["scale"] != 0:
        listed = suspects(noise, len(suspicious), by_annotator=result.get("by_annotator", False))
        first = ", ".join(map(str, suspicious[:10])) or "none"
        sentences.append(f"{listed} The first, as audit.json counts rows, from 0 at the file's first: {first}.")
    sentences += [*annotator_sentences(result["annotators"]), *worth(result), *wanted(result["wants"])]
    sentences += meter_sentences(result["meter"]) if "meter" in result else []
    return [f"{result['kept_pairs']} pairs.", *sentences]


def blame_lines(result: Facts, out: Path) -> list[str]:
    """Return what `rlhf blame` found, a sentence a line, and how to train without the pairs that it took out.

    Args:
        out: the folder with `rest.jsonl`.
    """
    span = " [{:.2f}, {:.2f}]".format(*result["slope_ci"]) if result["slope_ci"] else ""
    way = "rises" if result["slope"] > 0 else "falls"
    lines = [
        f"{result['stage']}: the score {way} by {abs(result['slope']):.2f} with a usual difference in {result['feature']} "
        f"(slope {result['slope']:.2f}{span}).",
        f"{result['removed']} pairs are taken out; of all that pulls it up they have {result['influence_of_removed']:.0%}. "
        "The strongest:"
        if result["pairs"][0]["influence"] > 0
        else f"No pair pulls it up; the {result['removed']} that pull it down least are taken out. The first:",
    ]
    for row in result["pairs"][:5]:
        prompt, chosen, rejected = (_short(row[name]) for name in ("prompt", "chosen", "rejected"))
        lines.append(f"  {row['influence']:+.4f}  {prompt}: {chosen} | not: {rejected}")
    # What was held out of the run's own files is a given test side now, and stands in its other files as before.
    data = f"data.preferences={out / 'rest.jsonl'} data.test={result['test_pairs']} data.leakage=drop"
    return [*lines, f"Again without them, and tested on the same pairs: rlhf run RECIPE {data}"]


def _short(text: str, length: int = 48) -> str:
    """Return the beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
