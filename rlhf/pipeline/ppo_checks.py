"""What keys of the ppo section can't do together, said before SFT and a reward model are paid for."""

from collections.abc import Iterator

from rlhf.lab.build import CONTEXT
from rlhf.models.load import find_source
from rlhf.pipeline.launch import number_of_processes
from rlhf.pipeline.plan import plan, stages_until
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.source_kinds import FOLDER, kind_of
from rlhf.recipe.schema import Recipe


def ppo_problems(recipe: Recipe, *, until: str | None = None) -> Iterator[str]:
    """Yield what `PPOTrainer` would refuse of a recipe's own keys when its stage begins.

    Args:
        until: the last stage that will run, if it is not the plan's.

    Raises:
        UserError: there is no such stage.
    """
    yield from _source_problems(recipe)
    ppo = recipe.ppo.trl_settings()
    for key in ("ptx_coef", "adversarial_coef"):
        if ppo.get(key, 0) > 0 and not recipe.has_sft:
            yield f"ppo.{key}: it reads demonstrations, and nobody gives any; name them under data.sft, or leave the key out."
    if (ppo.get("lora_dropout") or 0) > 0 and ppo.get("disable_dropout", True):
        yield (
            "ppo.lora_dropout: ppo.disable_dropout, which is true unless you say otherwise, switches it off, since ratios would be "
            "noise; leave lora_dropout out."
        )
    if ppo.get("adversarial_coef", 0) > 0 and recipe.reward.experts in ("gate", "weights"):
        yield (
            "ppo.adversarial_coef: it reads the features before one linear head, and experts that are not merged have a head each; "
            "leave it out, or set reward.experts: merged."
        )
    is_apart = ppo.get("ptx_coef", 0) > 0 and not ppo.get("use_peft")
    if is_apart and number_of_processes() > 1 and _reaches_ppo(recipe, until):
        yield (
            "ppo.ptx_coef: with several processes it needs the four roles on one base; set ppo.use_peft: true, leave ptx_coef out, "
            "or run without a launcher."
        )
    if ppo.get("reference_mixup", 0) > 0 and ppo.get("use_peft") and not _starts_from_adapter(recipe):
        yield (
            "ppo.reference_mixup moves the reference, which is the base without an adapter here, under the policy too; leave it or "
            "ppo.use_peft out, or start from an SFT adapter (sft.use_peft: true, with a backbone.model)."
        )
    if recipe.lab is None or recipe.backbone.model is not None or recipe.lab.is_sampled:
        return
    unnamed = PPOConfig.max_completion_length if _reaches_ppo(recipe, until) else 0
    if (longest := ppo.get("max_completion_length", unnamed)) >= CONTEXT:
        yield (
            f"ppo.max_completion_length is {longest}, which leaves no room for a prompt in the {CONTEXT} tokens that the lab's "
            "model reads; lower it (recipes/quickstart.yaml has 40)."
        )


def _reaches_ppo(recipe: Recipe, until: str | None) -> bool:
    return any(stage.name == "ppo" for stage in stages_until(plan(recipe), until))


def _source_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with how the scores of several sources become one."""
    ppo, others = recipe.ppo.trl_settings(), recipe.ppo.extra_rewards
    if recipe.reward.members > 1:
        return  # an ensemble, which `reward_problems` looks at
    weights, ensemble = ppo.get("reward_weights"), ppo.get("reward_ensemble")
    count = 1 + len(others)
    if weights is not None and len(weights) != count:
        yield (
            f"ppo.reward_weights has {len(weights)} entries for {count} sources, which are the recipe's reward model"
            f"{' and those of ppo.extra_rewards, in this order' if others else ''}; give one for each."
        )
    if ensemble is None:
        return
    if count < 2:
        yield (
            f"ppo.reward_ensemble is {ensemble}, which needs two reward models or more; name others under ppo.extra_rewards, set "
            "reward.members, or leave it out."
        )
    without = [name for name in others if kind_of(name) is not FOLDER]
    if without:
        yield (
            f"ppo.reward_ensemble is {ensemble}, which compares its members, but nobody knows the scale of {', '.join(without)}; "
            "take reward-model folders of this pipeline, or ppo.reward_weights for a sum."
        )
    if not ppo.get("normalize_reward", True):
        yield "ppo.normalize_reward: an ensemble compares its members on one scale; leave it on."


def _starts_from_adapter(recipe: Recipe) -> bool:
    """Tell whether PPO's policy and reference start from an adapter, of SFT or of the backbone."""
    model = recipe.backbone.model
    if model is not None and recipe.has_sft and recipe.sft.trl_settings().get("use_peft"):
        return True  # a model from nothing is trained whole
    return model is not None and find_source(model).adapter is not None
