"""What the estimate is told about a run, and what it says of a stage: how each section trains, what each stage has to do."""

from dataclasses import dataclass
from typing import Literal

from transformers import TrainingArguments
from trl import ModelConfig

from rlhf.cost.memory import Memory

Section = Literal["sft", "vote", "reward", "ppo"]


@dataclass(frozen=True)
class Training:
    """How a section of a recipe trains a model.

    Attributes:
        model: dtype, adapter and quantisation.
        args: the trainer's arguments, as the run will build them.
    """

    model: ModelConfig
    args: TrainingArguments


@dataclass(frozen=True)
class Rollouts:
    """How PPO samples and learns.

    Attributes:
        size: answers of a process in one rollout.
        max_prompt_length, max_answer_length: in tokens; prompts of any length where the first is None.
        epochs: how often each answer is learnt from.
        mini_batches: updates in such an epoch, of the policy and of the critic.
        steps: of the optimizer in a rollout, as the Trainer counts them.
        reward_models: how many score each answer.
        batch: answers that a process samples together at most; None: a rollout, outside of PPO two.
    """

    size: int
    max_prompt_length: int | None
    max_answer_length: int
    epochs: int
    mini_batches: int
    steps: int
    reward_models: int = 1
    batch: int | None = None

    @property
    def together(self) -> int:
        """Return the number of answers that PPO samples together."""
        return min(self.size, self.batch or self.size)

    @property
    def together_elsewhere(self) -> int:
        """Return the number of answers that other stages sample together."""
        return self.batch or 2 * self.size


@dataclass(frozen=True)
class SftWork:
    """A stage that trains on demonstrations.

    Attributes:
        folder: of the stage in the run, "round-0/sft".
        rows: demonstrations.
    """

    folder: str
    rows: int


@dataclass(frozen=True)
class PairWork:
    """A stage that trains on pairs: one reward model, the members of an ensemble, or those of a vote.

    Attributes:
        folder: of the stage in the run, "round-1/reward".
        section: whose settings the models train with.
        pairs: that the stage has.
        trained: of these, or of the rankings that they make, how many each model trains on.
        answers: that each of those has; a mean.
        scored: how many pairs each model scores when it is trained; a mean.
        models: how many are trained.
        calibrated: answers of the policy before PPO that are sampled and scored for the scale of the finished model's scores.
        golden: tokens of the texts of its certificate, each scored by itself.
        views: how often a text is read in a step: twice under a contrastive term.
        ascent: prompts, and answers to each, that MetaRM's extra step reads; None without it.
        top_layers: layers of each model's own above a frozen trunk that is read once for all; None where each is whole.
    """

    folder: str
    section: Literal["vote", "reward"]
    pairs: int
    trained: int
    scored: float
    answers: float = 2.0
    models: int = 1
    calibrated: int = 0
    golden: tuple[int, ...] = ()
    views: int = 1
    ascent: tuple[int, int] | None = None
    top_layers: int | None = None

    @property
    def are_rankings(self) -> bool:
        """Return whether whole rankings are trained on, each with all of its pairs; those of two answers are pairs."""
        return self.answers > 2


@dataclass(frozen=True)
class PpoWork:
    """A stage of PPO.

    Attributes:
        folder: of the stage in the run, "round-1/ppo".
        rollouts: how many each process makes, with the others.
        tried: answers that are sampled before the first rollout, to see whether they end.
    """

    folder: str
    rollouts: int
    tried: int = 0


@dataclass(frozen=True)
class SamplingWork:
    """A stage that samples answers and trains nothing.

    Attributes:
        folder: of the stage in the run, "round-1/evaluate".
        answers: how many are sampled.
        is_scored: whether the reward model scores each of them.
        compared: of these, how many are read by two policies for their KL.
    """

    folder: str
    answers: int
    is_scored: bool
    compared: int = 0


Work = SftWork | PairWork | PpoWork | SamplingWork


@dataclass(frozen=True)
class Estimate:
    """What one stage will cost.

    Attributes:
        folder: of the stage in the run.
        rows: trained on or sampled by all processes, each counted once.
        tokens: that one process reads of these rows, over all passes.
        steps: of the optimizer.
        memory: at the peak, of one process (of its GPU, where there is one).
        seconds: on this machine, of one process that waits for no other.
    """

    folder: str
    rows: int
    tokens: int
    steps: int
    memory: Memory
    seconds: float

    @property
    def bytes(self) -> float:
        """Return the bytes of one process at the peak."""
        return self.memory.bytes
