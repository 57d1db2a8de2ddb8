"""Dropout, in whatever form a model has it: modules, and probabilities that layers hand to a function."""

from torch import nn


def switch_off_dropout(model: nn.Module) -> int:
    """Set every dropout probability of a model to 0, and return how many were above it.

    Beside the modules (`nn.Dropout` and its like, whose probability is `p`), layers keep probabilities as numbers and call
    a function with them in training: OPT's `dropout`, Llama's `attention_dropout`, Bloom's `hidden_dropout`, GPT-2's `*pdrop`,
    `activation_dropout`, `layerdrop`, `drop_prob`. All are attributes of a module whose name has "drop" in it. The
    configuration stays as it is: it is saved with the model, and whoever trains on may want its dropout.
    """
    count = 0
    for module in model.modules():
        is_dropout = "drop" in type(module).__name__.lower()
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and value > 0 and ("drop" in name.lower() or (is_dropout and name == "p")):
                setattr(module, name, 0.0)
                count += 1
    return count
