"""A reward model behind HTTP, with OpenRLHF's contract: POST /get_reward → {"rewards": [...]}."""

import threading
from typing import Any, cast

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from rlhf.data.rows import Prompt
from rlhf.reward.load import RewardModel, open_reward_model


class Batch(BaseModel):
    """Answers to score: `prompts` with `responses`; or, as OpenRLHF's clients say it, `query` = prompt and answer in one text."""

    prompts: list[str | list[dict[str, str]]]
    responses: list[str] | None = None
    query: list[str] | None = None

    def answers(self) -> list[str]:
        """What follows the prompt.

        Raises:
            HTTPException: 422, with a sentence, where lengths differ or a query does not begin with its prompt.
        """
        found = self.responses
        if found is None:
            texts = self.query or []
            pairs = list(zip(texts, self.prompts, strict=False))
            astray = [i for i, (q, p) in enumerate(pairs) if not isinstance(p, str) or not q.startswith(p)]
            if astray:
                raise HTTPException(422, f"query {astray[0]} does not begin with its prompt; send `responses` instead.")
            found = [query[len(str(prompt)) :].removeprefix("\n") for query, prompt in pairs] if pairs else texts
        if len(found) != len(self.prompts):
            raise HTTPException(422, f"{len(self.prompts)} prompts and {len(found)} answers.")
        return found


def open_app(model: str) -> FastAPI:
    """The application of a reward model's folder, or of a hub id with one label.

    Raises:
        UserError: nothing there that could score.
    """
    return reward_app(open_reward_model(model), model)


def reward_app(reward: RewardModel, name: str) -> FastAPI:
    """The application: /get_reward, and /health for whoever starts it."""
    app = FastAPI(title=f"reward model {name}")
    one_at_a_time = threading.Lock()  # a model has one set of buffers; requests wait for each other

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
