"""4-bit weights, through which gradients must pass."""

from bitsandbytes.nn import Linear4bit
from torch import nn

from rlhf.errors import UserError


def keep_gradients(model: nn.Module) -> None:
    """Let gradients go on passing through a model's 4-bit layers, in place.

    On CPUs with AVX512-BF16 bitsandbytes repacks a layer's weights at its first forward in evaluation mode, and from then on no
    gradient passes through it, without a word: what samples or compares scores before it learns would train next to nothing.

    Raises:
        UserError: layers are repacked already.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    packed = sum(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    if packed:
        raise UserError(
            f"{packed} of the model's {len(layers)} 4-bit layers were repacked for reading by a forward in evaluation mode on this "
            "CPU, and no gradient passes through them any more; load the model anew, and give it to the trainer before it reads "
            "anything."
        )
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
