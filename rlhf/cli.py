"""The command line: parse, call, print.

Exit codes: 0 done, 1 failed, 2 bad input (nothing created), 3 waiting for people's labels, 130/143 interrupted.
"""

import atexit
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from rlhf.errors import TrainingError, UserError, Waiting
from rlhf.pipeline import interrupt
from rlhf.recipe import Recipe, load_recipe

# Libraries announce things that a recipe's reader can't act on; set before any of them is imported.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

WAITING = 3
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
# A pipe has no width; at rich's 80 columns tables would lose their numbers.
output = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
errors = Console(stderr=True, highlight=False)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe: one YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, as many as you like.", show_default=False)
]
Out = Annotated[Path | None, typer.Option(help="The run's folder. [default: runs/NAME]", show_default=False)]


RewardModelName = Annotated[
    str, typer.Argument(help="A reward model's folder, or a hub id with one label.", show_default=False)
]


@app.command("run")
def run_command(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, show the plan, write nothing.")] = False,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
) -> None:
    """Run a recipe from SFT to a report. The same command again goes on where it stopped."""
    _run(recipe_file, overrides, out, dry_run=dry_run, until=until)


@app.command("check")
def check_command(
    recipe_files: Annotated[list[Path], typer.Argument(help="Recipes.", show_default=False)],
    show: Annotated[bool, typer.Option(help="Print the resolved recipe.")] = False,
) -> None:
    """Validate recipes; every mistake is named with its line."""
    problems: list[str] = []
    for file in recipe_files:
        try:
            recipe = load_recipe(file)
        except UserError as error:
            problems += error.problems
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
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
) -> None:
    """Estimate rows, tokens, steps, memory and time of every stage, before any weights are loaded; writes nothing."""
    from rlhf.pipeline.checks import check_arguments, check_sources
    from rlhf.report.terminal import estimates_table

    recipe = load_recipe(recipe_file, overrides or [])
    check_sources(recipe)
    with errors.status("counting the data, timing one and two layers of the model …"):
        check_arguments(recipe, until=until)
        from rlhf.cost.estimate import estimate

        found, notes = estimate(recipe, until=until)
    output.print(estimates_table(recipe.name, found))
    for note in notes:
        output.print(note, markup=False, soft_wrap=True)


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
        output.print(f"{file}", markup=False, soft_wrap=True)


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


@app.command("score")
def score_command(model: RewardModelName) -> None:
    """Read JSON lines from standard input, write them with their scores; exit 1 at the end if a line was bad."""
    import json

    from rlhf.pipeline.model_commands import score_stream

    bad = 0
    for row in score_stream(model, sys.stdin):
        bad += "error" in row
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    sys.stdout.flush()
    if bad:
        raise TrainingError(f"{bad} lines could not be scored; each has its error in its place.")


@app.command("evaluate")
def evaluate_command(
    model: RewardModelName,
    data: Annotated[list[str], typer.Argument(help="Files of pairs or rankings, or hub datasets.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where to write the JSON; the page lies beside it.", show_default=False)],
    against: Annotated[
        str | None, typer.Option(help="Another reward model, compared on the same pairs.", show_default=False)
    ] = None,
) -> None:
    """Judge a reward model: accuracy with its interval, length control, calibration, K-wise, RewardBench."""
    from rlhf.pipeline.model_commands import evaluate_reward_model

    def say(line: str) -> None:
        errors.print(line, markup=False, soft_wrap=True)

    if out.suffix == ".html":
        raise UserError(f"--out {out}: the report is JSON; name it .json, and the page beside it is .html.")
    result = evaluate_reward_model(model, data, out, against=against, say=say)
    table = Table(title="95 % intervals over prompts; ties are wrong")
    for heading in ("data", "pairs", "accuracy", "95 %", "longer\nwins", "length-\ncontrolled", "ties", "ECE", "T"):
        table.add_column(heading, justify="left" if heading == "data" else "right")
    for name, report in result["data"].items():
        low, high = report["accuracy_ci"]
        controlled, temperature = report["accuracy_length_controlled"], report["temperature"]
        table.add_row(
            name,
            str(report["n"]),
            f"{report['accuracy']:.3f}",
            f"{low:.2f}-{high:.2f}",
            f"{report['length_baseline']:.3f}",
            "-" if controlled is None else f"{controlled:.3f}",
            str(report["ties"]),
            f"{report['ece']:.3f}",
            "-" if temperature is None else f"{temperature:.2f}",
        )
    output.print(table)
    for name, report in result["data"].items():
        for line in _more_of_evaluation(report, against):
            output.print(f"{name}: {line}", markup=False, soft_wrap=True)
    output.print(f"{out}   {out.with_suffix('.html')}", markup=False, soft_wrap=True)


