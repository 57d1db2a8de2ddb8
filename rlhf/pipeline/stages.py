"""The stages that make the world, the data and the base model, and those that train and compare policies.

Each is one function: it reads its parents' folders, does the work, writes into its own folder, and returns facts for the manifest.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig

from rlhf.data.prepare import DataSources, prepare_data
from rlhf.data.ratings import RatingScale
from rlhf.data.sources import Fit, Source
from rlhf.errors import UserError
from rlhf.evaluation.policies import evaluate_policies
from rlhf.files import read_jsonl, write_jsonl
from rlhf.invariants.checks import CheckBook
from rlhf.invariants.ends import require_reachable_end
from rlhf.lab.answers import answers_of_model
from rlhf.lab.build import RATED, Answers, LabSettings, build_instructions, build_lab
from rlhf.models.dequantise import dequantise
from rlhf.models.generate import end_token_ids, sample_texts
from rlhf.models.gguf import gguf_file
from rlhf.models.load import find_source, load_policy, load_tokenizer
from rlhf.models.save import save_model
from rlhf.models.scratch import build_base
from rlhf.models.sharding import gathered_weights, is_sharded
from rlhf.models.text import last_turn, plain
from rlhf.models.thoughts import lost_thoughts, trained_unlike_sampled
from rlhf.models.tools import ToolTemplate
from rlhf.pipeline.agreement import compare_kl
from rlhf.pipeline.context import StageContext, backbone_model
from rlhf.pipeline.demonstrations import read_lengths, refuse_packing
from rlhf.pipeline.ends import check_ends_before_ppo, refuse_unreadable_turns
from rlhf.pipeline.sampling import sampling_settings, say_cut_prompts, say_cut_texts
from rlhf.pipeline.store import CHECKPOINTS
from rlhf.pipeline.trainers import StagePPOTrainer, StageSFTTrainer
from rlhf.pipeline.training import (
    check_nothing_lost,
    checks_of,
    evaluation_rows,
    save_trained,
    split_settings,
    train,
    training_arguments,
)
from rlhf.pipeline.true_reward import load_true_reward
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.reporting import cuts_of_all
from rlhf.recipe import Recipe
from rlhf.recipe.objectives import OBJECTIVES
from rlhf.recipe.schema import DATA_SOURCES
from rlhf.report.records import MANIFEST, read_record
from rlhf.reward.denoise import check_needs, check_scale
from rlhf.reward.ensemble import load_scorer_of, member_folders
from rlhf.reward.load import template_digest
from rlhf.reward.sources import by_source

SHOWN_SAMPLES, SFT_ANSWERS = 64, "sft_answers.jsonl"
TOOL_TEMPLATE = "tool_template_sha256"  # a fact of data with tool calls


def run_lab(context: StageContext, answers: Answers | None = None) -> dict[str, Any]:
    """Generate the world: labelled pairs, prompts, and in the world of lists a base model and demonstrations.

    Args:
        answers: gives the answers of a world that has no writers; by default the backbone.
    """
    lab = context.recipe.lab
    assert lab is not None, "the plan has this stage where there is a lab"
    settings = LabSettings(**lab.model_dump(exclude={"world"}), seed=context.recipe.seed)
    if not lab.is_sampled:
        return build_lab(context.folder, settings)
    return build_instructions(context.folder, settings, answers or _answers_of_backbone(context))


def _answers_of_backbone(context: StageContext) -> Answers:
    """Load the backbone, and return what samples its answers."""
    recipe = context.recipe
    made = context.find_parent("base")
    backbone = backbone_model(recipe) if made is None else made / "model"
    model_config, _ = split_settings(context.trl_settings("ppo"))
    tokenizer = load_tokenizer(backbone, conversational=True, revision=recipe.backbone.revision)
    context.say(f"lab: {backbone} answers the prompts of this world.")
    policy = load_policy(backbone, model_config, trainable=False).to(context.device).eval()
    return answers_of_model(
        policy,
        tokenizer,
        **sampling_settings(recipe, policy.config),
        engine=recipe.sampling.engine,
        seed=recipe.seed,
        keep=context.folder / CHECKPOINTS,
        say=context.say,
    )


def run_data(context: StageContext, fit: Fit | None = None) -> dict[str, Any]:
    """Read the data that the recipe names, check and split them; what it does not name comes from the lab.

    Args:
        fit: writes tool calls; by default as the run's base model does.

    Raises:
        UserError: they can't be used, or are not what the reward model of this recipe is trained on.
    """
    data, lab = context.recipe.data, context.find_parent("lab")
    named: dict[str, Any] = {
        name: [Source(**entry.model_dump()) for entry in data.sources(name)] for name in DATA_SOURCES
    }
    others: dict[str, Any] = data.model_dump(exclude=set(DATA_SOURCES))
    others["shuffle"] = any(named.values())  # the lab's rows come in an order drawn at random
    if lab is not None:
        if data.prompts is None:
            named["test_prompts"] = [Source(str(lab / "data" / "test_prompts.jsonl"))]
        files = {name: lab / "data" / f"{name}.jsonl" for name in DATA_SOURCES}
        if context.recipe.reward.reads_ratings:
            files["preferences"] = lab / "data" / RATED
        named |= {name: [Source(str(file))] for name, file in files.items() if not named[name] and file.is_file()}
    reward = context.recipe.reward
    ratings = RatingScale(**reward.ratings()) if reward.reads_ratings else None
    sources = DataSources(**others, **named, ratings=ratings, critiques=reward.extra_kind == "critique")
    fit = fit or _tool_template(context.recipe, lab, context.find_parent("base"))
    facts = prepare_data(context.folder / "data", sources, seed=context.recipe.seed, fit=fit)
    if isinstance(fit, ToolTemplate) and fit.used is not None:
        facts[TOOL_TEMPLATE] = template_digest(fit.used)
    for sentence in facts.pop("sentences"):
        context.say(sentence)
    if (OBJECTIVES[reward.objective].needs.pairs or reward.ratings_first) and not facts["rows"].get("pairs"):
        user = "reward.ratings_first goes on with" if reward.ratings_first else "a gate is fitted to"
        raise UserError(
            f"data.preferences: {user} pairs, and no prompt has two answers of which one is better; add such rows, or "
            "take reward.objective: regression."
        )
    pairs = context.folder / "data" / "pairs.jsonl"
    if pairs.is_file():  # before SFT is paid for
        check_needs(read_jsonl(pairs), OBJECTIVES[reward.objective])
        check_scale(read_jsonl(pairs), reward.objective, reward.margin_scale)
        if reward.experts is not None:
            by_source(read_jsonl(pairs), reward.expert_weights)
    return facts


def _tool_template(recipe: Recipe, *earlier: Path | None) -> ToolTemplate | None:
    """Return what writes tool calls as the run's base model does; None where that model is made of these data.

    Args:
        earlier: the stages before the data; one of them may have written the base model.
    """
    written = next((folder for folder in earlier if folder is not None and (folder / "model").is_dir()), None)
    if written is None and recipe.backbone.model is None:
        return None
    base = backbone_model(recipe) if written is None else str(written / "model")
    revision = recipe.backbone.revision if written is None else None
    return ToolTemplate(lambda: load_tokenizer(base, conversational=True, revision=revision, pads=False), base)


def check_tool_template(recipe: Recipe, parents: Mapping[str, Path]) -> None:
    """Refuse data whose tool calls were written by another chat template than the base model has now.

    Args:
        parents: the folders of a stage's parents by role.

    Raises:
        UserError: they were; models would learn one format and be used with another.
    """
    data = parents.get("data")
    written = None if data is None else (read_record(data / MANIFEST) or {"facts": {}})["facts"].get(TOOL_TEMPLATE)
    template = None if written is None else _tool_template(recipe, parents.get("lab"), parents.get("base"))
    if template is not None and template_digest(template.load()) != written:
        raise UserError(
            f"{data}: its tool calls were written by another chat template than {template.name} has now. Take the change back, or "
            "delete the folder, and those of later stages, to make them again."
        )


def run_base(context: StageContext) -> dict[str, Any]:
    """Build a small model from nothing, its tokenizer trained on the demonstrations and the pairs; or dequantise a GGUF file."""
    file = None if context.recipe.backbone.model is None else gguf_file(context.recipe.backbone.model)
    if file is not None:
        context.say(f"base: {file.name} is dequantised once, into {context.folder / 'model'} …")
        weights = dequantise(file, context.folder / "model")
        context.say(f"base: {weights:,} weights in float32, {4 * weights / 1e9:.1f} GB.")
        return {"gguf": str(file), "weights": weights}
    settings = dict(context.recipe.backbone.from_scratch or {})
    texts = base_texts(context.data)
    build_base(
        context.folder / "model",
        texts,
        architecture=settings.pop("architecture"),
        settings=settings,
        seed=context.recipe.seed,
    )
    return {"texts": len(texts)}


def base_texts(data: Path) -> list[str]:
    """Return the texts that the tokenizer of a model from nothing is trained on."""
    return [
        plain([message])
        for file in (data / "sft.jsonl", data / "pairs.jsonl")
        for row in (read_jsonl(file) if file.is_file() else [])
        for part in row.values()
        if isinstance(part, list)
        for message in part
    ]


def run_sft(context: StageContext) -> dict[str, Any]:
    """Train a policy on the demonstrations; the loss is on the answers only."""
    # 1. Model and data. A model from nothing has nothing to adapt, so all of its weights are trained.
    written = context.find_parent("base") or context.find_parent("lab")
    base = backbone_model(context.recipe) if written is None else written / "model"
    is_fresh = context.recipe.backbone.model is None
    model_config, settings = split_settings(context.training_settings("sft"))
    if is_fresh and model_config.use_peft:
        context.say("sft: the base model has random weights, so all of them are trained, not an adapter.")
        model_config.use_peft = model_config.load_in_4bit = False
    set_seed(context.recipe.seed)  # an adapter's first weights are random
    tokenizer = load_tokenizer(base, conversational=True, revision=context.recipe.backbone.revision)
    model = load_policy(base, model_config)
    demonstrations = read_jsonl(context.data / "sft.jsonl")
    prompts = [row["prompt"] for row in demonstrations]
    refuse_unreadable_turns(tokenizer, prompts, source="data.sft")
    answers = [last_turn(row["completion"]) for row in demonstrations]
    for sentence in (*lost_thoughts(tokenizer, prompts, answers), *trained_unlike_sampled(tokenizer, prompts, answers)):
        context.say(f"sft: {sentence}")
    rows = Dataset.from_list(demonstrations)

    # 2. Train.
    args = training_arguments(SFTConfig, settings, context.folder, context.recipe.seed)
    trainer = StageSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    refuse_packing(trainer)
    checks = CheckBook()
    require_reachable_end(checks, tokenizer, end_token_ids(model, tokenizer), stage="sft", is_trained_here=True)
    lengths = read_lengths(trainer.train_dataset)
    # Without packing TRL leaves them out; packed in pieces, the other pieces of one may hold its answer.
    packed_whole = lengths.without_answer if args.packing_strategy == "bfd" else 0
    dropped = packed_whole if args.packing else len(rows) - len(lengths.tokens)
    if dropped == len(rows):
        raise UserError(
            f"sft: the prompts of all {len(rows)} demonstrations alone fill max_length={args.max_length}; raise sft.max_length."
        )
    if dropped:
        context.say(
            f"sft: {dropped} of {len(rows)} demonstrations were left out: their prompts alone fill max_length={args.max_length}."
        )
    kept = len(rows) - dropped
    cut = sum(args.max_length is not None and length >= args.max_length for length in lengths.tokens)
    if args.packing and args.packing_strategy == "wrapped":
        context.say("sft: packing_strategy=wrapped cuts demonstrations wherever a row is full; nobody counts how many.")
    elif cut:
        context.say(f"sft: {cut} of {kept} demonstrations reach max_length={args.max_length} and may have been cut.")
    train(trainer, context.folder, label="sft", say=context.say)

    # 3. Save, and show what it says now.
    out = context.folder / "model"
    if save_trained(trainer, out):
        # One process can't answer with a part of the weights.
        model = load_policy(out, model_config, trainable=False) if is_sharded(trainer.model) else trainer.model
        show_samples(context, model, tokenizer)
    return {
        "demonstrations": kept,
        "dropped": dropped,
        "cut": cut,
        "tokens": sum(lengths.tokens),
        "checks": checks.entries,
    }


def run_ppo(context: StageContext) -> dict[str, Any]:
    """Train a policy by PPO against the reward model, from the SFT policy or from that of the round before."""
    # 1. Where it starts, and what its KL is measured to: the policy at the start, or SFT.
    recipe = context.recipe
    model_config, settings = split_settings(context.training_settings("ppo"))
    args = training_arguments(PPOConfig, settings, context.folder, recipe.seed)
    set_seed(recipe.seed)
    sft = context.sft_model
    policy_before = context.find_parent("policy")
    start = sft if policy_before is None else policy_before / "model"
    reference = sft if context.settings.get("reference") == "sft" else start
    tokenizer = load_tokenizer(sft, conversational=True, revision=recipe.backbone.revision)
    gold = load_true_reward(recipe)
    members = [str(folder) for folder in member_folders(context.parent("reward"))]
    if len(members) > 1 and args.reward_ensemble is None:
        args.reward_ensemble = "mean"

    if args.kl_target is not None and policy_before is not None:
        before = read_record(policy_before / MANIFEST) or {"facts": {}}
        kl_coef = before["facts"].get("kl_coef")
        if kl_coef is not None:  # begun anew, each round would need its first rollouts to find it again
            args.kl_coef = kl_coef
            context.say(f"ppo: kl_coef begins at {kl_coef:.3g}, where the round before ended (ppo.kl_target).")

    policy, book = load_policy(start, model_config), CheckBook()
    check_nothing_lost(context, start, policy, book)

    # 2. Train.
    trainer = StagePPOTrainer(
        policy,
        [*members, *recipe.ppo.extra_rewards],
        args,
        train_dataset=Dataset.from_list(read_jsonl(context.data / "prompts.jsonl")),
        processing_class=tokenizer,
        eval_dataset=evaluation_rows(context.data / "test_prompts.jsonl", args, recipe.evaluate.prompts),
        monitor_funcs={"gold": gold} if gold is not None else None,
        ptx_dataset=Dataset.from_list(read_jsonl(context.data / "sft.jsonl")) if args.reads_demonstrations else None,
        adapter_was_trained=find_source(reference).adapter is not None and model_config.use_peft,
    )
    # Other prompts every round, as long as there are some; an epoch is a rollout.
    trainer.first_rollout = (context.round - 1) * int(args.num_train_epochs)
    if reference != start:
        trainer.reference.load(reference, model_config)
    check_ends_before_ppo(context, trainer, book)
    train(trainer, context.folder, label="ppo", say=context.say, stop_at="epoch")  # an epoch is a rollout

    # 3. Save, and say what happened.
    weights = gathered_weights(trainer, "policy")
    if context.is_main:
        save_model(trainer.accelerator.unwrap_model(trainer.model).policy, tokenizer, context.folder / "model", weights)
        write_jsonl(context.folder / "samples.jsonl", [sample.as_row() for sample in trainer.latest_samples])
    if trainer.stopped is not None:
        context.say(trainer.stopped)
    cuts = cuts_of_all(trainer)
    for sentence in cuts:
        context.say(sentence)
    rollouts = trainer.state.global_step // args.steps_per_rollout
    book.merge(checks_of(trainer, *(source.function for source in trainer.rewards.sources)))
    return {
        "episodes": trainer.episodes,
        "rollouts": rollouts,
        "kl_coef": trainer.progress.kl_coef,
        "stopped": trainer.stopped,
        "warnings": trainer.progress.health.sentences,
        "reward_cuts": cuts,
        "checks": book.entries,
    }


def run_evaluate(context: StageContext) -> dict[str, Any]:
    """Compare the last policy with SFT and best-of-16 on held-out prompts, by proxy, by gold, and at which KL."""
    recipe = context.recipe
    set_seed(recipe.seed)
    model_config, _ = split_settings(context.trl_settings("ppo"))
    rows = read_jsonl(context.data / "test_prompts.jsonl")[: recipe.evaluate.prompts]
    if len(rows) < recipe.evaluate.prompts:
        context.say(f"evaluate: only {len(rows)} held-out prompts, of {recipe.evaluate.prompts} asked for.")
    sft = context.sft_model
    reward = load_scorer_of(context.parent("reward"), device=context.device)
    first = context.find_parent("first_evaluation")
    sampled = None if first is None else read_jsonl(first / SFT_ANSWERS)
    trained, book = context.parent("policy") / "model", CheckBook()
    policy = load_policy(trained, model_config, trainable=False)
    check_nothing_lost(context, trained, policy, book)
    tokenizer = load_tokenizer(sft, conversational=True, revision=recipe.backbone.revision)
    prompts = [row["prompt"] for row in rows]
    cut = say_cut_prompts(context, policy, tokenizer, prompts, stage="evaluate")
    facts, samples, sft_answers = evaluate_policies(
        policy=policy.to(context.device).eval(),
        sft=load_policy(sft, model_config, trainable=False).to(context.device).eval(),
        tokenizer=tokenizer,
        reward=reward,
        gold=load_true_reward(recipe),
        prompts=prompts,
        answers=recipe.evaluate.answers,
        sft_answers=None if sampled is None else [(row["completion"], row["ended"]) for row in sampled],
        **sampling_settings(recipe, policy.config),
        engine=recipe.sampling.engine,
    )
    write_jsonl(context.folder / "samples.jsonl", samples)
    if sampled is None:
        write_jsonl(context.folder / SFT_ANSWERS, [{"completion": text, "ended": ended} for text, ended in sft_answers])
    compare_kl(context, samples, book)
    book.merge(checks_of(reward))
    cuts = say_cut_texts(context, reward, stage="evaluate")
    return {**facts, "prompts_cut": cut, "reward_cuts": cuts, "checks": book.entries}


def show_samples(context: StageContext, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write answers to held-out prompts beside the model."""
    set_seed(context.recipe.seed)
    model.eval()
    prompts = [row["prompt"] for row in read_jsonl(context.data / "test_prompts.jsonl")[:SHOWN_SAMPLES]]
    say_cut_prompts(context, model, tokenizer, prompts, stage="sft, samples")
    texts, ended = sample_texts(model, tokenizer, prompts, **sampling_settings(context.recipe, model.config))
    gold = load_true_reward(context.recipe)
    values: Sequence[float | None] = (
        gold([plain(prompt) for prompt in prompts], texts) if gold else [None] * len(prompts)
    )
    rows = zip(prompts, texts, values, ended, strict=True)
    write_jsonl(
        context.folder / "samples.jsonl",
        [{"prompt": p, "completion": text, "gold": value, "ended": ended} for p, text, value, ended in rows],
    )
