"""Answers by a vLLM engine in a process of its own, which holds a copy of the model and gives all memory back when it ends."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from rlhf.errors import TrainingError, UserError
from rlhf.files import write_text
from rlhf.models.merge import merged_weights, trains_tied_embeddings

MODEL, REQUESTS, ANSWERS = "model", "requests.json", "answers.json"
# What `torchrun` tells a process, which an engine would take for its own launch.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
SPARE = 0.05  # of the accelerator's memory, left to whoever else is there


def engine_answers(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
) -> list[list[int]]:
    """Return one sampled answer to each prompt, as ids, its end token included where one was sampled.

    Each prompt has a seed of its own, drawn from torch's generator, so that equal calls give equal answers.

    Args:
        model: a causal model; an adapter is merged for the engine, and the model stays as it is.
        rows: the prompts' ids.
        end_ids: ids that end an answer.
        max_new_tokens: an answer is cut after this many tokens.
        temperature: of the sampling, > 0.

    Raises:
        UserError: vLLM is not installed, or the model cannot be given to it.
        TrainingError: the engine ended without answers.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("sampling.engine: vLLM is not installed (how to: recipes/guides/ppo.md).")
    if getattr(model, "is_loaded_in_4bit", False):
        raise UserError("sampling.engine: vllm wants whole weights, not 4-bit ones; set sampling.engine=transformers.")
    if trains_tied_embeddings(model):
        raise UserError(
            "sampling.engine: vllm wants the adapter merged, and this one trains embeddings that input and output share; set "
            "sampling.engine=transformers."
        )
    with tempfile.TemporaryDirectory(prefix="rlhf-vllm-") as name:
        # 1. The model and what is asked, as files.
        folder = Path(name)
        _save(model, folder / MODEL)
        seeds = torch.randint(2**31, (len(rows),)).tolist()
        requests = {
            "prompts": [list(row) for row in rows],
            "seeds": seeds,
            "end_ids": list(end_ids),
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "longest": max(len(row) for row in rows) + max_new_tokens,
            "dtype": str(model.dtype).removeprefix("torch."),
            "memory_share": _free_share(),
        }
        write_text(folder / REQUESTS, json.dumps(requests))

        # 2. The engine, which ends with its answers.
        environment = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
        environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        code = _run([sys.executable, "-m", "rlhf.models.vllm_process", name], environment)
        if code != 0:
            raise TrainingError(f"sampling.engine: vLLM ended with exit code {code}; what it said stands above.")
        answers: list[list[int]] = json.loads((folder / ANSWERS).read_text(encoding="utf-8"))

    # 3. One answer to each prompt.
    if len(answers) != len(rows) or any(len(answer) == 0 for answer in answers):
        raise TrainingError(f"vLLM returned {len(answers)} answers to {len(rows)} prompts, or an empty one.")
    return answers


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run a command to its end, and end whatever it started and left behind; return its exit code."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _save(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Write a model whole, an adapter in its base, as vLLM reads it."""
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return
    weights = {key: weight.detach().to("cpu", copy=True) for key, weight in merged_weights(model)}
    model.get_base_model().save_pretrained(folder, state_dict=weights)


def _free_share() -> float | None:
    """Return the share of the accelerator's memory that the engine may have; None where there is no CUDA device."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return max(0.01, free / total - SPARE)
