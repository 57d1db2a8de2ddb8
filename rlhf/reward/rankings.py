"""Rankings as what a reward model is trained on: K answers to a prompt are one element, encoded behind their prompt once.

`ranking_rows` makes them of pairs: the pairs of one `group` become one ranking again. `RankingRewardTrainer` trains on them.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NotRequired, TypedDict

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig

from rlhf.data.read import BadRow
from rlhf.data.rows import SIDES, Messages, Pair, Prompt, answer, asked, has_ended, pair_digest, wording
from rlhf.errors import UserError
from rlhf.models.text import before_last_turn, encode_answers, last_turn
from rlhf.objectives.rankings import is_best
from rlhf.recipe.objectives import OBJECTIVES, Loss
from rlhf.reward.collator import PairCollator
from rlhf.reward.trainer import PairRewardTrainer, Scored

UNREAD = ("margin", "confidence")  # columns that say something of a pair, and nothing of a ranking


class Response(TypedDict):
    """One answer of a ranking: its text, or its turns; `score`, higher is better, where `beats` does not say the order."""

    content: str | Messages
    score: NotRequired[float]


class RankingRow(TypedDict):
    """A prompt's answers and their order: by their scores, or by `beats`, the places [better, worse] of compared answers."""

    prompt: Prompt
    responses: list[Response]
    beats: NotRequired[list[list[int]]]
    weight: NotRequired[float]


# ---- Rows ----


def ranking_rows(pairs: Sequence[Pair], *, objective: str = "plackett_luce") -> list[RankingRow]:
    """Return pairs as rankings: those of one `group` as one, with every answer once; any other pair as a ranking of two.

    What was compared stays compared, and nothing is added: where a cap took pairs out of a ranking, their answers beat each
    other in no direction, as tied answers do. A ranking's weight is the mean of its pairs'.

    Args:
        objective: who asks, for the sentence of a refusal.

    Raises:
        UserError: a pair has a margin or a confidence, which no ranking has a place for.

    >>> sides = [[{"role": "assistant", "content": text}] for text in "abc"]
    >>> pairs: list[Pair] = [
    ...     {"prompt": [], "chosen": sides[i], "rejected": sides[j], "group": "g"} for i, j in ((0, 1), (0, 2), (1, 2))
    ... ]
    >>> ranking_rows(pairs)[0]["beats"]
    [[0, 1], [0, 2], [1, 2]]
    """
    for name in UNREAD:
        having = [number for number, row in enumerate(pairs) if row.get(name) is not None]
        if having:
            raise UserError(
                f"reward.objective is {objective}, which reads no {name!r}, but {len(having)} of {len(pairs)} pairs (the first "
                f"is number {having[0] + 1}) have one; take the column out, or choose another objective."
            )
    groups: dict[tuple[object, ...], list[Pair]] = {}
    for number, row in enumerate(
        pairs
    ):  # a group may hold prompts that differ in case or blanks, with answers of their own
        key = ("row", number) if row.get("group") is None else ("group", row["group"], wording(row["prompt"]))
        groups.setdefault(key, []).append(row)
    has_weights = any(row.get("weight") is not None for row in pairs)
    return [_ranking(part, has_weights=has_weights) for group in groups.values() for part in _by_annotator(group)]


def _by_annotator(group: Sequence[Pair]) -> list[list[Pair]]:
    """Return the pairs of a group as one ranking; as one of each annotator where several compared the same two answers.

    In one ranking four people of one mind would count as much as a fifth of another.
    """
    if len({pair_digest(row) for row in group}) == len(group):
        return [list(group)]
    rankings: dict[object, list[Pair]] = {}
    for row in group:
        rankings.setdefault(row.get("annotator"), []).append(row)
    return list(rankings.values())


