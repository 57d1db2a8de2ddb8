"""The checks "sampler true" and "token counts true": false alarms of a true sampler, and the smallest fault of sampling that one rollout shows.

rlhf sft recipes/quickstart.yaml --out runs/q
python tests/benchmarks/sampler.py runs/q/round-0/sft/model runs/q/round-0/data/data/prompts.jsonl --json sampler.json

A rollout is 64 × 48 = 3,072 tokens. The contexts are those of answers that the policy sampled with our own `generate`; at
each of them tokens are drawn anew, many thousands of times, from the model's own logits (a true sampler) or from changed ones
(temperature, top-p, min-p, top-k). What is drawn is scored with the unchanged logits, as PPO would. Beside these, whole rollouts
are sampled token by token, as in a run, and their z compared with the same bounds.

The two halves of "token counts true" are the places before the middle and those after it.

Quantiles are those of z; "beyond" is the share of rollouts outside the bounds that are derived for that share of false alarms.
Power is the share of rollouts that are stopped at the bounds of a quickstart: α = 10⁻⁴ a run, 48 rollouts, four looks a rollout.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.files import read_jsonl
from rlhf.invariants.sampler import MomentSums, count_sums, sampler_bounds, sampler_z
from rlhf.models.generate import generate
from rlhf.models.load import load_policy, load_tokenizer, model_settings
from rlhf.models.logprobs import response_logits, token_surprise

ROLLOUT = 64 * 48  # tokens
TESTS = 4 * 48  # looks of a quickstart
HALF = ROLLOUT // 2
SHARE_CAUGHT = 0.9
LEVELS = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
DRAWS = 500  # rollouts for a figure of power
Change = Callable[[Tensor], Tensor]  # logits → logits


class Contexts(NamedTuple):
    """The places of one rollout.

    Attributes:
        logits: [3072, vocabulary].
        entropy, variance, third: [3072] moments of the surprise, nats, nats², nats³.
    """

    logits: Tensor
    entropy: Tensor
    variance: Tensor
    third: Tensor


def contexts_of(model: Any, tokenizer: Any, prompts: list[Any], first: int) -> tuple[Contexts, float, float]:
    """Sample answers until there are 3,072 tokens; return their places, and both z of the tokens that were sampled there."""
    logits: list[Tensor] = []
    tokens: list[Tensor] = []
    while sum(len(of) for of in logits) < ROLLOUT:
        batch = [prompts[(first + i) % len(prompts)] for i in range(64)]
        first += 64
        answers = generate(model, tokenizer, batch, max_new_tokens=48)
        ids = torch.cat([answers.prompt_ids, answers.response_ids], dim=1)
        mask = torch.cat([answers.prompt_mask, answers.response_mask], dim=1)
        keep = answers.response_mask.bool()
        logits.append(response_logits(model, ids, mask, keep.shape[1])[:, :-1][keep])
        tokens.append(answers.response_ids[keep])
    places, sampled = torch.cat(logits)[:ROLLOUT], torch.cat(tokens)[:ROLLOUT]
    surprise = token_surprise(places[None], ROLLOUT)
    contexts = Contexts(places, *(column[0] for column in surprise))
    (surprise_sums,), (counts,) = sums_of(contexts, sampled[:, None]), counts_of(contexts, sampled[:, None])
    return contexts, sampler_z(surprise_sums), sampler_z(counts)


def sums_of(contexts: Contexts, tokens: Tensor) -> list[MomentSums]:
    """Return the sums of rollouts with these tokens [3072, n]."""
    surprise = -torch.log_softmax(contexts.logits, dim=-1).gather(1, tokens)
    deviations = (surprise - contexts.entropy[:, None]).double().sum(dim=0).tolist()
    variance, third = contexts.variance.double().sum().item(), contexts.third.double().sum().item()
    return [MomentSums(deviation, variance, third, ROLLOUT) for deviation in deviations]


def counts_of(contexts: Contexts, tokens: Tensor) -> list[MomentSums]:
    """Return the sums of "token counts true" of rollouts with these tokens [3072, n]."""
    probabilities = torch.softmax(contexts.logits.double(), dim=-1)
    expected = torch.stack([probabilities[:HALF].sum(dim=0), probabilities[HALF:].sum(dim=0)])
    vocabulary = expected.shape[1]
    return [
        count_sums(torch.stack([torch.bincount(half, minlength=vocabulary) for half in column.split(HALF)]), expected)
        for column in tokens.unbind(dim=1)
    ]


def draw(contexts: Contexts, change: Change, count: int) -> Tensor:
    """Draw tokens [3072, n] from changed logits, each place by itself."""
    cumulative = torch.softmax(change(contexts.logits).double(), dim=-1).cumsum(dim=-1)
    uniform = torch.rand(len(cumulative), count, dtype=torch.float64) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, uniform, right=True).clamp(max=cumulative.shape[1] - 1)


def temperature(value: float) -> Change:
    """Return the change to another temperature."""
    return lambda logits: logits / value


def top_p(value: float) -> Change:
    """Return the change to a nucleus of this mass."""

    def change(logits: Tensor) -> Tensor:
        ordered, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= value
        return logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), float("-inf"))

    return change


def min_p(value: float) -> Change:
    """Return the change to tokens of at least this share of the likeliest one's probability."""

    def change(logits: Tensor) -> Tensor:
        probabilities = torch.softmax(logits, dim=-1)
        return logits.masked_fill(probabilities < value * probabilities.amax(dim=-1, keepdim=True), float("-inf"))

    return change


def top_k(value: int) -> Change:
    """Return the change to the k likeliest tokens."""
    return lambda logits: logits.masked_fill(logits < logits.topk(value).values[:, -1:], float("-inf"))


