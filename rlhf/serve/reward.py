"""A reward model behind HTTP, with OpenRLHF's contract: POST /get_reward → {"rewards": [...]}."""

import threading
import warnings
from typing import Any, cast

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from rlhf.data.rows import Prompt
from rlhf.errors import UserError
from rlhf.reward.load import open_reward_model
from rlhf.reward.model import RewardModel


class Batch(BaseModel):
    """Answers to score, in one of two forms.

    Ours: `prompts` (strings, or conversations) with `responses`, and `ended` where some answers were cut off. OpenRLHF's:
    `query` = prompt and answer in one text, with `prompts` beside them or not.
    """

    prompts: list[str | list[dict[str, str]]] | None = None
    responses: list[str] | None = None
    ended: list[bool] | None = None
    query: list[str] | None = None

    def check(self) -> int:
        """Return how many answers there are.

        Raises:
            HTTPException: 422, with a sentence, where there are none of either form or lengths differ.
        """
        answers = self.query if self.responses is None else self.responses
        if answers is None or (self.prompts is None and self.query is None):
            raise HTTPException(422, "send `prompts` and `responses`, or `query`.")
        if self.prompts is not None and len(answers) != len(self.prompts):
            raise HTTPException(422, f"{len(self.prompts)} prompts and {len(answers)} answers.")
        if self.ended is not None and len(answers) != len(self.ended):
            raise HTTPException(422, f"{len(answers)} answers and {len(self.ended)} values of `ended`.")
        return len(answers)


def open_app(model: str) -> FastAPI:
    """Open a reward model's folder, or a one-label classifier on the hub, as an application.

    Raises:
        UserError: nothing there that could score.
    """
    return reward_app(open_reward_model(model), model)


def reward_app(reward: RewardModel, name: str) -> FastAPI:
    """Build the application: /get_reward, and /health for whoever starts it."""
    app = FastAPI(title=f"reward model {name}")
    one_at_a_time = threading.Lock()  # a model has one set of buffers, so requests wait for each other

    @app.post("/get_reward")
    def get_reward(batch: Batch) -> dict[str, Any]:
        count = batch.check()
        with one_at_a_time:
            before = reward.cut
            rewards = score_batch(reward, batch) if count else []
            cut = reward.cut - before
        if cut and not before:
            warnings.warn(
                f"{name}: {cut} texts are longer than {reward.max_length} tokens and lost their beginning; every reply says how "
                "many under `cut`.",
                stacklevel=2,
            )
        return {"rewards": rewards, "scores": rewards, "cut": cut}

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"model": name, "mean": reward.mean, "std": reward.std}

    return app


def score_batch(reward: RewardModel, batch: Batch) -> list[float]:
    """Return the rewards of a batch whose lengths were checked.

    A `query` is scored as that very text where its prompt was rendered by a chat template, where it comes without one, or
    where the reward model reads plain text. Otherwise its prompt is a person's words, and the reward model's own template is
    laid around the two.

    Raises:
        HTTPException: 422, with a sentence, where a query does not begin with its prompt, or the model can't score it.
    """
    prompts = cast(list[Prompt] | None, batch.prompts)
    try:
        if batch.responses is not None:
            assert prompts is not None or batch.query is not None, "checked"
            if prompts is None:
                raise HTTPException(422, "`responses` need their `prompts`.")
            return reward.score(prompts, batch.responses, ended=batch.ended).tolist()
        queries = batch.query or []
        if prompts is None or not reward.conversational or all(_is_rendered(reward, prompt) for prompt in prompts):
            return reward.score_texts(queries, ended=batch.ended).tolist()
        answers = []
        for row, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
            if not isinstance(prompt, str) or not query.startswith(prompt):
                raise HTTPException(422, f"query {row} does not begin with its prompt; send `responses` instead.")
            if _is_rendered(reward, prompt):
                raise HTTPException(
                    422, f"prompt {row} was rendered by a chat template and others were not; send one kind."
                )
            answers.append(query[len(prompt) :].removeprefix("\n").removesuffix(reward.tokenizer.eos_token))
        return reward.score(prompts, answers, ended=batch.ended).tolist()
    except UserError as error:
        raise HTTPException(422, str(error)) from error


def _is_rendered(reward: RewardModel, prompt: Prompt) -> bool:
    return isinstance(prompt, str) and reward.is_rendered(prompt)
