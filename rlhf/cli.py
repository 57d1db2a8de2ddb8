"""The command line: parse, call, print.

Exit codes: 0 done, 1 failed, 2 bad input (nothing created), 3 waiting for people's labels, 130/143 interrupted.
"""

import atexit
import logging
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Annotated, TextIO

import typer
import yaml
from rich.console import Console

from rlhf.errors import TrainingError, UserError, Waiting
from rlhf.pipeline import interrupt
from rlhf.recipe import Recipe, load_recipe

PACKAGE = "rlhf-pipeline"
WAITING = 3
TYPER_INTERRUPTED = 130  # what Typer makes of a KeyboardInterrupt; a real Ctrl-C is `interrupt.Interrupted`
# Libraries announce things that a recipe's reader can't act on.
QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_TELEMETRY": "1"}
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
# A pipe has no width; at rich's 80 columns tables would lose their numbers.
output = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
errors = Console(stderr=True, highlight=False)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe: one YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, as many as you like.", show_default=False)
]
Out = Annotated[Path | None, typer.Option(help="The run's folder. [default: runs/NAME]", show_default=False)]
RewardModelName = Annotated[str, typer.Argument(help="A reward model's folder, or a hub id.", show_default=False)]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"{PACKAGE} {metadata.version(PACKAGE)}")
        raise typer.Exit


@app.callback()
def _top_level(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


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
        from rlhf.pipeline.estimate import estimate

        estimates, notes = estimate(recipe, until=until)
    output.print(estimates_table(recipe.name, estimates))
    for note in notes:
        _say(note)


@app.command("doctor")
def doctor_command(recipe_file: RecipeFile, overrides: Overrides = None) -> None:
    """Check what a run relies on, without training: templates, sampling, scores, reward functions; writes nothing."""
    recipe = load_recipe(recipe_file, overrides or [])
    with errors.status("reading the data, opening the models …"):
        from rlhf.pipeline.doctor import examine, require_all
        from rlhf.report.terminal import findings_table

        findings = examine(recipe, say=_say_aside)
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
        _say(f"{file}")


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
    import io
    import json

    from rlhf.pipeline.model_commands import score_stream

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # a bad byte is its line's error
    bad = 0
    for row in score_stream(model, sys.stdin):
        bad += "score" not in row
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
    """Evaluate a reward model: accuracy with its interval, length control, calibration, K-wise, RewardBench."""
    from rlhf.pipeline.model_commands import evaluate_reward_model
    from rlhf.report.terminal import evaluation_lines, evaluation_table

    if out.suffix == ".html":
        raise UserError(f"--out {out}: the report is JSON; name it .json, and the page beside it is .html.")
    result = evaluate_reward_model(model, data, out, against=against, say=_say_aside)
    output.print(evaluation_table(result))
    for line in evaluation_lines(result):
        _say(line)
    _say(f"{out}   {out.with_suffix('.html')}")


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
    from rlhf.report.terminal import audit_line

    result = audit(pairs, model, out, members=members, recipe=load_recipe(recipe) if recipe else None, say=_say_aside)
    _say(audit_line(result))
    _say(f"{out / 'audit.html'}   {out / 'cleaned.jsonl'}   {out / 'pairs.parquet'}")


@app.command("export")
def export_command(
    model: Annotated[Path, typer.Argument(help="A policy's or reward model's folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
) -> None:
    """Write a standard Hugging Face checkpoint: adapters merged in, tokenizer and template beside the weights."""
    from rlhf.pipeline.model_commands import export_model

    export_model(model, out)
    _say(f"{out}")


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
    *,
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

    if export is not None:
        _say(f"{export}: {export_to(run, export, form)} pairs")
    if import_ is not None:
        counts = import_from(run, import_, say=_say)
        _say(f"{import_}: {', '.join(f'{count} {name}' for name, count in counts.items())}.")
    if export is not None or import_ is not None or status:
        for line in progress_lines(run):
            _say(line)
        return
    serve_page(run, annotator, host=host, port=port, say=_say)


def _say(line: str) -> None:
    """Print a line to standard output as it is, however wide the terminal."""
    output.print(line, markup=False, soft_wrap=True)


def _say_aside(line: str, *, style: str | None = None) -> None:
    """Print a line to standard error as it is."""
    errors.print(line, style=style, markup=False, soft_wrap=True)


def _run(recipe_file: Path, overrides: list[str] | None, out: Path | None, *, dry_run: bool, until: str | None) -> None:
    from rlhf.pipeline.checks import check_arguments, check_recipe_file, check_sources
    from rlhf.pipeline.run import run

    recipe = load_recipe(recipe_file, overrides or [])
    check_sources(recipe)
    out = out or Path("runs") / recipe.name
    if dry_run:
        check_recipe_file(recipe, out)
        check_arguments(recipe)
        _show_plan(recipe, out)
        return
    is_main = int(os.environ.get("RANK", "0")) == 0

    def say(line: str) -> None:
        if is_main:
            _say(line)

    run(recipe, out, until=until, say=say)
    if is_main:
        from rlhf.report.terminal import show_summary

        show_summary(out, output)


def _show_plan(recipe: Recipe, out: Path) -> None:
    from rlhf.pipeline.plan import plan
    from rlhf.pipeline.store import Store
    from rlhf.report.terminal import plan_table

    store, stages = Store(out), plan(recipe)
    done = {stage.folder for stage in stages if store.is_done(stage)}
    output.print(
        plan_table(f"{recipe.name}, seed {recipe.seed}, into {out} (dry run, nothing was written)", stages, done)
    )


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as the sentence it is, without the line of code that raised it."""
    _say_aside(f"Note: {message}")


def main() -> None:
    """Run the command line and turn what happened into an exit code."""
    _quieten_libraries()
    interrupt.install()
    warnings.showwarning = _print_warning
    code = [1]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Gloo's threads sometimes abort a process in its last moment, after all is written. What is registered first runs last.
        atexit.register(lambda: os._exit(code[0]))
    code[0] = _exit_code()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code[0])


def _quieten_libraries() -> None:
    """Set what silences libraries; they read it when they are first imported, which no command has done yet."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _exit_code() -> int:
    """Run the command line; return its exit code."""
    try:
        if app(standalone_mode=False) == TYPER_INTERRUPTED:
            raise KeyboardInterrupt
    except UserError as error:
        for problem in error.problems:
            _say_aside(problem, style="red")
        return 2
    except TrainingError as error:
        _say_aside(str(error), style="red")
        return 1
    except Waiting as state:
        _say_aside(str(state), style="yellow")
        return WAITING
    except interrupt.Interrupted as interruption:
        errors.print(f"{interruption}: stopped. The same command goes on from the last checkpoint.", markup=False)
        return 128 + interruption.signum
    except (
        SystemExit,
        KeyboardInterrupt,
        typer.Abort,
    ) as ending:  # ours end otherwise: code of a person or of a library
        code = ending.code if isinstance(ending, SystemExit) else None
        name = f"SystemExit({code!r})" if isinstance(ending, SystemExit) else "KeyboardInterrupt"
        sentence = f"Something raised {name} in the middle, which is no end of this command: a function of yours, or a library."
        _say_aside(f"{sentence} Finished stages are intact; the same command goes on.", style="red")
        return code if isinstance(code, int) and code else 1
    except Exception as error:
        usage = getattr(error, "exit_code", None)
        if usage is None:
            raise
        getattr(error, "show", lambda: None)()
        return int(usage)
    return 0


if __name__ == "__main__":
    main()
