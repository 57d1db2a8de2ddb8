"""What a recipe will cost, said before any weights are loaded: rows, tokens, steps, memory and time of every stage.

Rows and tokens are counted on the data themselves (the lab's are generated, local files are read and split as the run will);
of hub datasets only the recipe's caps are known. Seconds come from one and two random layers of the model at the recipe's
batch shapes (`rlhf.models.slices`); the rest is arithmetic that can be read below.
"""

import math
import random
import resource
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from trl import RewardConfig, SFTConfig

from rlhf.data.read import is_local
from rlhf.errors import UserError
from rlhf.evaluation.policy import BEST_OF
from rlhf.models.load import adapter_settings, find_source, load_tokenizer
from rlhf.models.scratch import design_base
from rlhf.models.slices import Shape, Slices, slices
from rlhf.models.text import answer_text, encode, prompt_text
from rlhf.pipeline.context import StageContext, read_jsonl
from rlhf.pipeline.plan import plan, stages_until
from rlhf.pipeline.stages import base_texts, run_data, run_lab
from rlhf.pipeline.store import Stage
from rlhf.pipeline.training import quiet_libraries, split_settings, training_arguments
from rlhf.ppo.config import PPOConfig
from rlhf.recipe.schema import DATA_SOURCES, Recipe

COUNTED = 512  # rows whose tokens are counted, of each kind
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


@dataclass
class Sizes:
    """Rows and token lengths of the data.

    Attributes:
        rows: by file: sft, pairs, test_pairs, prompts, test_prompts.
        prompts, answers, demonstrations: lengths of some.
        notes: what is not known, in sentences.
    """

    rows: dict[str, int]
    prompts: list[int]
    answers: list[int]
    demonstrations: list[int]
    notes: list[str] = field(default_factory=list)


def estimate(recipe: Recipe, *, until: str | None = None) -> tuple[list[Estimate], list[str]]:
    """Every stage of a recipe that trains or samples, and what there is to know about these figures.

    Args:
        until: the last stage, as `rlhf run --until` takes it.

    Raises:
        UserError: the data or the model's configuration can't be read.
    """
    quiet_libraries()
    with tempfile.TemporaryDirectory() as work:
        config, sizes = _model_and_data(recipe, Path(work))
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


# ---- What there is ----


def _model_and_data(recipe: Recipe, work: Path) -> tuple[PretrainedConfig, Sizes]:
    """The configuration, and the data as the run's own stages make them, in a folder that is thrown away."""
    # 1. The data: the lab's, or local files.
    parents, folder = {}, work / "round-0/data"
    hub = [f"data.{name}" for name in DATA_SOURCES for s in recipe.data.sources(name) if not is_local(s.source)]
    if recipe.lab is not None:
        parents = {"lab": work / "round-0/lab"}
        run_lab(StageContext(recipe, parents["lab"], {}, lambda _: None))
    if not hub:
        run_data(StageContext(recipe, folder, parents, lambda _: None))

    # 2. The model's shape and its tokenizer.
    name: str | Path | None = parents["lab"] / "model" if parents else recipe.backbone.model
    if recipe.backbone.from_scratch is not None:
        if hub:
            raise UserError(
                f"rlhf plan: {', '.join(hub)}: from_scratch needs the texts, and these are not local files."
            )
        settings = dict(recipe.backbone.from_scratch)
        texts = base_texts(folder / "data")
        tokenizer, config = design_base(texts, architecture=settings.pop("architecture"), settings=settings)
        return config, _counted(folder / "data", tokenizer)
    assert name is not None
    try:
        config = AutoConfig.from_pretrained(find_source(name).base, revision=recipe.backbone.revision)
        tokenizer = load_tokenizer(name, conversational=True, revision=recipe.backbone.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"backbone.model: {name}: {str(error).strip().splitlines()[0]}") from error
    return config, _from_caps(recipe, hub) if hub else _counted(folder / "data", tokenizer)


