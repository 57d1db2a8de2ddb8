"""What a recipe will cost, said before any weights are loaded: rows, tokens, steps, memory and time of every stage.

Rows and tokens are counted on the data themselves (the lab's are generated, local files are read and split as the run will);
of hub datasets only the recipe's caps are known. Seconds come from one and two random layers of the model at the recipe's
batch shapes (`rlhf.cost.slices`); the rest is arithmetic that can be read below.
"""

import math
import random
import resource
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from trl import RewardConfig, SFTConfig

from rlhf.cost.sizes import Sizes, model_and_data
from rlhf.cost.slices import Shape, Slices, slices
from rlhf.evaluation.policies import BEST_OF
from rlhf.models.load import adapter_settings
from rlhf.pipeline.plan import plan, stages_until
from rlhf.pipeline.store import Stage
from rlhf.pipeline.training import quiet_libraries, split_settings, training_arguments
from rlhf.ppo.config import PPOConfig
from rlhf.recipe.schema import Recipe

BITS = 4.5  # of a 4-bit weight, with its scales
GRADIENT_AND_MOMENTS = 3  # what AdamW's training keeps beside each weight, each as large
BATCHES = 200  # drawn to find out how long the longest row of a batch is


@dataclass(frozen=True)
class Estimate:
    """One stage.

    Attributes:
        rows: trained on or sampled, each counted once.
        tokens: of these rows, over all passes.
        steps: of the optimizer.
        bytes: at the peak, of one process (of its GPU, where there is one).
        seconds: on this machine, by one process.
    """

    folder: str
    rows: int
    tokens: int
    steps: int
    bytes: float
    seconds: float


def estimate(recipe: Recipe, *, until: str | None = None) -> tuple[list[Estimate], list[str]]:
    """Every stage of a recipe that trains or samples, and what there is to know about these figures.

    Args:
        until: the last stage, as `rlhf run --until` takes it.

    Raises:
        UserError: the data or the model's configuration can't be read.
    """
    quiet_libraries()
    with tempfile.TemporaryDirectory() as work:
        config, sizes = model_and_data(recipe, Path(work))
    costs = _Costs(recipe, config, sizes)
    estimators: dict[str, Callable[[Stage], Estimate]] = {
        "sft": costs.sft,
        "vote": costs.vote,
        "sample": costs.sample,
        "reward": costs.reward,
        "ppo": costs.ppo,
        "evaluate": costs.evaluate,
    }
    stages = stages_until(plan(recipe), until)
    return [estimators[stage.name](stage) for stage in stages if stage.name in estimators], sizes.notes


def _longest_of(lengths: Sequence[int], rows: int) -> int:
    """Mean length of the longest of so many rows: what a padded batch is as long as."""
    rng = random.Random(0)
    return round(statistics.mean(max(rng.choices(lengths, k=rows)) for _ in range(BATCHES)))


def _round_of(stage: Stage) -> int:
    return int(stage.folder.partition("/")[0].rpartition("-")[2])


# ---- What it costs ----


