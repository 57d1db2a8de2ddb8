"""Rewards: reward models, Python functions and servers behind one call, text in and scores out."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.rows import Message, Messages, Prompt
from rlhf.errors import TrainingError
from rlhf.models.generate import Completions
from rlhf.objectives.ensemble import combined
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.remote import RemoteReward
from rlhf.ppo.rollout import PromptRow
from rlhf.ppo.source_kinds import kind_of
from rlhf.reward.load import RewardModel

ScoringFunction: TypeAlias = Callable[..., Sequence[float | None]]
RewardFunction: TypeAlias = str | RewardModel | PreTrainedModel | ScoringFunction
Result = TypeVar("Result")


class RewardSource:
    """One reward function under one interface.

    Args:
        function: of one of the kinds in `rlhf.ppo.source_kinds`: a folder of `rlhf.load_reward_model`; the http address of
            a reward server (`RemoteReward`); a function in a file (`FileReward`); a causal model's verdicts
            (`VerdictReward`); a loaded `RewardModel`; a one-label classifier (with its tokenizer as `processing_class`);
            or a function, `async` or not, called as TRL calls its own, `f(prompts=..., completions=...,
            completion_ids=..., **columns)`, returning one number an answer, or a list of one number a token.

    Raises:
        UserError: of none of them; or it can't be opened.
    """

    def __init__(self, function: RewardFunction, processing_class: PreTrainedTokenizerBase | None = None):
        self.function = cast(RewardModel | ScoringFunction, kind_of(function).open(function, processing_class))
        self.name = getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def compares(self) -> bool:
        """Tell whether it compares an answer with one of the reference, which it finds in the column `reference_answer`."""
        return bool(getattr(self.function, "compares", False))

    @property
    def has_scale(self) -> bool:
        """Say whether the scores' mean and deviation on SFT samples were measured."""
        return isinstance(self.function, RewardModel) and (self.function.mean, self.function.std) != (0.0, 1.0)

    @property
    def scale(self) -> tuple[float, float]:
        """Return mean and deviation on SFT samples; (0, 1) where nobody measured them."""
        return (self.function.mean, self.function.std) if isinstance(self.function, RewardModel) else (0.0, 1.0)

    def __call__(
        self, prompts: Sequence[Prompt], completions: Completions, columns: Mapping[str, Sequence[object]]
    ) -> tuple[Tensor, Tensor | None]:
        """Score answers.

        Returns:
            raw scores [b], float32 on the CPU; and rewards of single tokens [b, r], whose sums those are, or None where
            the source gives none.

        Raises:
            TrainingError: another number of scores than answers or tokens, or one that is not finite.
        """
        if isinstance(self.function, RewardModel):
            texts = texts_for(self.function, completions.texts, blank=completions.blank)
            scores = self.function.score(prompts, texts, ended=completions.ended.tolist())
            dense = None
        else:
            scores, dense = self._call(self.function, prompts, completions, columns)
        if len(scores) != len(prompts):
            raise TrainingError(
                f"The reward function {self.name!r} returned {len(scores)} scores for {len(prompts)} answers."
            )
        bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
        if bad:
            raise TrainingError(
                f"The reward function {self.name!r} returned {scores[bad[0]].item()} for {len(bad)} of {len(scores)} answers, "
                f"first for {completions.texts[bad[0]]!r}; nothing was updated.",
                rows=[
                    {"prompt": prompt, "completion": text, "score": repr(score)}
                    for prompt, text, score in zip(prompts, completions.texts, scores.tolist(), strict=True)
                ],
            )
        return scores, dense

    def _call(
        self,
        function: ScoringFunction,
        prompts: Sequence[Prompt],
        completions: Completions,
        columns: Mapping[str, Sequence[object]],
    ) -> tuple[Tensor, Tensor | None]:
        """Call a function as TRL does: its scores [b], and its rewards of single tokens [b, r] where it gives such."""
        mask = completions.response_mask.bool()
        ids = [row[keep].tolist() for row, keep in zip(completions.response_ids, mask, strict=True)]
        arguments: dict[str, Any] = {**columns}
        if isinstance(function, RemoteReward):
            arguments["ended"] = completions.ended.tolist()
        answers: Any = function(
            prompts=list(prompts),
            completions=as_completions(prompts, completions.texts),
            completion_ids=ids,
            **arguments,
        )
        if inspect.isawaitable(answers):
            answers = _wait_for(answers)
        answers, dense = list(answers), None
        if answers and not isinstance(answers[0], str) and np.ndim(answers[0]) == 1:
            dense = self._per_token(answers, ids, completions)
            answers = dense.sum(dim=1).tolist()
        return torch.tensor([float("nan") if x is None else float(x) for x in answers]), dense

    def _per_token(
        self, answers: Sequence[Sequence[float]], ids: Sequence[Sequence[int]], completions: Completions
    ) -> Tensor:
        """Put rewards of single tokens in the places of their answers, [b, r], 0 elsewhere."""
        dense = torch.zeros(completions.response_mask.shape)
        lengths = [len(row) for row in answers]
        if lengths != [len(row) for row in ids]:
            raise TrainingError(
                f"The reward function {self.name!r} returned {lengths[:3]}… rewards for answers of {[len(x) for x in ids][:3]}… "
                "tokens; one a token, the end included."
            )
        for row, values in enumerate(answers):
            dense[row, : len(values)] = torch.as_tensor(values, dtype=torch.float)
        return dense


