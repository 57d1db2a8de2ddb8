"""Commands of `rlhf` one after another in one launch of two processes: `torchrun … tests/distributed/sharded.py plan.json`.

A cold start takes longer than most commands here. Before each command accelerate forgets the one before; some are run by
the first process alone, as if nobody had launched it.

accelerate 1.15 leaves FSDP out where the device is a CPU, without a word. torch's FSDP2 itself runs there, so accelerate is
told here that it is at work. Each process writes what it held at the end of each training into the run's folder.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import accelerate.state
import torch
import transformers.trainer
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from rlhf.files import write_text

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
SHARDED = {**FSDP2, "SHARD_ON_CPU": "true"}
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def shard_on_cpu() -> None:
    """Let accelerate's state say that FSDP is at work on the processes of a CPU too, where `SHARD_ON_CPU` is set."""
    before = accelerate.state.AcceleratorState.__init__

    def initialise(self: Any, *arguments: Any, **named: Any) -> None:
        before(self, *arguments, **named)
        plugin = named.get("fsdp_plugin")
        if self.distributed_type == DistributedType.MULTI_CPU and plugin is not None and "SHARD_ON_CPU" in os.environ:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = initialise


def held(tensors: Any) -> int:
    """Numbers that this process holds of some tensors."""
    return sum((x.to_local() if isinstance(x, DTensor) else x).numel() for x in tensors)


class Held(TrainerCallback):
    """Writes how many numbers of parameters and of the optimizer's state this process held, and of how many."""

    def on_train_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        states = [
            x for entry in named["optimizer"].state.values() for x in entry.values() if torch.is_tensor(x) and x.dim()
        ]
        tensors = {"parameters": list(named["model"].parameters()), "optimizer": states}
        trainer = getattr(named["train_dataloader"], "trainer", None)  # PPO's rollouts know theirs
        if trainer is not None:
            frozen = [trainer.reference.model, *trainer.rewards.models]
            ours = {id(p) for p in tensors["parameters"]}
            tensors["frozen"] = [p for model in frozen for p in model.parameters() if id(p) not in ours]
        facts = {name: [held(group), sum(x.numel() for x in group)] for name, group in tensors.items()}
        stage, _, run, *_ = Path(args.output_dir).parents
        (run / f"held-{stage.name}-{args.process_index}.json").write_text(
            json.dumps({**facts, "world": args.world_size})
        )


class StopAfter(TrainerCallback):
    """Sends SIGTERM to the first process after a step of a stage: `STOP_AFTER=reward:2`."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        stage = Path(args.output_dir).parent.name
        if args.process_index == 0 and os.environ.get("STOP_AFTER") == f"{stage}:{state.global_step}":
            os.kill(os.getpid(), signal.SIGTERM)


def fix_answers() -> None:
    """Let PPO take the same answers to the same prompts whatever the number of processes, where `FIXED_ANSWERS` is set."""
    from rlhf.ppo import checks, experience
    from rlhf.ppo.trainer import PPOTrainer

    sample, check = PPOTrainer.sample, checks.check_sampling

    def fixed(self: Any, rows: Any) -> Any:
        completions = sample(self, rows)
        if "FIXED_ANSWERS" not in os.environ:
            return completions
        shape = (len(rows), self.args.max_completion_length)
        completions.response_ids, completions.response_mask = torch.zeros(2, *shape, dtype=torch.long)
        for i, row in enumerate(rows):
            generator = torch.Generator().manual_seed(sum(map(ord, str(row["prompt"]))))
            length = int(torch.randint(1, shape[1] + 1, (1,), generator=generator))
            completions.response_ids[i, :length] = torch.randint(5, 60, (length,), generator=generator)
            completions.response_mask[i, :length] = 1
            completions.ended[i] = False
        kept = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(completions.response_ids, completions.response_mask, strict=True)
        ]
        completions.texts = self.processing_class.batch_decode(kept, skip_special_tokens=True)
        return completions

    def unless_fixed(*arguments: Any) -> None:
        if "FIXED_ANSWERS" not in os.environ:  # planted answers are what "sampler true" rightly stops
            check(*arguments)

    for owner, name, function in ((PPOTrainer, "sample", fixed), (experience, "check_sampling", unless_fixed)):
        setattr(owner, name, function)


def run_command(number: int, command: dict[str, Any]) -> None:
    """Run one command of a plan as a process of its own would, and write its exit code and what it said."""
    from rlhf.cli import main

    # 1. The folder, with stages of earlier commands where those are taken over.
    rank, alone = int(os.environ["RANK"]), command["processes"] == 1
    result = Path(f"result-{number}-{rank}.json")
    done, ready = Path(f"result-{number}-0.json"), Path(f"ready-{number}")
    if rank == 0:
        for stage in command["takes"]:
            shutil.copytree(stage, Path(command["out"], *Path(stage).parts[1:]))
        write_text(ready, str(free_port()))
    wait_for(ready)
    if alone and rank > 0:
        wait_for(done)
        return

    # 2. The environment of a fresh launch.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    before = dict(os.environ)
    os.environ.update(command["environment"])
    os.environ["MASTER_PORT"] = ready.read_text()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # that store holds the addresses of the command before
    if alone:
        for name in LAUNCHED:
            del os.environ[name]

    # 3. The command.
    sys.argv = ["rlhf", command["verb"], "r.yaml", "--out", command["out"], *command["overrides"]]
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()) as stdout:
        try:
            main()
        except SystemExit as ending:
            code = ending.code
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
    write_text(result, json.dumps({"code": code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.02)


if __name__ == "__main__":
    torch.set_num_threads(1)
    shard_on_cpu()
    fix_answers()
    transformers.trainer.DEFAULT_CALLBACKS += [Held, StopAfter]
    for index, entry in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        run_command(index, entry)
    os._exit(0)  # what the commands left to do at the end would end this process with their codes
