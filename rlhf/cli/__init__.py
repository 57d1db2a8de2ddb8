"""The command line: parse, call, print.

Exit codes: 0 done, 1 failed, 2 bad input (nothing created), 3 waiting for people's labels, 130/143 interrupted, 141 nobody reads.
"""

import atexit
import contextlib
import errno
import logging
import os
import signal
import sqlite3
import sys
import traceback
import warnings
from typing import Annotated, TextIO

import typer

# The verbs enter themselves, in the order of `rlhf --help`.
# isort: off
import rlhf.cli.runs
import rlhf.cli.models
import rlhf.cli.labels  # noqa: F401

# isort: on
from rlhf.cli.console import app, prepare_streams, say_aside
from rlhf.errors import OtherProcessError, TrainingError, UserError, Waiting, is_disk_full, is_out_of_memory
from rlhf.pipeline import interrupt
from rlhf.pipeline.launch import is_first_to_stop, number_of_processes
from rlhf.progress import Work, a_line_a_minute
from rlhf.versions import version_of

PACKAGE = "rlhf-pipeline"
WAITING = 3
NOBODY_READS = 128 + signal.SIGPIPE
# What a signal leaves behind, by verb; of the others nothing is left, and the command starts again from the beginning.
GOES_ON = "stopped. The same command goes on from the last checkpoint."
AFTER_A_SIGNAL = {
    **dict.fromkeys(("run", "sft", "vote", "reward", "ppo"), GOES_ON),
    "serve": "the server has stopped; requests that it had taken on were answered first.",
    "label": "the page is closed; every label that was given is kept.",
    "score": "stopped. The lines that were written are whole; the rest was not scored.",
}
WITHOUT_END = ("serve", "label")  # they wait for others; how far they are is no question
STARTS_AGAIN = "stopped before the end; the same command starts again."
# What the place of a file refuses, which is no fault of this package: rights, a read-only disk, a full or a broken one.
PLACE_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EMFILE,
    errno.ENOTDIR,
)
# What is wrong with the name of a file, whoever asks for it.
NAME_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP)
# What pathlib says, without a class of its own, of a name that can't be made a path.
NO_PATH = ("Symlink loop", "Could not determine home directory")
TOO_LITTLE_MEMORY = (
    "Free memory that other processes hold, or take a machine with more; fewer or shorter texts at once need less."
)
TYPER_INTERRUPTED = 130  # what Typer makes of a KeyboardInterrupt; a real Ctrl-C is `interrupt.Interrupted`
# Libraries announce things that a recipe's reader can't act on.
QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_TELEMETRY": "1"}
# On a CPU torch keeps a program for every shape that it meets in 16 bits, 1024 of them: with batches of all lengths gibibytes.
FEW_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}


class _Verb:
    """One a process: the verb that was called."""

    name = ""


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"{PACKAGE} {version_of(PACKAGE)}")
        raise typer.Exit