def _more_of_evaluation(report: dict[str, Any], against: str | None) -> list[str]:
    """What only some data have: rankings, another model, a published benchmark's sections."""
    lines = []
    if "rankings" in report:
        ranked = report["rankings"]
        tau = "-" if ranked["tau_b"] is None else f"{ranked['tau_b']:.3f}"
        lines.append(
            f"{ranked['prompts']} rankings: best of K chosen in {ranked['best_of_k']:.3f} (chance "
            f"{ranked['best_of_k_by_chance']:.3f}), Kendall tau-b {tau}."
        )
    if "against" in report:
        other = report["against"]
        low, high = other["difference_ci"]
        lines.append(
            f"{against} has {other['accuracy']:.3f}; difference {other['difference']:+.3f} [{low:+.3f}, {high:+.3f}], "
            f"p = {other['p_value']:.2g} (paired, by prompt)."
        )
    for benchmark in (report["reward_bench"], report.get("rankings", {}).get("reward_bench_2")):
        if benchmark:
            lines.append(", ".join(f"{section} {value:.3f}" for section, value in benchmark.items()))
    return lines


@app.command("audit")
def audit_command(
    pairs: Annotated[
        str, typer.Argument(help="A file of preferences in any form, or a hub dataset.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="What the voters start from: a folder or hub id.", show_default=False)],
    out: Annotated[Path, typer.Option(help="A new folder.", show_default=False)],
    members: Annotated[int | None, typer.Option(help="Number of voters. [default: 10]", show_default=False)] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Its vote and reward sections say how voters are trained.", show_default=False)
    ] = None,
) -> None:
    """Find wrong preference labels: the strength of every pair, suspicious rows, cleaned data, a page."""
    from rlhf.pipeline.audit import audit

    def say(line: str) -> None:
        errors.print(line, markup=False, soft_wrap=True)

    result = audit(pairs, model, out, members=members, recipe=load_recipe(recipe) if recipe else None, say=say)
    noise = result["noise_rate"]
    found = (
        f"about {noise['mean']:.1%} of the labels wrong (between {noise['low']:.1%} and {noise['high']:.1%}); "
        f"{len(result['suspicious'])} suspicious rows, first {result['suspicious'][:10]}"
    )
    if result["vote"]["scale"] == 0:
        found = "the votes agree with the labels no more than chance, so they say nothing about them"
    output.print(f"{result['kept_pairs']} pairs; {found}", markup=False, soft_wrap=True)
    output.print(
        f"{out / 'audit.html'}   {out / 'cleaned.jsonl'}   {out / 'pairs.parquet'}", markup=False, soft_wrap=True
    )


@app.command("export")
def export_command(
    model: Annotated[Path, typer.Argument(help="A policy's or reward model's folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
) -> None:
    """Write a standard Hugging Face checkpoint: adapters merged in, tokenizer and template beside the weights."""
    from rlhf.pipeline.model_commands import export_model

    export_model(model, out)
    output.print(f"{out}", markup=False, soft_wrap=True)


@app.command("serve")
def serve_command(
    model: RewardModelName,
    host: Annotated[str, typer.Option(help="Whom to listen to; 0.0.0.0 is everybody.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where.")] = 5000,
) -> None:
    """Serve a reward model: POST /get_reward, as OpenRLHF's clients and `ppo.extra_rewards` ask."""
    try:
        import uvicorn
    except ImportError as error:
        raise UserError("rlhf serve: install the server first (pip install '.[serve]').") from error
    from rlhf.serve.reward import open_app

    served = open_app(model)
    output.print(f"http://{host}:{port}/get_reward", markup=False)
    uvicorn.run(served, host=host, port=port, log_level="warning")


@app.command("label")
def label_command(
    run: Annotated[Path, typer.Argument(help="A run that waits for labels.", show_default=False)],
    annotator: Annotated[
        list[str] | None, typer.Option(help="Who labels; once for each person. [default: you]", show_default=False)
    ] = None,
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
    from rlhf.serve.desk import export_to, import_from, progress_lines, serve_page

    def say(line: str) -> None:
        output.print(line, markup=False, soft_wrap=True)

    if export is not None:
        say(f"{export}: {export_to(run, export, form)} pairs")
    if import_ is not None:
        counts = import_from(run, import_)
        say(f"{import_}: {', '.join(f'{count} {name}' for name, count in counts.items())}.")
    if export is not None or import_ is not None or status:
        for line in progress_lines(run):
            say(line)
        return
    serve_page(run, annotator, host=host, port=port, say=say)


def _run(recipe_file: Path, overrides: list[str] | None, out: Path | None, *, dry_run: bool, until: str | None) -> None:
    from rlhf.pipeline.checks import check_arguments, check_recipe_file, check_sources
    from rlhf.pipeline.plan import plan
    from rlhf.pipeline.run import run

    recipe = load_recipe(recipe_file, overrides or [])
    check_sources(recipe)
    out = out or Path("runs") / recipe.name
    if dry_run:
        check_recipe_file(recipe, out)
        check_arguments(recipe)
        _show_plan(recipe, plan(recipe), out)
        return
    is_main = int(os.environ.get("RANK", "0")) == 0

    def say(line: str) -> None:
        if is_main:
            output.print(line, markup=False, soft_wrap=True)

    run(recipe, out, until=until, say=say)
    if is_main:
        from rlhf.report.terminal import show_summary

        show_summary(out, output)


def _show_plan(recipe: Recipe, stages: list[Any], out: Path) -> None:
    from rlhf.pipeline.store import Store

    store = Store(out)
    table = Table(title=f"{recipe.name}, seed {recipe.seed}, into {out} (dry run, nothing was written)")
    for heading in ("stage", "reads", "state"):
        table.add_column(heading)
    for stage in stages:
        state = "done" if store.is_done(stage) else "to do"
        table.add_row(stage.folder, ", ".join(parent.folder for parent in stage.parents.values()) or "-", state)
    output.print(table)


def _say_warning(
    message: Warning | str, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    """A warning as the sentence it is, without the line of code that raised it."""
    errors.print(f"Note: {message}", markup=False, soft_wrap=True)


def main() -> None:
    """Run the command line and turn what happened into an exit code."""
    interrupt.install()
    warnings.showwarning = _say_warning
    code = [1]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Gloo's threads sometimes abort a process in its last moment, after all is written. What is registered first runs last.
        atexit.register(lambda: os._exit(code[0]))
    code[0] = _exit_code()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code[0])


def _exit_code() -> int:
    try:
        app(standalone_mode=False)
    except UserError as error:
        for problem in error.problems:
            errors.print(problem, style="red", markup=False, soft_wrap=True)
        return 2
    except TrainingError as error:
        errors.print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    except Waiting as state:
        errors.print(str(state), style="yellow", markup=False, soft_wrap=True)
        return WAITING
    except interrupt.Interrupted as interruption:
        errors.print(f"{interruption}: stopped. The same command goes on from the last checkpoint.", markup=False)
        return 128 + interruption.signum
    except Exception as error:
        usage = getattr(error, "exit_code", None)
        if usage is None:
            raise
        getattr(error, "show", lambda: None)()
        return int(usage)
    return 0


if __name__ == "__main__":
    main()
