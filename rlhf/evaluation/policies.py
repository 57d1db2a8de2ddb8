"""How good a policy is: against SFT and best-of-n on the same held-out prompts, by proxy, by gold, and at which KL."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.conversations import conversation_keys
from rlhf.data.rows import Prompt
from rlhf.evaluation.best_of_n import best_of_n_kl, best_of_n_values, gap_closed
from rlhf.evaluation.gold import GoldFunction
from rlhf.models.generate import Completions, Engine, completer, sample_texts
from rlhf.models.logprobs import response_logprobs
from rlhf.models.score import Scorer
from rlhf.models.text import plain
from rlhf.objectives.kl import kl_k1
from rlhf.progress import track
from rlhf.statistics import POINT, clustered_mean, win_rate

BEST_OF = 16


class PolicyEvaluation(NamedTuple):
    """What was measured, and on what.

    Attributes:
        facts: `sft`, `policy`, `best_of_16`, `gold_gap_closed` and its interval as in `summary.json`; and `best_of_n`, the true
            reward of the best of n of SFT's answers and its KL (unbiased over all subsets of the 16).
        samples: the answers of SFT and of the policy to each prompt, side by side, for people: the first to every prompt, then the
            second to every prompt, and so on. Rows of one `conversation` are not independent.
        sft_answers: all of SFT's answers, each with whether it ended.
    """

    facts: dict[str, Any]
    samples: list[dict[str, Any]]
    sft_answers: list[tuple[str, bool]]


class _Answers(NamedTuple):
    """The policy's answers: the texts, whether each ended, their raw scores, and Σ_t k1 to SFT in nats."""

    texts: list[str]
    ended: list[bool]
    proxies: list[float]
    kls: list[float]


@torch.no_grad()
def evaluate_policies(
    *,
    policy: PreTrainedModel,
    sft: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward: Scorer,
    gold: GoldFunction | None,
    prompts: Sequence[Prompt],
    batch_size: int,
    max_new_tokens: int,
    answers: int = 1,
    temperature: float = 1.0,
    max_prompt_length: int | None = None,
    engine: Engine = "transformers",
    sft_answers: Sequence[tuple[str, bool]] | None = None,
) -> PolicyEvaluation:
    """Sample both policies at one temperature and compare them.

    `answers` a prompt from the policy, beside as many of SFT; best of n chooses from 16 of SFT, of which those are the first. KL
    is Σ_t (log π - log π_sft) over the policy's answers, their end token included, in nats an answer.

    Args:
        policy, sft: causal models in evaluation mode on one device, with one tokenizer.
        reward: what gives an answer its proxy score.
        gold: the true reward, or None.
        batch_size: answers that are sampled together.
        max_new_tokens: an answer is cut after this many tokens.
        answers: of the policy to each prompt, 1 to 16.
        temperature: of the sampling and of the KL, > 0.
        max_prompt_length: in tokens; longer prompts lose their beginning.
        engine: what samples.
        sft_answers: those of an earlier call for these prompts and this SFT; sampled here where absent.
    """
    per_prompt = BEST_OF if gold is not None else answers  # without a true reward there is no best of 16 to speak of
    lengths: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "max_prompt_length": max_prompt_length,
        "engine": engine,
    }
    texts = [plain(prompt) for prompt in prompts]
    numbers: dict[str, int] = {}
    conversations = [numbers.setdefault(key, len(numbers)) for key in conversation_keys(prompts)]
    clusters = conversations * answers

    # 1. SFT's answers to each prompt; first, so that they are the same whatever the policy became.
    repeated: Sequence[Prompt] = [prompt for prompt in prompts for _ in range(per_prompt)]
    if sft_answers is None:
        sampled, ended = sample_texts(
            sft, tokenizer, repeated, batch_size=batch_size, label="evaluate: before PPO", **lengths
        )
        sft_answers = list(zip(sampled, ended, strict=True))
    sft_texts = [text for text, _ in sft_answers]
    sft_proxies = reward.score(repeated, sft_texts, ended=[ended for _, ended in sft_answers]).tolist()
    sft_scores = torch.tensor(sft_proxies).view(-1, per_prompt)

    # 2. The policy's answers, their scores and their distance from SFT.
    asked = list(prompts) * answers
    complete = completer(policy, tokenizer, asked, **lengths)
    of_policy = _answers(policy, sft, complete, reward, asked, batch_size, temperature)

    # 3. What is known without a true reward, and the true reward of all answers where there is one.
    facts: dict[str, Any] = {
        "n": len(prompts),
        "answers": answers,
        "sft": {"gold": None, **_mean("proxy", _first(sft_scores, answers), clusters)},
        "policy": {
            **_mean("proxy", of_policy.proxies, clusters),
            "gold": None,
            **_mean("kl", of_policy.kls, clusters),
            "win_rate": None,
        },
        "best_of_16": {"by_reward": {"gold": None, "kl": None}, "by_gold": {"gold": None}},
        "gold_gap_closed": None,
        "gold_gap_closed_ci": None,
        "best_of_n": [],
    }
    gold_policy: Sequence[float | None] = [None] * len(asked)
    gold_sft: Sequence[float | None] = [None] * len(asked)
    if gold is not None:
        golds = gold(texts * answers, of_policy.texts)
        of_sft = gold([text for text in texts for _ in range(BEST_OF)], sft_texts)
        # In float64, as Python's numbers are: equal rewards stay equal, and a tie is half a win.
        sft_golds = torch.tensor(of_sft, dtype=torch.float64).view(-1, BEST_OF)
        for name, known in _by_true_reward(golds, sft_golds, sft_scores, conversations).items():
            facts[name] = facts[name] | known if isinstance(known, dict) else known
        gold_policy, gold_sft = golds, _first(sft_golds, answers)

    # 4. Side by side, for people.
    places = [i * per_prompt + answer for answer in range(answers) for i in range(len(prompts))]
    samples = [
        {
            "prompt": texts[row % len(texts)],
            "conversation": clusters[row],
            "sft": sft_texts[place],
            "policy": of_policy.texts[row],
            "ended_sft": sft_answers[place][1],
            "ended_policy": of_policy.ended[row],
            "proxy_sft": sft_proxies[place],
            "proxy_policy": of_policy.proxies[row],
            "gold_sft": gold_sft[row],
            "gold_policy": gold_policy[row],
            "kl": of_policy.kls[row],
        }
        for row, place in enumerate(places)
    ]
    return PolicyEvaluation(facts, samples, list(sft_answers))