@app.callback()
def _top_level(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    _Verb.name = context.invoked_subcommand or ""
    if _Verb.name not in WITHOUT_END:
        context.with_resource(a_line_a_minute(Work(f"rlhf {_Verb.name}")))


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as the sentence it is, without the line of code that raised it."""
    say_aside(f"Note: {message}")


def main() -> None:
    """Run the command line and turn what happened into an exit code."""
    prepare_streams()
    _prepare_libraries()
    interrupt.install()
    warnings.showwarning = _print_warning
    code = [1]
    if number_of_processes() > 1:
        # Gloo's threads sometimes abort a process in its last moment, after all is written. What is registered first runs last.
        atexit.register(lambda: os._exit(code[0]))
    sys.argv[1:] = [_with_home(argument) for argument in sys.argv[1:]]
    code[0] = _exit_code()
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.flush()
    sys.exit(code[0])


def _with_home(argument: str) -> str:
    """Return `--out=~/runs` with the home folder in place of `~`, which a shell leaves as it is behind `=`."""
    name, _, value = argument.partition("=")
    return f"{name}={os.path.expanduser(value)}" if name.startswith("--") and value.startswith("~") else argument


def _prepare_libraries() -> None:
    """Set what silences libraries and bounds their memory; they read it when first imported, which no command has done yet."""
    for name, value in (QUIET | FEW_SHAPES).items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _exit_code() -> int:
    """Run the command line; return its exit code. Of several processes the first that fails says why."""
    try:
        if app(standalone_mode=False) == TYPER_INTERRUPTED:
            raise KeyboardInterrupt
        sys.stdout.flush()
    except UserError as error:
        _say_once(*error.problems, style="red")
        return 2
    except OtherProcessError:
        return 1
    except TrainingError as error:
        _say_once(str(error), style="red")
        return 1
    except Waiting as state:
        _say_once(str(state), style="yellow")
        return WAITING
    except BrokenPipeError:  # whoever read standard output has what they wanted
        _forget_output()
        return NOBODY_READS
    except interrupt.Interrupted as interruption:
        _say_once(f"{interruption}: {AFTER_A_SIGNAL.get(_Verb.name, STARTS_AGAIN)}")
        return 128 + interruption.signum
    except (
        SystemExit,
        KeyboardInterrupt,
        typer.Abort,
    ) as ending:  # ours end otherwise: code of a person or of a library
        # Rich ends the program where nobody reads its pages of help.
        if isinstance(ending.__context__, BrokenPipeError):
            _forget_output()
            return NOBODY_READS
        code = ending.code if isinstance(ending, SystemExit) else None
        name = f"SystemExit({code!r})" if isinstance(ending, SystemExit) else "KeyboardInterrupt"
        sentence = f"Something raised {name} in the middle, which is no end of this command: a function of yours, or a library."
        _say_once(f"{sentence} Finished stages are intact; the same command goes on.", style="red")
        return code if isinstance(code, int) and code else 1
    except OSError as error:
        return _code_of_place(error)
    except sqlite3.OperationalError as error:
        _say_once(
            f"labels.sqlite, the book of labels, can't be read or written ({error}): another program holds it, its folder is "
            "read-only, or the disk is full. Mend that, and give the command again; no verdict is lost.",
            style="red",
        )
        return 1
    except Exception as error:
        return _code_of_fault(error)
    return 0


def _code_of_fault(error: Exception) -> int:
    """Say what is wrong where neither names nor places are; return the exit code. A fault of this package keeps its traceback."""
    if isinstance(error, RuntimeError) and str(error).startswith(NO_PATH):
        _say_once(f"The name of a file or folder leads nowhere ({str(error).rstrip('.')}); correct it.", style="red")
        return 2
    if is_out_of_memory(error):
        lines = str(error).strip().splitlines() or [type(error).__name__]
        _say_once(f"rlhf {_Verb.name}: out of memory ({lines[0][:200]}). {TOO_LITTLE_MEMORY}", style="red")
        return 1
    if is_disk_full(error):
        _say_once(
            f"rlhf {_Verb.name}: no space left on the device. Make room, and give the command again.", style="red"
        )
        return 1
    usage = getattr(error, "exit_code", None)
    if usage is None:  # a fault of this package keeps its traceback
        _say_once(traceback.format_exc().rstrip())
        return 1
    getattr(error, "show", lambda: None)()
    return int(usage)


def _code_of_place(error: OSError) -> int:
    """Say what is wrong with the name or the place of a file; return the exit code. Other faults keep their traceback."""
    if error.errno in NAME_ERRORS and error.filename is not None:
        _say_once(f"{error.filename}: can't be the name of a file ({error.strerror}); correct it.", style="red")
        return 2
    if error.errno not in PLACE_ERRORS:
        _say_once(traceback.format_exc().rstrip())
        return 1
    if error.filename is None:
        _forget_output()
    place = error.filename or "standard output, or a file that was open"
    sentence = f"{place}: can't be read or written ({error.strerror}); mend that, and give the command again."
    _say_once(f"{sentence} Finished stages and whole checkpoints of a run are intact.", style="red")
    return 1


def _forget_output() -> None:
    """Drop what standard output still holds: Python would try to write it at the end, and fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say_once(*lines: str, style: str | None = None) -> None:
    """Print to standard error why the command ended, unless another process of this launch ended first.

    A launcher sends SIGTERM to the others as soon as one has ended, which must not become a second, other end.
    """
    if number_of_processes() > 1:
        interrupt.ignore()
    if is_first_to_stop():
        with contextlib.suppress(BrokenPipeError):  # the exit code says it too
            for line in lines:
                say_aside(line, style=style)


if __name__ == "__main__":
    main()
