"""Closed forms of the contrastive terms, optimal transport as an oracle for the codes, and mutants."""

import math
from collections.abc import Callable
from typing import Any

import ot
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rlhf.objectives import contrastive
from rlhf.objectives.contrastive import sinkhorn


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_simcse_of_equal_and_of_orthogonal_elements() -> None:
    for n in (2, 7):
        alike = contrastive.info_nce(torch.ones(n, 5), torch.ones(n, 5))
        torch.testing.assert_close(alike, torch.full((n,), math.log(n)))
        apart = contrastive.info_nce(
            torch.eye(n, dtype=torch.double), torch.eye(n, dtype=torch.double), temperature=0.5
        )
        expected = math.log1p((n - 1) * math.exp(-1 / 0.5))
        torch.testing.assert_close(apart, torch.full((n,), expected, dtype=torch.double))


def test_simcse_looks_at_directions_and_at_the_right_twin() -> None:
    first, second = drawn(6, 4), drawn(6, 4, seed=1)
    loss = contrastive.info_nce(first, second, temperature=0.3)
    scaled = contrastive.info_nce(first * torch.arange(1, 7)[:, None], 9 * second, temperature=0.3)
    torch.testing.assert_close(scaled, loss)
    for i in range(6):
        cosines = torch.cosine_similarity(first[i], second, dim=1)
        torch.testing.assert_close(loss[i], -torch.log_softmax(cosines / 0.3, dim=0)[i])
    order = torch.tensor([3, 1, 0, 5, 2, 4])
    torch.testing.assert_close(contrastive.info_nce(first[order], second[order], temperature=0.3), loss[order])


def test_a_difference_and_its_negative_are_as_far_apart_as_can_be() -> None:
    """One pair: cos is 1 with itself and -1 with its negative, so the loss is log(1 + exp(-2/τ)) whatever the pair."""
    d = drawn(1, 4)
    elements = contrastive.with_negatives(d)
    torch.testing.assert_close(elements.sum(dim=0), torch.zeros(4, dtype=torch.double))
    loss = contrastive.info_nce(elements, elements, temperature=0.5)
    torch.testing.assert_close(loss, torch.full((2,), math.log1p(math.exp(-4)), dtype=torch.double))


def test_codes_have_their_marginals_and_are_optimal_transport() -> None:
    """Against POT's entropic transport with uniform marginals: rows 1, columns n / K."""
    scores = drawn(12, 4)
    codes = contrastive.sinkhorn(scores, epsilon=0.5, iterations=300).double()
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(12, dtype=torch.double), atol=1e-5, rtol=0)
    torch.testing.assert_close(codes.sum(dim=0), torch.full((4,), 3.0, dtype=torch.double), atol=1e-5, rtol=0)
    plan = ot.sinkhorn([1 / 12] * 12, [1 / 4] * 4, -scores.numpy(), reg=0.5, numItermax=5000, stopThr=1e-12)
    torch.testing.assert_close(codes / 12, torch.tensor(plan), atol=1e-6, rtol=0)
    few = contrastive.sinkhorn(scores, epsilon=0.5)
    torch.testing.assert_close(few.sum(dim=1), torch.ones(12), atol=1e-5, rtol=0)


def test_codes_survive_scores_that_overflow_outside_logarithms() -> None:
    codes = contrastive.sinkhorn(1e3 * drawn(8, 3), epsilon=0.05)
    assert torch.isfinite(codes).all()
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(8))


def test_swav_with_equal_prototypes_and_its_lower_bound() -> None:
    first, second = drawn(16, 6), drawn(16, 6, seed=1)
    equal = contrastive.swapped_prediction(first, second, torch.ones(5, 6, dtype=torch.double))
    torch.testing.assert_close(equal, torch.full((16,), 2 * math.log(5), dtype=torch.double))

    prototypes = drawn(5, 6, seed=2)
    losses = contrastive.swapped_prediction(first, second, prototypes)
    centres = normalize(prototypes, dim=1)
    entropy = torch.zeros(16, dtype=torch.double)
    for view in (first, second):
        codes = sinkhorn(normalize(view, dim=1) @ centres.T).double()
        entropy += torch.special.entr(codes).sum(dim=1)
    assert (losses >= entropy - 1e-6).all(), "a cross-entropy is at least the entropy of its target"
    torch.testing.assert_close(contrastive.swapped_prediction(second, first, prototypes), losses)


def test_no_gradient_passes_through_codes() -> None:
    """The gradient is that of cross-entropy against constant codes."""
    first, second = drawn(8, 6).requires_grad_(), drawn(8, 6, seed=1)
    prototypes = drawn(4, 6, seed=2)
    contrastive.swapped_prediction(first, second, prototypes).sum().backward()
    assert first.grad is not None
    centres = normalize(prototypes, dim=1)
    codes = sinkhorn(normalize(second, dim=1) @ centres.T)
    again = first.detach().clone().requires_grad_()
    (-(codes * torch.log_softmax(normalize(again, dim=1) @ centres.T / 0.1, dim=1)).sum()).backward()
    torch.testing.assert_close(first.grad, again.grad)


def sum_of_the_diagonal_only(views: Tensor, other_views: Tensor, *, temperature: float = 0.05) -> Tensor:
    return -(normalize(views, dim=1) * normalize(other_views, dim=1)).sum(dim=1) / temperature


def without_normalising(views: Tensor, other_views: Tensor, *, temperature: float = 0.05) -> Tensor:
    similarity = views @ other_views.T / temperature
    return torch.logsumexp(similarity, dim=1) - similarity.diagonal()


def softmax_for_codes(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    return torch.softmax(scores / epsilon, dim=1).detach()


def own_prediction(views: Tensor, other_views: Tensor, prototypes: Tensor, **_: Any) -> Tensor:
    centres = normalize(prototypes, dim=1)
    scores = normalize(views, dim=1) @ centres.T
    return -2 * (sinkhorn(scores) * torch.log_softmax(scores / 0.1, dim=1)).sum(dim=1)


def without_the_negative(differences: Tensor) -> Tensor:
    return torch.cat([differences, differences])


MUTANTS: list[tuple[str, Callable[..., Any], Callable[[], None]]] = [
    ("info_nce", sum_of_the_diagonal_only, test_simcse_of_equal_and_of_orthogonal_elements),
    ("info_nce", without_normalising, test_simcse_looks_at_directions_and_at_the_right_twin),
    ("sinkhorn", softmax_for_codes, test_codes_have_their_marginals_and_are_optimal_transport),
    ("swapped_prediction", own_prediction, test_swav_with_equal_prototypes_and_its_lower_bound),
    ("with_negatives", without_the_negative, test_a_difference_and_its_negative_are_as_far_apart_as_can_be),
]


@pytest.mark.parametrize(("name", "mutant", "test"), MUTANTS, ids=[mutant.__name__ for _, mutant, _ in MUTANTS])
def test_the_tests_reject(
    name: str, mutant: Callable[..., Any], test: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    test()
    monkeypatch.setattr(contrastive, name, mutant)
    with pytest.raises(AssertionError):
        test()
