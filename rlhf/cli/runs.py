"""The verbs of runs: run, one stage, check, plan, doctor, report, lineage."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
import yaml

from rlhf.cli.console import Out, Overrides, RecipeFile, app, errors, output, say, say_aside
from rlhf.errors import UserError
from rlhf.recipe import Recipe, load_recipe

UNTIL = "Stop after this stage: data, sft, label, vote, reward, ppo, … (the first of that name); or a folder, as round-2/label."
LOOKS_SECONDS, BUSY = 0.5, 0.4  # how long to look, and the share of the cores from which a clock can't be believed


@app.command("run")
def run_command(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, show the plan, write nothing.")] = False,
    until: Annotated[str | None, typer.Option(help=UNTIL)] = None,
) -> None:
    """Run a recipe from SFT to a report. The same command again goes on where it stopped."""
    _run(recipe_file, overrides, out, dry_run=dry_run, until=until)


@app.command("check")
def check_command(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|KEY=VALUE",
            help="Recipes, and section.key=value for all of them, in any order.",
            show_default=False,
        ),
    ],
    show: Annotated[bool, typer.Option(help="Print the resolved recipe.")] = False,
) -> None:
    """Validate recipes and what they name on this machine; a run refuses nothing else but what stands on a hub."""
    from rlhf.pipeline.checks import check_here

    overrides = [name for name in names if "=" in name and not Path(name).exists()]
    files = [Path(name) for name in names if name not in overrides]
    if not files:
        raise UserError("check: name a recipe beside the overrides.")
    problems: list[str] = []
    for file in files:
        try:
            recipe = load_recipe(file, overrides)
            check_here(recipe)
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        output.print(f"{file}: fine", markup=False)
        if show:
            output.print(yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True), markup=False)
    if problems:
        raise UserError(problems)


@app.command("plan")
def plan_command(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help=UNTIL)] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of a launch, each with a GPU: what one of them does and holds, by role.", show_default=False
        ),
    ] = None,
    sharding: Annotated[
        Literal["ddp", "fsdp2"], typer.Option(help="Whether a process holds all of a model (ddp) or its part (fsdp2).")
    ] = "ddp",
    out: Annotated[
        Path | None,
        typer.Option(
            help="A run that has made its data (`rlhf run --until data`): they are counted as they are.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Estimate rows, tokens, steps, memory and time of every stage, before any weights are loaded; writes nothing."""
    from psutil import cpu_percent

    from rlhf.pipeline.checks import check_arguments, check_sources
    from rlhf.pipeline.finished import require_data
    from rlhf.report.terminal import estimates_table, memory_table

    recipe = load_recipe(recipe_file, overrides or [])
    if out is not None:
        require_data(recipe, out)
    check_sources(recipe)
    busy = busy_sentence(cpu_percent(LOOKS_SECONDS) / 100, os.cpu_count() or 1)
    with errors.status("counting the data, timing one and two layers of the model …"):
        check_arguments(recipe, until=until)
        from rlhf.cost.memory import Processes
        from rlhf.pipeline.estimate import estimate

        estimates, notes = estimate(recipe, until=until, processes=Processes(processes or 1, sharding), out=out)
    output.print(estimates_table(recipe.name, estimates))
    if processes is not None:
        output.print(memory_table(recipe.name, estimates, processes=processes, sharding=sharding))
    for note in [*([busy] if busy else []), *notes]:
        say(note)


def busy_sentence(share: float, cores: int) -> str:
    """Return what other programs do to times that are measured; empty where they do hardly anything.

    Args:
        share: of all cores, how much of them is at work before this program is.

    >>> busy_sentence(0.2, 2), busy_sentence(0.95, 2)[:62]
    ('', 'Other programs are at work here (1.9 of 2 cores are busy), whi')
    """
    if share < BUSY:
        return ""
    return (
        f"Other programs are at work here ({share * cores:.1f} of {cores} cores are busy), which lengthens what is measured on a "
        "processor by more than its share: two layers are timed, and their difference stands for all. Run this on a quiet machine."
    )


