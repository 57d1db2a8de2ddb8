"""How good a policy is: against SFT and best-of-n on the same held-out prompts, by proxy, by gold, and at which KL."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Prompt
from rlhf.models.generate import Completions, generate, sample_texts
from rlhf.models.logprobs import response_logprobs
from rlhf.models.text import plain
from rlhf.objectives.kl import kl_k1
from rlhf.statistics import best_of_n_kl, best_of_n_values, clustered_mean, win_rate

BEST_OF = 16
Score = Callable[..., Tensor]
Gold = Callable[[list[str], list[str]], list[float]]


@torch.no_grad()
def evaluate_policies(
    *,
    policy: Any,
    sft: Any,
    tokenizer: PreTrainedTokenizerBase,
    score: Score,
    gold: Gold | None,
    prompts: Sequence[Prompt],
    batch_size: int,
    max_new_tokens: int,
    max_prompt_length: int | None = None,
    sft_answers: Sequence[tuple[str, bool]] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]], list[tuple[str, bool]]]:
    """Sample both policies at temperature 1 and compare them.

    One answer a prompt from the policy, 16 from SFT (one without a true reward), the first being SFT's own. KL is
    Σ_t (log π - log π_sft) over the policy's answers, their end token included, in nats an answer.

    Args:
        policy, sft: causal models in evaluation mode on one device, with one tokenizer.
        score: the reward model: (prompts, texts, ended=...) → raw scores.
        gold: the true reward, or None.
        sft_answers: what an earlier call gave back for these prompts and this SFT; sampled here where absent.

    Returns:
        `sft`, `policy`, `best_of_16` and `gold_gap_closed` as in `summary.json`; `best_of_n`, the true reward of the best
        of n of SFT's answers and its KL (unbiased over all subsets of the 16); samples side by side; and all of SFT's answers, each
        with whether it ended.
    """
    per_prompt = BEST_OF if gold is not None else 1  # without a true reward there is no best of 16 to speak of
    arguments: dict[str, Any] = {"max_new_tokens": max_new_tokens, "max_prompt_length": max_prompt_length}
    texts = [plain(prompt) for prompt in prompts]

    # 1. SFT's answers to each prompt; first, so that they are the same whatever the policy became.
    repeated: Sequence[Prompt] = [prompt for prompt in prompts for _ in range(per_prompt)]
    if sft_answers is None:
        sampled, ended = sample_texts(
            sft, tokenizer, repeated, batch_size=batch_size, label="evaluate: SFT", **arguments
        )
        sft_answers = list(zip(sampled, ended, strict=True))
    sft_texts = [text for text, _ in sft_answers]
    sft_proxies = score(repeated, sft_texts, ended=[ended for _, ended in sft_answers]).tolist()
    sft_scores = torch.tensor(sft_proxies).view(-1, per_prompt)

    # 2. The policy's answers, their scores and their distance from SFT.
    answers, finished, proxies, kls = [], [], [], []
    for start in tqdm(range(0, len(prompts), batch_size), desc="evaluate: policy", disable=None):
        part = prompts[start : start + batch_size]
        completions = generate(policy, tokenizer, part, **arguments)
        answers += completions.texts
        finished += completions.ended.tolist()
        proxies += score(part, completions.texts, ended=completions.ended.tolist()).tolist()
        kls += sequence_kl(policy, sft, completions).tolist()

    # 3. The true reward of all of them.
    facts: dict[str, Any] = {
        "n": len(prompts),
        "sft": {"gold": None, **_mean("proxy", sft_scores[:, 0].tolist())},
        "policy": {**_mean("proxy", proxies), "gold": None, **_mean("kl", kls), "win_rate": None},
        "best_of_16": {"by_reward": {"gold": None, "kl": None}, "by_gold": {"gold": None}},
        "gold_gap_closed": None,
        "best_of_n": [],
    }
    gold_policy: list[float | None] = [None] * len(prompts)
    gold_sft: list[float | None] = [None] * len(prompts)
    if gold is not None:
        ours = gold(texts, answers)
        theirs = torch.tensor(gold([text for text in texts for _ in range(BEST_OF)], sft_texts)).view(-1, BEST_OF)
        first = theirs[:, 0].tolist()
        best = theirs.max(dim=1).values.tolist()
        picked = theirs.gather(1, sft_scores.argmax(dim=1, keepdim=True)).squeeze(1).tolist()
        rate, interval = win_rate(ours, first)
        facts["sft"] |= _mean("gold", first)
        facts["policy"] |= {**_mean("gold", ours), "win_rate": rate, "win_rate_ci": interval}
        facts["best_of_16"]["by_reward"] |= {**_mean("gold", picked), "kl": best_of_n_kl(BEST_OF)}
        facts["best_of_16"]["by_gold"] |= _mean("gold", best)
        facts["best_of_n"] = [
            {
                "n": n,
                "kl": best_of_n_kl(n),
                "by_reward": clustered_mean(best_of_n_values(sft_scores.tolist(), theirs.tolist(), n))[0],
                "by_gold": clustered_mean(best_of_n_values(theirs.tolist(), theirs.tolist(), n))[0],
            }
            for n in (1, 2, 4, 8, BEST_OF)
        ]
        gap = facts["best_of_16"]["by_gold"]["gold"] - facts["sft"]["gold"]
        if gap > 0:
            facts["gold_gap_closed"] = (facts["policy"]["gold"] - facts["sft"]["gold"]) / gap
        gold_policy, gold_sft = list(ours), first

    # 4. Side by side, for people.
    samples = [
        {
            "prompt": texts[i],
            "sft": sft_texts[i * per_prompt],
            "policy": answers[i],
            "ended_sft": sft_answers[i * per_prompt][1],
            "ended_policy": finished[i],
            "proxy_sft": sft_proxies[i * per_prompt],
            "proxy_policy": proxies[i],
            "gold_sft": gold_sft[i],
            "gold_policy": gold_policy[i],
            "kl": kls[i],
        }
        for i in range(len(prompts))
    ]
    return facts, samples, list(sft_answers)


def sequence_kl(policy: Any, reference: Any, completions: Completions) -> Tensor:
    """Σ_t k1 over each answer [b], nats, at temperature 1."""
    input_ids = torch.cat([completions.prompt_ids, completions.response_ids], dim=1)
    attention_mask = torch.cat([completions.prompt_mask, completions.response_mask], dim=1)
    width = completions.response_ids.shape[1]
    logprobs = response_logprobs(policy, input_ids, attention_mask, width, 1.0)
    logprobs_reference = response_logprobs(reference, input_ids, attention_mask, width, 1.0)
    kl = kl_k1(logprobs, logprobs_reference)
    return torch.where(completions.response_mask.bool(), kl, torch.zeros_like(kl)).sum(dim=1)


def _mean(name: str, values: Sequence[float]) -> dict[str, Any]:
    mean, interval = clustered_mean(values)
    return {name: mean, f"{name}_ci": interval}
