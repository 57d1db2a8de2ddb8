"""Merging an adapter into its base: the one place that does it, and compares what the model says before and after."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.errors import TrainingError, UserError

# Of the largest output in size. Adding a product of factors to a weight rounds it once: about 1e-6 of the outputs in float32
# and a few of its own roundings in 16 bits. An update that lands in another place moves them by a tenth and more.
MERGED_WITHIN = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
LOST = 0.25  # of what an adapter changes
TEXTS, TOKENS = 2, 24  # what is compared


def merge_adapter(model: PeftModel, *, trainable: bool = False) -> PreTrainedModel:
    """Return the base with the adapter in its weights, which says what the two said together.

    Where input and output embeddings are one weight and the adapter trains either, the update of one is none of the other,
    and PEFT would add both to both. They become two weights first, and the configuration says so
    (`tie_word_embeddings: false`), so that every later stage and every other program reads two.

    Args:
        trainable: whether the whole model is to be trained; PEFT froze the base below its adapter, and leaves it so.

    Raises:
        TrainingError: the merged model says something else. 4-bit weights are rounded again and not compared.
    """
    before = alone = None
    if not getattr(model, "is_quantized", False):
        before = _outputs(model)
        with model.disable_adapter():
            alone = _outputs(model)
    if adapts_tied_embeddings(model):
        _untie(model.get_base_model())
    merged: PreTrainedModel = model.merge_and_unload()
    if before is not None and alone is not None:
        after = _outputs(merged)
        error, effect = (after - before).abs().max().item(), (before - alone).abs().max().item()
        difference = error / max(1.0, before.abs().max().item())
        allowed = MERGED_WITHIN.get(merged.dtype, 0.1)
        if not difference <= allowed:
            raise TrainingError(
                f"merging the adapter of {merged.name_or_path} into its base changes what the model says by {difference:.3g} of "
                f"the largest output, allowed {allowed:.3g}; nothing was written. Likely causes: an adapter on weights that two "
                "modules share (tied embeddings), or factors that are too large for the weights' dtype. Train without these "
                "modules in lora_target_modules, or use base and adapter as they are."
            )
        if error > LOST * effect > 0:
            warnings.warn(
                f"merging the adapter of {merged.name_or_path} in {merged.dtype} rounds much of it away: "
                f"the error is {error / effect:.0%} of what the adapter changes; merge in float32.",
                stacklevel=2,
            )
    if trainable:
        for parameter in merged.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    return merged


@torch.no_grad()
def merged_weights(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the base with the active adapter in them, by the base's own names, one after the other.

    A weight is to be used before the next is asked for. The base is what it was before, to the bit: adding an adapter and taking
    it off again, as PEFT's `unmerge_adapter` does, rounds the base a little otherwise each time.

    Raises:
        UserError: the adapter trains rows of the embeddings, which are no weight of the base, or experts.
    """
    base, active = model.get_base_model(), model.active_adapter
    if any(isinstance(module, TrainableTokensWrapper) for module in base.modules()):
        raise UserError(
            "the adapter trains single tokens (trainable_token_indices), which another engine can't be given; sample with "
            "transformers, or train whole embeddings."
        )
    if adapts_parameters(base):
        raise UserError(
            "the adapter trains the weights of experts, which are merged nowhere but in a whole export (`rlhf export`); sample "
            "with transformers, or train other modules."
        )
    layers = dict(base.named_modules())
    for name, weight in base.named_parameters():
        if model.prefix in name or ".original_module." in name:
            continue
        if ".modules_to_save." in name:
            owner, _, rest = name.partition(".modules_to_save.")
            adapter, _, leaf = rest.partition(".")
            if adapter == active:
                yield f"{owner}.{leaf}", weight.data
        elif ".base_layer." in name:
            owner, _, leaf = name.partition(".base_layer.")
            with _merged(layers[owner]):
                yield f"{owner}.{leaf}", weight.data
        else:
            yield name, weight.data


@contextmanager
def _merged(layer: nn.Module) -> Iterator[None]:
    """Hold one layer's active adapter in its weights for a while, and put these back to the bit."""
    assert isinstance(layer, BaseTunerLayer), "only such a layer has a base layer"
    weights = list(layer.get_base_layer().parameters())
    before = [weight.detach().clone() for weight in weights]
    layer.merge()
    try:
        yield
    finally:
        if layer.merged:  # it is not, where it has other adapters only
            layer.unmerge()
        for weight, value in zip(weights, before, strict=True):
            weight.data.copy_(value)


def adapts_parameters(model: nn.Module) -> bool:
    """Return whether an adapter has factors for bare parameters, as PEFT makes them for experts that one tensor holds."""
    return any(isinstance(module, ParamWrapper) for module in model.modules())


def adapts_tied_embeddings(model: nn.Module) -> bool:
    """Return whether input and output embeddings share a weight and an adapter has factors for either."""
    return any(isinstance(module, BaseTunerLayer) for module in _tied_embeddings(model))


def trains_tied_embeddings(model: nn.Module) -> bool:
    """Return whether they share a weight and an adapter has factors for either, or a copy of either that it trains whole."""
    return any(isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) for module in _tied_embeddings(model))


def _tied_embeddings(model: nn.Module) -> list[nn.Module]:
    """Return an adapted model's input and output embeddings where they share a weight; else nothing."""
    if not isinstance(model, PeftModel):
        return []
    source, target = _embeddings(model.get_base_model())
    if source is None or target is None or _base_layer(source).weight is not _base_layer(target).weight:
        return []
    return [source, target]


def _embeddings(model: PreTrainedModel) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the modules of input and output embeddings; None where a model has none."""
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None, None


def _base_layer(module: nn.Module) -> nn.Module:
    """Return the module inside PEFT's wrapper."""
    while isinstance(inner := getattr(module, "base_layer", getattr(module, "original_module", None)), nn.Module):
        module = inner
    return module


def _untie(model: PreTrainedModel) -> None:
    """Give the output embeddings a weight of their own, equal to the shared one."""
    _, target = _embeddings(model)
    assert target is not None, "adapts_tied_embeddings looks"
    layer = _base_layer(target)
    layer.weight = nn.Parameter(layer.get_parameter("weight").detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


@torch.no_grad()
def _outputs(model: PreTrainedModel | PeftModel) -> Tensor:
    """Return a model's logits or scores on a few texts of random tokens, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (TEXTS, TOKENS), generator=generator).to(
        model.device
    )
    was_training = model.training
    model.eval()
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    model.train(was_training)
    return logits.float()
