"""Which precision this machine is fast in: measured once a process where a recipe leaves it open (`bf16: auto`).

Machines differ: of two CPUs, one took a seventh of float32's time in bfloat16, and one eight times as much.
"""

import time
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

AUTO = "auto"
ROWS, WIDTH, REPETITIONS = 256, 768, 3
FASTER = 1.2  # how many times as fast bfloat16 must be: below that, float32's digits are worth more


def resolve_bf16(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trainer's settings with `bf16: auto` replaced by what is fast on this machine, and say what that is.

    The weights stay in float32 either way; with bfloat16 the forwards compute under autocast. A recipe, the key of a stage
    and a run's folder keep "auto": a run that is resumed elsewhere goes on in what is fast there, and says so.
    """
    if settings.get("bf16") != AUTO:
        return dict(settings)
    is_fast, reason = _choice()
    warnings.warn(reason, stacklevel=2)
    return {**settings, "bf16": is_fast}


def warn_of_4_bit(load_in_4bit: bool) -> None:
    """Say what 4-bit weights cost where there is no GPU."""
    if load_in_4bit and not torch.cuda.is_available():
        times = _cost_of_4_bit()
        if times is not None:
            warnings.warn(
                f"load_in_4bit: on this CPU a layer with 4-bit weights takes {times:.1f} times as long as in float32 (measured); "
                "they save memory, not time.",
                stacklevel=3,
            )


@cache
def _choice() -> tuple[bool, str]:
    """Tell whether bfloat16 is fast here, and why, in a sentence."""
    if torch.cuda.is_available():
        is_there = torch.cuda.is_bf16_supported(including_emulation=False)
        return is_there, f"bf16: auto is {str(is_there).lower()}: this GPU {'has' if is_there else 'lacks'} bfloat16."
    plain, half = measure(torch.float32), measure(torch.bfloat16)
    is_fast = plain > FASTER * half
    return is_fast, (
        f"bf16: auto is {str(is_fast).lower()}: forward and backward of a layer take {1000 * half:.1f} ms in bfloat16 and "
        f"{1000 * plain:.1f} ms in float32 on this CPU (measured)."
    )


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
