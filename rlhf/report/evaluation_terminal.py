"""Tables and sentences of `rlhf evaluate` at the terminal."""

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from rlhf.report.records import Facts

# A subset of which a length rule gets this share says little about a model that is right there.
LENGTH_SOLVES = 0.9
LEAST_EFFECT = 0.01  # deviations; less is rounding, or of no use to anybody


def letters(models: Sequence[object]) -> list[str]:
    """Return a letter for each model, which stands for its long name: A, B, … Z, then A26, A27, …

    >>> letters(["x", "y"])
    ['A', 'B']
    """
    return [chr(ord("A") + i) if i < 26 else f"A{i}" for i in range(len(models))]


def evaluation_tables(result: Facts) -> list[Table]:
    """Build the tables of `rlhf evaluate`: all data, each benchmark's figures, the probes."""
    tables = [_overview(result)]
    tables += [
        _figures(name, report, result["models"]) for name, report in result["data"].items() if report["benchmark"]
    ]
    tables += [_probes(result["probes"])] if "probes" in result else []
    return tables


def evaluation_lines(result: Facts) -> list[str]:
    """Return what only some evaluations have, one sentence a line: models' names, rankings, differences, length rules, biases."""
    lines = []
    if len(result["models"]) > 1:
        lines += [
            f"{letter}: {model}" for letter, model in zip(letters(result["models"]), result["models"], strict=True)
        ]
    for name, report in result["data"].items():
        lines += [f"{name}: {line}" for line in _more(report, result["models"])]
    for letter, entry in zip(letters(result["models"]), result.get("probes", []), strict=False):
        who = f"{letter}: " if len(result["models"]) > 1 else ""
        lines.append(who + bias_sentence(entry))
    return lines


def bias_sentence(entry: Facts) -> str:
    """Say which probes move a model's score, in words."""
    known = {name: effect for name, effect in entry["effects"].items() if effect["effect"] is not None}
    moved = [
        name
        for name, effect in known.items()
        if effect["effect_ci"] and not _holds_zero(effect["effect_ci"]) and abs(effect["effect"]) >= LEAST_EFFECT
    ]
    if not known:
        return "Probes: all answers have the same score, so nothing can be said in its deviations."
    if all(effect["effect_ci"] is None for effect in known.values()):
        return "Probes: all answers are of one conversation, so nothing says whether an edit moves the score in others."
    if not moved:
        return f"Probes: none of {len(known)} edits moves the score beyond its interval, by {LEAST_EFFECT} deviations or more."
    said_of = [f"{name} {known[name]['effect']:+.2f}" for name in sorted(moved, key=lambda x: -abs(known[x]["effect"]))]
    return f"Probes: {len(moved)} of {len(known)} edits move the score, in deviations: {', '.join(said_of)}."


def _holds_zero(interval: Sequence[float]) -> bool:
    return interval[0] <= 0 <= interval[1]


def length_sentence(report: Facts) -> str | None:
    """Name the subsets that a length rule alone gets right, at least `LENGTH_SOLVES` of their pairs; None if there are none."""
    solved = []
    for name, group in report["by"].get("subset", {}).items():
        longer = group["length_baseline"]
        if max(longer, 1 - longer) >= LENGTH_SOLVES:
            rule = "longer" if longer > 0.5 else "shorter"
            solved.append(f'{name} ("{rule} wins" {max(longer, 1 - longer):.2f}, this model {group["accuracy"]:.2f})')
    return f"a length rule alone gets {', '.join(solved)}." if solved else None


def verdict_sentence(entry: Facts) -> str:
    """Say how a causal model's verdicts agree with the labels, and how much of them is the order of the answers."""
    difference = with_interval(entry["difference"], entry["difference_ci"], sign=True)
    unknown = f" {entry['too_long']} pairs are too long for it, and count as wrong." if entry["too_long"] else ""
    return (
        f"verdicts of {entry['model']}: accuracy {with_interval(entry['accuracy'], entry['accuracy_ci'])}, {difference} from the "
        f"first; {entry['turned']:.0%} of the verdicts turn with the order, A is said {entry['says_a']:.0%} of the time (mean bias "
        f"{entry['bias']:+.2f} nats); {entry['letter_share']:.0%} of its probability is on the letters.{unknown}"
    )


