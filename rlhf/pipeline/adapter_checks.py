"""Whether the modules that a recipe puts LoRA on are modules of its model: peft passes over a name that is none, if another is."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rlhf.recipe.schema import Recipe

HEAD = "score"  # of a reward model, which its language model has not


def adapter_problems(recipe: Recipe, config: PreTrainedConfig | None) -> Iterator[str]:
    """Yield the names in `lora_target_modules` that are no modules of the model.

    Args:
        config: of the backbone; None: of a model that is built from nothing.
    """
    stages = {name: getattr(recipe, name).trl_settings() for name in ("sft", "reward", "ppo")}
    stages["vote"] = recipe.vote_settings() if recipe.needs_vote and recipe.vote.trunk is None else {}
    wanted = {
        name: targets
        for name, settings in stages.items()
        if settings.get("use_peft")
        and isinstance(targets := settings.get("lora_target_modules"), list)
        and not (len(targets) == 1 and not str(targets[0]).isidentifier())  # all-linear, or a pattern
    }
    if not wanted:
        return
    modules = _modules(config or _config_of_nothing(recipe))
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
