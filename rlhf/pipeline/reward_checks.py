"""What keys of the reward section can't do together, said before a run."""

from collections.abc import Iterator

from rlhf.data.read import ReadReport, read_rows
from rlhf.errors import UserError
from rlhf.pipeline.launch import number_of_processes
from rlhf.recipe.objectives import OBJECTIVES
from rlhf.recipe.schema import RATING_SCALE, Recipe, RewardSection


def reward_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what the reward section's own keys can't do together, and why MetaRM can't use its samples."""
    reward, ppo = recipe.reward, recipe.ppo.trl_settings()
    adapter = reward.trl_settings()
    yield from _expert_problems(reward)
    if reward.members > 1 and recipe.ppo.extra_rewards:
        yield "reward.members: PPO combines an ensemble as a whole, so ppo.extra_rewards can't be added to it."
    for key in ("reward_weights", "normalize_reward"):
        if reward.members > 1 and ppo.get(key) not in (None, True):
            yield f"reward.members: members are compared on one scale and weigh the same; leave ppo.{key} out."
    drops = (adapter.get("lora_dropout") or 0) > 0 and adapter.get("disable_dropout", True)
    if drops and reward.extra_kind != "contrastive":  # whose own `dropout` goes where this one is
        yield (
            "reward.lora_dropout: reward.disable_dropout, which is true unless you say otherwise, switches it off; leave "
            "lora_dropout out, or set disable_dropout: false."
        )
    pairs = adapter.get("per_device_train_batch_size", 8) * adapter.get("gradient_accumulation_steps", 1)
    if reward.extra == "length" and pairs * number_of_processes() < 2:
        yield (
            "reward.extra: length: of the two answers of one pair the correlation with length is 1 or -1, whatever the model says; "
            "set reward.per_device_train_batch_size to 2 or more."
        )
    if reward.extra == "text" and (reward.extra_weight or 0) >= 1:
        yield f"reward.extra_weight is {reward.extra_weight}: of `text` it is a share of the loss, so it must be below 1."
    elements = OBJECTIVES[reward.objective].loss.elements
    of_pairs = ("extra", "meta", "flip_rate", "group_weight", "ratings_first")
    for key in [name for name in of_pairs if getattr(reward, name) and elements != "pairs"]:
        yield f"reward.{key}: it is for pairs, and {reward.objective} trains on {elements}; leave it out, or take a pair objective."
    if reward.meta and reward.extra_kind not in (None, "contrastive"):
        yield f"reward.meta: MetaRM goes with the contrastive terms, and extra is {reward.extra}; leave one of them out."
    if reward.needs_ratings:
        yield from _rating_problems(recipe)
    elif reward.ratings_first:
        yield from _first_problems(recipe)
    if reward.extra_kind == "critique":
        yield from _critique_problems(recipe)
    checkpointing = adapter.get("gradient_checkpointing_kwargs") or {}
    if reward.meta and adapter.get("gradient_checkpointing", True) and checkpointing.get("use_reentrant"):
        yield "reward.gradient_checkpointing_kwargs: reentrant checkpointing can't give MetaRM's ∇J; set use_reentrant: false."
    yield from _meta_problems(reward)


def _expert_problems(reward: RewardSection) -> Iterator[str]:
    """Yield what experts can't do together with other keys."""
    adapter = reward.trl_settings()
    if reward.experts is not None and not adapter.get("use_peft"):
        yield "reward.experts: experts are LoRA adapters on one base; set reward.use_peft: true."
    if reward.experts is not None and reward.members > 1:
        yield "reward.members: experts are combined in their own way; leave members out, or experts."
    for key in [name for name in ("use_rslora", "use_dora") if reward.experts == "merged" and adapter.get(name)]:
        yield f"reward.{key}: merged adds up plain LoRA, and this scales by norms of its own; leave it out, or take another way."
    if reward.experts == "merged" and adapter.get("lora_modules_to_save"):
        yield "reward.lora_modules_to_save: merged adds up factors and linear heads alone; leave it out, or take another way."
    if reward.expert_weights is not None and not any(reward.expert_weights.values()):
        yield "reward.expert_weights: all are 0, so all scores would be 0; give one of them a weight."
    if reward.expert_weights is not None and reward.experts in (None, "gate"):
        yield "reward.expert_weights: weights are for experts: weights or merged; a gate finds its own."