def texts_for(reward: RewardModel, texts: Sequence[str], *, blank: str) -> list[str]:
    """Return sampled answers as a reward model reads them: one of conversations takes each for a message.

    Args:
        blank: between a plain prompt and its answer, as `Completions` have it; no part of a message.
    """
    return [text.removeprefix(blank) for text in texts] if reward.conversational else list(texts)


def as_reward_model(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> RewardModel:
    """Return a one-label classifier, frozen, as a reward model whose scale nobody measured; its tokenizer is loaded if absent."""
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(network.config._name_or_path, trust_remote_code=False)
    return RewardModel(network.eval().requires_grad_(False), tokenizer)


class Scores(NamedTuple):
    """The scores of some answers by all sources.

    Attributes:
        raw: [b] of the first source, in its own units.
        total: [b] all sources as one, each normalised by its own scale.
        per_token: [b, r] the sources' rewards of single tokens, which are not in `total`; 0 elsewhere.
        disagreement: [b] deviation (1/k) of the normalised scores of an ensemble's members; None without one.
    """

    raw: Tensor
    total: Tensor
    per_token: Tensor
    disagreement: Tensor | None


class Rewards:
    """All sources of rewards as one.

    Args:
        sources: one or more.
        args: `normalize_reward`, `reward_weights`, `reward_ensemble` and its strength are read.
    """

    def __init__(self, sources: list[RewardSource], args: PPOConfig):
        self.sources, self.args = sources, args
        self.weights = args.reward_weights or [1.0] * len(sources)

    @property
    def scale(self) -> tuple[float, float]:
        """Return mean and deviation of the first source, where scores are normalised."""
        return self._scale(self.sources[0])

    @property
    def scale_of_copy(self) -> tuple[float, float]:
        """Return the same for a critic that is a copy of the first source's network, which may say less than the whole."""
        reward = self.sources[0].function
        return reward.scale_of_copy(*self.scale) if isinstance(reward, RewardModel) else self.scale

    def _scale(self, source: RewardSource) -> tuple[float, float]:
        return source.scale if self.args.normalize_reward else (0.0, 1.0)

    @property
    def compares(self) -> bool:
        """Tell whether a source compares an answer with one of the reference."""
        return any(source.compares for source in self.sources)

    @property
    def models(self) -> list[nn.Module]:
        """Return the networks of the sources that are reward models."""
        return [reward.model for reward in self.reward_models]

    @property
    def reward_models(self) -> list[RewardModel]:
        """Return the sources that are reward models."""
        return [source.function for source in self.sources if isinstance(source.function, RewardModel)]

    def to(self, device: torch.device) -> None:
        """Move the sources that have weights to a device."""
        for source in self.sources:
            if hasattr(source.function, "model"):
                source.function.model.to(device)

    def __call__(self, rows: Sequence[PromptRow], completions: Completions) -> Scores:
        """Score the answers to rows with a `prompt` and any other columns.

        Raises:
            TrainingError: a source fails, or rewards single tokens as the member of an ensemble.
        """
        prompts = [row["prompt"] for row in rows]
        columns = other_columns(rows)
        device = completions.response_ids.device
        per_token = torch.zeros(completions.response_mask.shape, device=device)
        raw_scores, normalized = [], []
        for source, weight in zip(self.sources, self.weights, strict=True):
            raw, dense = source(prompts, completions, columns)
            raw_scores.append(raw.to(device))
            if dense is not None and self.args.reward_ensemble is not None:
                raise TrainingError(
                    f"ppo: {source.name!r} rewards single tokens, which can't be a member of an ensemble."
                )
            mean, std = self._scale(source)
            scores = raw_scores[-1] if dense is None else torch.zeros_like(raw_scores[-1])
            normalized.append((scores - mean) / std)
            if dense is not None:
                per_token += weight * dense.to(device)
        total = total_reward(
            normalized, self.weights, ensemble=self.args.reward_ensemble, strength=self.args.reward_ensemble_strength
        )
        disagreement = None
        if self.args.reward_ensemble is not None:
            disagreement = torch.stack(normalized).std(dim=0, correction=0)
        return Scores(raw_scores[0], total, per_token, disagreement)


def other_columns(rows: Sequence[Mapping[str, object]]) -> dict[str, list[object]]:
    """Return the columns that reward functions are given beside prompts and completions."""
    return {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion")}


def _wait_for(awaitable: Awaitable[Result]) -> Result:
    """Wait for the result of a coroutine, in a thread of its own: a notebook already runs an event loop in this one."""

    async def result() -> Result:
        return await awaitable

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, result()).result()


def total_reward(
    columns: Sequence[Tensor], weights: Sequence[float], *, ensemble: str | None = None, strength: float = 0.5
) -> Tensor:
    """Combine the sources' scores into the one that is optimised, [b]: their weighted sum, or the members of an ensemble as one.

    Args:
        columns: of each source, [b], normalised by its own scale, so that members of an ensemble are on one.
    """
    scores = torch.stack(list(columns))
    if ensemble is not None:
        return combined(scores, ensemble, strength=strength)
    return (torch.tensor(weights)[:, None].to(scores) * scores).sum(dim=0)


def as_completions(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[str | Messages]:
    """Return answers in the prompts' own format, as TRL hands them to reward functions."""
    return [
        text if isinstance(prompt, str) else [Message(role="assistant", content=text)]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
