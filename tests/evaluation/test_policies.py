"""Policies evaluated against SFT: what is known, what is not, and the parts of the definition."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.data.rows import Prompt
from rlhf.evaluation.policies import evaluate_policies, sequence_kl
from rlhf.models.generate import generate, pad_left
from rlhf.models.text import plain
from tests.conftest import PROMPTS


class Lengths:
    """Scores an answer by its length."""

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> torch.Tensor:
        assert ended is not None, "whether an answer ended is told to the reward model"
        return torch.tensor([float(len(text)) for text in responses])


def evaluate(
    base: Path, tokenizer: Any, gold: Any, prompts: Sequence[Prompt] = PROMPTS[:10], answers: int = 1
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    facts, samples, _ = evaluate_policies(
        policy=model,
        sft=model,
        tokenizer=tokenizer,
        reward=Lengths(),
        gold=gold,
        prompts=prompts,
        batch_size=7,
        max_new_tokens=6,
        answers=answers,
    )
    return facts, samples


def test_without_a_true_reward_nothing_is_invented(base_folder: Path, tokenizer: Any) -> None:
    facts, samples = evaluate(base_folder, tokenizer, None)
    assert facts["gold_gap_closed"] is None
    assert facts["best_of_16"] == {"by_reward": {"gold": None, "kl": None}, "by_gold": {"gold": None}}
    assert facts["policy"]["win_rate"] is None
    assert facts["policy"]["kl"] == 0.0, "a policy is no distance from itself"
    assert [row["prompt"] for row in samples] == [plain(prompt) for prompt in PROMPTS[:10]]


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 16_777_217.0])
def test_equal_true_rewards_are_ties(base_folder: Path, tokenizer: Any, value: float) -> None:
    """No number is rounded on its way: a policy that is SFT wins half, also where float32 has no such number."""
    facts, samples = evaluate(base_folder, tokenizer, lambda _, texts: [value] * len(texts))
    assert facts["policy"]["win_rate"] == 0.5
    assert {row["gold_sft"] for row in samples} == {row["gold_policy"] for row in samples} == {value}


def test_gold_figures_are_those_of_the_samples(base_folder: Path, tokenizer: Any) -> None:
    def gold(prompts: list[str], texts: list[str]) -> list[float]:
        return [
            -float(len(text)) for text in texts
        ]  # the opposite of the score: the best by reward is the worst by gold

    facts, samples = evaluate(base_folder, tokenizer, gold)
    assert facts["sft"]["gold"] == pytest.approx(sum(row["gold_sft"] for row in samples) / 10)
    assert facts["policy"]["gold"] == pytest.approx(-facts["policy"]["proxy"])
    best = facts["best_of_16"]
    assert best["by_gold"]["gold"] > facts["sft"]["gold"] > best["by_reward"]["gold"]
    expected = (facts["policy"]["gold"] - facts["sft"]["gold"]) / (best["by_gold"]["gold"] - facts["sft"]["gold"])
    assert facts["gold_gap_closed"] == pytest.approx(expected)
    low, high = facts["gold_gap_closed_ci"]
    assert low <= expected <= high


@pytest.mark.parametrize("knows_gold", [True, False])
def test_several_answers_to_a_prompt_are_rows_of_one_cluster(
    base_folder: Path, tokenizer: Any, knows_gold: bool
) -> None:
    """Three answers to each of ten prompts: the first ten rows are those of one answer; the means are over all thirty."""

    def gold(prompts: list[str], texts: list[str]) -> list[float]:
        return [len(prompt) + len(text) / 100 for prompt, text in zip(prompts, texts, strict=True)]

    facts, samples = evaluate(base_folder, tokenizer, gold if knows_gold else None, answers=3)
    assert (facts["n"], facts["answers"], len(samples)) == (10, 3, 30)
    assert [row["prompt"] for row in samples] == [plain(prompt) for prompt in PROMPTS[:10]] * 3
    assert [row["conversation"] for row in samples] == list(range(10)) * 3
    assert len({row["sft"] for row in samples}) > 20, "SFT's answers to one prompt are others"
    assert [row["proxy_sft"] for row in samples] == [len(row["sft"]) for row in samples]
    assert facts["sft"]["proxy"] == pytest.approx(sum(len(row["sft"]) for row in samples) / 30)
    assert facts["policy"]["proxy"] == pytest.approx(sum(len(row["policy"]) for row in samples) / 30)
    if not knows_gold:
        return
    _, alone = evaluate(base_folder, tokenizer, gold)
    assert [row["sft"] for row in samples[:10]] == [row["sft"] for row in alone]
    assert [row["gold_sft"] for row in samples] == [len(row["prompt"]) + len(row["sft"]) / 100 for row in samples]
    assert [row["gold_policy"] for row in samples] == [len(row["prompt"]) + len(row["policy"]) / 100 for row in samples]
    mean_policy, mean_sft = (sum(row[f"gold_{who}"] for row in samples) / 30 for who in ("policy", "sft"))
    assert facts["policy"]["gold"] == pytest.approx(mean_policy)
    assert facts["sft"]["gold"] == pytest.approx(mean_sft)
    gap = facts["best_of_16"]["by_gold"]["gold"] - mean_sft
    assert facts["gold_gap_closed"] == pytest.approx((mean_policy - mean_sft) / gap)
    # Prompts differ by much more than answers, so the interval of the mean is that of ten prompts and not of thirty rows.
    low, high = facts["policy"]["gold_ci"]
    spread = torch.tensor([float(len(plain(prompt))) for prompt in PROMPTS[:10]]).std() / 10**0.5
    assert high - low > 3 * spread


def test_answers_of_one_score_share_their_true_reward(
    base_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of 16 by a reward model that knows nothing is any of them, and the end of the curve of n; not the first one."""
    monkeypatch.setattr(Lengths, "score", lambda self, prompts, responses, ended: torch.ones(len(responses)))
    facts, _ = evaluate(base_folder, tokenizer, lambda _, texts: [float(len(text)) for text in texts])
    assert facts["best_of_16"]["by_reward"]["gold"] == pytest.approx(facts["best_of_n"][-1]["by_reward"])
    assert facts["best_of_16"]["by_reward"]["gold"] == pytest.approx(facts["best_of_n"][0]["by_reward"])
    assert facts["sft"]["gold"] != pytest.approx(facts["best_of_n"][0]["by_reward"]), "the first answers are others"
    assert (facts["policy"]["proxy"], facts["policy"]["proxy_ci"]) == (1.0, None), "a point is no interval"


