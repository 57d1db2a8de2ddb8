"""What each stage of a run will cost, estimated before any weights are loaded: tokens, steps, memory and time.

Rows and token lengths are counted on the data (`rlhf.cost.sizes`); seconds and bytes come from one and two random layers of the
model at the run's batch shapes (`rlhf.cost.slices`); the rest is arithmetic that can be read below.
"""

import math
import random
import resource
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from rlhf.cost.sizes import Sizes
from rlhf.cost.slices import Shape, Slices, slices
from rlhf.cost.work import PairWork, PpoWork, Rollouts, SamplingWork, Section, SftWork, Training, Work
from rlhf.models.load import adapter_settings

BITS = 4.5  # of a 4-bit weight, with its scales
GRADIENT_AND_MOMENTS = 3  # what AdamW's training keeps beside each weight, each as large
BATCHES = 200  # drawn to learn how long the longest row of a batch is


@dataclass(frozen=True)
class Estimate:
    """What one stage will cost.

    Attributes:
        folder: of the stage in the run.
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


class Estimator:
    """Estimates the stages of one run; what was timed once is not timed again in the next round.

    Args:
        config: of the whole model; nothing is loaded.
        sizes: of the data.
        training: how each section trains.
        rollouts: how PPO samples and learns.
    """

    def __init__(
        self, config: PretrainedConfig, sizes: Sizes, training: Mapping[Section, Training], rollouts: Rollouts
    ):
        self.config, self.sizes, self.training, self.rollouts = config, sizes, training, rollouts
        self.shares_prompt = config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        self.process = 0.0 if torch.cuda.is_available() else 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._slices: dict[tuple[Section, bool], Slices] = {}
        self._seconds: dict[tuple[object, ...], float] = {}
        rows = training["ppo"].args.per_device_train_batch_size
        answers = [min(length, rollouts.max_answer_length) for length in sizes.answers]
        prompts = [min(length, rollouts.max_prompt_length or length) for length in sizes.prompts]
        # Tokens of the longest answer and prompt in a batch, and of a prompt with its answer on average.
        self.answer, self.prompt = longest_of(answers, rows), longest_of(prompts, rows)
        self.whole = round(statistics.mean(prompts) + statistics.mean(answers))

    def estimate(self, work: Work) -> Estimate:
        """Estimate what a stage costs."""
        match work:
            case SftWork():
                return self._sft(work)
            case PairWork():
                return self._pairs(work)
            case PpoWork():
                return self._ppo(work)
            case SamplingWork():
                return self._sampled(work)

    # The stages.

    def _sft(self, work: SftWork) -> Estimate:
        """Estimate supervised fine-tuning: one model, logits at every token."""
        args = self.training["sft"].args
        lengths = [min(length, args.max_length or length) for length in self.sizes.demonstrations]
        longest = longest_of(lengths, args.per_device_train_batch_size)
        tokens = work.rows * statistics.mean(lengths) * args.num_train_epochs
        shape = Shape(args.per_device_train_batch_size, longest, longest)
        steps, seconds = self._supervised("sft", shape, work.rows)
        return Estimate(work.folder, work.rows, round(tokens), steps, self.memory("sft", shape), seconds)

    def _pairs(self, work: PairWork) -> Estimate:
        """Estimate reward models; where the model allows it, the prompt of a pair is read once."""
        args = self.training[work.section].args
        prompt, answer = statistics.mean(self.sizes.prompts), statistics.mean(self.sizes.answers)
        pair = prompt * (1 if self.shares_prompt else 2) + 2 * answer
        rows = work.views if self.shares_prompt else 2  # of a pair
        shape = Shape(rows * args.per_device_train_batch_size, round(pair * work.views / rows), 0)
        steps, seconds = self._supervised(work.section, shape, work.trained * rows)
        tokens = work.models * work.trained * work.views * pair * args.num_train_epochs
        if work.ascent is not None:
            prompts, answers = work.ascent
            ascent = Shape(prompts, self.prompt + answers * self.answer, 0)
            seconds += steps * self._time(work.section, ascent, training=True)
        seconds += self._scoring(work.section, 2 * work.scored)
        memory = self.memory(work.section, shape)
        return Estimate(work.folder, work.pairs, round(tokens), work.models * steps, memory, work.models * seconds)

    def _ppo(self, work: PpoWork) -> Estimate:
        """Estimate PPO: sampling, scoring, three forwards, and the update of policy and critic."""
        rollouts, rows = self.rollouts, self.training["ppo"].args.per_device_train_batch_size
        policy, critic = Shape(rows, self.prompt + self.answer, self.answer), Shape(rows, self.prompt + self.answer, 0)
        micro_batches = rollouts.size // rows
        # Policy and reference; critic and reward models.
        forwards = 2 * self._time("ppo", policy) + (1 + rollouts.reward_models) * self._time("ppo", critic)
        updates = self._time("ppo", policy, training=True) + self._time("ppo", critic, training=True)
        optimizer = sum(self._slices_of("ppo", has_logits).seconds_of_update() for has_logits in (True, False))
        seconds = work.rollouts * (
            self._sampling(rollouts.size)
            + micro_batches * forwards
            + rollouts.epochs * (micro_batches * updates + rollouts.mini_batches * optimizer)
        )
        memory = max(
            self.memory("ppo", policy), self.memory("ppo", policy, activations=False) + self._cache(rollouts.size)
        )
        answers = work.rollouts * rollouts.size
        return Estimate(work.folder, answers, answers * self.whole, work.rollouts * rollouts.steps, memory, seconds)

    def _sampled(self, work: SamplingWork) -> Estimate:
        """Estimate the sampling of answers, two rollouts at once since no backward follows, and their scoring."""
        weights = self._slices_of("ppo", True).weights() + self._cache(2 * self.rollouts.size)
        seconds = self._sampling(work.answers) + (self._scoring("reward", work.answers) if work.is_scored else 0.0)
        return Estimate(work.folder, work.answers, work.answers * self.whole, 0, self.process + weights, seconds)

    # Their parts.

    def _supervised(self, section: Section, shape: Shape, rows: int) -> tuple[int, float]:
        """Return the steps and seconds of training on rows of a file."""
        args = self.training[section].args
        micro_batches = math.ceil(rows / shape.rows) * args.num_train_epochs
        steps = math.ceil(math.ceil(rows / shape.rows) / args.gradient_accumulation_steps) * args.num_train_epochs
        update = self._slices_of(section, shape.has_logits).seconds_of_update()
        return round(steps), micro_batches * self._time(section, shape, training=True) + steps * update

    def _sampling(self, answers: float) -> float:
        """Return the seconds of sampling answers, a rollout at once."""
        size = self.rollouts.size
        key = ("sampling", self.prompt, self.answer)
        if key not in self._seconds:
            policy = self._slices_of("ppo", True)
            self._seconds[key] = policy.seconds_of_sampling(size, self.prompt, self.answer)
        return self._seconds[key] * answers / size

    def _scoring(self, section: Section, texts: float) -> float:
        """Return the seconds of scoring texts."""
        rows = self.training[section].args.per_device_eval_batch_size
        return texts / rows * self._time(section, Shape(rows, self.whole, 0))

    def _time(self, section: Section, shape: Shape, *, training: bool = False) -> float:
        """Return the seconds of a forward, with its backward where it trains; each shape is timed once."""
        key = (section, shape, training)
        if key not in self._seconds:
            self._seconds[key] = self._slices_of(section, shape.has_logits).seconds(shape, training=training)
        return self._seconds[key]

    def _slices_of(self, section: Section, has_logits: bool) -> Slices:
        """Build the slices of a section's model, once."""
        if (section, has_logits) not in self._slices:
            model, args = self.training[section].model, self.training[section].args
            named = None if model.dtype in (None, "auto") else getattr(torch, model.dtype)
            self._slices[section, has_logits] = slices(
                self.config,
                has_logits=has_logits,
                device=args.device,
                dtype=named or self.config.dtype or torch.float32,
                autocast=args.bf16,
                adapter=adapter_settings(model) if model.use_peft else None,
                checkpointing=args.gradient_checkpointing,
            )
        return self._slices[section, has_logits]

    def memory(self, section: Section, shape: Shape, *, activations: bool = True) -> float:
        """Return the bytes at the peak of training: of one model, or of PPO's four roles.

        They are weights, gradients and AdamW's two moments of what is trained, and activations.
        """
        model = self.training[section].model
        whole = self._slices_of(section, shape.has_logits)
        trained = whole.weights(trainable=True)
        frozen = whole.weights() - trained
        if model.load_in_4bit:
            frozen -= whole.layer_weights() * (1 - BITS / 16)
        total = frozen + (1 + GRADIENT_AND_MOMENTS) * trained + (whole.saved(shape) if activations else 0.0)
        if section == "ppo":
            head = self._slices_of("ppo", False)
            others = self.rollouts.reward_models - 1  # of an ensemble, each with a base of its own
            total += others * head.weights()
            if model.use_peft:  # critic; reference and reward adapters
                total += (1 + GRADIENT_AND_MOMENTS + 2) * head.weights(trainable=True)
            else:  # critic, reward, reference
                total += (1 + GRADIENT_AND_MOMENTS + 1) * head.weights() + whole.weights()
                total += head.saved(Shape(shape.rows, shape.length, 0)) if activations else 0.0
        return self.process + total

    def _cache(self, rows: int) -> float:
        """Return the bytes of keys and values while so many answers are sampled."""
        text = self.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        size = torch.tensor([], dtype=text.dtype or torch.float32).element_size()
        return 2.0 * rows * (self.prompt + self.answer) * text.num_hidden_layers * width * size


def longest_of(lengths: Sequence[int], rows: int) -> int:
    """Estimate the longest of so many rows, drawn from lengths: a mean over 200 batches, and what a padded batch is as long as."""
    rng = random.Random(0)
    return round(statistics.mean(max(rng.choices(lengths, k=rows)) for _ in range(BATCHES)))
