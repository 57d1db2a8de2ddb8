"""The processes of a launch: as many as were asked for, steps as before if there were others, one of them says what went wrong."""

import argparse
import json
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml

from rlhf.errors import UserError
from rlhf.files import write_text
from rlhf.report.records import read_note

LAUNCH = "launch.json"  # beside checkpoints


class Launch(NamedTuple):
    """How an optimizer step was shared out.

    Attributes:
        processes: how many there were.
        accumulation: micro-batches of a step on each of them.
    """

    processes: int
    accumulation: int


def number_of_processes() -> int:
    """Return how many processes a launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def write_launch(checkpoints: Path, launch: Launch) -> None:
    """Note beside checkpoints how the steps were shared out that led to the latest of them."""
    write_text(checkpoints / LAUNCH, json.dumps(launch._asdict()))


def read_launch(checkpoints: Path) -> Launch | None:
    """Return what was noted beside checkpoints; None where nothing was."""
    file = checkpoints / LAUNCH
    return Launch(**read_note(file, f"delete {checkpoints.parent} to make the stage again")) if file.is_file() else None


def accumulation_as_before(checkpoints: Path, accumulation: int) -> int:
    """Return the micro-batches of a step on each process with which a stage that was begun goes on: its steps stay as they were.

    Half as many processes make each step of twice as many micro-batches, so no row is read twice and none is left out.

    Args:
        accumulation: what a stage begins with.

    Raises:
        UserError: this number of processes can't share a step's micro-batches.
    """
    before = read_launch(checkpoints)
    if before is None:
        return accumulation
    total, processes = before.processes * before.accumulation, number_of_processes()
    if total % processes:
        fitting = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        raise UserError(
            f"{checkpoints.parent}: begun with {total} micro-batches to a step, which {processes} processes can't share evenly; "
            f"go on with a number of processes that divides it ({fitting}), or delete the folder to make it again."
        )
    return total // processes


def check_launch() -> None:
    """Refuse a launch by accelerate that asked for several processes and started one, or that asked for DeepSpeed.

    `accelerate launch --cpu --num_processes 2` starts one without a word: the batch is half of what was asked for.

    Raises:
        UserError: with what to launch instead.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "accelerate was asked for DeepSpeed, which no stage supports; take FSDP2 (recipes/accelerate/fsdp2.yaml), or data "
            "parallelism (ddp.yaml) with LoRA and 4-bit weights."
        )
    if number_of_processes() > 1 or "ACCELERATE_MIXED_PRECISION" not in os.environ:
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


def is_first_to_stop() -> bool:
    """Tell whether no process of this launch has stopped before this one, so that it is the one to say what went wrong.

    The launcher's own store counts them. Under a launcher without one, every process says it.
    """
    if number_of_processes() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    # torch is loaded when something went wrong.
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return int(store.add("rlhf-stopped", 1)) == 1
    except DistError:  # the launcher is gone
        return True