@torch.no_grad()
def test_answers_and_kl_are_those_of_the_temperature(base_folder: Path, tokenizer: Any) -> None:
    """Near 0 both policies give the answers that plain transformers finds greedily; the KL is of softmax(logits / T)."""
    torch.manual_seed(0)
    sft, policy = (AutoModelForCausalLM.from_pretrained(base_folder).eval() for _ in range(2))
    for weight in policy.parameters():
        weight.add_(0.02 * torch.randn_like(weight))
    together: dict[str, Any] = {
        "tokenizer": tokenizer,
        "reward": Lengths(),
        "gold": None,
        "batch_size": 7,
        "max_new_tokens": 6,
    }
    _, samples, _ = evaluate_policies(policy=policy, sft=sft, prompts=PROMPTS[:10], temperature=1e-4, **together)
    asked = tokenizer.apply_chat_template(PROMPTS[:10], add_generation_prompt=True)["input_ids"]
    ids, mask = pad_left(asked, tokenizer.pad_token_id)
    for name, model in (("sft", sft), ("policy", policy)):
        greedy = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=6)[:, ids.shape[1] :]
        assert [row[name] for row in samples] == tokenizer.batch_decode(greedy, skip_special_tokens=True)

    completions = generate(policy, tokenizer, PROMPTS[:10], max_new_tokens=6, temperature=0.6)
    texts = torch.cat([completions.prompt_ids, completions.response_ids], dim=1)
    mask = torch.cat([completions.prompt_mask, completions.response_mask], dim=1)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    expected = torch.zeros(10)
    for model, sign in ((policy, 1), (sft, -1)):
        logits = model(texts, attention_mask=mask, position_ids=places).logits[:, -7:-1]
        logprobs = (logits / 0.6).log_softmax(dim=-1).gather(2, completions.response_ids[..., None])[..., 0]
        expected += sign * (logprobs * completions.response_mask).sum(dim=1)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(sequence_kl(policy, sft, completions, 0.6), expected, atol=1e-4, rtol=1e-4)


def test_turns_of_one_conversation_are_one_draw(base_folder: Path, tokenizer: Any) -> None:
    """Ten prompts of one conversation are one observation, of which no interval can be made; they had one like ten others."""

    def gold(prompts: list[str], texts: list[str]) -> list[float]:
        return [float(len(text) % 7) for text in texts]

    turns: list[Any] = [{"role": "user", "content": "red"}]
    prompts = [turns]
    for _ in range(9):
        turns = [*turns, {"role": "assistant", "content": "dog"}, {"role": "user", "content": "red"}]
        prompts.append(turns)
    alone, samples = evaluate(base_folder, tokenizer, gold)
    facts, of_one = evaluate(base_folder, tokenizer, gold, prompts)
    assert [row["conversation"] for row in samples] == list(range(10))
    assert [row["conversation"] for row in of_one] == [0] * 10
    for name in ("proxy_ci", "gold_ci", "win_rate_ci"):
        low, high = alone["policy"][name]
        assert low < high
        assert facts["policy"][name] == (None if name != "win_rate_ci" else [0.0, 1.0])
    mixed, _ = evaluate(base_folder, tokenizer, gold, [*prompts[:5], *PROMPTS[:5]])
    low, high = mixed["policy"]["proxy_ci"]
    assert low < high
