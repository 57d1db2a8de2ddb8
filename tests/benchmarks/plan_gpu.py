"""What `rlhf plan RECIPE --processes N --sharding WAY` says of memory for models of eight billion parameters, without a GPU.

python tests/benchmarks/plan_gpu.py recipes/models/llama-3.1-8b-lora.yaml --processes 8 --sharding fsdp2

The plan's own arithmetic with the configuration of Llama-3.1-8B, on tensors without data, so nothing is computed or timed and no
weights are needed. Autocast and TRL's fused head do not reach such tensors: adapters compute in float32 here, SFT makes all of its
logits, and activations are an upper bound. Data are those that the recipe's caps allow, each row as long as may be.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from transformers import LlamaConfig

from rlhf.cost import estimate, slices
from rlhf.cost.memory import Processes
from rlhf.data.read import is_local
from rlhf.pipeline.estimate import ppo_rollouts, section_training, sizes_from_caps, work_of
from rlhf.pipeline.plan import plan
from rlhf.pipeline.training import quiet_libraries
from rlhf.recipe import load_recipe
from rlhf.recipe.schema import DATA_SOURCES
from rlhf.report.terminal import memory_table

LLAMA = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
    dtype=torch.bfloat16,
)


def on_nothing(config: Any, **named: Any) -> slices.Slices:
    """Build slices of tensors without data."""
    with torch.device("meta"):
        return slices.slices(config, **named | {"device": torch.device("meta"), "fused_head": False})


def main() -> None:
    """Print what one process holds, of every stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--sharding", choices=("ddp", "fsdp2"), default="ddp")
    arguments = parser.parse_intermixed_args()
    quiet_libraries()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    hub = [f"data.{name}" for name in DATA_SOURCES for s in recipe.data.sources(name) if not is_local(s.source)]
    sizes, training = sizes_from_caps(recipe, hub), section_training(recipe)
    processes, ppo = Processes(arguments.processes, arguments.sharding), training["ppo"].args
    nothing = {"seconds": 0.0, "seconds_of_update": 0.0, "seconds_of_sampling": 0.0}
    with (
        mock.patch.object(estimate, "slices", on_nothing),
        mock.patch.multiple(slices.Slices, **{name: mock.Mock(return_value=value) for name, value in nothing.items()}),
        mock.patch.object(slices.Slices, "_precision", return_value=nullcontext()),
        mock.patch("transformers.masking_utils._ignore_causal_mask_sdpa", return_value=True),  # it would read the mask
    ):
        estimator = estimate.Estimator(LLAMA, sizes, training, ppo_rollouts(recipe, ppo, LLAMA), processes)
        estimator.process = 0.0
        works = [work_of(stage, recipe, sizes, ppo, processes.count) for stage in plan(recipe)]
        stages = [estimator.estimate(work) for work in works if work is not None]
    Console(width=140).print(memory_table(recipe.name, stages, processes=processes.count, sharding=processes.sharding))


if __name__ == "__main__":
    main()
