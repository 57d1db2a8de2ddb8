"""Where rewards come from: reward models, Python functions and servers, behind one call, text in and scores out."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from rlhf.data.rows import Prompt
from rlhf.errors import TrainingError
from rlhf.models.generate import Completions
from rlhf.objectives.ensemble import combined
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.remote import RemoteReward
from rlhf.reward.load import RewardModel, load_reward_model

RewardFunction: TypeAlias = str | RewardModel | PreTrainedModel | Callable[..., Sequence[float | None]]


class RewardSource:
    """One reward function under one interface.

    Args:
        function: a folder of `rlhf.load_reward_model`; the http address of a reward server (`RemoteReward`); a loaded
            `RewardModel`; a one-label classifier (with its tokenizer as `processing_class`); or a function, `async` or
            not, called as TRL calls its own, `f(prompts=..., completions=..., completion_ids=..., **columns)`, returning
            one number an answer, or a list of one number a token.
    """

    def __init__(self, function: RewardFunction, processing_class: Any = None):
        if isinstance(function, str):
            function = RemoteReward(function) if is_server(function) else load_reward_model(function)
        elif isinstance(function, nn.Module):
            network: Any = function
            tokenizer = processing_class or AutoTokenizer.from_pretrained(network.config._name_or_path)
            function = RewardModel(network.eval().requires_grad_(False), tokenizer)
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    @property
    def has_scale(self) -> bool:
        """Whether the scores' mean and deviation on SFT samples were measured."""
        return isinstance(self.function, RewardModel) and (self.function.mean, self.function.std) != (0.0, 1.0)

    @property
    def scale(self) -> tuple[float, float]:
        """Mean and deviation on SFT samples; (0, 1) where nobody measured them."""
        return (self.function.mean, self.function.std) if isinstance(self.function, RewardModel) else (0.0, 1.0)

    def __call__(
        self, prompts: Sequence[Prompt], completions: Completions, columns: dict[str, list[Any]]
    ) -> tuple[Tensor, Tensor | None]:
        """Raw scores [b], float32 on the CPU, and what was said of single tokens [b, r], whose sums those are, or None.

        Raises:
            TrainingError: another number of scores than answers or tokens, or one that is not finite.
        """
        dense = None
        if isinstance(self.function, RewardModel):
            scores = self.function.score(prompts, completions.texts, ended=completions.ended.tolist())
        else:
            mask = completions.response_mask.bool()
            ids = [row[keep].tolist() for row, keep in zip(completions.response_ids, mask, strict=True)]
            answers = self.function(
                prompts=list(prompts),
                completions=as_completions(prompts, completions.texts),
                completion_ids=ids,
                **columns,
            )
            if inspect.isawaitable(answers):
                answers = _wait_for(answers)
            answers = list(answers)
            if answers and isinstance(answers[0], Sequence | Tensor):
                dense = self._per_token(answers, ids, completions)
                answers = dense.sum(dim=1).tolist()
            scores = torch.tensor([float("nan") if x is None else float(x) for x in answers])
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

    def _per_token(self, answers: Sequence[Any], ids: Sequence[Sequence[int]], completions: Completions) -> Tensor:
        """Rewards of single tokens in the places of their answers, [b, r], 0 elsewhere."""
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


class Scores(NamedTuple):
    """What all sources say of some answers.

    Attributes:
        raw: [b] of the first source, in its own units.
        total: [b] all sources as one, each normalised by its own scale.
        per_token: [b, r] what sources said of single tokens, which is not in `total`; 0 elsewhere.
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
        """Mean and deviation of the first source, where scores are normalised."""
        return self._scale(self.sources[0])

    def _scale(self, source: RewardSource) -> tuple[float, float]:
        return source.scale if self.args.normalize_reward else (0.0, 1.0)

    def to(self, device: torch.device) -> None:
        """Move what has weights."""
        for source in self.sources:
            if hasattr(source.function, "model"):
                source.function.model.to(device)

    def __call__(self, rows: Sequence[dict[str, Any]], completions: Completions) -> Scores:
        """Score the answers to rows with a `prompt` and any other columns.

        Raises:
            TrainingError: a source fails, or rewards single tokens as the member of an ensemble.
        """
        prompts = [row["prompt"] for row in rows]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
        device = completions.response_ids.device
        per_token = torch.zeros(completions.response_mask.shape, device=device)
        raws, normalized = [], []
        for source, weight in zip(self.sources, self.weights, strict=True):
            raw, dense = source(prompts, completions, columns)
            raws.append(raw.to(device))
            if dense is not None and self.args.reward_ensemble is not None:
                raise TrainingError(
                    f"ppo: {source.name!r} rewards single tokens, which can't be a member of an ensemble."
                )
            mean, std = self._scale(source)
            whole = raws[-1] if dense is None else torch.zeros_like(raws[-1])
            normalized.append((whole - mean) / std)
            if dense is not None:
                per_token += weight * dense.to(device)
        total = total_reward(
            normalized, self.weights, ensemble=self.args.reward_ensemble, strength=self.args.reward_ensemble_strength
        )
        disagreement = None
        if self.args.reward_ensemble is not None:
            disagreement = torch.stack(normalized).std(dim=0, correction=0)
        return Scores(raws[0], total, per_token, disagreement)


def is_server(name: str) -> bool:
    """Whether a reward source is an address and not a folder."""
    return name.startswith(("http://", "https://"))


def _wait_for(awaitable: Any) -> Any:
    """The result of a coroutine; in a thread of its own, since a notebook already runs an event loop in this one."""

    async def result() -> Any:
        return await awaitable

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, result()).result()


def total_reward(
    columns: Sequence[Tensor], weights: Sequence[float], *, ensemble: str | None = None, strength: float = 0.5
) -> Tensor:
    """What is optimised, of what the sources say, [b]: the weighted sum, or the members of an ensemble as one.

    Args:
        columns: of each source, [b], normalised by its own scale, so that members of an ensemble are on one.
    """
    scores = torch.stack(list(columns))
    if ensemble is not None:
        return combined(scores, ensemble, strength=strength)
    return (torch.tensor(weights)[:, None].to(scores) * scores).sum(dim=0)


def as_completions(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Any]:
    """Answers in the prompts' own format, as TRL hands them to reward functions."""
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
