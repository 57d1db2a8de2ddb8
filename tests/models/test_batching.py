"""Batches by length: each row once, ties in their order, results back in the order of the rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.models.batching import batches_by_length, pad_batch, run_batches

LENGTHS = st.lists(st.integers(0, 5), max_size=40)


@given(LENGTHS, st.integers(1, 9), st.booleans())
def test_batches_are_the_rows_sorted_and_cut(lengths: list[int], batch_size: int, longest_first: bool) -> None:
    batches = batches_by_length(lengths, batch_size, longest_first=longest_first)
    order = [row for batch in batches for row in batch]
    sign = -1 if longest_first else 1
    assert order == sorted(range(len(lengths)), key=lambda row: (sign * lengths[row], row)), "ties stay in their order"
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert all(batches)


@given(LENGTHS, st.integers(1, 9))
def test_results_come_back_in_the_order_of_the_rows(lengths: list[int], batch_size: int) -> None:
    calls: list[list[int]] = []

    def function(batch: list[int]) -> list[str]:
        calls.append(batch)
        return [f"row {row}" for row in batch]

    batches = batches_by_length(lengths, batch_size)
    assert run_batches(function, batches) == [f"row {row}" for row in range(len(lengths))]
    assert calls == batches


@pytest.mark.parametrize("longest_first", [False, True])
def test_no_rows_and_one_row(longest_first: bool) -> None:
    assert batches_by_length([], 4, longest_first=longest_first) == []
    assert batches_by_length([7], 4, longest_first=longest_first) == [[0]]
    assert run_batches(lambda batch: batch, []) == []
    assert run_batches(lambda batch: [10 * row for row in batch], [[0]]) == [0]


def test_a_function_owes_a_result_for_each_row() -> None:
    with pytest.raises(ValueError, match="shorter"):
        run_batches(lambda batch: batch[1:], [[1, 0]])


def test_the_rows_of_a_tensor_are_results() -> None:
    rows = run_batches(lambda batch: torch.tensor([[row, 2.0 * row] for row in batch]), [[2, 0], [1]])
    assert torch.equal(torch.stack(rows), torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]]))


def test_padding_is_on_the_right_and_the_mask_knows_it_from_a_token_that_looks_like_it() -> None:
    ids, mask = pad_batch([[5], [6, 9, 9], [9, 7]], pad_token_id=9)
    assert ids.tolist() == [[5, 9, 9], [6, 9, 9], [9, 7, 9]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert ids.dtype == mask.dtype == torch.long
    assert [x.tolist() for x in pad_batch([[3, 4]], pad_token_id=0)] == [[[3, 4]], [[1, 1]]]
