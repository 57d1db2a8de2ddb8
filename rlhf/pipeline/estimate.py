"""`rlhf plan`: what the stages of a recipe have to do, told to `rlhf.cost`, which says what that will cost.

The lab's data are generated and local files are read and split as the run will do it, in a folder that is thrown away; of data on
a hub only the recipe's caps are known.
"""

import math
import tempfile
from pathlib import Path

from transformers import PretrainedConfig, TrainingArguments
from trl import RewardConfig, SFTConfig

from rlhf.cost.estimate import ONE_PROCESS, Estimator
from rlhf.cost.memory import Processes
from rlhf.cost.sizes import PairTokens, Sizes, count_sizes
from rlhf.cost.work import Estimate, PairWork, PpoWork, Rollouts, SamplingWork, Section, SftWork, Training, Work
from rlhf.data.read import is_local
from rlhf.data.sources import Fit
from rlhf.errors import UserError
from rlhf.evaluation.policies import BEST_OF
from rlhf.invariants.ends import SAMPLED
from rlhf.lab.answers import stand_in_answers
from rlhf.models.load import find_source, load_tokenizer
from rlhf.models.open import open_config
from rlhf.models.prompt_length import room_for_prompt
from rlhf.models.scratch import design_base
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.finished import require_data
from rlhf.pipeline.plan import plan, stages_until
from rlhf.pipeline.reward import CALIBRATION_SAMPLES
from rlhf.pipeline.stage_table import STAGES
from rlhf.pipeline.stages import base_texts, run_data, run_lab
from rlhf.pipeline.store import Stage
from rlhf.pipeline.training import quiet_libraries, split_settings, training_arguments
from rlhf.ppo.config import PPOConfig
from rlhf.recipe.objectives import OBJECTIVES
from rlhf.recipe.schema import DATA_SOURCES, Recipe
from rlhf.reward.certify import LONG

LARGE_SHARE = 1 / 3  # of the time: what evaluation takes is said from here on
GOLDEN = (30,) * 11 + (LONG,)  # tokens, about, of the texts of a certificate

UNKNOWN_ANSWERS = (
    "lab: the backbone's answers are not sampled for this; each is taken to be as long as may be, an upper bound. "
    "`rlhf run --until data` samples them, and `rlhf plan --out` of that run counts them."
)


def estimate(
    recipe: Recipe, *, until: str | None = None, processes: Processes = ONE_PROCESS, out: Path | None = None
) -> tuple[list[Estimate], list[str]]:
    """Estimate every stage of a recipe that trains or samples, and say what there is to know about these figures.

    Args:
        until: the last stage, as `rlhf run --until` takes it.
        processes: of the launch; figures are those of one of them.
        out: a run of the recipe that has its data, which are then counted as they are; None makes them, as far as no model runs.

    Raises:
        UserError: the data or the model's configuration can't be read, or `out` has no data of this recipe.
    """
    if out is not None:
        require_data(recipe, out)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        config, sizes = model_and_sizes(recipe, Path(folder), out)
    training = section_training(recipe)
    stages, ppo = stages_until(plan(recipe), until), training["ppo"].args
    works = [work_of(stage, recipe, sizes, ppo, processes.count) for stage in stages]
    estimator = Estimator(config, sizes, training, ppo_rollouts(recipe, ppo, config), processes)
    estimates = [estimator.estimate(work) for work in works if work is not None]
    alone = [
        stage.folder for stage, work in zip(stages, works, strict=True) if work and not STAGES[stage.name].together
    ]
    return estimates, [
        *sizes.notes,
        *([UNKNOWN_ANSWERS] if out is None and recipe.lab is not None and recipe.lab.is_sampled else []),
        *_evaluation_note(estimates, recipe.evaluate.prompts),
        *_not_counted(recipe),
        *_notes_of_processes(recipe, processes, alone, training),
    ]


def _notes_of_processes(
    recipe: Recipe, processes: Processes, alone: list[str], training: dict[Section, Training]
) -> list[str]:
    """Return what several processes do not divide, and what they can't run.

    Args:
        alone: the folders of stages that one process runs.
    """
    if processes.count == 1:
        return []
    notes = []
    if alone:
        notes.append(f"{', '.join(alone)}: run by one process while the others wait, with whole models.")
    if recipe.reward.needs_vote and recipe.vote.trunk is not None:
        notes.append("vote.trunk: a shared trunk is one process's; run `rlhf vote` without a launcher first.")
    if processes.sharding == "fsdp2" and any(section.model.load_in_4bit for section in training.values()):
        notes.append("load_in_4bit: FSDP2 leaves 4-bit weights whole on every process; only the adapters are divided.")
    return notes


