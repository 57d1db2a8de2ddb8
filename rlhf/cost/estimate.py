"""What each stage of a run will cost, estimated before any weights are loaded: tokens, steps, memory and time.

Rows and token lengths are counted on the data (`rlhf.cost.sizes`); seconds and bytes come from one and two random layers of the
model at the run's batch shapes (`rlhf.cost.slices`); the rest is arithmetic that can be read below.
"""

import math
import random
import resource
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from rlhf.cost.batches import (
    BATCHES,
    PairBatch,
    Scoring,
    different_texts,
    elements_by_length,
    longest_of,
    mean_shape,
    stretches_of,
    unpadded_shapes,
)
from rlhf.cost.memory import (
    MOMENTS,
    Memory,
    Processes,
    Role,
    adapter_of,
    exchanged_in_rollouts,
    exchanged_in_training,
    largest,
    role_of,
)
from rlhf.cost.sizes import PairTokens, Sizes
from rlhf.cost.slices import Shape, Slices, slices
from rlhf.cost.work import Estimate, PairWork, PpoWork, Rollouts, SamplingWork, Section, SftWork, Training, Work
from rlhf.models.batching import TOKENS_TOGETHER
from rlhf.models.load import adapter_settings
from rlhf.models.packing import LONG_ROW, pack

ONE_PROCESS = Processes()
SCORED = 64  # texts that a reward model scores together
TRAINED_TO_FORWARD = 3  # a backward takes twice the operations of its forward


