"""Reward models behind HTTP: raw scores, in the order sent, whoever asks beside.

POST /score, /rank, /get_reward (OpenRLHF's contract), /classify (vLLM's); GET /health, /models, /metrics, /docs.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from rlhf.reward.model import RewardModel
from rlhf.serve.batching import Refused, Scored, Worker
from rlhf.serve.gate import GONE, Gate
from rlhf.serve.metrics import Metrics
from rlhf.serve.models import ServedModel, Text
from rlhf.serve.protocol import (
    Class,
    ClassifyBody,
    ClassifyReply,
    HealthReply,
    ModelEntry,
    ModelsReply,
    Problem,
    RankBody,
    RankReply,
    RewardBody,
    RewardReply,
    ScoreBody,
    ScoreReply,
    Usage,
)

AskedModel = Annotated[
    str | None, Query(alias="model", description="One of GET /models; the same as `model` in the body.")
]
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": reason}
    for status, reason in {
        400: "The body can't be read.",
        401: "The token is missing or wrong.",
        404: "No such model.",
        408: "The body did not come in time.",
        413: "The body is too large.",
        422: "A text, or the form of the request, can't be scored; the sentence says which.",
        429: "Too many texts wait; Retry-After says for how long.",
        500: "The model failed.",
        503: "The server stops.",
        504: "No score in time.",
    }.items()
}
UNWATCHED = 0.1  # seconds before a request's client is watched, which costs more than most scores
SHOWN = 3  # mistakes of a body that are named


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        body_bytes: of a request's body.
        waiting_texts: in the queue of each model; the one request that comes to an empty queue may have more.
        seconds: until a request has its scores, or is given up.
        batch_tokens: of one forward, padding included; None: as the model's device wants it.
        batch_texts: of one forward.
    """

    body_bytes: int = 32 * 2**20
    waiting_texts: int = 65_536
    seconds: float = 60.0
    batch_tokens: int | None = None
    batch_texts: int = 64


def reward_app(reward: RewardModel, name: str) -> FastAPI:
    """Build the application of one model that is loaded already."""
    return serve_app([ServedModel(name, [reward])])


def serve_app(models: Sequence[ServedModel], *, token: str | None = None, limits: Limits | None = None) -> FastAPI:
    """Build the application.

    Args:
        models: the first one answers requests that name none.
        token: which requests must bring; None: none.
    """
    limits = limits or Limits()
    metrics = Metrics()
    workers = {
        model.name: Worker(
            model,
            metrics,
            batch_tokens=limits.batch_tokens or model.batch_tokens,
            batch_texts=limits.batch_texts,
            most_waiting=limits.waiting_texts,
        )
        for model in models
    }

    @asynccontextmanager
    async def run_workers(_: FastAPI) -> AsyncIterator[None]:
        for worker in workers.values():
            worker.start()
        yield
        for worker in workers.values():
            await asyncio.to_thread(worker.stop)

    app = FastAPI(title="rlhf serve", lifespan=run_workers, redoc_url=None)
    _add_scoring(app, _Desk(workers, limits.seconds))
    _add_reading(app, workers, metrics)
    app.add_exception_handler(Refused, _say_refusal)
    app.add_exception_handler(HTTPException, _say_http_error)
    app.add_exception_handler(RequestValidationError, _say_mistakes)
    endpoints = {str(getattr(route, "path", "")) for route in app.routes}
    app.add_middleware(
        Gate,
        endpoints=endpoints,
        metrics=metrics,
        token=token,
        most_bytes=limits.body_bytes,
        seconds=limits.seconds,
    )
    return app


@dataclass
class _Desk:
    """Takes a request's texts to the worker of its model, and brings the scores back.

    Attributes:
        workers: by the names of their models.
        seconds: until a request is given up.
    """

    workers: dict[str, Worker]
    seconds: float

    def worker_of(self, in_query: str | None, in_body: str | None) -> Worker:
        """Return the worker of the model that a request names.

        Raises:
            Refused: 404 for an unknown name, 422 for two names.
        """
        if in_query is not None and in_body is not None and in_query != in_body:
            raise Refused(422, "`model` in the address and `model` in the body differ.")
        name = in_query or in_body or next(iter(self.workers))
        if name not in self.workers:
            raise Refused(404, f"no such model here; there is {', '.join(self.workers)}.")
        return self.workers[name]

    async def score(self, request: Request, worker: Worker, texts: Sequence[Text]) -> Scored:
        """Return the scores of texts, or give up when the client goes away or the time is over.

        Raises:
            Refused: 422, 429, 500, 503 as the worker says; 504 after the time; 499, which nobody reads.
        """
        if not texts:
            return Scored([], 0, 0)
        job = worker.submit(texts)
        done = asyncio.wrap_future(job.done)
        try:
            await asyncio.wait({done}, timeout=min(UNWATCHED, self.seconds))
            if not done.done():
                await _until_gone(request, done, self.seconds - UNWATCHED)
            if done.done():
                return done.result()
            raise Refused(504, f"no scores after {self.seconds:g} s; {worker.waiting} texts wait.", retry_after=5)
        finally:
            worker.give_up(job)