def with_interval(value: float, interval: Sequence[float] | None, *, sign: bool = False) -> str:
    """Return a number with its interval, where it has one.

    >>> with_interval(0.5, [0.4, 0.6]), with_interval(0.5, None)
    ('0.500 [0.40, 0.60]', '0.500')
    """
    if interval is None:
        return f"{value:+.3f}" if sign else f"{value:.3f}"
    low, high = interval
    return f"{value:+.3f} [{low:+.2f}, {high:+.2f}]" if sign else f"{value:.3f} [{low:.2f}, {high:.2f}]"


def _overview(result: Facts) -> Table:
    table = Table(title="95 % intervals over conversations; ties are wrong")
    several = len(result["models"]) > 1
    headings = (
        "data",
        *(("model",) if several else ()),
        "pairs",
        "accuracy",
        "95 %",
        *(("minus A",) if several else ()),
    )
    for heading in (*headings, "longer\nwins", "length-\ncontrolled", "ties", "ECE", "T"):
        table.add_column(heading, justify="left" if heading in ("data", "model") else "right")
    for name, report in result["data"].items():
        for letter, entry in zip(letters(report["models"]), report["models"], strict=True):
            low, high = entry["accuracy_ci"]
            controlled, temperature = entry["accuracy_length_controlled"], entry["temperature"]
            difference = "difference" in entry and with_interval(entry["difference"], entry["difference_ci"], sign=True)
            table.add_row(
                escape(name) if letter == "A" else "",
                *([letter] if several else []),
                str(report["n"]) if letter == "A" else "",
                f"{entry['accuracy']:.3f}",
                f"{low:.2f}-{high:.2f}",
                *([difference or ""] if several else []),
                f"{report['length_baseline']:.3f}" if letter == "A" else "",
                "-" if controlled is None else f"{controlled:.3f}",
                str(entry["ties"]),
                f"{entry['ece']:.3f}",
                "-" if temperature is None else f"{temperature:.2f}",
            )
    return table


def _figures(name: str, report: Facts, models: Sequence[str]) -> Table:
    """Build the table of a benchmark's figures, models beside each other, and what length rules get on the same rows."""
    table = Table(title=f"{escape(name)}: {report['benchmark']}, its own arithmetic")
    table.add_column("figure")
    for letter in letters(models):
        table.add_column(letter if len(models) > 1 else "score", justify="right")
        if letter != "A":
            table.add_column(f"{letter} minus A", justify="right")
    for heading in ("longer\nwins", "shorter\nwins", "prompts"):
        table.add_column(heading, justify="right")
    for figure, entry in report["figures"].items():
        cells = []
        for value in entry["models"]:
            cells.append(with_interval(value["value"], value["ci"]))
            if "difference" in value:
                cells.append(with_interval(value["difference"], value["difference_ci"], sign=True))
        table.add_row(figure, *cells, f"{entry['longer']:.3f}", f"{entry['shorter']:.3f}", str(entry["n"]))
    return table


def _probes(probes: Sequence[Facts]) -> Table:
    answers = probes[0]["answers"]
    table = Table(title=f"Probes: change of the score by an edit of {answers} answers, in deviations of the score")
    table.add_column("edit")
    for letter in letters(probes):
        table.add_column(letter if len(probes) > 1 else "effect", justify="right")
        table.add_column("rises", justify="right")
    for name in probes[0]["effects"]:
        cells = []
        for entry in probes:
            effect = entry["effects"][name]
            known = effect["effect"] is not None
            cells.append(with_interval(effect["effect"], effect["effect_ci"], sign=True) if known else "-")
            cells.append("-" if effect["higher"] is None else f"{effect['higher']:.0%}")
        table.add_row(name, *cells)
    return table


def _more(report: Facts, models: Sequence[str]) -> list[str]:
    """Return sentences about what only some data have: rankings, another model, subsets that a length rule gets."""
    lines = []
    if "rankings" in report:
        ranked = report["rankings"]
        tau = "-" if ranked["tau_b"] is None else f"{ranked['tau_b']:.3f}"
        lines.append(
            f"{ranked['prompts']} rankings: best of K chosen in {ranked['best_of_k']:.3f} (chance "
            f"{ranked['best_of_k_by_chance']:.3f}), Kendall tau-b {tau}."
        )
    for model, entry in zip(models, report["models"], strict=True):
        if "difference" in entry:
            difference = with_interval(entry["difference"], entry["difference_ci"], sign=True)
            lines.append(
                f"{model} has {entry['accuracy']:.3f}, {difference} from the first; p = {entry['p_value']:.2g} (paired, by prompt)."
            )
    if "verdicts" in report:
        lines.append(verdict_sentence(report["verdicts"]))
    sentence = length_sentence(report)
    return [*lines, sentence] if sentence else lines
