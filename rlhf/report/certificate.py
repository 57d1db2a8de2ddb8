"""Tables of `rlhf certify` and `rlhf verify` at the terminal."""

from rich.markup import escape
from rich.table import Table

from rlhf.report.records import Facts


def certificate_table(certificate: Facts) -> Table:
    """Build the table of a certificate: one row a golden text."""
    table = Table(title=f"golden texts, scored in {certificate['computed_in']}; weights in {certificate['dtype']}")
    table.add_column("text")
    for heading in ("turns", "tokens", "score"):
        table.add_column(heading, justify="right")
    table.add_column("it ends in")
    for text in certificate["golden"]:
        score, end = f"{text['score']:.4f}", escape(repr(text["text"][-24:]))
        table.add_row(text["name"], str(len(text["messages"])), str(len(text["ids"])), score, end)
    return table


def certificate_lines(certificate: Facts) -> list[str]:
    """Return what the table leaves out: texts that the model can't read, and how far a correct server may be off."""
    lines = [f"left out: {name}: {reason}" for name, reason in certificate["left_out"].items()]
    allowed = ", ".join(f"{value:.2g} in {dtype}" for dtype, value in certificate["tolerance"].items())
    return [*lines, f"A correct server may be off by {allowed} (root mean square)."]


def verdict_table(verdict: Facts) -> Table:
    """Build the table of what a server said: one row a form, with how far it lies from the model's scores."""
    allowed = verdict["tolerance"][verdict["dtype"]]
    table = Table(
        title=f"{verdict['kind']}: differences from {verdict['against']}; allowed {allowed:.2g} in {verdict['dtype']}"
    )
    table.add_column("asked")
    for heading in ("texts", "alone,\nrms", "alone,\nlargest", "together,\nrms", "together,\nlargest"):
        table.add_column(heading, justify="right")
    table.add_column("what is wrong")
    for form in verdict["forms"]:
        figures = [form[f"{size}_{way}"] for way in ("alone", "together") for size in ("difference", "largest")]
        cells = ["-" if figure is None else f"{figure:.2e}" for figure in figures]
        wrong = [fault["fault"] for fault in verdict["faults"] if fault["form"] == form["form"]]
        shown = f"[red]{', '.join(wrong)}[/]" if wrong else "[green]nothing[/]"
        table.add_row(form["form"], str(len(form["texts"])), *cells, shown)
    return table
