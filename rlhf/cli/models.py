"""The verbs of models: score, evaluate, export, serve."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rlhf.cli.console import RewardModelName, app, output, say, say_aside
from rlhf.errors import TrainingError, UserError


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
    result = evaluate_reward_model(model, data, out, against=against, say=say_aside)
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
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders of reward models or ensembles, or hub ids; NAME=FOLDER gives one another name.",
            show_default=False,
        ),
    ],
    host: Annotated[str, typer.Option(help="Whom to listen to; 0.0.0.0 is everybody, with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where.")] = 5000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="RLHF_SERVE_TOKEN", help="What clients must send as `Authorization: Bearer …`.", show_default=False
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until a request is given up.", min=0.1)] = 60.0,
    queue: Annotated[int, typer.Option(help="Texts that may wait, for each model.", min=1)] = 65_536,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens in a forward, padding included. [default: 1024 on a CPU, 16384 on a GPU]",
            min=1,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve reward models: POST /score, /rank, /get_reward (OpenRLHF's), /classify (vLLM's)."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError("rlhf serve: install the server first (pip install '.[serve]').") from error
    from rlhf.serve.reward import Limits
    from rlhf.serve.run import serve_models

    limits = Limits(seconds=timeout, waiting_texts=queue, batch_tokens=batch_tokens)
    serve_models(models, host=host, port=port, token=token, limits=limits, say=say)