def beyond(sums: MomentSums, *, tests: int, false_alarms: float) -> bool:
    """Return whether z of the surprise lies outside its bounds."""
    low, high = sampler_bounds(sums, tests=tests, false_alarms=false_alarms)
    return not low <= sampler_z(sums) <= high


def above(sums: MomentSums, *, tests: int, false_alarms: float) -> bool:
    """Return whether z of the counts lies above its bound; it has no lower one, so half of the false alarms are spent."""
    return sampler_z(sums) > sampler_bounds(sums, tests=tests, false_alarms=false_alarms)[1]


def caught(places: list[Contexts], change: Change) -> dict[str, float]:
    """Return the shares of faulty rollouts that are stopped, by either check and by one of them, and the means of both z."""
    tokens = [draw(contexts, change, DRAWS // len(places)) for contexts in places]
    surprise = [s for pair in zip(places, tokens, strict=True) for s in sums_of(*pair)]
    counts = [s for pair in zip(places, tokens, strict=True) for s in counts_of(*pair)]
    by_surprise = [beyond(s, tests=TESTS, false_alarms=1e-4) for s in surprise]
    by_counts = [above(s, tests=TESTS, false_alarms=1e-4) for s in counts]
    return {
        "stopped": statistics.fmean(a or b for a, b in zip(by_surprise, by_counts, strict=True)),
        "by_surprise": statistics.fmean(by_surprise),
        "by_counts": statistics.fmean(by_counts),
        "z_surprise": statistics.fmean(map(sampler_z, surprise)),
        "z_counts": statistics.fmean(map(sampler_z, counts)),
    }


def smallest(places: list[Contexts], change_of: Callable[[float], Change], near: float, far: float) -> float:
    """Return the fault nearest to none that nine of ten rollouts show, by bisection between one that is and one that isn't."""
    if caught(places, change_of(far))["stopped"] < SHARE_CAUGHT:
        return float("nan")
    for _ in range(8):
        middle = (near + far) / 2
        if caught(places, change_of(middle))["stopped"] >= SHARE_CAUGHT:
            far = middle
        else:
            near = middle
    return far


def suppressed(nth: int) -> Change:
    """Return the change that leaves out every nth token of the vocabulary."""
    return lambda logits: logits.masked_fill(torch.arange(logits.shape[1]) % nth == nth - 1, float("-inf"))


def summary(z: list[float]) -> dict[str, object]:
    """Return number, mean, deviation and quantiles of z, each quantile beside the normal's."""
    ordered = torch.tensor(z, dtype=torch.float64)
    levels = [level for level in LEVELS if level * len(z) >= 1 and (1 - level) * len(z) >= 1]
    return {
        "n": len(z),
        "mean": statistics.fmean(z),
        "deviation": statistics.stdev(z),
        "quantiles": {str(level): [ordered.quantile(level).item(), NormalDist().inv_cdf(level)] for level in levels},
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--rollouts", type=int, default=20_000, help="drawn anew at the places of --whole rollouts")
    parser.add_argument("--whole", type=int, default=200, help="sampled token by token")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    # 1. Whole rollouts, token by token.
    tokenizer = load_tokenizer(args.model, conversational=True)
    model = load_policy(args.model, model_settings({}), trainable=False).eval()
    prompts = [row["prompt"] for row in read_jsonl(args.prompts)]
    places, whole, whole_counts = [], [], []
    with torch.no_grad():
        for i in range(args.whole):
            contexts, z_surprise, z_counts = contexts_of(model, tokenizer, prompts, 64 * i)
            whole.append(z_surprise)
            whole_counts.append(z_counts)
            if i < 20:
                places.append(contexts)
    skewness = [(c.third.double().sum() / c.variance.double().sum() ** 1.5).item() for c in places]
    result: dict[str, object] = {
        "entropy": statistics.fmean(c.entropy.mean().item() for c in places),
        "variance": statistics.fmean(c.variance.mean().item() for c in places),
        "skewness": statistics.fmean(skewness),
        "whole": summary(whole),
        "whole_counts": summary(whole_counts),
    }

    # 2. False alarms: tokens drawn anew from the model's own logits.
    drawn = [draw(c, temperature(1.0), args.rollouts // len(places)) for c in places]
    for name, statistic, outside in (("surprise", sums_of, beyond), ("counts", counts_of, above)):
        sums = [s for pair in zip(places, drawn, strict=True) for s in statistic(*pair)]
        result[name] = {
            **summary([sampler_z(s) for s in sums]),
            "beyond": {
                str(alpha): statistics.fmean(outside(s, tests=1, false_alarms=alpha) for s in sums)
                for alpha in (0.1, 0.05, 0.01, 0.001, 0.0001)
            },
            "stopped": statistics.fmean(outside(s, tests=TESTS, false_alarms=1e-4) for s in sums),
        }

    # 3. Power of one rollout.
    faults: dict[str, Change] = {
        **{f"temperature {t}": temperature(t) for t in (0.9, 0.95, 0.98, 1.02, 1.05, 1.1)},
        **{f"top-p {p}": top_p(p) for p in (0.999, 0.99, 0.98, 0.95, 0.9)},
        **{f"min-p {p}": min_p(p) for p in (0.001, 0.01, 0.05)},
        **{f"top-k {k}": top_k(k) for k in (50, 20, 10)},
        **{f"every {n}th token suppressed": suppressed(n) for n in (100, 30, 10, 3)},
    }
    result["power"] = {name: caught(places, change) for name, change in faults.items()}
    result["smallest"] = {
        "temperature below 1": smallest(places, temperature, 1.0, 0.5),
        "temperature above 1": smallest(places, temperature, 1.0, 2.0),
        "top-p": smallest(places, top_p, 1.0, 0.5),
        "min-p": smallest(places, min_p, 0.0, 0.5),
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
