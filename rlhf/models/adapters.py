"""Names of an adapter's weights: as PEFT holds them in a model, and as it writes them into `adapter_model.safetensors`."""

import copy
import json
from pathlib import Path

from peft import PeftConfig, PeftModel, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from rlhf.errors import UserError

ADAPTER = "default"
LEARNT_PROMPTS = {"ADAPTION_PROMPT"} | {
    str(kind.value) for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(config, PromptLearningConfig)
}
INSIDE = "base_model.model."  # what PEFT puts before every name of the model inside it


def saved_name(name: str, adapter: str = ADAPTER) -> str:
    """Return the name by which PEFT writes a parameter of an adapter: LoRA factors, DoRA's magnitudes, whole modules.

    >>> saved_name("base_model.model.model.embed_tokens.modules_to_save.default.weight")
    'base_model.model.model.embed_tokens.weight'
    >>> saved_name("base_model.model.q_proj.lora_magnitude_vector.default.weight")
    'base_model.model.q_proj.lora_magnitude_vector'
    >>> saved_name("base_model.model.model.embed_tokens.lora_embedding_A.default")
    'base_model.model.model.embed_tokens.lora_embedding_A'
    """
    if name.endswith(f".lora_magnitude_vector.{adapter}.weight"):
        name = name.removesuffix(".weight")
    name = name.replace(f".modules_to_save.{adapter}.", ".")
    return name.removesuffix(f".{adapter}").replace(f".{adapter}.", ".")


def adapter_places(model: PeftModel, adapter: str = ADAPTER) -> dict[str, nn.Parameter]:
    """Return the parameters of an adapter in a model, by the names by which PEFT writes them."""
    marks = (f".modules_to_save.{adapter}.", f".{adapter}.", f".{adapter}")
    return {
        saved_name(name, adapter): parameter
        for name, parameter in model.named_parameters()
        if marks[0] in name or ("lora_" in name and (marks[1] in name or name.endswith(marks[2])))
    }


def rewrites_base(config: PeftConfig) -> bool:
    """Tell whether making an adapter of these settings changes the base, under every adapter on it.

    PiSSA, OLoRA, LoftQ and their like take the adapter's first weights out of the base's.
    """
    return getattr(config, "init_lora_weights", True) not in (True, False, "gaussian", "eva")


def beside_others(config: PeftConfig) -> PeftConfig:
    """Return an adapter's settings for a copy of it on the same base: its weights are copied in, so the base stays as it is."""
    settings = copy.deepcopy(config)
    if rewrites_base(config):
        settings.init_lora_weights = True
    return settings


def of_backbone(name: str, model: PeftModel) -> bool:
    """Return whether a saved name is of the layers below the heads, which models for all tasks have in common."""
    return name.startswith(f"{INSIDE}{model.base_model.model.base_model_prefix}.")


def refuse_learnt_prompt(folder: str) -> None:
    """Refuse an adapter that is a prompt and no change of weights, where it would have to be merged into them.

    Raises:
        UserError: it is one; what is made without it would be the base alone.
    """
    kind = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
    if kind in LEARNT_PROMPTS:
        raise UserError(
            f"{folder}: this adapter is a learnt prompt ({kind}), which can't be merged into weights, and a reward model can't "
            "start from it; take LoRA."
        )