def _evaluation_note(estimates: list[Estimate], prompts: int) -> list[str]:
    """Return a sentence where evaluations take a third of the time or more, since a smaller number of prompts is a choice."""
    total = sum(stage.seconds for stage in estimates)
    share = sum(stage.seconds for stage in estimates if stage.folder.endswith("/evaluate")) / max(total, 1e-9)
    if share < LARGE_SHARE:
        return []
    return [
        f"Evaluation takes {share:.0%} of this time, with evaluate.prompts={prompts}; fewer prompts take less and make its "
        "intervals wider (gold_gap_closed is meant for 512 or more)."
    ]


def _not_counted(recipe: Recipe) -> list[str]:
    """Return a sentence that names what a recipe asks for and these figures leave out, each by its key."""
    reward, ppo = recipe.reward, recipe.ppo
    token_rewards = ("novelty_coef", "adversarial_coef")
    parts = {
        "reward.extra: critique (its writing, a second training, longer texts in PPO)": reward.extra == "critique",
        "reward.extra: text (the logits of the chosen answers and of a reference)": reward.extra == "text",
        "reward.objective: gated (its two fits, after a reading of every answer)": reward.objective == "gated",
        "reward.experts (a training and a score for each source)": reward.experts is not None,
        "ppo.extra_rewards": bool(ppo.extra_rewards),
        "ppo.baseline_samples (more answers sampled and scored)": bool(ppo.trl_settings().get("baseline_samples")),
        **{f"ppo.{name}": bool(ppo.trl_settings().get(name)) for name in token_rewards},
        f"rounds.labels_from: {recipe.rounds.labels_from}": recipe.rounds.labels_from in ("judge", "verdicts"),
    }
    asked = [part for part, is_asked in parts.items() if is_asked]
    return [f"Not counted: {'; '.join(asked)}. Time and memory will be above these figures."] if asked else []


# ---- Model and data ----


def model_and_sizes(recipe: Recipe, folder: Path, out: Path | None = None) -> tuple[PretrainedConfig, Sizes]:
    """Return the model's configuration and the sizes of the data.

    Args:
        folder: where the run's own stages make the data.
        out: a run that has made them, in whose folder they are then counted.

    Raises:
        UserError: the data or the model's configuration can't be read, or lie on a hub where that is not enough.
    """
    # 1. The data: a run's; or made as far as no model runs, and of those on a hub only the caps are known.
    hub: list[str] = []
    if out is None:
        hub = hub_data(recipe)
        make_data(recipe, folder)
    root, longest_answer = out or folder, _longest_answer(recipe)
    data = root / "round-0/data"

    # 2. The model's shape and its tokenizer.
    if recipe.backbone.from_scratch is not None:
        if hub:
            raise UserError(
                f"rlhf plan: {', '.join(hub)}: from_scratch needs the texts, and these are not local files."
            )
        settings = dict(recipe.backbone.from_scratch)
        texts = base_texts(data / "data")
        tokenizer, config = design_base(texts, architecture=settings.pop("architecture"), settings=settings)
        return config, count_sizes(data / "data", tokenizer, longest_answer=longest_answer)
    name = recipe.backbone.model or root / "round-0/lab/model"
    try:
        config = open_config(find_source(name).base, recipe.backbone.revision)
        tokenizer = load_tokenizer(name, conversational=True, revision=recipe.backbone.revision)
    except UserError as error:
        raise UserError(f"backbone.model: {error}") from error
    if hub:
        return config, sizes_from_caps(recipe, hub)
    return config, count_sizes(data / "data", tokenizer, longest_answer=longest_answer)


def hub_data(recipe: Recipe) -> list[str]:
    """Return the keys whose data lie on a hub, "data.preferences"."""
    return [f"data.{name}" for name in DATA_SOURCES for s in recipe.data.sources(name) if not is_local(s.source)]


