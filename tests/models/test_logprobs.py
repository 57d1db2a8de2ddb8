"""The passes over logits against their definitions and TRL's kernels."""

import pytest
import torch
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from rlhf.models import logprobs
from rlhf.models.logprobs import token_logprobs, token_surprise


@pytest.mark.parametrize("at_once", [1, 700, 2**20])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_gradient_are_those_of_autograd(
    temperature: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "ELEMENTS_AT_ONCE", at_once)  # a row, two rows and a rest, all
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 6, 50, generator=generator)).requires_grad_()
    ids = torch.randint(0, 50, (3, 5), generator=generator)
    upstream = torch.randn(3, 5, generator=generator)
    found = token_logprobs(logits, ids, temperature=temperature)
    (gradient,) = torch.autograd.grad(found, logits, upstream)
    expected = selective_log_softmax(logits[:, :5] / temperature, ids)
    (gradient_expected,) = torch.autograd.grad(expected, logits, upstream)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, gradient_expected, atol=1e-6, rtol=1e-5)
    assert (gradient[:, 5] == 0).all()  # nobody asked for what comes after the last token


def test_sixteen_bit_logits_are_summed_in_float32() -> None:
    logits = torch.randn(2, 4, 1000, generator=torch.Generator().manual_seed(2)).bfloat16()
    ids = torch.randint(0, 1000, (2, 4), generator=torch.Generator().manual_seed(3))
    expected = logits.double().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    found = token_logprobs(logits, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_entropy_of_even_logits_is_log_of_the_vocabulary() -> None:
    torch.testing.assert_close(token_surprise(torch.zeros(1, 3, 64), 2).entropy, torch.full((1, 2), 64.0).log())
    logits = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(token_surprise(logits, 4, temperature=0.7).entropy, entropy_from_logits(logits / 0.7))