class Estimator:
    """Estimates the stages of one run; what was timed once is not timed again in the next round.

    Args:
        config: of the whole model; nothing is loaded.
        sizes: of the data.
        training: how each section trains.
        rollouts: how PPO samples and learns.
        processes: that train together.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        sizes: Sizes,
        training: Mapping[Section, Training],
        rollouts: Rollouts,
        processes: Processes = ONE_PROCESS,
    ):
        self.config, self.sizes, self.training, self.rollouts = config, sizes, training, rollouts
        self.processes = processes
        self.shares_prompt = config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        self.process = 0.0 if torch.cuda.is_available() else 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._slices: dict[tuple[Section, bool, torch.dtype | None], Slices] = {}
        self._seconds: dict[tuple[object, ...], float] = {}
        self._peaks: dict[tuple[object, ...], float] = {}
        rows = training["ppo"].args.per_device_train_batch_size
        self.answers = [min(length, rollouts.max_answer_length) for length in sizes.answers]
        self.prompts = [min(length, rollouts.max_prompt_length or length) for length in sizes.prompts]
        # Tokens of the longest answer and prompt in a batch, and of a prompt with its answer on average.
        self.answer, self.prompt = longest_of(self.answers, rows), longest_of(self.prompts, rows)
        # Memory is that of the largest batch, where time is a sum over all; a policy's answers may all go on to the limit.
        self.longest_answer, self.longest_prompt = rollouts.max_answer_length, max(self.prompts)
        self.whole = round(statistics.mean(self.prompts) + statistics.mean(self.answers))
        rng = random.Random(0)
        self.texts = [rng.choice(self.prompts) + rng.choice(self.answers) for _ in range(BATCHES)]

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
        tokens, rows = work.rows * statistics.mean(lengths), work.rows
        if args.packing and args.max_length:  # several in one row, until it is full
            lengths, rows = [args.max_length], math.ceil(tokens / args.max_length)
        shape = Shape(size := args.per_device_train_batch_size, longest_of(lengths, size), longest_of(lengths, size))
        steps, seconds = self._supervised("sft", shape, self._micro_batches(rows, shape.rows))
        memory = self.memory("sft", Shape(shape.rows, max(lengths), max(lengths)))
        read = round(tokens * args.num_train_epochs / self.processes.count)
        return Estimate(work.folder, work.rows, read, steps, memory, seconds)

    def _pairs(self, work: PairWork) -> Estimate:
        """Estimate reward models; where the model allows it, the prompt of a pair is read once.

        So is, in a batch, each answer to a prompt that several pairs compare; a batch of rankings has each once anyhow.
        """
        # 1. The pairs that fit into max_length, in batches of like length; the longest is the largest.
        section, args = work.section, self.training[work.section].args
        limit = getattr(args, "max_length", None) or math.inf
        pairs = [pair for pair in self.sizes.pairs if max(pair.chosen, pair.rejected) <= limit] or self.sizes.pairs
        share, count = len(pairs) / len(self.sizes.pairs), args.per_device_train_batch_size
        trained = round(work.trained * share)
        of_pair = 1.0 if work.are_rankings else work.answers / 2  # a rated answer is half a pair
        together = math.ceil(min(count, max(1, trained)) * of_pair)
        if work.top_layers is not None:  # a trunk reads each pair by itself
            pairs = [pair._replace(group=None) for pair in pairs]
        batches = self._batches(pairs, together, work)
        shapes = [batch.shape for batch in batches]
        shape = mean_shape(shapes)
        tokens = sum(batch.tokens for batch in batches) / sum(batch.elements for batch in batches) * of_pair
        if work.top_layers is not None:
            return self._on_trunk(work, work.top_layers, trained, shapes, round(tokens))

        # 2. Training, each model beginning with a comparison of the shared forward with the plain one.
        steps, seconds = self._supervised(section, shape, self._micro_batches(trained, count))
        texts = [length for pair in pairs for length in (pair.chosen, pair.rejected)]
        if self.shares_prompt:
            compared = round(statistics.mean(batch.texts for batch in batches))
            alone = Shape(work.views * compared, longest_of(texts, compared), 0)
            seconds += self._time(section, shape) + self._time(section, alone)
        if work.ascent is not None:
            prompts, answers = work.ascent
            ascent = Shape(math.ceil(prompts / self.processes.count), self.prompt + answers * self.answer, 0)
            seconds += steps * self._time(section, ascent, training=True)

        # 3. Scores of pairs; the scale of the scores; the certificate, in the model's precision and in bfloat16.
        memory = self.memory(section, max(shapes, key=lambda batch: batch.rows * batch.length))
        scoring = [self._scoring(section, 2 * work.scored, texts), self._scoring(section, work.calibrated, self.texts)]
        seconds += sum(scored.seconds for scored in scoring)
        memories = [
            memory,
            *(self._alone([self._model("reward", section, has_logits=False)], scored.bytes) for scored in scoring),
        ]
        once = 0.0
        if work.calibrated and self.shares_prompt:
            once = self._sampling(work.calibrated, self.rollouts.together_elsewhere)
            memories.append(self._memory_of_sampling())
        for length_alone in work.golden:
            seconds += self._time(section, Shape(1, length_alone, 0))
            if length_alone < max(work.golden):  # the long text is not read in bfloat16
                seconds += self._time(section, Shape(1, length_alone, 0), dtype=torch.bfloat16)
        total = round(work.models * trained * work.views * tokens * args.num_train_epochs / self.processes.count)
        rows, seconds = round(work.pairs * share), once + work.models * seconds
        return Estimate(work.folder, rows, total, work.models * steps, largest(memories), seconds)

    def _on_trunk(
        self, work: PairWork, top_layers: int, trained: int, shapes: Sequence[Shape], tokens: int
    ) -> Estimate:
        """Estimate models that share a frozen trunk: it is read once over all pairs, and each trains whole layers above it.

        A forward, and a forward with backward, cost a layer's share of the whole model's; nothing below the top is trained, and
        nothing is under autocast.

        Args:
            trained: pairs that each model trains on.
            shapes: of the batches of all pairs.
            tokens: of a pair.
        """
        args = self.training[work.section].args
        depth = self.config.get_text_config().num_hidden_layers
        share = top_layers / depth
        forward = self._time(work.section, mean_shape(shapes), dtype=self._without_autocast(work.section))
        size = args.per_device_train_batch_size
        micro_batches = math.ceil(trained / size)
        steps = math.ceil(micro_batches / args.gradient_accumulation_steps) * args.num_train_epochs
        each = args.num_train_epochs * micro_batches * TRAINED_TO_FORWARD + work.scored / size
        seconds = forward * ((1 - share) * math.ceil(work.pairs / size) + share * work.models * each)
        longest = max(shape.length for shape in shapes)
        batch = Shape(max(1, min(work.pairs, TOKENS_TOGETHER // longest)), longest, 0)
        of_member = (2 + MOMENTS) * top_layers * self._slices_of(work.section, False).layer()
        activations = of_member + self._peak(work.section, batch, training=False)
        memory = self._alone([self._model("reward", work.section, has_logits=False)], activations)
        total = round(work.models * trained * tokens * args.num_train_epochs)
        return Estimate(work.folder, work.pairs, total, round(work.models * steps), memory, seconds)

    def _batches(self, pairs: Sequence[PairTokens], count: int, work: PairWork) -> list[PairBatch]:
        """Return the batches of a sample, so many elements each, grouped by length and packed or padded as the trainer does it."""
        elements = elements_by_length(pairs, are_rankings=work.are_rankings)
        long_row = LONG_ROW * self.config.get_text_config().hidden_size
        batches = []
        for start in range(0, len(elements), count):
            batch = elements[start : start + count]
            read = [pair for element in batch for pair in element]
            # What reads each text in a row of its own has both of every pair, but of a ranking each answer once.
            is_each_once = self.shares_prompt or work.are_rankings
            groups = different_texts(read if is_each_once else [pair._replace(group=None) for pair in read])
            texts = [text for group in groups for text in group]
            if self.shares_prompt:
                packed = pack(groups, pad_token_id=0, long_row=long_row)
                (rows, width), tokens = packed.input_ids.shape, int((packed.segments >= 0).sum())
            else:
                rows, width, tokens = len(texts), max(map(len, texts)), sum(map(len, texts))
            batches.append(PairBatch(Shape(work.views * rows, width, 0), len(texts), tokens, len(batch)))
        return batches

    def _ppo(self, work: PpoWork) -> Estimate:
        """Estimate PPO: sampling, scoring, three forwards, and the update of policy and critic."""
        rollouts, rows = self.rollouts, self.training["ppo"].args.per_device_train_batch_size
        policy, widest = self._unpadded(rows)
        critic = Shape(policy.rows, policy.length, 0)
        micro_batches = rollouts.size // rows
        # Policy and reference; the critic; reward models, which autocast leaves alone.
        scoring = rollouts.reward_models * self._time("ppo", critic, dtype=self._without_autocast("ppo"))
        forwards = 2 * self._time("ppo", policy) + self._time("ppo", critic) + scoring
        updates = self._time("ppo", policy, training=True) + self._time("ppo", critic, training=True)
        optimizer = sum(self._slices_of("ppo", has_logits).seconds_of_update() for has_logits in (True, False))
        seconds = self._sampling(work.tried, work.tried) + work.rollouts * (
            self._sampling(rollouts.size, rollouts.together)
            + micro_batches * forwards
            + rollouts.epochs * (micro_batches * updates + rollouts.mini_batches * optimizer)
        )
        # Where nothing is trained, every role is whole on each process.
        update, roles = self.memory("ppo", widest), self._roles("ppo", has_logits=True)
        rollout = replace(update, exchanged=exchanged_in_rollouts(roles, self.processes), accumulates=True)
        scored = Shape(min(SCORED, rollouts.size), self.longest_prompt + self.longest_answer, 0)
        prefill = self._peak("ppo", Shape(rollouts.together, self.longest_prompt, 1), training=False)
        memories = [
            update,
            replace(rollout, activations=self._peak("ppo", scored, training=False)),
            replace(rollout, activations=self._cache(rollouts.together) + prefill),
        ]
        answers = work.rollouts * rollouts.size
        rows, steps = answers * self.processes.count, work.rollouts * rollouts.steps
        return Estimate(work.folder, rows, answers * self.whole, steps, largest(memories), seconds)

    def _sampled(self, work: SamplingWork) -> Estimate:
        """Estimate the sampling of answers, their scoring and their KL."""
        rows = self.rollouts.together_elsewhere
        seconds, memory = self._sampling(work.answers, rows), self._memory_of_sampling()
        if work.is_scored:
            # Policy, SFT and reward models, each with a base of its own.
            policies = [self._model(name, "ppo", has_logits=True) for name in ("policy", "sft")]
            models = [*policies, *[self._model("reward", "reward", has_logits=False)] * self.rollouts.reward_models]
            scoring = self._scoring("reward", work.answers, self.texts)
            seconds += self.rollouts.reward_models * scoring.seconds
            together = min(rows, max(1, work.compared))
            compared, widest = self._unpadded(together)
            seconds += 2 * work.compared / together * self._time("ppo", compared)
            peaks = [memory.activations, scoring.bytes, self._peak("ppo", widest, training=False)]
            memory = largest([self._alone(models, peak) for peak in peaks])
        return Estimate(work.folder, work.answers, work.answers * self.whole, 0, memory, seconds)

    # Their parts.

    def _unpadded(self, texts: int) -> tuple[Shape, Shape]:
        """Return the mean shape of batches of so many texts as the roles of PPO read them, and the largest if no answer ends."""
        long_row = LONG_ROW * self.config.get_text_config().hidden_size
        return unpadded_shapes(self.prompts, self.answers, texts, long_row=long_row, limit=self.longest_answer)

    def _micro_batches(self, rows: int, size: int) -> int:
        """Return how many micro-batches of so many rows one process reads in an epoch."""
        return math.ceil(rows / (size * self.processes.count))

    def _supervised(self, section: Section, shape: Shape, micro_batches: int) -> tuple[int, float]:
        """Return the steps and seconds of training on a file that has so many micro-batches."""
        args = self.training[section].args
        steps = math.ceil(micro_batches / args.gradient_accumulation_steps) * args.num_train_epochs
        update = self._slices_of(section, shape.has_logits).seconds_of_update()
        trained = args.num_train_epochs * micro_batches * self._time(section, shape, training=True)
        return round(steps), trained + steps * update

    def _sampling(self, answers: float, rows: int) -> float:
        """Return the seconds of sampling answers, so many at once."""
        rows = min(rows, math.ceil(answers))
        if rows == 0:
            return 0.0
        key = ("sampling", rows)
        if key not in self._seconds:
            prompt, stretches = longest_of(self.prompts, rows), stretches_of(self.answers, rows)
            self._seconds[key] = self._slices_of("ppo", True).seconds_of_sampling(rows, prompt, stretches)
        return self._seconds[key] * answers / rows

    def _scoring(self, section: Section, texts: float, lengths: Sequence[int]) -> Scoring:
        """Return the cost of scoring texts of such lengths in tokens, in batches of like length, each padded to its longest."""
        count = math.ceil(texts)
        if count == 0:
            return Scoring(0.0, 0.0)
        drawn = sorted(random.Random(0).choices(lengths, k=count))
        batches = [drawn[start : start + SCORED] for start in range(0, count, SCORED)]
        shapes = [Shape(len(batch), batch[-1], 0) for batch in batches]
        forward = self._time(section, mean_shape(shapes), dtype=self._without_autocast(section))
        seconds = len(shapes) * forward * texts / count
        return Scoring(seconds, self._peak(section, max(shapes, key=lambda x: x.rows * x.length), training=False))

    def _time(
        self, section: Section, shape: Shape, *, training: bool = False, dtype: torch.dtype | None = None
    ) -> float:
        """Return the seconds of a forward, with its backward where it trains; each shape is timed once."""
        key = (section, shape, training, dtype)
        if key not in self._seconds:
            measured = self._slices_of(section, shape.has_logits, dtype)
            self._seconds[key] = measured.seconds(shape, training=training)
        return self._seconds[key]

    def _peak(self, section: Section, shape: Shape, *, training: bool) -> float:
        """Return the bytes that live at once in a forward, with its backward where it trains; each shape is measured once."""
        key = (section, shape, training)
        if key not in self._peaks:
            self._peaks[key] = self._slices_of(section, shape.has_logits).peak(shape, training=training)
        return self._peaks[key]

    def _without_autocast(self, section: Section) -> torch.dtype | None:
        """Return the type of a section's weights where it trains under autocast; None where all is computed in that."""
        return self._dtype(section) if self.training[section].args.bf16 else None

    def _dtype(self, section: Section) -> torch.dtype:
        named = self.training[section].model.dtype
        dtype: torch.dtype | None = self.config.dtype if named in (None, "auto") else getattr(torch, named)
        return dtype or torch.float32

    def _slices_of(self, section: Section, has_logits: bool, dtype: torch.dtype | None = None) -> Slices:
        """Build the slices of a section's model, once; in another dtype, without autocast, where one is named."""
        if (section, has_logits, dtype) not in self._slices:
            model, args = self.training[section].model, self.training[section].args
            self._slices[section, has_logits, dtype] = slices(
                self.config,
                has_logits=has_logits,
                device=args.device,
                dtype=dtype or self._dtype(section),
                autocast=args.bf16 and dtype is None,
                adapter=adapter_settings(model) if model.use_peft else None,
                checkpointing=args.gradient_checkpointing,
                fused_head=section == "sft",
            )
        return self._slices[section, has_logits, dtype]

    def memory(self, section: Section, shape: Shape) -> Memory:
        """Return the bytes at the peak of training: of one model, or of PPO's four roles."""
        roles = self._roles(section, has_logits=shape.has_logits)
        activations = self._peak(section, shape, training=True)
        if section == "ppo" and not self.training[section].model.use_peft:  # policy and critic in one backward
            activations += self._peak("ppo", Shape(shape.rows, shape.length, 0), training=True)
        return Memory(
            self.process,
            tuple(role.share(self.processes) for role in roles),
            exchanged_in_training(roles, self.processes),
            activations,
            accumulates=self.training[section].args.gradient_accumulation_steps > 1,
        )

    def _roles(self, section: Section, *, has_logits: bool) -> tuple[Role, ...]:
        """Return the roles of a section's training: one model, or those of PPO."""
        model, slices_of = self.training[section].model, self._slices_of(section, has_logits)
        if section != "ppo":
            return (role_of("model", slices_of, quantised=model.load_in_4bit),)
        policy, head = role_of("policy", slices_of, quantised=model.load_in_4bit), self._slices_of("ppo", False)
        if model.use_peft:
            others = [adapter_of(name, head, trained=name == "critic") for name in ("critic", "reference", "reward")]
        else:
            reference, reward = role_of("reference", slices_of, trained=False), role_of("reward", head, trained=False)
            others = [role_of("critic", head), reference, reward]
        ensemble = [role_of("reward", head, trained=False)] * (self.rollouts.reward_models - 1)  # each with its base
        return (policy, *others, *ensemble)

    def _model(self, name: str, section: Section, *, has_logits: bool) -> Role:
        """Return a section's model as it is where it is not trained."""
        return role_of(name, self._slices_of(section, has_logits), trained=False)

    def _alone(self, models: Sequence[Role], activations: float) -> Memory:
        """Return the bytes of one process that has models to itself and trains none."""
        return Memory(self.process, tuple(model.share(ONE_PROCESS) for model in models), 0.0, activations)

    def _memory_of_sampling(self) -> Memory:
        """Return the bytes at the peak of sampling from one policy outside of PPO."""
        rows = self.rollouts.together_elsewhere
        prefill = self._peak("ppo", Shape(rows, self.longest_prompt, 1), training=False)
        return self._alone([self._model("policy", "ppo", has_logits=True)], self._cache(rows) + prefill)

    def _cache(self, rows: int) -> float:
        """Return the bytes of keys and values while so many answers are sampled."""
        text = self.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        size = torch.tensor([], dtype=text.dtype or torch.float32).element_size()
        return 2.0 * rows * (self.longest_prompt + self.longest_answer) * text.num_hidden_layers * width * size
