"""What a label is worth: the Laplace posterior against sums, information against Monte Carlo, diversity against brute force."""

import math

import torch

from rlhf.objectives.selection import difference_std, expected_information, head_covariance, most_diverse


def test_labels_make_the_head_sure_where_they_are() -> None:
    """n labels along one axis at p = 1/2: variance 1 / (λ + n / 4) there, 1 / λ elsewhere."""
    features = torch.tensor([[1.0, 0.0]]).repeat(12, 1)
    covariance = head_covariance(features, torch.zeros(12), ridge=2.0)
    torch.testing.assert_close(covariance, torch.diag(torch.tensor([1 / (2 + 3), 1 / 2])))
    std = difference_std(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), covariance)
    torch.testing.assert_close(std, torch.tensor([math.sqrt(0.2), math.sqrt(2.0)]))
    sure = head_covariance(features, torch.full((12,), 20.0), ridge=2.0)
    torch.testing.assert_close(sure, torch.eye(2) / 2), "labels that were certain taught nothing"


def test_information_is_what_monte_carlo_says() -> None:
    """200,000 draws: their own error is below 0.002 nats."""
    means = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 3.0, 3.0])
    stds = torch.tensor([0.01, 1.0, 4.0, 0.5, 3.0, 0.5, 4.0])
    noise = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    p = torch.sigmoid(means + stds * noise[:, None])

    def entropy(q: torch.Tensor) -> torch.Tensor:
        return -(torch.special.xlogy(q, q) + torch.special.xlogy(1 - q, 1 - q))

    expected = entropy(p.mean(dim=0)) - entropy(p).mean(dim=0)
    found = expected_information(means, stds)
    torch.testing.assert_close(found, expected, atol=0.004, rtol=0)
    assert (expected_information(means, torch.zeros(7)) < 1e-6).all(), "nothing is learnt where nothing is unknown"
    assert found.max() <= math.log(2)


def test_diversity_takes_what_the_others_do_not_say() -> None:
    features = torch.tensor([[3.0, 0.0], [2.9, 0.0], [0.0, 2.0]])
    taken = most_diverse(features, torch.zeros(3), torch.eye(2), 2)
    assert taken == [0, 2], "the second is nearly the first again"


def test_greedy_choice_is_that_of_whole_inverses() -> None:
    generator = torch.Generator().manual_seed(1)
    features, means = torch.randn(30, 5, generator=generator), torch.randn(30, generator=generator)
    weight = torch.sigmoid(means) * (1 - torch.sigmoid(means))
    precision, expected = torch.eye(5), list[int]()
    for _ in range(6):
        gain = weight * difference_std(features, torch.linalg.inv(precision)) ** 2
        gain[expected] = -1
        best = int(gain.argmax())
        expected.append(best)
        precision = precision + weight[best] * torch.outer(features[best], features[best])
    assert most_diverse(features, means, torch.eye(5), 6) == expected
