"""Dropout, in whatever form a model has it: modules, and probabilities that layers hand to a function."""

from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig


def switch_off_dropout(model: nn.Module) -> int:
    """Set every dropout probability of a model to 0, and return how many were above it.

    Beside the modules (`nn.Dropout` and its like, whose probability is `p`), layers keep probabilities as numbers and call
    a function with them in training: OPT's `dropout`, Llama's `attention_dropout`, Bloom's `hidden_dropout`, GPT-2's `*pdrop`,
    `activation_dropout`, `layerdrop`, `drop_prob`. All are attributes of a module whose name has "drop" in it. Falcon's layers,
    Persimmon's and BLT's read them from their configuration at every forward, so modules below the top get a view of it in
    which they are 0. The configuration itself stays as it is: it is saved with the model, and whoever trains on may want its
    dropout.
    """
    count = 0
    views: dict[int, PreTrainedConfig | None] = {}
    top = [model.base_model, model.base_model.model] if isinstance(model, PeftModel) else []
    for module in model.modules():
        is_dropout = "drop" in type(module).__name__.lower()
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and value > 0 and ("drop" in name.lower() or (is_dropout and name == "p")):
                setattr(module, name, 0.0)
                count += 1
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and not any(module is holder for holder in [model, *top]):
            if id(config) not in views:
                names = _dropout_names(config)
                views[id(config)] = _view_without(config, names) if names else None
                count += len(names)
            view = views[id(config)]
            if view is not None:
                module.config = view
    return count


def _dropout_names(config: PreTrainedConfig) -> list[str]:
    """Return the attributes of a configuration that are dropout probabilities above 0."""
    names = [name for name in vars(config) if "drop" in name.lower()]
    return [name for name in names if isinstance(value := getattr(config, name), float) and value > 0]


def _view_without(config: PreTrainedConfig, names: list[str]) -> PreTrainedConfig:
    """Return a configuration that has every value in common with another, also later ones, but reads some of them as 0.

    Properties of a class go before the values of its objects, and the two objects have one `__dict__`.
    """
    zeros: dict[str, Any] = {name: property(lambda _: 0.0) for name in names}
    view: PreTrainedConfig = object.__new__(type(type(config).__name__, (type(config),), zeros))
    object.__setattr__(view, "__dict__", config.__dict__)
    return view