def _ranking(pairs: Sequence[Pair], *, has_weights: bool) -> RankingRow:
    places: dict[tuple[str, str, bool], int] = {}
    responses: list[Response] = []
    beats = []
    for row in pairs:
        comparison = []
        for side in SIDES:
            key = (wording(asked(row, side)), answer(row, side).strip(), has_ended(row[side]))
            if key not in places:
                places[key] = len(responses)
                responses.append({"content": row[side]})
            comparison.append(places[key])
        beats.append(comparison)
    ranking: RankingRow = {"prompt": pairs[0]["prompt"], "responses": responses, "beats": beats}
    if has_weights:
        weights = [1.0 if (weight := row.get("weight")) is None else weight for row in pairs]
        ranking["weight"] = sum(weights) / len(weights)
    return ranking


def comparisons_of(row: Mapping[str, Any]) -> list[list[int]]:
    """Return which answers of a ranking beat which, as places [better, worse]; tied answers beat each other in no direction.

    Args:
        row: with `responses`, each with a `score`, or with `beats`; or a pair.

    Raises:
        BadRow: fewer than two answers, an answer without a score, or all of them tied.

    >>> comparisons_of({"responses": [{"content": "a", "score": 1}, {"content": "b", "score": 3}]})
    [[1, 0]]
    """
    if "responses" not in row:
        return [[0, 1]]
    if len(row["responses"]) < 2:
        raise BadRow(f"a ranking of {len(row['responses'])} answers; there must be two or more")
    given: list[list[int]] | None = row.get("beats")
    if given is None:
        scores = [response.get("score") for response in row["responses"]]
        if any(not isinstance(score, int | float) or not isfinite(score) for score in scores):
            raise BadRow("an answer without a `score` that is a finite number")
        places = range(len(scores))
        given = [[i, j] for i in places for j in places if scores[i] > scores[j]]
    if not given:
        raise BadRow("all of its answers are tied, so it says nothing")
    return given


def check_rankings(dataset: Dataset) -> None:
    """Refuse rankings that compare nothing, before anything is trained.

    Raises:
        UserError: naming the first such row for each reason, and how many there are.
    """
    bad: dict[str, list[int]] = {}
    for number, row in enumerate(dataset):
        try:
            comparisons_of(row)
        except BadRow as reason:
            bad.setdefault(str(reason), []).append(number)
    if bad:
        raise UserError([f"reward: row {rows[0]} ({len(rows)} in all): {reason}." for reason, rows in bad.items()])


def check_unread(dataset: Dataset) -> None:
    """Refuse columns that a ranking has no place for.

    Raises:
        UserError: naming the first that holds anything.
    """
    for name in UNREAD:
        if name in dataset.column_names and any(value is not None for value in dataset[name]):
            raise UserError(f"reward: no ranking has a place for the column {name!r}; take it out, or train on pairs.")


# ---- Batches ----


@dataclass
class RankingCollator(PairCollator):
    """Rankings as a batch: all answers of a ranking behind their prompt, each once; or every answer by itself."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Pack or pad all answers, ranking by ranking; and a float [g] per column.

        Beside them: `answers` [g, K] the place of each ranking's answers among all, -1 where it has fewer; `beats` [g, K, K]
        bool; `pairs` [g, 2] the places of one of the best answers and one of the worst.
        """
        groups = [row["answer_ids"] for row in examples]
        most = max(map(len, groups))
        answers = torch.full((len(groups), most), -1)
        beats = torch.zeros(len(groups), most, most, dtype=torch.bool)
        start = 0
        for number, row in enumerate(examples):
            count = len(row["answer_ids"])
            answers[number, :count] = torch.arange(start, start + count)
            beats[number][tuple(torch.tensor(row["beats"]).T)] = True
            start += count
        ends = [is_best(order).int().argmax(dim=1, keepdim=True) for order in (beats, beats.mT)]
        places = {"answers": answers, "beats": beats, "pairs": answers.gather(1, torch.cat(ends, dim=1))}
        return {**self.answers(groups), **places, **self.column_values(examples)}


# ---- Training ----


