"""The table of stages: which function runs each, which parents it reads, and in which processes. Loads no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

Run = Callable[..., dict[str, Any]]  # StageContext → the facts of the stage's manifest


@dataclass(frozen=True)
class StageFunction:
    """What runs a stage, and what it may look at.

    A stage's key follows from the keys of all its parents, so a plan hands over no other parents than those named here.

    Attributes:
        run: "module:function"; the module, and torch with it, is loaded when the stage runs.
        reads: roles of the parents that every plan hands it.
        may_read: roles of the parents that some plans hand it.
        together: with several processes, whether all of them run it; otherwise the first does, while the others wait.
    """

    run: str
    reads: tuple[str, ...] = ()
    may_read: tuple[str, ...] = ()
    together: bool = False

    def load(self) -> Run:
        """Import the function."""
        module, _, name = self.run.partition(":")
        function: Run = getattr(import_module(module), name)
        return function


STAGES = {
    "lab": StageFunction("rlhf.pipeline.stages:run_lab", may_read=("base",)),
    "data": StageFunction("rlhf.pipeline.stages:run_data", may_read=("lab", "base")),
    "base": StageFunction("rlhf.pipeline.stages:run_base", may_read=("data",)),
    "sft": StageFunction("rlhf.pipeline.stages:run_sft", reads=("data",), may_read=("base", "lab"), together=True),
    "sample": StageFunction("rlhf.pipeline.sampling:run_sample", reads=("data",), may_read=("sft", "base", "policy")),
    "select": StageFunction(
        "rlhf.pipeline.sampling:run_select", reads=("data", "sample"), may_read=("sft", "base", "reward", "label")
    ),
    "label": StageFunction(
        "rlhf.pipeline.label:run_label", reads=("data",), may_read=("sft", "base", "select", "earlier")
    ),
    "second_look": StageFunction(
        "rlhf.pipeline.second_look_stage:run_second_look",
        reads=("data", "label"),
        may_read=("sft", "base", "earlier"),
        together=True,
    ),
    "vote": StageFunction(
        "rlhf.pipeline.vote:run_vote", reads=("data",), may_read=("sft", "base", "label"), together=True
    ),
    "reward": StageFunction(
        "rlhf.pipeline.reward:run_reward",
        reads=("data",),
        may_read=("sft", "base", "label", "vote", "sample", "latest_evaluation", "older_evaluation"),
        together=True,
    ),
    "ppo": StageFunction(
        "rlhf.pipeline.stages:run_ppo", reads=("data", "reward"), may_read=("sft", "base", "policy"), together=True
    ),
    "evaluate": StageFunction(
        "rlhf.pipeline.stages:run_evaluate",
        reads=("data", "reward", "policy"),
        may_read=("sft", "base", "first_evaluation"),
    ),
}