class _Costs:
    """Estimates of one recipe's stages; what was timed is kept for the next round."""

    def __init__(self, recipe: Recipe, config: PretrainedConfig, sizes: Sizes):
        self.recipe, self.config, self.sizes = recipe, config, sizes
        self.shares_prompt = config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        self.process = 0.0 if torch.cuda.is_available() else 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.args: dict[str, Any] = {
            "sft": self._arguments(SFTConfig, recipe.sft.trl_settings()),
            "reward": self._arguments(RewardConfig, {"num_train_epochs": 1} | recipe.reward.trl_settings()),
            "vote": self._arguments(RewardConfig, {"num_train_epochs": 1} | recipe.vote_settings()),
            "ppo": self._arguments(PPOConfig, recipe.ppo.trl_settings()),
        }
        self._slices: dict[tuple[str, bool], Slices] = {}
        self._seconds: dict[Any, float] = {}
        ppo = self.args["ppo"][1]
        answers = [min(n, ppo.max_completion_length) for n in sizes.answers]
        prompts = [min(n, ppo.max_prompt_length or n) for n in sizes.prompts]
        self.answer = _longest_of(answers, ppo.per_device_train_batch_size)
        self.prompt = _longest_of(prompts, ppo.per_device_train_batch_size)
        self.read = round(statistics.mean(prompts) + statistics.mean(answers))  # tokens of a prompt and its answer

    def _arguments(self, config_class: Any, keys: dict[str, Any]) -> tuple[Any, Any]:
        model_config, settings = split_settings(keys)
        return model_config, training_arguments(config_class, settings, Path("nowhere"), self.recipe.seed)

    # The stages.

    def sft(self, stage: Stage) -> Estimate:
        """One model, logits at every token."""
        args = self.args["sft"][1]
        lengths = [min(n, args.max_length or n) for n in self.sizes.demonstrations]
        length = _longest_of(lengths, args.per_device_train_batch_size)
        tokens = self.sizes.rows["sft"] * statistics.mean(lengths) * args.num_train_epochs
        shape = Shape(args.per_device_train_batch_size, length, length)
        steps, seconds = self._training("sft", shape, self.sizes.rows["sft"])
        return self._estimate(stage, self.sizes.rows["sft"], tokens, steps, self._memory("sft", shape), seconds)

    def reward(self, stage: Stage, section: str = "reward", share: float = 1.0) -> Estimate:
        """One model, or the members of an ensemble or a vote; the prompt of a pair is read once."""
        how, args = self.recipe.reward, self.args[section][1]
        models = how.members if section == "reward" else self.recipe.vote.members
        rows = self._pairs(stage)
        trained = round(rows * share)
        prompt, answer = (statistics.mean(lengths) for lengths in (self.sizes.prompts, self.sizes.answers))
        pair = prompt * (1 if self.shares_prompt else 2) + 2 * answer
        views = 2 if how.extra is not None and section == "reward" else 1
        forwards = views if self.shares_prompt else 2  # rows of a pair
        shape = Shape(forwards * args.per_device_train_batch_size, round(pair * views / forwards), 0)
        steps, seconds = self._training(section, shape, trained * forwards)
        tokens = models * trained * views * pair * args.num_train_epochs
        if how.meta and section == "reward":
            climb = Shape(how.meta_prompts, self.prompt + how.meta_responses * self.answer, 0)
            seconds += steps * self._time(section, climb, training=True)
        judged = rows * (1 - share or 1)
        if section == "reward":
            judged = self.sizes.rows["test_pairs"] or self._held_out(stage)
        seconds += self._scoring(section, 2 * judged)
        return self._estimate(stage, rows, tokens, models * steps, self._memory(section, shape), models * seconds)

    def vote(self, stage: Stage) -> Estimate:
        """So many reward models, each on the pairs of all folds but one."""
        return self.reward(stage, "vote", 1.0 if self.recipe.vote.in_sample else 1 - 1 / self.recipe.vote.folds)

    def sample(self, stage: Stage) -> Estimate:
        """Answers of the present policy."""
        count = min(stage.settings["prompts"], self.sizes.rows["prompts"]) * stage.settings["responses"]
        return self._sampled(stage, count, 0.0)

    def ppo(self, stage: Stage) -> Estimate:
        """Rollouts: sampling, scoring, three forwards, and the update of policy and critic."""
        args, rows = self.args["ppo"][1], self.args["ppo"][1].per_device_train_batch_size
        policy, critic = Shape(rows, self.prompt + self.answer, self.answer), Shape(rows, self.prompt + self.answer, 0)
        size = args.local_rollout_size
        episodes = args.total_episodes or round(args.num_train_epochs * self.sizes.rows["prompts"])
        rollouts = max(1, round(episodes / size))
        micro_batches = size // rows
        members = self.recipe.reward.members
        # Policy and reference; critic and reward models.
        forwards = 2 * self._time("ppo", policy) + (1 + members) * self._time("ppo", critic)
        updates = self._time("ppo", policy, training=True) + self._time("ppo", critic, training=True)
        optimizer = sum(self._of("ppo", logits).seconds_of_update() for logits in (True, False))
        seconds = rollouts * (
            self._sampling(size)
            + micro_batches * forwards
            + args.num_ppo_epochs * (micro_batches * updates + args.num_mini_batches * optimizer)
        )
        steps, tokens = rollouts * args.steps_per_rollout, rollouts * size * self.read
        cache = self._cache(size)
        memory = max(self._memory("ppo", policy), self._memory("ppo", policy, activations=False) + cache)
        return self._estimate(stage, rollouts * size, tokens, steps, memory, seconds)

    def evaluate(self, stage: Stage) -> Estimate:
        """Answers of the policy, and once in a run of SFT."""
        prompts = min(self.recipe.evaluate.prompts, self.sizes.rows["test_prompts"])
        has_gold = self.recipe.lab is not None or self.recipe.evaluate.gold is not None
        of_sft = 0 if "first_evaluation" in stage.parents else (BEST_OF if has_gold else 1)
        return self._sampled(stage, prompts * (1 + of_sft), self._scoring("reward", prompts * (1 + of_sft)))

    # Their parts.

    def _pairs(self, stage: Stage) -> int:
        """Training pairs of a round: those of the data, and the labels of the rounds so far."""
        number, rounds, rows = _round_of(stage), self.recipe.rounds, self.sizes.rows["pairs"]
        if rounds.labels_from == "dataset" and rounds.count > 1:
            return rows * number // rounds.count
        if rounds.first == "offline":
            return rows + rounds.labels * (number - 1)
        return rounds.labels * number - self._held_out(stage)

    def _held_out(self, stage: Stage) -> int:
        """Labels so far that the reward model is judged on, where the data has no pairs for that."""
        labels = self.recipe.rounds.labels * _round_of(stage)
        return 0 if self.sizes.rows["test_pairs"] else round(self.recipe.data.test_fraction * labels)

    def _training(self, section: str, shape: Shape, rows: int) -> tuple[int, float]:
        """Steps and seconds of a supervised stage."""
        args = self.args[section][1]
        micro_batches = math.ceil(rows / shape.rows) * args.num_train_epochs
        steps = math.ceil(math.ceil(rows / shape.rows) / args.gradient_accumulation_steps) * args.num_train_epochs
        of = self._of(section, shape.has_logits)
        return round(steps), micro_batches * self._time(section, shape, training=True) + steps * of.seconds_of_update()

    def _sampling(self, count: float) -> float:
        """Seconds of sampling answers, a rollout at once."""
        size = self.args["ppo"][1].local_rollout_size
        shape = ("sampling", self.prompt, self.answer)
        if shape not in self._seconds:
            self._seconds[shape] = self._of("ppo", True).seconds_of_sampling(size, self.prompt, self.answer)
        return self._seconds[shape] * count / size

    def _scoring(self, section: str, count: float) -> float:
        rows = self.args[section][1].per_device_eval_batch_size
        return count / rows * self._time(section, Shape(rows, self.read, 0))

    def _sampled(self, stage: Stage, count: int, more: float) -> Estimate:
        weights = self._of("ppo", True).weights() + self._cache(2 * self.args["ppo"][1].local_rollout_size)
        return self._estimate(stage, count, count * self.read, 0, self.process + weights, self._sampling(count) + more)

    def _time(self, section: str, shape: Shape, *, training: bool = False) -> float:
        key = (section, shape, training)
        if key not in self._seconds:
            self._seconds[key] = self._of(section, shape.has_logits).seconds(shape, training=training)
        return self._seconds[key]

    def _of(self, section: str, has_logits: bool) -> Slices:
        if (section, has_logits) not in self._slices:
            model_config, args = self.args[section]
            named = None if model_config.dtype in (None, "auto") else getattr(torch, model_config.dtype)
            fresh = self.recipe.lab is not None or self.recipe.backbone.from_scratch is not None
            adapted = model_config.use_peft and not (fresh and section == "sft")
            self._slices[section, has_logits] = slices(
                self.config,
                has_logits=has_logits,
                device=args.device,
                dtype=named or self.config.dtype or torch.float32,
                autocast=args.bf16,
                adapter=adapter_settings(model_config) if adapted else None,
                checkpointing=args.gradient_checkpointing,
            )
        return self._slices[section, has_logits]

    def _memory(self, section: str, shape: Shape, *, activations: bool = True) -> float:
        """Bytes at the peak: weights, gradients and AdamW's two moments of what is trained, activations; for PPO of four roles."""
        of = self._of(section, shape.has_logits)
        trained = of.weights(trainable=True)
        frozen = of.weights() - trained
        if self.args[section][0].load_in_4bit:
            frozen -= of.layer_weights() * (1 - BITS / 16)
        total = frozen + (1 + GRADIENT_AND_MOMENTS) * trained + (of.saved(shape) if activations else 0.0)
        if section == "ppo":
            head = self._of("ppo", False)
            beside = Shape(shape.rows, shape.length, 0)
            others = self.recipe.reward.members - 1  # of an ensemble, each with a base of its own
            total += others * head.weights()
            if self.args["ppo"][0].use_peft:  # critic; reference and reward adapters
                total += (1 + GRADIENT_AND_MOMENTS + 2) * head.weights(trainable=True)
            else:  # critic, reward, reference
                total += (1 + GRADIENT_AND_MOMENTS + 1) * head.weights() + of.weights()
                total += head.saved(beside) if activations else 0.0
        return self.process + total

    def _cache(self, rows: int) -> float:
        """Bytes of keys and values while so many answers are sampled."""
        text = self.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        size = torch.tensor([], dtype=text.dtype or torch.float32).element_size()
        return 2.0 * rows * (self.prompt + self.answer) * text.num_hidden_layers * width * size

    def _estimate(
        self, stage: Stage, rows: float, tokens: float, steps: float, memory: float, seconds: float
    ) -> Estimate:
        return Estimate(stage.folder, round(rows), round(tokens), round(steps), memory, seconds)