class RankingRewardTrainer(PairRewardTrainer):
    """Reward model on rankings of K answers with Plackett-Luce, or with the choice of the best (arXiv:2301.11270).

    A ranking is one element: `per_device_train_batch_size` counts rankings, and the loss is divided once, by the global number of
    them. All of its answers share one encoding of their prompt, as in `PairRewardTrainer`. An answer that is longer than
    `max_length` is left out of its ranking, and a ranking in which nothing is compared any more is left out as a whole.

    The dataset has `prompt` and `responses`, each with `content` (a text or messages) and `score`, higher is better; equal
    scores are ties, which say nothing. Of pairs, `ranking_rows` makes such rows. Pairs (`chosen`, `rejected`) are taken too, as
    rankings of two; held-out data is usually that. Logged accuracy and margin are those of a best answer against a worst one.

    Args:
        objective: `plackett_luce` or `kwise`.

    Raises:
        UserError: another objective; a ranking with one answer, without scores, or with all answers tied.
    """

    id_columns = ("answer_ids", "beats")
    collator_class = RankingCollator

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        objective: str = "plackett_luce",
        loss: Loss | None = None,
        **arguments: Any,
    ):
        names = [name for name, row in OBJECTIVES.items() if row.needs.rankings]
        if loss is None and objective not in names:
            raise UserError(f"reward: objective {objective!r} is none of rankings: {', '.join(names)}.")
        dataset = arguments.get("train_dataset")
        if isinstance(dataset, Dataset) and "answer_ids" not in dataset.column_names:
            check_rankings(dataset)
            check_unread(dataset)
        super().__init__(model, args, loss=loss or OBJECTIVES[objective].loss, **arguments)

    @staticmethod
    def tokenize(batch: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
        """Return the token ids of each row's answers, and which beat which."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        answer_ids = []
        for row in rows:
            sides = row["responses"] if "responses" in row else [{"content": row[side]} for side in SIDES]
            contents = [side["content"] for side in sides]
            prompts = [before_last_turn(row["prompt"], turns) for turns in contents]
            texts, ended = [last_turn(turns) for turns in contents], [has_ended(turns) for turns in contents]
            answer_ids.append(encode_answers(tokenizer, prompts, texts, ended=ended)[0])
        return {"answer_ids": answer_ids, "beats": [comparisons_of(row) for row in rows]}

    def short_enough(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: RewardConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """Return the rankings without answers longer than `max_length`, and without those that then compare nothing."""
        if args.max_length is None:
            return dataset
        cut = dataset.map(_without_long_answers, fn_kwargs={"most": args.max_length})
        kept = cut.filter(lambda row: len(row["beats"]) > 0)
        if isinstance(dataset, Dataset):
            before, after = (sum(map(len, rows["answer_ids"])) for rows in (dataset, cut))
            if before > after and len(kept):
                warnings.warn(
                    f"{before - after} of {before} answers of the {dataset_name} set are longer than max_length={args.max_length} "
                    "tokens and were left out of their rankings.",
                    stacklevel=2,
                )
        return kept

    def lengths(self, dataset: Dataset) -> list[int]:
        """Return the tokens of each ranking's longest answer."""
        return [max(map(len, answers)) for answers in dataset["answer_ids"]]

    def losses(self, scored: Scored, columns: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each ranking, [g] nats; centring is that of a pair: (2 · its mean reward)², times the coefficient."""
        answers, beats = inputs["answers"], inputs["beats"]
        is_there = answers >= 0
        rewards = scored.rewards[answers.clamp(min=0)]
        losses: Tensor = self.loss_function(rewards, beats, **columns)
        if self.args.center_rewards_coefficient is not None:
            means = (rewards * is_there).sum(dim=1) / is_there.sum(dim=1)
            losses = losses + columns.get("weight", 1.0) * self.args.center_rewards_coefficient * (2 * means) ** 2
        return losses


def _without_long_answers(row: dict[str, Any], most: int) -> dict[str, Any]:
    kept = [i for i, ids in enumerate(row["answer_ids"]) if len(ids) <= most]
    place = {before: after for after, before in enumerate(kept)}
    beats = [[place[i], place[j]] for i, j in row["beats"] if i in place and j in place]
    return {"answer_ids": [row["answer_ids"][i] for i in kept], "beats": beats}
