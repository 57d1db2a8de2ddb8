"""Keys that a recipe sets and that no stage would use, or that another key takes back: each is an error that names the other."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.addresses import hide_secrets
from rlhf.recipe.keys import stage_keys
from rlhf.recipe.objectives import EXTRAS, OBJECTIVES
from rlhf.recipe.schema import STAGE_SECTIONS, Recipe, StageSection

# What PEFT and TRL make an adapter of.
ADAPTER_KEYS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_dora",
    "use_rslora",
)
BITS_KEYS = ("bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant")
VLLM_KEYS = ("vllm_mode", "vllm_gpu_memory_utilization", "vllm_importance_sampling_clip_max", "vllm_max_model_length")
FLIPS, MARGINS = ("flip", "flip_margin", "drop"), ("margin", "adaptive_margin", "flip_margin", "soft_margin")
SMOOTHS = ("smoothing", "soft_margin")
# What a trainer of a whole model reads, and members on a shared trunk don't.
NOT_ON_TRUNK = (
    "use_peft", *ADAPTER_KEYS, "load_in_4bit", "load_in_8bit", "dtype", "attn_implementation", "optim", "optim_args",
    "center_rewards_coefficient", "disable_dropout", "bf16", "fp16",
)  # fmt: skip
BEFORE_PPO: dict[str, tuple[str, ...]] = {
    "sft": (),
    "vote": (),
    "reward": ("reward",),
}  # last stage: trained after SFT until it
READING = ("chat_template_path", "eos_token")  # which texts a trainer of TRL's makes of conversations
ASKING = ("labels", "prompts", "responses", "select")
ASKS_NOBODY = "no round asks for labels, as rounds.count is 1 and rounds.first offline"
NEEDS_NOISE = ("vote_sigmoid", "posterior", "weight")  # what they make of a label rests on how many labels are wrong
RATED = tuple(objective.name for objective in OBJECTIVES.values() if objective.needs.ratings)


def corrected_twice(recipe: Recipe) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield keys by which labels would be corrected twice, or by voters who know nothing of what is wrong."""
    reward, rounds = recipe.reward, recipe.rounds
    if reward.flip_rate > 0 and OBJECTIVES[reward.objective].sets_confidence:
        yield (
            ("reward", "flip_rate"),
            f"reward.flip_rate is a share of wrong labels in the loss, and reward.objective: {reward.objective} already says how "
            "likely each label is right; the two take each other back. Leave out one of them.",
        )
    if recipe.vote.in_sample and (reward.objective in NEEDS_NOISE or rounds.max_noise is not None):
        yield (
            ("vote", "in_sample"),
            "vote.in_sample lets voters vote on what they were trained on, and they agree with it, so nobody knows how many labels "
            f"are wrong; reward.objective: {', '.join(NEEDS_NOISE)} and rounds.max_noise want that. Leave out vote.in_sample.",
        )


@dataclass(frozen=True)
class Needs:
    """Keys of a section that are read only where other keys of it say so.

    Attributes:
        keys: the dependent ones.
        met: whether the section's values say so; a key that is not set has its default there.
        reason: what decides, in words that follow "is not used: ".
        switch: a key whose default switches the others off; written down, it does so by name, and they are left alone.
    """

    section: str
    keys: tuple[str, ...]
    met: Callable[[Mapping[str, Any]], bool]
    reason: str
    switch: str | None = None


def _asks(rounds: Mapping[str, Any]) -> bool:
    return bool(rounds["count"] > 1 or rounds["first"] == "sampled")


