"""What every verb shares: the application, its arguments, its standard streams, and how lines are printed."""

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from rlhf.addresses import hide_secrets
from rlhf.data.sources import Source
from rlhf.recipe import load_source


def prepare_streams() -> None:
    """Give each standard stream that was closed outside a place, and let no letter be one that can't be printed.

    Python has None for a stream that is closed; the next file that is opened would also get its number, and what libraries
    print would be written into that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class PipedConsole(Console):
    """A console whose reader may go away, as `| head` does: rich would end the program there without a word."""

    def on_broken_pipe(self) -> None:
        """Raise what Python raises itself where nobody reads any more."""
        raise BrokenPipeError


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
# A pipe has no width; at rich's 80 columns tables would lose their numbers.
output = PipedConsole(highlight=False, width=None if sys.stdout and sys.stdout.isatty() else 140)
errors = PipedConsole(stderr=True, highlight=False)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe: one YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, as many as you like.", show_default=False)
]
Out = Annotated[Path | None, typer.Option(help="The run's folder. [default: runs/NAME]", show_default=False)]
Columns = Annotated[
    str | None,
    typer.Option(help="Which column is which: prompt=question,chosen=answers.good,…", show_default=False),
]
Compared = Annotated[
    Literal["answers", "conversations"] | None,
    typer.Option(
        help="Pairs that part before their last turn: left out (answers), or compared whole (conversations).",
        show_default=False,
    ),
]
RewardModelName = Annotated[str, typer.Argument(help="A reward model's folder, or a hub id.", show_default=False)]


def source_of(text: str, columns: str | None) -> Source:
    """Return a source of data that was named on the command line."""
    return Source(**load_source(text, columns=columns).model_dump())


def say(line: str) -> None:
    """Print a line to standard output, without secrets of addresses, otherwise as it is, however wide the terminal."""
    output.print(hide_secrets(line), markup=False, soft_wrap=True)


def say_link(line: str) -> None:
    """Print a line with an address that is meant for whoever reads it, token and all, to standard output."""
    output.print(line, markup=False, soft_wrap=True)


def say_aside(line: str, *, style: str | None = None) -> None:
    """Print a line to standard error, without secrets of addresses, otherwise as it is."""
    errors.print(hide_secrets(line), style=style, markup=False, soft_wrap=True)
