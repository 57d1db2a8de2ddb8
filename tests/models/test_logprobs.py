"""The passes over logits against their definitions and TRL's kernels."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from rlhf.models import logprobs
from rlhf.models.logprobs import (
    ExpectedCounts,
    response_logprobs,
    response_statistics,
    token_logprobs,
    token_surprise,
)


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


# ---- The logits of answers, a part at a time ----

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What each does to its logits that a bare output layer does not: nothing, a soft cap, a factor, a divisor; GPT-2's names are its own.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 3.0},
    "granite": {"logits_scaling": 0.25},
    "gpt_neox": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
}


def tiny_model(architecture: str, **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = TINY if architecture != "gpt2" else {n: v for n, v in TINY.items() if n.endswith(("size", "id"))}
    config = AutoConfig.for_model(architecture, **{**settings, **ARCHITECTURES.get(architecture, {}), **more})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():  # initial weights are so small that neither cap nor factor would show
        parameter.data.mul_(6.0)
    return model


def texts_of_two_lengths() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Three texts with answers of 6, 4 and 1 tokens, behind prompts of 5 and fewer."""
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :2], mask[1, 9:], mask[2, 6:] = 0, 0, 0
    return ids, mask, 6


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama with LoRA"])
def test_in_parts_everything_is_as_in_one_piece(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model(architecture.split()[0])
    if "LoRA" in architecture:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    ids, mask, length = texts_of_two_lengths()
    answered = mask[:, -length:].bool()
    upstream = torch.randn(3, length, generator=torch.Generator().manual_seed(2)) * answered

    def everything() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        weights = torch.stack([answered.float(), answered.float() / 2], dim=1)
        expected = ExpectedCounts(weights, torch.zeros(2, 97, dtype=torch.float64))
        with torch.no_grad():
            logprobs, surprise = response_statistics(model, ids, mask, length, 0.7, moments=True, expected=expected)
        assert surprise is not None
        model.zero_grad()
        (response_logprobs(model, ids, mask, length, 0.7) * upstream).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
        return torch.stack([logprobs, *surprise])[:, answered], gradients, expected.sums

    with monkeypatch.context() as plain:
        plain.setattr(logprobs, "reads_states", lambda _: False)  # the model's own forward, padding and all
        whole, whole_gradients, whole_counts = everything()
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 4 * 97)
    monkeypatch.setattr(logprobs, "response_logits", None)  # nobody may ask for all logits at once
    parts, gradients, counts = everything()
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(counts, whole_counts, atol=1e-6, rtol=1e-5)
    assert len(gradients) == len(whole_gradients) > 0
    scale = max(g.abs().max().item() for g in whole_gradients)
    for gradient, whole_gradient in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(gradient, whole_gradient, atol=1e-5 * scale, rtol=1e-4)


def test_nothing_as_large_as_the_logits_is_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask, length) = tiny_model("llama", vocab_size=5000), texts_of_two_lengths()
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 4 * 5000)
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        response_logprobs(model, ids, mask, length, 1.0)
    assert max(kept) < 5000


def test_a_model_that_reaches_into_its_decoder_is_read_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask, length) = tiny_model("llama"), texts_of_two_lengths()
    answered = mask[:, -length:].bool()
    with torch.no_grad():
        expected = response_logprobs(model, ids, mask, length, 1.0)

    class Reaching(type(model)):  # type: ignore[misc]
        def forward(self, *arguments: Any, **named: Any) -> Any:
            assert self.model.layers is not None
            return super().forward(*arguments, **named)

    model.__class__ = Reaching
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 1)
    with torch.no_grad(), pytest.warns(UserWarning, match="^Reaching: .* the logits of a whole batch are in memory"):
        found = response_logprobs(model, ids, mask, length, 1.0)
    torch.testing.assert_close(found[answered], expected[answered], atol=1e-5, rtol=1e-5)
    assert logprobs._READS_STATES[Reaching] is False
