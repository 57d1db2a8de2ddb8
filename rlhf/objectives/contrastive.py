"""Contrastive terms beside the reward loss (arXiv:2401.06080 section 3.1): SimCSE and SwAV on two views of each element.

An element is the representation of an answer, or the difference of a pair's two representations, or the negative of that
difference. Its two views are two forward passes under different dropout. All losses are in nats per element, unreduced.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def with_negatives(differences: Tensor) -> Tensor:
    """Put differences f(chosen) - f(rejected) above their negatives: [n, h] → [2n, h].

    >>> with_negatives(torch.tensor([[1.0, -2.0]])).tolist()
    [[1.0, -2.0], [-1.0, 2.0]]
    """
    return torch.cat([differences, -differences])


def info_nce(views: Tensor, other_views: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Return SimCSE's loss: how badly an element's other view is told from those of all other elements.

        l_i = - log [ exp(cos(h_i, h'_i) / τ) / Σ_j exp(cos(h_i, h'_j) / τ) ]

    (arXiv:2401.06080 eq. 9; τ = 0.05 is that of arXiv:2104.08821.) All elements alike: log n. Each view its twin's copy and
    orthogonal to all others: log(1 + (n - 1) exp(-1/τ)).

    Args:
        views, other_views: [n, h], row i of both is element i.

    Returns:
        [n] nats, in [0, log n + 2/τ).

    >>> info_nce(torch.ones(4, 3), torch.ones(4, 3))  # log 4
    tensor([1.3863, 1.3863, 1.3863, 1.3863])
    """
    similarity = normalize(views, dim=1) @ normalize(other_views, dim=1).T / temperature
    return torch.logsumexp(similarity, dim=1) - similarity.diagonal()


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Return codes: how each element is divided among the prototypes when all prototypes must be used equally.

        argmax_Q  tr(Qᵀ S) + ε H(Q),   rows of Q sum to 1, columns to n / K

    by alternating normalisation of exp(S / ε) in logarithms, rows last (arXiv:2006.09882 eq. 3-4: ε = 0.05, three
    iterations). With one column all codes are 1; equal scores give 1 / K everywhere.

    Args:
        scores: [n, K] similarity of each element to each prototype.

    Returns:
        [n, K] without gradient; rows sum to 1 exactly, columns to n / K as iterations grow.

    >>> sinkhorn(torch.zeros(4, 2))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000],
            [0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    log_codes = scores.float() / epsilon
    for _ in range(iterations):
        log_codes = log_codes - torch.logsumexp(log_codes, dim=0, keepdim=True)
        log_codes = log_codes - torch.logsumexp(log_codes, dim=1, keepdim=True)
    return log_codes.exp()


def swapped_prediction(
    views: Tensor,
    other_views: Tensor,
    prototypes: Tensor,
    *,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Tensor:
    """Return SwAV's loss: each view predicts the code of the other.

        l = - Σ_k q'_k log p_k - Σ_k q_k log p'_k,   p = softmax_k(cos(h, c_k) / τ),   q = sinkhorn(cos(h, c))

    (arXiv:2401.06080 eq. 7-8; τ, ε and iterations are those of arXiv:2006.09882.) Equal prototypes: 2 log K. At least the
    sum of the entropies of both codes. No gradient passes through codes.

    Args:
        views, other_views: [n, h].
        prototypes: [K, h], of any length.

    Returns:
        [n] nats.

    >>> swapped_prediction(torch.eye(3), torch.eye(3), torch.ones(5, 3))  # 2 log 5
    tensor([3.2189, 3.2189, 3.2189])
    """
    centres = normalize(prototypes, dim=1)
    scores, other_scores = normalize(views, dim=1) @ centres.T, normalize(other_views, dim=1) @ centres.T
    codes = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    other_codes = sinkhorn(other_scores, epsilon=epsilon, iterations=iterations)
    log_p, other_log_p = (torch.log_softmax(s / temperature, dim=1) for s in (scores, other_scores))
    return -(other_codes * log_p).sum(dim=1) - (codes * other_log_p).sum(dim=1)