def _labels_come_from(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """Return whether one of these gives the labels; where no round asks for any, another sentence says so."""
    return lambda rounds: not _asks(rounds) or rounds["labels_from"] in names


def _objective_is(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: values["objective"] in names


NEEDS = (
    Needs(
        "reward", ("flip_by", "flip_fraction"), _objective_is(*FLIPS), f"reward.objective is none of {', '.join(FLIPS)}"
    ),
    Needs("reward", ("flip_fraction",), lambda v: v["flip_by"] == "rank", "reward.flip_by: sign decides by itself"),
    Needs("reward", ("smoothing",), _objective_is(*SMOOTHS), f"reward.objective is none of {', '.join(SMOOTHS)}"),
    Needs("reward", ("smoothing_mask",), _objective_is("soft_margin"), "reward.objective is not soft_margin"),
    Needs(
        "reward",
        ("margin_scale", "margin_clip"),
        _objective_is(*MARGINS),
        f"reward.objective is none of {', '.join(MARGINS)}",
    ),
    Needs(
        "reward",
        ("extra_weight", "extra_temperature", "prototypes", "dropout"),
        lambda v: v["extra"] is not None,
        "reward.extra is not set",
    ),
    Needs(
        "reward",
        ("extra_temperature", "dropout"),
        lambda v: v["extra"] is None or EXTRAS[v["extra"]].kind == "contrastive",
        f"it is for the contrastive terms, {', '.join(x.name for x in EXTRAS.values() if x.kind == 'contrastive')}",
    ),
    Needs(
        "reward",
        ("prototypes",),
        lambda v: v["extra"] in (None, "swav", "swav_diff"),
        "prototypes are for swav, swav_diff",
    ),
    Needs(
        "reward",
        ("critique_tokens", "critiques"),
        lambda v: v["extra"] is not None and EXTRAS[v["extra"]].kind == "critique",
        "reward.extra is not critique",
    ),
    Needs(
        "reward",
        ("meta_pool", "meta_responses", "meta_prompts", "meta_step", "meta_normalized"),
        lambda v: v["meta"],
        "reward.meta is not true",
        switch="meta",
    ),
    Needs(
        "reward",
        ("attributes", "rating_scale"),
        lambda v: v["objective"] in RATED or v.get("ratings_first", False),
        f"reward.objective is none of {', '.join(RATED)}, and reward.ratings_first is not true",
    ),
    Needs("reward", ("expert_weights",), lambda v: v["experts"] is not None, "reward.experts is not set"),
    Needs("ppo", ("kl_horizon",), lambda v: v["kl_target"] is not None, "ppo.kl_target is not set"),
    Needs(
        "ppo",
        ("reward_ensemble_strength",),
        lambda v: v["reward_ensemble"] in ("uncertainty", "soft_min"),
        "ppo.reward_ensemble is neither uncertainty nor soft_min",
    ),
    Needs("ppo", ("shaping_tokens",), lambda v: v["shaping_coef"] > 0, "ppo.shaping_coef is 0"),
    Needs("ppo", (*VLLM_KEYS, "vllm_server_base_url"), lambda v: v["use_vllm"], "ppo.use_vllm is not true", "use_vllm"),
    Needs("ppo", ("vllm_server_base_url",), lambda v: v["vllm_mode"] == "server", "ppo.vllm_mode is not server"),
    Needs(
        "ppo",
        ("num_train_epochs",),
        lambda v: v["total_episodes"] is None,
        "ppo.total_episodes decides how long it trains",
    ),
    # Who writes `judge` and no number of rounds believes that a judge labels, where the file's own labels are trained on.
    Needs("rounds", ("labels_from",), lambda v: _asks(v) or v["labels_from"] == "dataset", ASKS_NOBODY, "count"),
    Needs("rounds", (*ASKING, "annotators_per_pair"), _asks, ASKS_NOBODY, "count"),
    Needs("rounds", ASKING, _labels_come_from("lab", "people", "judge", "verdicts"), "rounds.labels_from is dataset"),
    Needs("rounds", ("annotators_per_pair",), _labels_come_from("people"), "rounds.labels_from is not people"),
    Needs(
        "rounds",
        ("judge_model",),
        lambda v: v["labels_from"] in ("judge", "verdicts"),
        "rounds.labels_from is neither judge nor verdicts",
    ),
    Needs(
        "rounds",
        ("judge_url", "judge_key", "judge_budget"),
        lambda v: v["labels_from"] == "judge",
        "rounds.labels_from is not judge, and nobody is asked over a network",
    ),
    Needs(
        "rounds",
        ("age_weight", "min_fresh_accuracy", "kl_limit"),
        lambda v: v["count"] > 1,
        "rounds.count is 1, and no round comes after it",
        "count",
    ),
)


def unused_keys(recipe: Recipe) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield the section and key of every value that no stage would use, and a sentence that names what decides instead.

    A key that says what holds anyway (a default, or the value of the SFT adapter that decides) is no error; nor are the keys of
    what is switched off by name, as `reward.meta=false` and `reward.use_peft=false` do on the command line.
    """
    for needs in NEEDS:
        name, switch = needs.section, needs.switch
        is_off_by_name = switch is not None and _set_keys(recipe, name).get(switch) == _defaults(name)[switch]
        if not needs.met(_values(recipe, name)) and not is_off_by_name:
            yield from _not_used(recipe, name, needs.keys, needs.reason)
    if recipe.vote.trunk is not None:
        reason = "voters on a shared trunk (vote.trunk) train all weights of their own layers, in float32, by AdamW"
        yield from _not_used(recipe, "vote", NOT_ON_TRUNK, reason)
        for key in READING:
            if recipe.needs_vote and recipe.vote_settings().get(key) is not None:
                name = "vote" if _set_keys(recipe, "vote").get(key) is not None else "reward"
                yield (
                    (name, key),
                    f"{name}.{key} is not read by voters on a shared trunk (vote.trunk), who would judge other texts than the "
                    f"reward model reads. Save the tokenizer with it beside the backbone, or leave out vote.trunk or {name}.{key}.",
                )
    for name in STAGE_SECTIONS:
        values, written = _values(recipe, name), _set_keys(recipe, name)
        if not values["load_in_4bit"] and written.get("load_in_4bit") is None:
            yield from _not_used(recipe, name, BITS_KEYS, f"{name}.load_in_4bit is not true")
        yield from _not_used(
            recipe, name, ("model_init_kwargs",), f"the stage loads its model itself; set {name}.dtype or the like"
        )
        if name in ("vote", "reward") and values["label_smoothing_factor"]:
            other = (
                "set reward.objective: smoothing and reward.smoothing"
                if name == "reward"
                else "voters have vote.flip_rate"
            )
            yield from _not_used(recipe, name, ("label_smoothing_factor",), f"no loss on pairs reads it; {other}")
        if written.get("use_peft") is None and not values["use_peft"]:
            yield from _not_used(recipe, name, ADAPTER_KEYS, f"{name}.use_peft is not true")
    yield from _decided_by_sft(recipe)


def _decided_by_sft(recipe: Recipe) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield the adapter keys of later stages that differ from those of SFT's adapter, which those stages go on with."""
    is_fresh = recipe.backbone.from_scratch is not None or recipe.backbone.model is None
    adapter = _values(recipe, "sft")
    if not recipe.has_sft or is_fresh or not adapter["use_peft"]:
        return
    for name in ("reward", "vote", "ppo"):
        if _set_keys(recipe, name).get("use_peft") is False:
            continue
        for key, value in _set_keys(recipe, name).items():
            if key in ADAPTER_KEYS and value != adapter[key]:
                yield (
                    (name, key),
                    f"{name}.{key} is {value!r}, which is not used: after a LoRA SFT every later stage goes on with SFT's adapter, "
                    f"and sft.{key} is {adapter[key]!r}. Set sft.{key}, or leave {name}.{key} out.",
                )


def mixed_bits(recipe: Recipe, until: str | None = None) -> Iterator[str]:
    """Yield a sentence for each stage in which SFT's adapter stands on other weights than it was trained on, or PPO's roles do.

    Some want that, as vLLM takes whole weights only: it is no error.

    Args:
        until: the last stage that will run, if it is not the plan's.
    """
    sft, reward, ppo = (_values(recipe, name) for name in ("sft", "reward", "ppo"))
    if not recipe.has_sft or not sft["use_peft"]:
        has_roles = until not in BEFORE_PPO and reward["use_peft"] and ppo["use_peft"]
        if has_roles and reward["load_in_4bit"] != ppo["load_in_4bit"]:
            yield (
                f"ppo: its policy stands on {_bits(ppo)} weights and the reward model on {_bits(reward)} ones, so the four roles "
                "do not share one base, and critic and reward model are whole models beside it; give reward and ppo the same "
                "load_in_4bit."
            )
        return
    stages = BEFORE_PPO.get(until or "", ("reward", "ppo"))
    for name in stages:
        values = _values(recipe, name)
        if _bits(values) != _bits(sft):
            yield (
                f"{name}: SFT's adapter was trained on {_bits(sft)} weights and stands on {_bits(values)} ones here, so this stage "
                f"does not start from the model that SFT made; give sft and {name} the same load_in_4bit and bnb_4bit_quant_type."
            )


def absent_stages(recipe: Recipe) -> Iterator[str]:
    """Yield a sentence for each section of a stage that the recipe has not; a base may hold such a section: it is no error."""
    reasons = {}
    if not recipe.has_sft:
        reasons["sft"] = "nobody gives demonstrations (data.sft), so there is no SFT, and the backbone takes its place"
    if not recipe.needs_vote:
        reasons["vote"] = f"nothing votes: reward.objective: {recipe.reward.objective} reads no votes"
    for section, reason in reasons.items():
        defaults = _defaults(section)
        keys = [f"{section}.{key}" for key, value in _set_keys(recipe, section).items() if value != defaults.get(key)]
        if keys:
            yield f"{', '.join(keys)}: not used; {reason}."


def mixed_temperatures(recipe: Recipe, until: str | None = None) -> Iterator[str]:
    """Yield a sentence where PPO samples at another temperature than rounds and evaluations; some want that, as papers differ.

    Args:
        until: the last stage that will run, if it is not the plan's.
    """
    ppo, others = _values(recipe, "ppo")["temperature"], recipe.sampling.temperature
    if ppo != others and (until or "ppo").rpartition("/")[2] in ("ppo", "evaluate"):
        yield (
            f"ppo.temperature is {ppo:g} and sampling.temperature {others:g}: PPO trains another distribution than the one whose "
            "answers are labelled and evaluated. Set sampling.temperature alone, which PPO reads too."
        )


def _bits(values: Mapping[str, Any]) -> str:
    """Return in words how a stage loads the weights of its base."""
    if values["load_in_4bit"]:
        return f"4-bit ({values['bnb_4bit_quant_type']})"
    return "8-bit" if values["load_in_8bit"] else "whole"


def _not_used(
    recipe: Recipe, section: str, keys: tuple[str, ...], reason: str
) -> Iterator[tuple[tuple[str, str], str]]:
    defaults = _defaults(section)
    for key, value in _set_keys(recipe, section).items():
        if key in keys and value != defaults.get(key):
            yield (section, key), hide_secrets(f"{section}.{key} is {value!r}, which is not used: {reason}.")


def _set_keys(recipe: Recipe, section: str) -> dict[str, Any]:
    """Return the keys of a section that the recipe sets, ours and TRL's."""
    model = getattr(recipe, section)
    ours = {key: getattr(model, key) for key in model.model_fields_set if key in type(model).model_fields}
    return {**ours, **model.trl_settings()} if isinstance(model, StageSection) else ours


def _defaults(section: str) -> dict[str, Any]:
    """Return what a key that is not set stands for: our own defaults, and TRL's."""
    keys = stage_keys(section) if section in STAGE_SECTIONS else {}
    trl = {key: entry.get("default") for key, entry in keys.items()}
    fields = Recipe.model_fields[section].get_default(call_default_factory=True)
    return {**trl, **fields.model_dump()}


def _values(recipe: Recipe, section: str) -> dict[str, Any]:
    """Return a section's values; a member of the vote takes what it does not set itself from the reward section."""
    below = _set_keys(recipe, "reward") if section == "vote" else {}
    return {**_defaults(section), **below, **_set_keys(recipe, section)}