def _rating_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what ratings of attributes can't do together with other keys."""
    reward, objective = recipe.reward, recipe.reward.objective
    yield from _scale_problems(recipe, objective)
    if reward.trl_settings().get("center_rewards_coefficient") is not None:
        yield "reward.center_rewards_coefficient: ratings say where the scores lie; leave it out."
    if reward.experts is not None:
        yield f"reward.experts: experts are trained on pairs, and {objective} trains on ratings; leave one of them out."
    if recipe.rounds.count > 1 or recipe.rounds.first == "sampled":
        yield f"rounds: labels of rounds are pairs, and {objective} trains on ratings; take another objective, or one round."
    if OBJECTIVES[objective].needs.pairs:
        yield from _gate_problems(reward)


def _scale_problems(recipe: Recipe, who: str) -> Iterator[str]:
    """Yield what is wrong with the ratings that `who` reads."""
    reward = recipe.reward
    low, high = reward.rating_scale or RATING_SCALE
    if not low < high:
        yield f"reward.rating_scale: [{low:g}, {high:g}] is no scale; name the lowest rating and then the highest."
    if not any(reward.attribute_weights.values()):
        yield "reward.attributes: all weights are 0, so every score would be; give one another weight."
    if recipe.data.preferences is None and (recipe.lab is None or recipe.lab.is_sampled):
        yield f"data.preferences: {who} needs answers with ratings of attributes; name a file that has them."


def _first_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what a first model on ratings can't do together with other keys."""
    reward = recipe.reward
    yield from _scale_problems(recipe, "reward.ratings_first")
    if number_of_processes() > 1:
        yield "reward.ratings_first: the first model is read back between two trainings, by one process; start one."
    for key in [name for name in ("members", "experts") if getattr(reward, name) not in (1, None)]:
        yield f"reward.{key}: each of several models would start from the same first one; leave {key} or ratings_first out."
    if reward.extra_kind not in (None, "contrastive", "text"):
        yield f"reward.extra: {reward.extra} has a head or a first model of its own; leave it out, or ratings_first."


def _gate_problems(reward: RewardSection) -> Iterator[str]:
    """Yield what a gate over attributes can't do together with other keys."""
    nothing = [name for name, weight in reward.attribute_weights.items() if weight == 0]
    if nothing:
        yield f"reward.attributes: {', '.join(nothing)} has weight 0; a gate reads the sign of each, so leave it out."
    if reward.members > 1:
        yield "reward.members: every member would have a gate of its own; leave members out, or take objective: regression."


def _critique_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what a reward model that writes critiques can't do together with other keys."""
    reward, lab = recipe.reward, recipe.lab
    if reward.members > 1 or reward.experts is not None:
        key = "members" if reward.members > 1 else "experts"
        yield f"reward.{key}: critiques are written by one model, on which it goes on training; leave {key} out, or critique."
    if reward.trl_settings().get("eval_strategy", "no") != "no":
        yield "reward.eval_strategy: held-out answers have no critiques before the model has learnt to write them; leave it off."
    if number_of_processes() > 1:
        yield "reward.extra: critique: its critiques are written between two trainings, by one process; start one."
    if recipe.data.preferences is None and (lab is None or not lab.critiques):
        yield (
            "reward.extra: critique: nobody gives critiques to learn from; set lab.critiques: true, or name pairs with "
            "critique_chosen and critique_rejected under data.preferences."
        )


def _meta_problems(reward: RewardSection) -> Iterator[str]:
    """Yield why MetaRM can't use the samples that a recipe names."""
    from rlhf.reward.meta import group_samples

    if reward.meta_samples is None:
        return
    if not reward.meta:
        yield "reward.meta_samples: nobody reads them without reward.meta: true."
        return
    try:
        group_samples([row for _, row in read_rows(reward.meta_samples, ReadReport(reward.meta_samples))])
    except UserError as error:
        yield from (f"reward.meta_samples: {reward.meta_samples}: {problem}" for problem in error.problems)
