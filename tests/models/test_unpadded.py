"""Without its padding a batch says what each text says alone: states, log-probabilities, scores, gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rlhf.models import unpadded
from rlhf.models.logprobs import ExpectedCounts, response_statistics
from rlhf.models.score import token_scores
from rlhf.models.unpadded import can_pack, rows_of_texts, token_states

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
PROMPTS, ANSWERS = [1, 9, 4, 30, 2, 2], [1, 3, 12, 5, 1, 7]  # tokens


def config_of(architecture: str, **more: object) -> Any:
    small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 97, "pad_token_id": 0}
    settings = small if architecture in ("gpt2", "bloom") else TINY
    return AutoConfig.for_model(architecture, **{**settings, **more})


def lively(model: Any) -> Any:
    """Weights so large that attention looks at single tokens: initial ones nearly take a mean, in which a leak is small."""
    for parameter in model.parameters():
        parameter.data.mul_(6.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


def batch(prompts: list[int], answers: list[int]) -> tuple[Tensor, Tensor, int]:
    """Texts of such lengths, prompts padded on the left and answers on the right."""
    left, right = max(prompts), max(answers)
    ids = torch.randint(3, 97, (len(prompts), left + right), generator=torch.Generator().manual_seed(0))
    columns = torch.arange(left + right)
    begins, ends = (torch.tensor(x)[:, None] for x in ([left - p for p in prompts], [left + a for a in answers]))
    mask = ((columns >= begins) & (columns < ends)).long()
    return ids * mask, mask, right


def texts(ids: Tensor, mask: Tensor) -> list[Tensor]:
    return [row[seen][None] for row, seen in zip(ids, mask.bool(), strict=True)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "gpt_neox", "gemma3_text", "mistral"])
def test_states_are_those_of_each_text_alone(architecture: str, attention: str) -> None:
    torch.manual_seed(0)
    window = {"sliding_window": 8} if architecture in ("gemma3_text", "mistral") else {}
    config = config_of(architecture, **window, **({"head_dim": 8} if architecture == "gemma3_text" else {}))
    decoder = lively(AutoModel.from_config(config, attn_implementation=attention))
    ids, mask, _ = batch(PROMPTS, ANSWERS)
    found = token_states(decoder, ids, mask)
    assert can_pack(decoder, ids.device)
    alone = torch.cat([decoder(input_ids=text).last_hidden_state[0] for text in texts(ids, mask)])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


def plain_logprobs(model: PreTrainedModel, ids: Tensor, mask: Tensor, answers: list[int]) -> list[Tensor]:
    """log softmax of each text alone, at temperature 0.7, at the tokens of its answer: [a, v]."""
    return [
        (model(input_ids=text).logits[0, -a - 1 : -1] / 0.7).log_softmax(dim=-1)
        for text, a in zip(texts(ids, mask), answers, strict=True)
    ]


@pytest.mark.parametrize("many", [False, True], ids=["in one part", "in parts"])
def test_losses_and_gradients_are_those_of_each_text_alone(many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, entropies and expected counts too; written out here text by text, with autograd's own softmax."""
    if many:
        monkeypatch.setattr("rlhf.models.logprobs.LOGITS_AT_ONCE", 4 * 97)
    torch.manual_seed(0)
    policy = lively(AutoModelForCausalLM.from_config(config_of("llama")))
    critic = lively(AutoModelForSequenceClassification.from_config(config_of("llama", num_labels=1)))
    ids, mask, length = batch(PROMPTS, ANSWERS)
    answered = mask[:, -length:].bool()
    wanted = torch.randn(answered.shape, generator=torch.Generator().manual_seed(1))

    # 1. What the code says.
    counts = ExpectedCounts(answered[:, None].float(), torch.zeros(1, 97, dtype=torch.float64))
    with torch.no_grad():
        still = response_statistics(policy, ids, mask, length, 0.7, moments=True, expected=counts)
    logprobs = response_statistics(policy, ids, mask, length, 0.7).logprobs
    values = token_scores(critic, ids, mask)[:, -length - 1 : -1]
    loss = ((logprobs * wanted)[answered].sum() + ((values - wanted) ** 2)[answered].sum()) / answered.sum()
    loss.backward()
    gradients = [p.grad.clone() for model in (policy, critic) for p in model.parameters() if p.grad is not None]
    policy.zero_grad()
    critic.zero_grad()

    # 2. What it must be.
    by_text = plain_logprobs(policy, ids, mask, ANSWERS)
    tokens = [text[0, -a:] for text, a in zip(texts(ids, mask), ANSWERS, strict=True)]
    expected = torch.cat([row.gather(-1, t[:, None])[:, 0] for row, t in zip(by_text, tokens, strict=True)])
    expected_values = torch.cat([
        critic.score(critic.model(input_ids=text).last_hidden_state)[0, -a - 1 : -1, 0]
        for text, a in zip(texts(ids, mask), ANSWERS, strict=True)
    ])  # fmt: skip
    close: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(logprobs[answered], expected, **close)
    torch.testing.assert_close(still.logprobs[answered], expected, **close)
    torch.testing.assert_close(values[answered], expected_values, **close)
    assert still.surprise is not None
    entropies = torch.cat([-(row.exp() * row).sum(dim=-1) for row in by_text])
    torch.testing.assert_close(still.surprise.entropy[answered], entropies, **close)
    torch.testing.assert_close(counts.sums[0], torch.cat(by_text).exp().sum(dim=0).double(), **close)

    expected_loss = (expected * wanted[answered]).sum() + ((expected_values - wanted[answered]) ** 2).sum()
    (expected_loss / sum(ANSWERS)).backward()
    torch.testing.assert_close(loss, expected_loss / sum(ANSWERS), **close)
    plain = [p.grad for model in (policy, critic) for p in model.parameters() if p.grad is not None]
    for gradient, other in zip(gradients, plain, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5 * other.abs().max().item(), rtol=1e-4)


