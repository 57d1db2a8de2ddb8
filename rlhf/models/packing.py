"""Rows packed behind a shared prefix: answers to one prompt in a single row, which see the prompt and not each other.

    row        p p p p  a a a  b b        the common prefix once, then what is left of each answer
    segment    0 0 0 0  1 1 1  2 2
    position   0 1 2 3  4 5 6  4 5        each answer goes on where the prefix ends
    attention  j ≤ i, and segment_j is 0 or segment_i

Several prompts may share a row too, so that short ones fill what a long one would leave to padding; they don't see each
other. The score is read at each answer's last token. Equal to encoding every answer by itself, for full causal attention.
"""

import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.scalar_head import score_head

MEGABATCH = 50
LONG_ROW = 6  # hidden sizes: the length of a row at which attention costs as much as all else in a layer, about
# Largest difference between shared and plain scores that sharing survives: sums in another order, and no more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass
class Packed:
    """Groups of answers that share a prefix, one or more groups to a row.

    Attributes:
        input_ids, position_ids: [b, t], padded on the right.
        groups: [b, t] which group a token belongs to, -1 for padding.
        segments: [b, t] 0 is the group's prefix, k its k-th answer, -1 padding.
        rows, ends: [n] row and index of the last token of each of the n answers, group by group.
    """

    input_ids: Tensor
    position_ids: Tensor
    groups: Tensor
    segments: Tensor
    rows: Tensor
    ends: Tensor


def pack(
    groups: Sequence[Sequence[Sequence[int]]],
    *,
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    long_row: int | None = None,
) -> Packed:
    """Put the sequences of each group, one or more, behind their common prefix.

    The shared part is their longest common prefix of token ids, but never all of one of them: each keeps a token of its
    own for its score.

    Args:
        groups: token ids of the sequences of each group.
        pad_token_id: what fills a row on the right.
        pad_to_multiple_of: round the length of the rows up to a multiple of this.
        long_row: put several groups into a row where that costs less; the row length at which attention costs as much
            as all else in a layer, `LONG_ROW` times the hidden size. None: group i is row i.
    """
    parts = [_one_group(group) for group in groups]
    lengths = [len(ids) for ids, *_ in parts]
    layout = balanced_rows(lengths, long_row) if long_row else [[number] for number in range(len(parts))]
    multiple = pad_to_multiple_of or 1
    width = -(-max(sum(lengths[number] for number in row) for row in layout) // multiple) * multiple
    shape = (len(layout), width)
    input_ids, positions = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.long)
    group_ids, segments = torch.full(shape, -1), torch.full(shape, -1)
    places: list[list[tuple[int, int]]] = [[] for _ in parts]
    for row, numbers in enumerate(layout):
        begin = 0
        for number in numbers:
            ids, position, segment, ends = parts[number]
            columns = slice(begin, begin + len(ids))
            input_ids[row, columns], positions[row, columns] = torch.tensor(ids), torch.tensor(position)
            group_ids[row, columns], segments[row, columns] = number, torch.tensor(segment)
            places[number] = [(row, begin + end) for end in ends]
            begin += len(ids)
    rows, ends_ = torch.tensor([place for group in places for place in group]).unbind(dim=1)
    return Packed(input_ids, positions, group_ids, segments, rows, ends_)