def _answers(
    policy: PreTrainedModel,
    sft: PreTrainedModel,
    complete: Callable[[Sequence[int]], Completions],
    reward: Scorer,
    prompts: Sequence[Prompt],
    batch_size: int,
    temperature: float,
) -> _Answers:
    """Return the policy's answers, their scores and their KL to SFT."""
    answers = _Answers([], [], [], [])
    for start in track(range(0, len(prompts), batch_size), "evaluate: after PPO"):
        part = prompts[start : start + batch_size]
        completions = complete(range(start, start + len(part)))
        answers.texts.extend(completions.texts)
        answers.ended.extend(completions.ended.tolist())
        answers.proxies.extend(reward.score(part, completions.texts, ended=completions.ended.tolist()).tolist())
        answers.kls.extend(sequence_kl(policy, sft, completions, temperature).tolist())
    return answers


def _by_true_reward(
    policy: Sequence[float], sft: Tensor, sft_scores: Tensor, conversations: Sequence[int]
) -> dict[str, Any]:
    """Return the facts that a true reward adds.

    Args:
        policy: [a · n] true rewards of the policy's answers: the first to each of n prompts, the second, …
        sft: [n, 16] true rewards of SFT's answers.
        sft_scores: [n, 16] their raw scores by the reward model.
        conversations: [n] the conversation of each prompt.
    """
    answers = len(policy) // len(sft)
    first, best = _first(sft, answers), sft.max(dim=1).values.tolist()
    clusters = list(conversations) * answers
    picked = best_of_n_values(sft_scores.tolist(), sft.tolist(), BEST_OF)  # equal scores share their true reward
    rate, interval = win_rate(policy, first, clusters)
    of_policy, of_sft = (_mean("gold", values, clusters) for values in (policy, first))
    closed, closed_interval = gap_closed(policy, first, best * answers, clusters)
    return {
        "sft": of_sft,
        "policy": {**of_policy, "win_rate": rate, "win_rate_ci": interval},
        "best_of_16": {
            "by_reward": {"gold": None, "kl": best_of_n_kl(BEST_OF), **_mean("gold", picked, conversations)},
            "by_gold": _mean("gold", best, conversations),
        },
        "gold_gap_closed": closed,
        "gold_gap_closed_ci": closed_interval,
        "best_of_n": [
            {
                "n": n,
                "kl": best_of_n_kl(n),
                "by_reward": clustered_mean(best_of_n_values(sft_scores.tolist(), sft.tolist(), n))[0],
                "by_gold": clustered_mean(best_of_n_values(sft.tolist(), sft.tolist(), n))[0],
            }
            for n in (1, 2, 4, 8, BEST_OF)
        ],
    }


def sequence_kl(
    policy: PreTrainedModel, reference: PreTrainedModel, completions: Completions, temperature: float = 1.0
) -> Tensor:
    """Return Σ_t k1 over each answer, [b], nats, both distributions at the temperature of the sampling."""
    input_ids = torch.cat([completions.prompt_ids, completions.response_ids], dim=1)
    attention_mask = torch.cat([completions.prompt_mask, completions.response_mask], dim=1)
    width = completions.response_ids.shape[1]
    logprobs = response_logprobs(policy, input_ids, attention_mask, width, temperature)
    logprobs_reference = response_logprobs(reference, input_ids, attention_mask, width, temperature)
    kl = kl_k1(logprobs, logprobs_reference)
    return torch.where(completions.response_mask.bool(), kl, torch.zeros_like(kl)).sum(dim=1)


def _first(by_prompt: Tensor, answers: int) -> list[float]:
    """Return [n, 16] values of SFT's answers as far as the policy has as many: the first of each prompt, the second, …"""
    return [float(value) for value in by_prompt[:, :answers].T.flatten()]


def _mean(name: str, values: Sequence[float], clusters: Sequence[int]) -> dict[str, Any]:
    mean, interval = clustered_mean(values, clusters)
    is_point = interval is None or interval[1] - interval[0] < POINT  # where all answers have one reward
    return {name: mean, f"{name}_ci": None if is_point else interval}