def test_padding_is_not_read_and_the_decoder_is_called_once() -> None:
    """Rows of real lengths, of which more than half is padding: what the decoder gets is less than a tenth of it."""
    decoder = lively(AutoModel.from_config(config_of("llama", hidden_size=64)))
    ids, mask, _ = batch([9, 16, 28, 60, 101, 150, 197, 372], [21, 300, 42, 7, 76, 30, 159, 12])
    assert can_pack(decoder, ids.device)
    read: list[Tensor] = []
    decoder.register_forward_pre_hook(lambda _, __, named: read.append(named["input_ids"]), with_kwargs=True)
    token_states(decoder, ids, mask)
    assert len(read) == 1
    assert mask.sum() < 0.5 * mask.numel()
    assert mask.sum() > 0.9 * read[0].numel()


def test_under_flash_attention_all_texts_lie_in_one_row() -> None:
    decoder = AutoModel.from_config(config_of("llama"))
    assert len(rows_of_texts([400, 400, 1], decoder)) > 1
    decoder.config._attn_implementation_internal = "flash_attention_2"
    assert rows_of_texts([400, 400, 1], decoder) == [[0, 1, 2]]


def test_a_decoder_in_which_texts_would_see_each_other_reads_its_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds: Bloom takes no positions; linear attention carries a state along the row."""
    for config in (config_of("bloom"), hybrid()):
        torch.manual_seed(0)
        decoder = lively(AutoModel.from_config(config))
        ids, mask, _ = batch([2, 9], [5, 1])
        with pytest.warns(UserWarning, match="would see each other, so padding is read too"):
            found = token_states(decoder, ids, mask)
        assert not can_pack(decoder, ids.device)
        assert decoder in unpadded._CAN_PACK
        alone = torch.cat([decoder(input_ids=text).last_hidden_state[0] for text in texts(ids, mask)])
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


def hybrid() -> Any:
    """Linear attention and full attention in turn, with experts."""
    return config_of("qwen3_next", layer_types=["linear_attention", "full_attention"], head_dim=8, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)  # fmt: skip


@pytest.mark.parametrize("kind", ["bloom", "hybrid"])
def test_sixteen_bits_hide_no_leak(kind: str) -> None:
    """Of the largest state it is a fiftieth, within what experts may round; a hybrid has experts and a state."""
    torch.manual_seed(0)
    config = config_of("bloom") if kind == "bloom" else hybrid()
    decoder = AutoModel.from_config(config).bfloat16().eval()  # as drawn: a leak of 1.5 %
    with pytest.warns(UserWarning, match="would see each other"):
        assert not can_pack(decoder, torch.device("cpu"))


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_noise_of_sixteen_bits_is_no_leak(precision: str) -> None:
    torch.manual_seed(0)
    decoder = lively(AutoModel.from_config(config_of("llama")))
    if precision == "bfloat16":
        decoder = decoder.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        assert can_pack(decoder, torch.device("cpu"))
