"""The states of a decoder at the tokens of a padded batch, computed without the padding.

    batch   . . a a a a .    is read as   a a a a d d    at positions   0 1 2 3 0 1
            . b b b b b .                 b b b b b .                   0 1 2 3 4 0
            . . . d d . .

Texts lie behind each other, in rows that cost least. A text begins where positions begin again: from them transformers makes
the mask under which no text sees another one, or, for FlashAttention, the bounds of all texts in one row. It is one call of the
decoder whatever the lengths are, so processes that hold its weights together stay in step.
"""

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf.models.packing import LONG_ROW, TOLERANCE, balanced_rows

LEAST_LEAK = 1e-3  # of the largest state; attention that sees no other text gives 0 in every precision


def token_states(decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return a decoder's last states at all tokens of a batch, [n, hidden] with n = Σ attention_mask, text by text.

    Args:
        decoder: a model that gives a `last_hidden_state`.
        input_ids, attention_mask: [b, t], padding on either side.
    """
    is_token = attention_mask.bool()
    # First of all `can_pack`: its forward must happen in all processes that hold the weights together, or in none.
    if not can_pack(decoder, input_ids.device) or is_token.all():
        states: Tensor = decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).last_hidden_state
        return states[is_token]

    # 1. A place in the rows for every token.
    lengths = is_token.sum(dim=1).tolist()
    rows = rows_of_texts(lengths, decoder)
    width = max(sum(lengths[text] for text in row) for row in rows)
    begins = torch.empty(len(lengths), dtype=torch.long)
    for number, row in enumerate(rows):
        begin = number * width
        for text in row:
            begins[text] = begin
            begin += lengths[text]
    positions = position_ids(attention_mask)[is_token]
    places = begins.to(positions.device).repeat_interleave(is_token.sum(dim=1)) + positions

    # 2. One forward; what is left of a row is texts of one token each.
    def in_rows(values: Tensor) -> Tensor:
        return values.new_zeros(len(rows) * width).index_copy(0, places, values).view(len(rows), width)

    packed = decoder(input_ids=in_rows(input_ids[is_token]), position_ids=in_rows(positions), use_cache=False)
    states = packed.last_hidden_state.flatten(0, 1)
    return states[places]


def rows_of_texts(lengths: Sequence[int], decoder: Any) -> list[list[int]]:
    """Return which texts share a row: as many rows as cost least; one row under FlashAttention, which reads each text by itself."""
    if "flash" in decoder.config._attn_implementation:
        return [list(range(len(lengths)))]
    return balanced_rows(lengths, LONG_ROW * decoder.config.get_text_config().hidden_size, widest=1)


@torch.no_grad()
def can_pack(decoder: nn.Module, device: torch.device) -> bool:
    """Tell whether a text behind another one in a row has the states that it has alone, in this decoder.

    Found out once for each decoder, with a text of two tokens behind nothing, behind a text of three and behind another of
    three: some decoders carry a state from token to token (linear attention), others read no positions. One warning says so;
    such a decoder reads its padding. What stands before may change nothing; where the tokens of a row meet in experts, sums of
    another order. That the text begins anew is seen within the noise of any precision.
    """
    if decoder not in _CAN_PACK:
        was_training = decoder.training
        decoder.eval()
        with torch.autocast(device.type, enabled=False):
            alone, behind, behind_other = (_last_two(decoder, before, device) for before in ([], [4, 3, 2], [1, 4, 4]))
        decoder.train(was_training)
        size = alone.abs().max().item()
        leak, shift = ((behind - other).abs().max().item() for other in (behind_other, alone))
        tolerance = TOLERANCE.get(alone.dtype, 0.1)
        allowed = tolerance if _has_experts(decoder) and not _carries_state(decoder) else min(tolerance, LEAST_LEAK)
        _CAN_PACK[decoder] = leak <= allowed * size and shift <= 0.1 * size
        if not _CAN_PACK[decoder]:
            warnings.warn(
                f"{type(decoder).__name__}: texts in one row would see each other, so padding is read too (slower).",
                stacklevel=2,
            )
    return _CAN_PACK[decoder]


def _has_experts(decoder: Any) -> bool:
    """Tell whether a decoder's layers choose among experts, by the numbers of them that its configuration names."""
    settings: dict[str, Any] = decoder.config.get_text_config().to_dict()
    return any("expert" in name and isinstance(value, int) and value > 1 for name, value in settings.items())


def _carries_state(decoder: nn.Module) -> bool:
    """Tell whether some layers carry a state from token to token: linear attention, state spaces, short convolutions."""
    return getattr(decoder, "_is_stateful", False) or any(isinstance(module, nn.Conv1d) for module in decoder.modules())


def _last_two(decoder: nn.Module, before: list[int], device: torch.device) -> Tensor:
    """Return the states [2, hidden] of a text of two tokens behind another text in its row."""
    ids = torch.tensor([[*before, 1, 3]], device=device)
    positions = torch.tensor([[*range(len(before)), 0, 1]], device=device)
    states: Tensor = decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return states[0, -2:]


_CAN_PACK: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def position_ids(attention_mask: Tensor) -> Tensor:
    """Return positions [b, t] that do not count padding on the left; padding itself gets 0.

    >>> position_ids(torch.tensor([[0, 0, 1, 1, 1]]))
    tensor([[0, 0, 0, 1, 2]])
    """
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
