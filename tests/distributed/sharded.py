"""`rlhf` on a CPU with FSDP2 at work: `torchrun … tests/distributed/sharded.py ppo r.yaml --out x`, with FSDP2's environment.

accelerate 1.15 leaves FSDP out where the device is a CPU, without a word. torch's FSDP2 itself runs there, so accelerate is
told here that it is at work. Each process writes what it held at the end of each training into the run's folder.
"""

import json
import os
from pathlib import Path
from typing import Any

import accelerate.state
import torch
import transformers.trainer
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def shard_on_cpu() -> None:
    """Let accelerate's state say that FSDP is at work on the processes of a CPU too."""
    before = accelerate.state.AcceleratorState.__init__

    def initialise(self: Any, *arguments: Any, **named: Any) -> None:
        before(self, *arguments, **named)
        if self.distributed_type == DistributedType.MULTI_CPU and named.get("fsdp_plugin") is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, named["fsdp_plugin"]
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = initialise


def held(tensors: Any) -> int:
    """Numbers that this process holds of some tensors."""
    return sum((x.to_local() if isinstance(x, DTensor) else x).numel() for x in tensors)


class Held(TrainerCallback):
    """Writes how many numbers of parameters and of the optimizer's state this process held, and of how many."""

    def on_train_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        model, optimizer = named["model"], named["optimizer"]
        states = [x for entry in optimizer.state.values() for x in entry.values() if torch.is_tensor(x) and x.dim()]
        facts = {
            "parameters": held(model.parameters()),
            "all_parameters": sum(p.numel() for p in model.parameters()),
            "optimizer": held(states),
            "all_optimizer": sum(x.numel() for x in states),
            "world": args.world_size,
        }
        stage, _, run, *_ = Path(args.output_dir).parents
        (run / f"held-{stage.name}-{args.process_index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("SHARD_ON_CPU") == "true":
        shard_on_cpu()
    transformers.trainer.DEFAULT_CALLBACKS.append(Held)
    from rlhf.cli import main

    main()
