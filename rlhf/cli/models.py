"""The verbs of models: score, evaluate, export, serve, certify, verify."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rlhf.cli.console import Columns, Compared, RewardModelName, app, output, say, say_aside, source_of
from rlhf.errors import TrainingError, UserError
from rlhf.progress import Work, a_line_a_minute

MOST_FACTOR = 10  # of one model from another; beyond it weights mean nothing
MOST_SECONDS = 86_400.0


def check_timeout(seconds: float) -> None:
    """Refuse a time that is none.

    Raises:
        UserError: saying so.
    """
    if not 0.1 <= seconds <= MOST_SECONDS:
        raise UserError(f"--timeout {seconds:g}: must lie between 0.1 and {MOST_SECONDS:g} seconds.")


@app.command("score")
def score_command(model: RewardModelName) -> None:
    """Read JSON lines from standard input, write them with their scores; exit 1 at the end if a line was bad."""
    import io
    import json

    from rlhf.data.limits import bounded_lines
    from rlhf.pipeline.model_commands import score_stream

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # a bad byte is its line's error
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # JSON is, whatever the locale
    bad = 0
    with a_line_a_minute(Work("rlhf score", unit="lines")) as work:
        for row in score_stream(model, bounded_lines(sys.stdin.readline), say_aside):
            bad += "score" not in row
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
            work.done += 1
    sys.stdout.flush()
    if bad:
        raise TrainingError(f"{bad} lines could not be scored; each has its error in its place.")


@app.command("evaluate")
def evaluate_command(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL [MODEL...] DATA...",
            help="Reward models (the first name, and every folder), then files of pairs, rankings or a published benchmark, "
            "hub datasets (NAME or NAME:SPLIT), or {source: …} as in a recipe.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where to write the JSON; the page lies beside it.", show_default=False)],
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Another reward model on the same pairs, also of the hub; as often as you like.", show_default=False
        ),
    ] = None,
    compare: Compared = None,
    probes: Annotated[bool, typer.Option("--probes", help="Measure biases by minimal edits of the answers.")] = False,
    verdicts: Annotated[
        str | None,
        typer.Option(
            help="A causal model that is asked which answer is better, on the same pairs, in both orders.",
            show_default=False,
        ),
    ] = None,
    columns: Columns = None,
) -> None:
    """Evaluate reward models: accuracy with its interval, length rules, calibration, published benchmarks, biases."""
    from rlhf.pipeline.evaluate import evaluate_models, models_and_data
    from rlhf.report.evaluation_terminal import evaluation_lines, evaluation_tables

    if out.suffix == ".html":
        raise UserError(f"--out {out}: the report is JSON; name it .json, and the page beside it is .html.")
    models, data = models_and_data(names)
    sources = [source_of(text, columns) for text in data]
    result = evaluate_models(
        [*models, *(against or [])],
        sources,
        out,
        probes=probes,
        verdicts=verdicts,
        say=say_aside,
        compare_as=compare or "answers",
    )
    for table in evaluation_tables(result):
        output.print(table)
    for line in evaluation_lines(result):
        say(line)
    say(f"{out}   {out.with_suffix('.html')}")


@app.command("export")
def export_command(
    model: Annotated[Path, typer.Argument(help="A policy's or reward model's folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    average: Annotated[
        list[Path] | None,
        typer.Option(
            help="A model whose weights are averaged with MODEL's (WARM); may be repeated.", show_default=False
        ),
    ] = None,
    extrapolate: Annotated[
        Path | None,
        typer.Option(help="A weaker model, from which to go beyond MODEL (ExPO).", show_default=False),
    ] = None,
    factor: Annotated[
        float | None,
        typer.Option(help="How far: 0 is the weaker model, 1 is MODEL. [default: 1.5]", show_default=False),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="SFT's answers, which set a combined reward model's scale.", show_default=False),
    ] = None,
) -> None:
    """Write a standard Hugging Face checkpoint: adapters merged in, tokenizer and template beside the weights."""
    if average and extrapolate is not None:
        raise UserError("export: --average and --extrapolate are two ways to combine models; choose one.")
    if factor is not None and extrapolate is None:
        raise UserError(
            "export: --factor says how far to go from another model; name that by --extrapolate, or leave it out."
        )
    if samples is not None and not average and extrapolate is None:
        raise UserError("export: --samples sets the scale of combined reward models; leave it out for a single one.")
    if factor is not None and not -MOST_FACTOR <= factor <= MOST_FACTOR:
        raise UserError(
            f"--factor {factor:g}: must lie between {-MOST_FACTOR} and {MOST_FACTOR}; 1.5 goes half as far again."
        )
    if average or extrapolate is not None:
        from rlhf.pipeline.combine import combine_models

        others = [extrapolate] if extrapolate is not None else [*(average or ())]
        far = 1.5 if factor is None else factor
        factors = [far, 1 - far] if extrapolate is not None else [1 / (1 + len(others))] * (1 + len(others))
        combine_models([path.expanduser() for path in (model, *others)], factors, out, samples=samples)
    else:
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
    *,
    host: Annotated[str, typer.Option(help="Whom to listen to; 0.0.0.0 is everybody, with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where.")] = 5000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="RLHF_SERVE_TOKEN", help="What clients must send as `Authorization: Bearer …`.", show_default=False
        ),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="A file that holds the token, as containers have it.", show_default=False)
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
    from rlhf.serve.run import read_token, serve_models

    check_timeout(timeout)
    token = token if token_file is None else read_token(token_file)
    limits = Limits(seconds=timeout, waiting_texts=queue, batch_tokens=batch_tokens)
    serve_models(models, host=host, port=port, token=token, limits=limits, say=say)


@app.command("certify")
def certify_command(
    model: RewardModelName,
    out: Annotated[
        Path | None, typer.Option(help="A file. [default: MODEL/certificate.json]", show_default=False)
    ] = None,
) -> None:
    """Write a reward model's golden texts and scores, by which `rlhf verify` tells whether it is served as it is."""
    from rlhf.pipeline.certificates import certify_model
    from rlhf.report.certificate import certificate_lines, certificate_table

    certificate, file = certify_model(model, out)
    output.print(certificate_table(certificate))
    for line in certificate_lines(certificate):
        say(line)
    say(f"{file}")


