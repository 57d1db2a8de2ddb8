"""Whether LoRA can be put where a recipe wants it: peft passes over a name that is no module, if another is, and over experts."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlhf.models.load import adapter_settings, find_source, model_settings
from rlhf.models.merge import adapts_parameters
from rlhf.recipe.keys import trl_keys
from rlhf.recipe.schema import Recipe

SCORING = ("reward", "vote")
HEAD = "score"  # of a reward model, which its language model has not


def adapter_problems(recipe: Recipe, config: PreTrainedConfig | None) -> Iterator[str]:
    """Yield the names in `lora_target_modules` that are no modules of the model, and else what can't be adapted.

    Args:
        config: of the backbone; None: of a model that is built from nothing.
    """
    stages = {name: getattr(recipe, name).trl_settings() for name in ("sft", "reward", "ppo")}
    stages["vote"] = recipe.vote_settings() if recipe.needs_vote and recipe.vote.trunk is None else {}
    adapted = {name: settings for name, settings in stages.items() if settings.get("use_peft")}
    if problems := list(_unknown_modules(adapted, config or _config_of_nothing(recipe))):
        yield from problems
    elif config is not None and find_source(str(recipe.backbone.model)).adapter is None:
        # An adapter of SFT's goes on in the later stages, wherever theirs would be.
        made = {"sft": adapted["sft"]} if "sft" in adapted else adapted
        for section, settings in made.items():
            yield from _refused_adapter(section, settings, config)


def _unknown_modules(adapted: Mapping[str, Mapping[str, Any]], config: PreTrainedConfig) -> Iterator[str]:
    """Yield a sentence for each section that names modules which the model has not."""
    wanted = {
        name: targets
        for name, settings in adapted.items()
        if isinstance(targets := settings.get("lora_target_modules"), list)
        and not (len(targets) == 1 and not str(targets[0]).isidentifier())  # all-linear, or a pattern
    }
    if not wanted:
        return
    modules = _modules(config)
    names = {HEAD, *(part for name in modules for part in _endings(name))}
    linear = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)})
    told: list[str] = []
    for section, targets in wanted.items():
        unknown = [str(target) for target in targets if target not in names]
        if unknown and unknown != told:
            told = unknown
            yield (
                f"{section}.lora_target_modules: the model has no module {', '.join(map(repr, unknown))}; its linear layers are "
                f"{', '.join(linear)}."
            )


def _refused_adapter(section: str, settings: Mapping[str, Any], config: PreTrainedConfig) -> Iterator[str]:
    """Yield why a section's adapter can't be made on a model without weights, or would be of no use to later stages."""
    kind, kinds = AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING
    if section in SCORING:
        kind, kinds = AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in kinds:
        return  # which is told elsewhere
    with torch.device("meta"):
        model = kind.from_config(config)
    inside = (name for name, module in model.named_modules() if "." in name and isinstance(module, nn.Linear))
    others = ", ".join(sorted({name.rpartition(".")[2] for name in inside}))
    experts = {name: x.numel() for name, x in model.named_parameters() if x.dim() == 3 and "expert" in name}
    share = sum(experts.values()) / sum(x.numel() for x in model.parameters())
    try:
        adapted = _adapted(model, section, settings)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        yield f"{section}.use_peft: peft refuses the adapter: {reason}. The model's linear layers: {others or 'none'}."
        return
    if adapts_parameters(adapted):
        yield f"{section}.lora_target_modules: LoRA on experts does not work yet; name some of {others}."
        return
    if section == "sft" and isinstance(adapted.get_base_model().get_output_embeddings(), BaseTunerLayer):
        yield (
            f"{section}.lora_target_modules: TRL's loss reads the output layer's own weights, so an adapter there would never be "
            f"trained; name some of {others}."
        )
        return
    trained = [name for name, x in adapted.named_parameters() if x.requires_grad]
    beside = {".".join(name.split(".")[:-2]) for name in experts}
    is_all = "all-linear" in (settings.get("lora_target_modules") or [])
    if experts and (is_all or any(f".{place}." in name for place in beside for name in trained)):
        warnings.warn(
            f"{section}.lora_target_modules: LoRA does not reach the experts, {share:.0%} of the weights, which stay as they are.",
            stacklevel=2,
        )


def _adapted(model: PreTrainedModel, section: str, settings: Mapping[str, Any]) -> PeftModel:
    """Put a section's adapter on a model without weights."""
    adapter = adapter_settings(model_settings({key: settings[key] for key in settings if key in trl_keys()["model"]}))
    adapter.task_type = TaskType.SEQ_CLS if section in SCORING else adapter.task_type
    adapter.lora_dropout, adapter.use_dora = 0.0, False  # neither decides where it is put, and experts take none
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, adapter, low_cpu_mem_usage=True)


def _modules(config: PreTrainedConfig) -> dict[str, nn.Module]:
    """Return the modules of a model without weights."""
    kind = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
    with torch.device("meta"):
        return dict(kind.from_config(config).named_modules())


def _config_of_nothing(recipe: Recipe) -> PreTrainedConfig:
    scratch = recipe.backbone.from_scratch
    architecture = "llama" if scratch is None else str(scratch["architecture"])
    return CONFIG_MAPPING[architecture](num_hidden_layers=1)


def _endings(name: str) -> Iterator[str]:
    """Yield a module's name and the ends of it that begin behind a dot, any of which names it."""
    parts = name.split(".")
    yield from (".".join(parts[i:]) for i in range(len(parts)))
