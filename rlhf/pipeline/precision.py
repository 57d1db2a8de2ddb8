"""Which precision a stage computes in: what its recipe says, what a launcher says, or what is fast here (`bf16: auto`).

Machines differ: of two CPUs, one took a seventh of float32's time in bfloat16, and one eight times as much.
"""

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf.errors import UserError
from rlhf.files import write_text
from rlhf.report.records import read_note

AUTO = "auto"
LAUNCHER = "ACCELERATE_MIXED_PRECISION"  # set by `accelerate launch`; it decides where a trainer's settings say nothing
PRECISION = "precision.json"  # beside checkpoints
POLL_SECONDS = 0.2
ROWS, WIDTH, REPETITIONS = 256, 768, 3
ROUNDS, ENOUGH_SECONDS = 8, 3.0  # of timing both precisions in turn
FASTER = 1.2  # how many times as fast one must be to count: below that, float32's digits are worth more


def resolve_bf16(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trainer's settings with the precision that it will compute in; say what `bf16: auto` came to.

    The weights stay in float32 either way; with bfloat16 the forwards compute under autocast. What accelerate was launched
    with holds where a recipe says nothing, or "auto".

    Raises:
        UserError: the recipe says `bf16: false`, and accelerate was launched with another precision, which would win.
    """
    asked, launched = settings.get("bf16"), os.environ.get(LAUNCHER, "no")
    if settings.get("fp16") and asked == AUTO:
        return {name: value for name, value in settings.items() if name != "bf16"}
    if asked is True or settings.get("fp16"):
        return dict(settings)
    if launched in ("bf16", "fp16"):
        if asked is False:
            raise UserError(
                "bf16: false (in the recipe, or as this stage began), and accelerate was launched with mixed_precision: "
                f"{launched}, which would win; launch with mixed_precision: no, or leave bf16 out."
            )
        return {**{name: value for name, value in settings.items() if name != "bf16"}, launched: True}
    if asked != AUTO:
        return dict(settings)
    is_fast, reason = _choice()
    warnings.warn(reason, stacklevel=2)
    return {**settings, "bf16": is_fast}


def precision_of_stage(settings: Mapping[str, Any], checkpoints: Path, *, decides: bool) -> dict[str, Any]:
    """Return a stage's settings with `bf16: auto` replaced by what the stage began in; the first time, by what is fast here.

    The choice is kept beside the checkpoints, so a stage that goes on stays in one precision, on another machine too. One
    process decides for all. A recipe and the key of a stage keep "auto".

    Args:
        checkpoints: the folder of the stage's checkpoints.
        decides: whether this process decides; another waits for its choice.
    """
    if settings.get("bf16") != AUTO:
        return dict(settings)
    file = checkpoints / PRECISION
    if file.is_file():
        facts = read_note(file, f"delete {checkpoints.parent} to make the stage again")
        others = {name: value for name, value in settings.items() if name != "bf16"}
        if facts.get("fp16"):  # of a launcher
            return {**others, "fp16": True}
        kept = facts["bf16"]
        if decides and os.environ.get(LAUNCHER, "no") == "no" and kept != _choice()[0]:
            now, other = ("bfloat16", "float32") if kept else ("float32", "bfloat16")
            warnings.warn(
                f"bf16: auto is {str(kept).lower()}: this stage began in {now} and goes on in it, though {other} is faster here.",
                stacklevel=2,
            )
        return {**settings, "bf16": kept}
    if decides:
        resolved = resolve_bf16(settings)
        checkpoints.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({name: bool(resolved.get(name)) for name in ("bf16", "fp16") if name in resolved}))
        return resolved
    while not file.is_file():  # where the one that decides fails, the launcher ends this one
        time.sleep(POLL_SECONDS)
    return precision_of_stage(settings, checkpoints, decides=False)


def kept_precision(checkpoints: Path) -> dict[str, bool]:
    """Return what `bf16: auto` came to in a stage, as a fact for its manifest; nothing where the recipe said it."""
    file = checkpoints / PRECISION
    return read_note(file, f"delete {checkpoints.parent} to make the stage again") if file.is_file() else {}


def in_float32(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without precision: voters on a shared trunk compute in float32, whatever reward models do."""
    return {name: value for name, value in settings.items() if name not in ("bf16", "fp16")}


def warn_of_4_bit(load_in_4bit: bool) -> None:
    """Say what 4-bit weights cost where there is no GPU."""
    if load_in_4bit and not torch.cuda.is_available():
        times = _cost_of_4_bit()
        if times is not None:
            slower = "; they save memory, not time" if times > FASTER else ""
            warnings.warn(
                f"load_in_4bit: on this CPU a layer with 4-bit weights takes {times:.1f} times as long as in float32 "
                f"(measured){slower}.",
                stacklevel=3,
            )


@cache
def _choice() -> tuple[bool, str]:
    """Tell whether bfloat16 is fast here, and why, in a sentence."""
    if torch.cuda.is_available():
        is_there = torch.cuda.is_bf16_supported(including_emulation=False)
        return is_there, f"bf16: auto is {str(is_there).lower()}: this GPU {'has' if is_there else 'lacks'} bfloat16."
    plain, half = measure_both()
    is_fast = plain > FASTER * half
    return is_fast, (
        f"bf16: auto is {str(is_fast).lower()}: forward and backward of a layer take {1000 * half:.1f} ms in bfloat16 and "
        f"{1000 * plain:.1f} ms in float32 on this CPU (measured)."
    )


def measure_both() -> tuple[float, float]:
    """Return the seconds of a layer in float32 and in bfloat16, each the shortest of several.

    They are timed in turn: on a machine that does something else too, one bad moment decides nothing.
    """
    begin, plain, half = time.monotonic(), list[float](), list[float]()
    for _ in range(ROUNDS):
        plain.append(measure(torch.float32))
        half.append(measure(torch.bfloat16))
        if time.monotonic() - begin > ENOUGH_SECONDS:
            break
    return min(plain), min(half)


def measure(dtype: torch.dtype) -> float:
    """Return the seconds of forward and backward of a linear layer on the CPU, under autocast where it is not float32."""
    with torch.random.fork_rng(devices=[]):  # a run's own draws stay what they are
        layer, rows = nn.Linear(WIDTH, WIDTH), torch.randn(ROWS, WIDTH)

    def train() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            loss = layer(rows).sum()
        loss.backward()

    return _shortest(train)


@cache
def _cost_of_4_bit() -> float | None:
    """Return how many times as long a 4-bit layer takes as one in float32; None without bitsandbytes."""
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError:
        return None
    with torch.random.fork_rng(devices=[]):
        plain, rows = nn.Linear(WIDTH, WIDTH), torch.randn(ROWS, WIDTH)
        quantised = Linear4bit(WIDTH, WIDTH, compute_dtype=torch.bfloat16, quant_type="nf4")
    quantised.load_state_dict(plain.state_dict())
    quantised = quantised.to("cpu")
    with torch.no_grad():
        return _shortest(lambda: quantised(rows)) / _shortest(lambda: plain(rows))


def _shortest(work: Callable[[], object]) -> float:
    """Return the shortest seconds of a few, after a first time that is not counted."""
    work()
    seconds = []
    for _ in range(REPETITIONS):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
