"""The verbs of models: score, evaluate, export, serve."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rlhf.cli.console import Compared, RewardModelName, app, output, say, say_aside
from rlhf.errors import TrainingError, UserError


@app.command("score")
def score_command(model: RewardModelName) -> None:
    """Read JSON lines from standard input, write them with their scores; exit 1 at the end if a line was bad."""
    import io
    import json

    from rlhf.data.limits import bounded_lines
    from rlhf.pipeline.model_commands import score_stream

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # a bad byte is its line's error
    bad = 0
    for row in score_stream(model, bounded_lines(sys.stdin.readline)):
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
    compare: Compared = None,
) -> None:
    """Evaluate a reward model: accuracy with its interval, length control, calibration, K-wise, RewardBench."""
    from rlhf.pipeline.model_commands import evaluate_reward_model
    from rlhf.report.terminal import evaluation_lines, evaluation_table

    if out.suffix == ".html":
        raise UserError(f"--out {out}: the report is JSON; name it .json, and the page beside it is .html.")
    result = evaluate_reward_model(model, data, out, against=against, say=say_aside, compare_as=compare or "answers")
    output.print(evaluation_table(result))
    for line in evaluation_lines(result):
        say(line)
    say(f"{out}   {out.with_suffix('.html')}")


@app.command("export")
def export_command(
    model: Annotated[Path, typer.Argument(help="A policy's or reward model's folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
) -> None:
    """Write a standard Hugging Face checkpoint: adapters merged in, tokenizer and template beside the weights."""
    from rlhf.pipeline.model_commands import export_model

    export_model(model, out)
    say(f"{out}")


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
