"""How this process was launched: a launcher that was asked for several processes and started one is found out."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import yaml

from rlhf.errors import UserError


def check_launch() -> None:
    """Refuse a launch by accelerate that asked for several processes and started one.

    `accelerate launch --cpu --num_processes 2` does so without a word: the batch is half of what was asked for.

    Raises:
        UserError: with the command that starts several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return
    parent = psutil.Process().parent()
    asked = processes_asked([] if parent is None else parent.cmdline())
    if asked > 1:
        raise UserError(
            f"accelerate was asked for {asked} processes and started one, as it does on a CPU. Launch with "
            f"`torchrun --nproc_per_node {asked} -m rlhf …`."
        )


def processes_asked(command: Sequence[str]) -> int:
    """Return how many processes a command of `accelerate launch` asks for, by itself or by its configuration file; else 1.

    >>> processes_asked(["accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "rlhf", "run", "r.yaml"])
    2
    >>> processes_asked(["bash"])
    1
    """
    if "launch" not in command:
        return 1
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--config_file", "--config-file", type=Path)
    try:
        known, _ = parser.parse_known_args(command[command.index("launch") + 1 :])
    except (argparse.ArgumentError, argparse.ArgumentTypeError, SystemExit):
        return 1
    if known.num_processes is None and known.config_file is not None and known.config_file.is_file():
        settings = yaml.safe_load(known.config_file.read_text(encoding="utf-8"))
        return int((settings or {}).get("num_processes") or 1)
    return known.num_processes or 1
