"""A reward model behind HTTP, with OpenRLHF's contract: POST /get_reward → {"rewards": [...]}."""

import threading
from typing import Any, cast

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from rlhf.data.rows import Prompt
from rlhf.reward.load import open_reward_model
from rlhf.reward.model import RewardModel


class Batch(BaseModel):
    """Answers to score: `prompts` with `responses`; or, as OpenRLHF's clients send it, `query` = prompt and answer in one text."""

    prompts: list[str | list[dict[str, str]]]
    responses: list[str] | None = None
    query: list[str] | None = None

    def answers(self) -> list[str]:
        """Return the answers' texts, without their prompts.

        Raises:
            HTTPException: 422, with a sentence, where lengths differ or a query does not begin with its prompt.
        """
        answers = self.responses
        if answers is None:
            queries = self.query or []
            pairs = list(zip(queries, self.prompts, strict=False))
            wrong = [i for i, (query, p) in enumerate(pairs) if not isinstance(p, str) or not query.startswith(p)]
            if wrong:
                raise HTTPException(422, f"query {wrong[0]} does not begin with its prompt; send `responses` instead.")
            answers = [query[len(str(prompt)) :].removeprefix("\n") for query, prompt in pairs] if pairs else queries
        if len(answers) != len(self.prompts):
            raise HTTPException(422, f"{len(self.prompts)} prompts and {len(answers)} answers.")
        return answers


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
        answers = batch.answers()
        prompts = cast(list[Prompt], batch.prompts)
        with one_at_a_time:
            rewards = reward.score(prompts, answers).tolist() if answers else []
        return {"rewards": rewards, "scores": rewards}

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"model": name, "mean": reward.mean, "std": reward.std}

    return app