def _one_group(group: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return token ids, positions and segments of a group, and where its answers end."""
    shared = 0
    while shared < min(map(len, group)) - 1 and len({sequence[shared] for sequence in group}) == 1:
        shared += 1
    ids, positions, segments, ends = list(group[0][:shared]), list(range(shared)), [0] * shared, []
    for number, sequence in enumerate(group, start=1):
        rest = sequence[shared:]
        ids += rest
        positions += range(shared, len(sequence))
        segments += [number] * len(rest)
        ends.append(len(ids) - 1)
    return ids, positions, segments, ends


def balanced_rows(lengths: Sequence[int], long_row: int, *, widest: int = 3) -> list[list[int]]:
    """Choose which groups share a row: as many rows as cost least, groups dealt longest first to the shortest row.

    Costs are padded tokens, dearer the longer the rows are, since attention looks over a whole row.

    Args:
        lengths: tokens of each group.
        long_row: the row length at which attention costs as much as all else in a layer.
        widest: how often the longest group may fit into a row, about; more rows are tried where it is large.

    Returns:
        the groups of each row.

    >>> balanced_rows([4, 2, 5], long_row=10)
    [[2], [0, 1]]
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    longest, shortest = lengths[longest_first[0]], lengths[longest_first[-1]]
    best: tuple[float, list[list[int]]] | None = None
    fewest = len(lengths) if longest == shortest else max(1, sum(lengths) // (widest * longest))
    for count in range(fewest, len(lengths) + 1):
        if best is not None and count * longest * (1 + longest / long_row) >= best[0]:
            break  # no more rows cost less than these
        heap = [(0, row) for row in range(count)]
        layout: list[list[int]] = [[] for _ in range(count)]
        for number in longest_first:
            load, row = heapq.heappop(heap)
            layout[row].append(number)
            heapq.heappush(heap, (load + lengths[number], row))
        width = max(heap)[0]
        cost = count * width * (1 + width / long_row)
        if best is None or cost < best[0]:
            best = cost, layout
    assert best is not None, "there is at least one group"
    return best[1]


def unpack(packed: Packed, *, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return the sequences that were packed, each by itself: `input_ids` and `attention_mask` [n, t], padded on the right."""
    sequences = [packed.input_ids[row][columns] for row, columns in tokens_read(packed)]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=ids.device)
    return ids, (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()


def tokens_read(packed: Packed) -> list[tuple[int, Tensor]]:
    """Return for each packed answer its row, and the columns of the tokens that it reads and is, in their order."""
    places = []
    for row, end in zip(packed.rows.tolist(), packed.ends.tolist(), strict=True):
        groups, segments = packed.groups[row], packed.segments[row]
        is_read = (groups == groups[end]) & ((segments == 0) | (segments == segments[end]))
        places.append((row, is_read.nonzero()[:, 0]))
    return places


def attention_bias(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention logits [b, 1, t, t]: 0 where a token may look, the lowest number where it may not.

    Padding looks at itself, so that every token has a place to look. Floats and not booleans: under eager attention
    a boolean mask is added as 0 and 1.

    >>> attention_bias(pack([[[7, 8], [7, 9]]], pad_token_id=0), torch.float32)[0, 0] == 0
    tensor([[ True, False, False],
            [ True,  True, False],
            [ True, False,  True]])
    """
    groups, segments = packed.groups, packed.segments
    t = segments.shape[1]
    earlier = torch.ones(t, t, dtype=torch.bool, device=segments.device).tril()
    related = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    related = related & (groups[:, None, :] == groups[:, :, None])
    visible = earlier & related & (segments[:, None, :] >= 0)
    visible = visible | torch.eye(t, dtype=torch.bool, device=segments.device)
    bias = torch.zeros(visible.shape, dtype=dtype, device=segments.device)
    return bias.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def obstacle(model: PreTrainedModel | PeftModel) -> str | None:
    """Say why answers cannot share their prompt in this model; None where they can."""
    if score_head(model) is None:
        return "an encoder's tokens look in both directions"
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return f"attn_implementation is {config._attn_implementation}, which takes no mask of its own"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"its layers are {', '.join(sorted(kinds - {'full_attention'}))}"
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        return "its attention has a sliding window"
    return None


def shared_scores(model: nn.Module, inner: nn.Module, packed: Packed) -> Tensor:
    """Return the scores of all packed answers, [n] float32, in their order.

    Args:
        model: what is called, so that a wrapper (data parallelism) sees its forward.
        inner: the same model without wrappers, with a `score` head.
    """
    bias = attention_bias(packed, _dtype(inner))
    with _every_token(inner) as outputs:
        model(input_ids=packed.input_ids, attention_mask=bias, position_ids=packed.position_ids, use_cache=False)
    return outputs[0].squeeze(-1)[packed.rows, packed.ends].float()


@torch.no_grad()
def largest_difference(inner: nn.Module, packed: Packed, *, pad_token_id: int) -> float:
    """Return the largest difference between shared and plain scores of one batch, in evaluation mode.

    It is relative to the plain score where that is above 1 in size, and where it is smaller, to the root mean square of all of
    them, up to 1: a new head's are near 0, and what is wrong with its scores is as much smaller.
    """
    was_training = inner.training
    inner.eval()
    ids, mask = unpack(packed, pad_token_id=pad_token_id)
    plain = inner(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1).float()
    shared = shared_scores(inner, inner, packed)
    inner.train(was_training)
    scale = plain.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny, max=1)
    return ((shared - plain).abs() / plain.abs().maximum(scale)).max().item()


def tolerance(inner: nn.Module, mixed_precision: str) -> float:
    """Return the largest difference between shared and plain scores that sharing survives, by the activations' precision.

    Args:
        inner: a model without wrappers.
        mixed_precision: accelerate's word for it: "no", "bf16", "fp16".
    """
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    return TOLERANCE.get(mixed or _dtype(inner), 0.1)


def order_by_length(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int, groups: Sequence[Hashable | None] | None = None
) -> list[int]:
    """Return the numbers of all rows, batch after batch of similar length, in an order drawn from (seed, epoch) and nothing else.

    Rows are shuffled, sorted within 50 batches at a time, cut into batches, and the batches shuffled; a ragged batch
    stays last. Rows of one group (the pairs of a ranking) stay beside each other, so most of them meet in one batch.

    Args:
        lengths: of each row.
        batch_size: rows of a batch.
        groups: of each row; None stands alone.
    """
    together: dict[tuple[str, Hashable], list[int]] = {}
    for i, group in enumerate(groups or [None] * len(lengths)):
        together.setdefault(("row", i) if group is None else ("group", group), []).append(i)
    ordered = list(together.values())
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    units = [ordered[i] for i in torch.randperm(len(ordered), generator=generator).tolist()]
    batches = []
    for start in range(0, len(units), MEGABATCH * batch_size):
        block = sorted(units[start : start + MEGABATCH * batch_size], key=lambda unit: -max(lengths[i] for i in unit))
        rows = [i for unit in block for i in unit]
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    whole = [batch for batch in batches if len(batch) == batch_size]
    ragged = [batch for batch in batches if len(batch) < batch_size]
    shuffled = [whole[place] for place in torch.randperm(len(whole), generator=generator).tolist()]
    return [i for batch in (*shuffled, *ragged) for i in batch]


class GroupedByLength(torch.utils.data.Sampler[int]):
    """Sampler of rows in batches of similar length, in a new order every epoch: `order_by_length`, whose arguments it takes.

    It asks which epoch begins. Where several processes go on within an epoch, accelerate wraps samplers once more than it and
    transformers look for a `set_epoch`, and the rows of the first epoch came again.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        epoch: Callable[[], int],
        groups: Sequence[Hashable | None] | None = None,
    ):
        self.lengths, self.batch_size, self.seed, self.epoch, self.groups = lengths, batch_size, seed, epoch, groups

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(
            order_by_length(self.lengths, self.batch_size, seed=self.seed, epoch=self.epoch(), groups=self.groups)
        )


@contextmanager
def _every_token(inner: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the head says at every token, of which a classifier itself gives only the last."""
    head, outputs = score_head(inner), list[Tensor]()
    assert head is not None, "obstacle() refuses models without one"
    hook = head.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def _dtype(inner: PreTrainedModel | PeftModel) -> torch.dtype:
    """Return the dtype of the activations: that of the embeddings, which stay in full precision above 4-bit weights."""
    dtype: torch.dtype = inner.get_input_embeddings().weight.dtype
    return dtype
