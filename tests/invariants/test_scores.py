"""Checks of scores see a fault of a share of the scores, however small these are."""

import pytest
import torch

from rlhf.invariants.scores import SCORE_TOLERANCE, alone_in_batch, as_rendered

SCORES = torch.tensor([0.3, -1.2, 0.7, 2.0, -0.1])


@pytest.mark.parametrize("scale", [1e-4, 0.01, 1.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fault_is_a_share_of_the_scores(scale: float, dtype: torch.dtype) -> None:
    """Heads of ratings on [0, 1], classifiers and new heads have scores within 0.1: no floor may hide half of them. Where all are
    small by chance, rounding is a larger share of them, so below 1 three times as much is allowed."""
    scores, allowed = scale * SCORES, SCORE_TOLERANCE[dtype]
    for check in (alone_in_batch, as_rendered):
        share = check(1.5 * scores, scores, dtype=dtype).statistic
        assert share == pytest.approx(1 / 3 if scale >= 1 else 1 / 9)
        assert not check(1.5 * scores, scores, dtype=dtype).held
        assert not check(-scores, scores, dtype=dtype).held
        assert check((1 + 0.9 * allowed) * scores, scores, dtype=dtype).held


def test_scores_that_are_all_nought_agree() -> None:
    nought = torch.zeros(3)
    assert alone_in_batch(nought, nought, dtype=torch.float32).held
    assert not alone_in_batch(nought + 1e-6, nought, dtype=torch.float32).held
    assert not alone_in_batch(torch.full((3,), torch.nan), SCORES[:3], dtype=torch.float32).held