@app.command("doctor")
def doctor_command(recipe_file: RecipeFile, overrides: Overrides = None) -> None:
    """Check what a run relies on, without training: templates, sampling, scores, reward functions; writes nothing."""
    recipe = load_recipe(recipe_file, overrides or [])
    with errors.status("reading the data, opening the models …"):
        from rlhf.pipeline.doctor import examine, require_all
        from rlhf.report.terminal import findings_table

        findings = examine(recipe, say=say_aside)
    output.print(findings_table(recipe.name, findings))
    require_all(findings)


def _stage_command(stage: str) -> None:
    def command(recipe_file: RecipeFile, overrides: Overrides = None, out: Out = None) -> None:
        _run(recipe_file, overrides, out, dry_run=False, until=stage)

    command.__doc__ = f"Run a recipe up to and including {stage}; what is done before is not repeated."
    app.command(stage)(command)


for _stage in ("sft", "vote", "reward", "ppo"):
    _stage_command(_stage)


@app.command("report")
def report_command(run: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)]) -> None:
    """Write the HTML page of a run again, and the cards of its models."""
    from rlhf.report.cards import write_cards
    from rlhf.report.page import write_report

    for file in (write_report(run), *write_cards(run)):
        say(f"{file}")


@app.command("clean")
def clean_command(
    run: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Delete it; without this, only show it.")] = False,
) -> None:
    """Show what of a run's folder nobody needs any more, and delete it with --yes."""
    from rlhf.pipeline.clean import clean, freeable

    rows = clean(run) if yes else freeable(run)
    for row in rows:
        say(f"{row.size / 1e6:9.1f} MB  {row.path}: {row.reason}")
    if not rows:
        say(f"{run}: nothing to free; whatever is here, somebody may need.")
        return
    total = sum(row.size for row in rows) / 1e6
    asked = " were freed" if yes else "; `rlhf clean --yes` frees them"
    say(f"{total:9.1f} MB{asked}")


@app.command("lineage")
def lineage_command(
    run: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)],
    stage: Annotated[
        str | None, typer.Argument(help="A stage's folder in it. [default: the last one]", show_default=False)
    ] = None,
) -> None:
    """Show where a model came from: every stage above it, with settings, versions and data."""
    from rlhf.pipeline.lineage import lineage

    output.print(lineage(run, stage))


def _run(recipe_file: Path, overrides: list[str] | None, out: Path | None, *, dry_run: bool, until: str | None) -> None:
    from rlhf.pipeline.checks import check_arguments, check_recipe_file, check_sources
    from rlhf.pipeline.launch import check_launch
    from rlhf.pipeline.run import run

    check_launch()
    recipe = load_recipe(recipe_file, overrides or [])
    check_sources(recipe)
    out = out or Path("runs") / recipe.name
    if dry_run:
        check_recipe_file(recipe, out)
        check_arguments(recipe, until=until)
        _show_plan(recipe, out, until)
        return
    is_main = int(os.environ.get("RANK", "0")) == 0

    def say_once(line: str) -> None:
        if is_main:
            say(line)

    run(recipe, out, until=until, say=say_once, own_process=True)
    if is_main:
        from rlhf.report.terminal import show_summary

        show_summary(out, output)


def _show_plan(recipe: Recipe, out: Path, until: str | None) -> None:
    from rlhf.pipeline.finished import made_of_what_is_gone, require_files
    from rlhf.pipeline.plan import plan, stages_until
    from rlhf.pipeline.store import Store
    from rlhf.report.terminal import plan_table

    store, planned = Store(out), plan(recipe)
    require_files(store, planned)
    stages = stages_until(planned, until)
    done = {stage.folder for stage in stages if store.is_done(stage)}
    output.print(
        plan_table(f"{recipe.name}, seed {recipe.seed}, into {out} (dry run, nothing was written)", stages, done)
    )
    if (orphans := made_of_what_is_gone(store, planned)) is not None:
        say(orphans)
