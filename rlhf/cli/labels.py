"""The verbs of data and labels: data, audit, blame, label, verdict."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf.cli.console import Columns, Compared, app, say, say_aside, say_link, source_of
from rlhf.recipe import load_recipe


@app.command("data")
def data_command(
    file: Annotated[
        str,
        typer.Argument(
            help="A file, a pattern, a folder or a hub dataset; or {source: …, split: …} as in a recipe.",
            metavar="FILE",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Show rows as this model reads them: a folder or hub id.", show_default=False)
    ] = None,
    columns: Columns = None,
    compare: Compared = None,
    out: Annotated[Path | None, typer.Option(help="Write canonical rows to this file.", show_default=False)] = None,
) -> None:
    """Show what a file of data is taken for: layout, direction of its labels, rows as a model reads them, what is left out."""
    source = source_of(file, columns)
    from rlhf.pipeline.describe import describe_data

    describe_data(source, model=model, out=out, say=say, compare_as=compare or "answers")


@app.command("audit")
def audit_command(
    pairs: Annotated[
        str,
        typer.Argument(help="Preferences: a file or hub dataset, or {source: …} as in a recipe.", show_default=False),
    ],
    *,
    model: Annotated[str, typer.Option(help="What the voters start from: a folder or hub id.", show_default=False)],
    out: Annotated[Path, typer.Option(help="A new folder.", show_default=False)],
    members: Annotated[
        int | None, typer.Option(help="Number of voters. [default: 10]", min=1, show_default=False)
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Its vote and reward sections say how voters are trained.", show_default=False)
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="How many pairs experts look at again: chosen here.", show_default=False)
    ] = None,
    expert_error: Annotated[
        float, typer.Option(help="How often an expert's verdict is wrong; read by --budget and --meter.")
    ] = 0.05,
    meter: Annotated[
        bool, typer.Option("--meter", help="Also say what more labels would bring; about twice the time.")
    ] = False,
    columns: Columns = None,
    compare: Compared = None,
) -> None:
    """Find wrong preference labels: the strength of every pair, suspicious rows, cleaned data, a page; a second look at some."""
    source = source_of(pairs, columns)
    from rlhf.pipeline.audit import audit
    from rlhf.report.second_look import second_look_sentences
    from rlhf.report.terminal import audit_lines

    settings = load_recipe(recipe) if recipe else None
    if budget is not None or meter:
        from rlhf.pipeline.second_look import check_expert_error

        check_expert_error(expert_error)  # before the vote, which takes hours
    result = audit(
        source,
        model,
        out,
        members=members,
        recipe=settings,
        say=say_aside,
        compare=compare,
        budget=budget,
        meter=meter,
        expert_error=expert_error,
    )
    if budget is not None:
        say("By labels and votes alone:")
    for line in audit_lines(result):
        say(line)
    if budget is not None:
        from rlhf.pipeline.second_look import RELABELLED, look_again

        compared = compare or ("answers" if settings is None else settings.data.compare)
        facts = look_again(
            source,
            model,
            out,
            budget=budget,
            expert_error=expert_error,
            compare=compared,
            seed=0 if settings is None else settings.seed,
            say=say_aside,
        )
        for line in second_look_sentences(facts):
            say(line)
        if facts["open"]:
            say(f"rlhf label {out}; then the same command again.")
        if facts["answered"]:
            say(f"{out / RELABELLED}: a row for each pair, with what is known of it.")
    say(f"{out / 'audit.html'}   {out / 'cleaned.jsonl'}   {out / 'pairs.parquet'}")


@app.command("blame")
def blame_command(
    run: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)],
    feature: Annotated[
        str,
        typer.Option(help="A trait of answers: length, evasion, flattery, …; or FILE.py:function.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="A new folder.", show_default=False)],
    share: Annotated[float, typer.Option(help="Of the pairs, how many are taken out.")] = 0.05,
) -> None:
    """Find the labels that made a reward model like a trait of answers, and write the pairs without them."""
    from rlhf.pipeline.blame import blame
    from rlhf.report.terminal import blame_lines

    for line in blame_lines(blame(run, feature, out, share=share, say=say_aside), out):
        say(line)


@app.command("label")
def label_command(
    run: Annotated[
        Path,
        typer.Argument(help="A run that waits for labels, an audit's folder, or RUN/second_look.", show_default=False),
    ],
    *,
    annotator: Annotated[
        list[str] | None, typer.Option(help="Who labels; once for each person. [default: you]", show_default=False)
    ] = None,
    gold: Annotated[
        Path | None,
        typer.Option(help="Pairs whose label you are sure of: hidden among the others.", show_default=False),
    ] = None,
    repeat: Annotated[float, typer.Option(help="Share of the questions that come again, hidden too; try 0.1.")] = 0.0,
    host: Annotated[str, typer.Option(help="Whom to listen to; 0.0.0.0 is everybody.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where.")] = 8765,
    status: Annotated[bool, typer.Option(help="Say how far people are, and stop.")] = False,
    export: Annotated[Path | None, typer.Option(help="Write the open pairs to this file.", show_default=False)] = None,
    form: Annotated[str, typer.Option(help="Of the exported file: plain, label-studio or argilla.")] = "plain",
    import_: Annotated[
        Path | None,
        typer.Option("--import", help="Take labels from this file, of any of the three forms.", show_default=False),
    ] = None,
) -> None:
    """Label pairs for a run: a page with one link a person; or as files, out and in."""
    from rlhf.serve.desk import check_export, export_to, hide_gold, import_from, progress_lines, serve_page

    # What is wrong is said before anything is taken in; what was labelled is in the book before the rest is written out.
    if export is not None:
        check_export(export, form)
    if import_ is not None:
        counts = import_from(run, import_, say=say)
        say(f"{import_}: {', '.join(f'{count} {name}' for name, count in counts.items())}.")
    if gold is not None:
        for line in hide_gold(run, gold):
            say(line)
    if export is not None:
        say(f"{export}: {export_to(run, export, form)} pairs")
    if export is not None or import_ is not None or status:
        for line in progress_lines(run):
            say(line)
        return
    serve_page(run, annotator, repeat=repeat, host=host, port=port, say=say_link)


@app.command("verdict")
def verdict_command(
    file: Annotated[
        str,
        typer.Argument(
            help="Rows with `judge`, and `label` where a person labelled: first, second, tie, or P(first is better).",
            metavar="FILE",
            show_default=False,
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON.", show_default=False)] = None,
) -> None:
    """Give a win rate from few labels of people and many of a judge, with an interval that holds however wrong the judge is."""
    from rlhf.pipeline.verdict import verdict

    verdict(file, out, say=say)