@app.command("verify")
def verify_command(
    target: Annotated[str, typer.Argument(help="A server's URL, or a folder.", show_default=False)],
    *,
    against: Annotated[str, typer.Option(help="The reward model that should be served.", show_default=False)],
    kind: Annotated[
        str | None,
        typer.Option(
            help="ours, openrlhf, vllm-classify, vllm-pooling or folder. [default: found out by asking]",
            show_default=False,
        ),
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="A bearer token.", envvar=["RLHF_SERVE_TOKEN", "RLHF_TOKEN"], show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name there, where a server has several.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="In which it should compute. [default: that of MODEL's weights]", show_default=False),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for each request.")] = 60.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where to write what was found.", show_default=False)
    ] = None,
) -> None:
    """Compare what a server, or a folder in plain transformers, says of golden texts with the model; exit 1 if it is wrong."""
    from rlhf.pipeline.certificates import verify_target, write_verdict
    from rlhf.report.certificate import verdict_table
    from rlhf.report.result_file import check_result_file

    check_timeout(timeout)
    if json_file is not None:
        check_result_file(json_file, "--json", key="held")
    verdict = verify_target(
        target, against=against, kind=kind, token=token, model=name, dtype=dtype, timeout=timeout, say=say_aside
    )
    output.print(verdict_table(verdict))
    for line in verdict["notes"]:
        say(line)
    if json_file is not None:
        write_verdict(json_file, verdict)
    if not verdict["held"]:
        raise TrainingError("\n".join(fault["sentence"] for fault in verdict["faults"]))
    say(f"{target} says what {against} says, to the precision of {verdict['dtype']}.")