async def _until_gone(request: Request, done: "asyncio.Future[Scored]", seconds: float) -> None:
    """Wait for scores, as long as the client does.

    Raises:
        Refused: 499; the client has gone, and nobody reads it.
    """
    gone = asyncio.ensure_future(request.receive())  # after the body, the next message is that the client has gone
    waited: set[asyncio.Future[Any]] = {done, gone}
    try:
        await asyncio.wait(waited, timeout=max(seconds, 0), return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not done.done():
            raise Refused(GONE, "the client went away.")
    finally:
        gone.cancel()


def _add_scoring(app: FastAPI, desk: _Desk) -> None:
    """Add the endpoints that score."""
    settings: dict[str, Any] = {"responses": PROBLEMS, "dependencies": [Security(HTTPBearer(auto_error=False))]}

    @app.post("/score", **settings)
    async def score(request: Request, body: ScoreBody, model: AskedModel = None) -> ScoreReply:
        """Score answers: whole conversations, or prompts and responses."""
        worker = desk.worker_of(model, body.model)
        scored = await desk.score(request, worker, body.texts())
        return ScoreReply(model=worker.model.name, scores=scored.scores, cut=scored.cut, tokens=scored.tokens)

    @app.post("/rank", **settings)
    async def rank(request: Request, body: RankBody, model: AskedModel = None) -> RankReply:
        """Put several answers to one prompt in order, best first."""
        worker = desk.worker_of(model, body.model)
        scored = await desk.score(request, worker, body.texts())
        order = sorted(range(len(scored.scores)), key=lambda i: -scored.scores[i])
        name = worker.model.name
        return RankReply(model=name, order=order, scores=scored.scores, cut=scored.cut, tokens=scored.tokens)

    @app.post("/get_reward", **settings)
    async def get_reward(request: Request, body: RewardBody, model: AskedModel = None) -> RewardReply:
        """Score answers as OpenRLHF's clients and `ppo.extra_rewards` ask."""
        worker = desk.worker_of(model, body.model)
        scored = await desk.score(request, worker, body.texts(worker.model))
        return RewardReply(rewards=scored.scores, scores=scored.scores, cut=scored.cut)

    @app.post("/classify", **settings)
    async def classify(request: Request, body: ClassifyBody, model: AskedModel = None) -> ClassifyReply:
        """Score texts as vLLM's clients ask; `probs` is the raw score, as vLLM's is for a model of this pipeline."""
        worker = desk.worker_of(model, body.model)
        scored = await desk.score(request, worker, body.texts())
        label = worker.model.label
        return ClassifyReply(
            id=f"classify-{request.state.request_id}",
            created=int(time.time()),
            model=worker.model.name,
            data=[Class(index=i, label=label, probs=[value]) for i, value in enumerate(scored.scores)],
            usage=Usage(prompt_tokens=scored.tokens, total_tokens=scored.tokens),
        )


def _add_reading(app: FastAPI, workers: dict[str, Worker], metrics: Metrics) -> None:
    """Add the endpoints that tell about the server."""
    models = [worker.model for worker in workers.values()]
    refusals: dict[int | str, dict[str, Any]] = {401: PROBLEMS[401]}

    refusals_of_health: dict[int | str, dict[str, Any]] = {503: PROBLEMS[503]}

    @app.get("/health", responses=refusals_of_health)
    def health(request: Request) -> HealthReply:
        """Tell whether the server works; with its token, or where it needs none, also what it serves."""
        dead = [name for name, worker in workers.items() if not worker.is_alive]
        if dead:
            raise Refused(503, "a model's thread has ended; start the server again.")
        if not request.state.is_trusted:
            return HealthReply()
        first = models[0]
        return HealthReply(model=first.name, mean=first.mean, std=first.std, models=[model.name for model in models])

    @app.get("/models", responses=refusals, dependencies=[Security(HTTPBearer(auto_error=False))])
    def list_models() -> ModelsReply:
        """List the models."""
        entries = [ModelEntry(id=m.name, kind=m.kind, mean=m.mean, std=m.std, max_length=m.max_length) for m in models]
        return ModelsReply(data=entries)

    @app.get(
        "/metrics",
        responses={200: {"content": {"text/plain": {}}}, **refusals},
        response_class=Response,
        dependencies=[Security(HTTPBearer(auto_error=False))],
    )
    def give_metrics() -> Response:
        """Return what was counted, for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _problem(request: Request, status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    text = sentence.encode("utf-8", "replace").decode()
    return JSONResponse({"detail": text, "request_id": request.state.request_id}, status, headers)


async def _say_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = None if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return _problem(request, error.status, error.sentence, headers)


async def _say_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    return _problem(request, error.status_code, str(error.detail), headers)


async def _say_mistakes(request: Request, error: Exception) -> Response:
    """Say what is wrong with a body, without what was in it: it may be long, and no text at all."""
    assert isinstance(error, RequestValidationError)
    mistakes = error.errors()
    sentence = "; ".join(_mistake(mistake) for mistake in mistakes[:SHOWN])
    more = len(mistakes) - SHOWN
    return _problem(request, 422, sentence + (f"; and {more} more" if more > 0 else "") + ".")


def _mistake(mistake: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in mistake["loc"][1:])
    if mistake["type"] == "json_invalid":
        return f"the body is not valid JSON: {mistake.get('ctx', {}).get('error', '')} at character {place}"
    if mistake["type"] == "model_attributes_type" and not place:
        return "send a JSON object, with Content-Type: application/json"
    return f"{place}: {mistake['msg']}" if place else str(mistake["msg"])