def make_data(recipe: Recipe, folder: Path, *, fit: Fit | None = None) -> None:
    """Make the lab and read the data as the run's own stages do, but for data on a hub.

    What a model would have to answer first has the longest answers there may be.

    Args:
        folder: stands for the run's.
        fit: writes tool calls, in place of the run's base model.

    Raises:
        UserError: as the run's stages would refuse the data.
    """
    parents = {}
    if recipe.lab is not None:
        parents["lab"] = folder / "round-0/lab"
        run_lab(StageContext(recipe, parents["lab"], {}, lambda _: None), stand_in_answers(_longest_answer(recipe)))
    if not hub_data(recipe):
        run_data(StageContext(recipe, folder / "round-0/data", parents, lambda _: None), fit)


def _longest_answer(recipe: Recipe) -> int:
    """Return how many tokens an answer may have."""
    return int(recipe.ppo.trl_settings().get("max_completion_length", PPOConfig.max_completion_length))


def sizes_from_caps(recipe: Recipe, hub: list[str]) -> Sizes:
    """Return the largest sizes that a recipe allows its hub data: as many rows as its caps, each as long as may be.

    Args:
        hub: the keys whose data lie on a hub, "data.preferences".

    Raises:
        UserError: a cap is missing.
    """
    data, ppo = recipe.data, recipe.ppo.trl_settings()
    caps = {"sft": data.max_sft, "pairs": data.max_pairs, "prompts": data.max_prompts or data.max_pairs}
    absent = {"sft": data.sft is None, "pairs": data.preferences is None}
    missing = [f"data.max_{name}" for name, cap in caps.items() if cap is None and not absent.get(name)]
    if missing:
        raise UserError(
            f"rlhf plan: {', '.join(hub)} lie on a hub and are not downloaded to be counted; set {', '.join(missing)}."
        )
    prompt, answer = (ppo.get(n, getattr(PPOConfig, n)) for n in ("max_prompt_length", "max_completion_length"))
    longest = recipe.sft.trl_settings().get("max_length", SFTConfig.max_length)
    rows = {name: cap or 0 for name, cap in caps.items()}
    held_out = max(1, round(data.test_fraction * rows["pairs"]))
    rows["ratings"] = 2 * rows["pairs"]
    return Sizes(
        rows=rows | {"test_pairs": held_out, "test_prompts": recipe.evaluate.prompts},
        prompts=[prompt],
        answers=[answer],
        demonstrations=[longest],
        pairs=[PairTokens(prompt, prompt + answer, prompt + answer)],
        notes=[
            f"{', '.join(hub)}: on a hub, not downloaded; as many rows as the caps allow, each as long as the settings allow, so "
            "these are upper bounds."
        ],
    )


# ---- Settings ----


def section_training(recipe: Recipe) -> dict[Section, Training]:
    """Return how each section trains, its arguments built as its stage builds them."""

    def training(config_class: type[TrainingArguments], keys: dict[str, object]) -> Training:
        model, settings = split_settings(keys)
        return Training(model, training_arguments(config_class, settings, Path("nowhere"), recipe.seed))

    sft = training(SFTConfig, recipe.sft.trl_settings())
    if recipe.backbone.model is None:
        sft.model.use_peft = sft.model.load_in_4bit = False  # a model from nothing has nothing to adapt
    return {
        "sft": sft,
        "vote": training(RewardConfig, {"num_train_epochs": 1} | recipe.vote_settings()),
        "reward": training(RewardConfig, {"num_train_epochs": 1} | recipe.reward.trl_settings()),
        "ppo": training(PPOConfig, recipe.ppo.trl_settings()),
    }


def ppo_rollouts(recipe: Recipe, args: PPOConfig, config: PretrainedConfig) -> Rollouts:
    """Return how PPO samples and learns.

    Args:
        config: of the policy, or of an encoder, which never answers.
    """
    room = room_for_prompt(config, max_new_tokens=args.max_completion_length)
    longest = args.max_prompt_length if room is None or room < 1 else min(room, args.max_prompt_length or room)
    return Rollouts(
        size=args.local_rollout_size,
        max_prompt_length=longest,
        max_answer_length=args.max_completion_length,
        epochs=args.num_ppo_epochs,
        mini_batches=args.num_mini_batches,
        steps=args.steps_per_rollout,
        reward_models=recipe.reward.members,
        batch=args.generation_batch_size,
    )


# ---- Stages ----