def _counted(data: Path, tokenizer: PreTrainedTokenizerBase) -> Sizes:
    """Rows of every file, and the tokens of some."""
    files = {name: data / f"{name}.jsonl" for name in ("sft", "pairs", "test_pairs", "prompts", "test_prompts")}
    rows = {name: read_jsonl(file) if file.is_file() else [] for name, file in files.items()}
    rng = random.Random(0)
    some = {name: rng.sample(found, min(COUNTED, len(found))) for name, found in rows.items()}

    def read(prompts: list[Any], answers: list[str]) -> list[int]:
        texts = [answer_text(tokenizer, p, a) for p, a in zip(prompts, answers, strict=True)]
        return [len(ids) for ids in encode(tokenizer, texts, conversational=True)] if texts else []

    asked = [row["prompt"] for row in some["pairs"]]
    begins = [len(ids) for ids in encode(tokenizer, [prompt_text(tokenizer, p) for p in asked], conversational=True)]
    whole = [read(asked, [row[side][0]["content"] for row in some["pairs"]]) for side in ("chosen", "rejected")]
    return Sizes(
        rows={name: len(found) for name, found in rows.items()},
        prompts=begins,
        answers=[max(1, n - p) for side in whole for n, p in zip(side, begins, strict=True)],
        demonstrations=read([r["prompt"] for r in some["sft"]], [r["completion"][0]["content"] for r in some["sft"]]),
    )


def _from_caps(recipe: Recipe, hub: list[str]) -> Sizes:
    """What a recipe says of hub data: as many rows as its caps allow, each as long as may be."""
    data, ppo = recipe.data, recipe.ppo.trl_settings()
    caps = {"sft": data.max_sft, "pairs": data.max_pairs, "prompts": data.max_prompts or data.max_pairs}
    missing = [f"data.max_{name}" for name, cap in caps.items() if cap is None and (name != "sft" or data.sft)]
    if missing:
        raise UserError(
            f"rlhf plan: {', '.join(hub)} lie on a hub and are not downloaded to be counted; set {', '.join(missing)}."
        )
    prompt, answer = (ppo.get(n, getattr(PPOConfig, n)) for n in ("max_prompt_length", "max_completion_length"))
    longest = recipe.sft.trl_settings().get("max_length", SFTConfig.max_length)
    rows = {name: cap or 0 for name, cap in caps.items()}
    held_out = max(1, round(data.test_fraction * rows["pairs"]))
    return Sizes(
        rows=rows | {"test_pairs": held_out, "test_prompts": recipe.evaluate.prompts},
        prompts=[prompt],
        answers=[answer],
        demonstrations=[longest],
        notes=[
            f"{', '.join(hub)}: on a hub, not downloaded; as many rows as the caps allow, each as long as the settings allow, so "
            "these are upper bounds."
        ],
    )


def _longest_of(lengths: Sequence[int], rows: int) -> int:
    """Mean length of the longest of so many rows: what a padded batch is as long as."""
    rng = random.Random(0)
    return round(statistics.mean(max(rng.choices(lengths, k=rows)) for _ in range(BATCHES)))


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
        judged = self.sizes.rows["test_pairs"] if section == "reward" else rows * (1 - share or 1)
        seconds += self._scoring(section, 2 * judged)
        return self._estimate(stage, rows, tokens, models * steps, self._memory(section, shape), models * seconds)

    def vote(self, stage: Stage) -> Estimate:
        """So many reward models, each on the pairs of all folds but one."""
        how = self.recipe.vote
        share = 1.0 if how.in_sample else 1 - 1 / how.folds
        return self.reward(stage, "vote", share)

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
        of_sft = 0 if "judged" in stage.parents else (BEST_OF if has_gold else 1)
        return self._sampled(stage, prompts * (1 + of_sft), self._scoring("reward", prompts * (1 + of_sft)))

    # Their parts.

    def _pairs(self, stage: Stage) -> int:
        """Training pairs of a round: those of the data, and the labels of the rounds so far."""
        number = int(stage.folder.partition("/")[0].rpartition("-")[2])
        rounds, rows = self.recipe.rounds, self.sizes.rows["pairs"]
        if rounds.labels_from == "dataset" and rounds.count > 1:
            return rows * number // rounds.count
        return rows + rounds.labels * (number - 1) if rounds.first == "offline" else rounds.labels * number

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