def work_of(stage: Stage, recipe: Recipe, sizes: Sizes, ppo: PPOConfig, processes: int) -> Work | None:
    """Return what a planned stage has to do, or None where it neither trains nor samples."""
    rows = sizes.rows
    match stage.name:
        case "sft":
            return SftWork(stage.folder, rows["sft"])
        case "vote" | "second_look":
            share = 1.0 if recipe.vote.in_sample else 1 - 1 / recipe.vote.folds
            pairs = training_pairs(stage, recipe, rows)
            votes = 2 if stage.name == "second_look" else 1  # the second with the experts' verdicts
            # A member scores the pairs that it was not trained on, or all of them where there are none.
            scored = pairs * (1 - share or 1)
            return PairWork(
                stage.folder,
                "vote",
                pairs,
                trained=round(pairs * share),
                scored=scored,
                models=votes * recipe.vote.members,
                top_layers=recipe.vote.trunk,
            )
        case "reward":
            reward, pairs = recipe.reward, training_pairs(stage, recipe, rows)
            trained, answers = training_elements(reward.objective, pairs, sizes)
            if reward.ratings_first:  # the first model reads one answer where this one reads the two of a pair
                trained += rows["ratings"] // 2
            return PairWork(
                stage.folder,
                "reward",
                rows["ratings"] if reward.needs_ratings else pairs,
                trained=trained,
                answers=answers,
                scored=rows["test_pairs"] or held_out_labels(stage, recipe, rows),
                models=reward.members,
                calibrated=min(CALIBRATION_SAMPLES, rows["prompts"]),
                golden=GOLDEN,
                views=2 if reward.extra_kind == "contrastive" else 1,
                ascent=(reward.meta_prompts, reward.meta_responses) if reward.meta else None,
            )
        case "ppo":
            return PpoWork(stage.folder, ppo.rollouts(rows["prompts"], processes), tried=min(SAMPLED, rows["prompts"]))
        case "lab" if recipe.lab is not None and recipe.lab.is_sampled:
            lab = recipe.lab
            prompts = math.ceil(lab.pairs / math.comb(lab.answers, 2))
            answers = lab.answers * prompts + 2 * 2 * lab.test_pairs
            return SamplingWork(stage.folder, answers, is_scored=False)
        case "sample":
            prompts = min(stage.settings["prompts"], rows["prompts"])
            return SamplingWork(stage.folder, prompts * stage.settings["responses"], is_scored=False)
        case "evaluate":
            prompts = min(recipe.evaluate.prompts, rows["test_prompts"])
            has_gold = recipe.lab is not None or recipe.evaluate.gold is not None
            # The policy's; and of SFT, whose answers are sampled once in a run, as many as best-of-n chooses from.
            answers = recipe.evaluate.answers
            sft_answers = 0 if "first_evaluation" in stage.parents else (BEST_OF if has_gold else answers)
            return SamplingWork(
                stage.folder, prompts * (answers + sft_answers), is_scored=True, compared=prompts * answers
            )
    return None


def training_pairs(stage: Stage, recipe: Recipe, rows: dict[str, int]) -> int:
    """Count the training pairs of a stage's round: those of the data, and the labels of the rounds so far."""
    number, rounds = round_of(stage), recipe.rounds
    if rounds.labels_from == "dataset" and rounds.count > 1:
        return rows["pairs"] * number // rounds.count
    if rounds.first == "offline":
        return rows["pairs"] + (rounds.labels - rounds.looked_at) * (number - 1)
    return (rounds.labels - rounds.looked_at) * number - held_out_labels(stage, recipe, rows)


def training_elements(objective: str, pairs: int, sizes: Sizes) -> tuple[int, float]:
    """Return how many elements a reward model is trained on, and how many answers each has, a mean.

    Args:
        pairs: of the stage's round; those that are not of the data are labels, each a ranking of two.
    """
    rows = sizes.rows
    match OBJECTIVES[objective].loss.elements:
        case "ratings":
            return rows["ratings"], 1.0
        case "rankings" if sizes.rankings:
            of_data = min(pairs, rows["pairs"])
            trained = round(sizes.rankings * of_data / rows["pairs"]) + pairs - of_data
            return trained, sizes.ranked_answers / sizes.rankings
    return pairs, 2.0


def held_out_labels(stage: Stage, recipe: Recipe, rows: dict[str, int]) -> int:
    """Count the labels so far that the reward model is evaluated on, where the data has no pairs for that."""
    labels = (recipe.rounds.labels - recipe.rounds.looked_at) * round_of(stage)
    return 0 if rows["test_pairs"] else round(recipe.data.test_fraction * labels)


def round_of(stage: Stage) -> int:
    """Return the number of a stage's round, which its folder names."""
    return int(stage.folder.partition("/")[0].rpartition("-")[2])
