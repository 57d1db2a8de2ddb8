"""The labelling page: one pair at a time, by keyboard, blind, and nothing lost."""

import hashlib
import hmac
import secrets
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from rlhf.data.labelbook import LabelBook
from rlhf.data.labels import Question, Verdict, agreement

COOKIE = "rlhf_annotator"
LONGEST_SECONDS = 600.0  # a pair left open over lunch says nothing about how long labels take
# What the page's keys and buttons send: the side as shown, which need not be the side as stored.
CHOICES = ("left", "right", "tie", "skip")


def annotator_tokens(path: Path, names: list[str]) -> dict[str, str]:
    """Return each annotator's secret, drawn once and kept in the run's book; whoever has it labels under that name."""
    connection = sqlite3.connect(path, timeout=30)
    try:
        with connection:
            connection.execute("CREATE TABLE IF NOT EXISTS annotators (name TEXT PRIMARY KEY, token TEXT NOT NULL)")
            for name in names:
                connection.execute("INSERT OR IGNORE INTO annotators VALUES (?, ?)", (name, secrets.token_urlsafe(16)))
            return dict(connection.execute("SELECT name, token FROM annotators"))
    finally:
        connection.close()


def shows_second_on_the_left(annotator: str, question: Question) -> bool:
    """Tell whether the sides are swapped: drawn for every annotator and question, and the same when a page is loaded again."""
    return hashlib.sha256(f"{annotator}\x1f{question.id}".encode()).digest()[0] % 2 == 1


def label_app(book: LabelBook, round_number: int, tokens: dict[str, str], *, wanted: int, title: str) -> FastAPI:
    """Build the application for one round's questions.

    Args:
        tokens: annotator → secret.
        wanted: verdicts that each question should have.
    """
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)
    templates = Environment(loader=PackageLoader("rlhf", "serve"), autoescape=True, undefined=StrictUndefined)

    def page(state: str, values: Mapping[str, object] | None = None, *, status: int = 200) -> HTMLResponse:
        nonce = secrets.token_urlsafe(12)
        template = templates.get_template("label.html.jinja")
        text = template.render(title=title, nonce=nonce, state=state, **(values or {}))
        headers = {
            "Content-Security-Policy": f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
            "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
            "Cache-Control": "no-store",
            "Referrer-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
        }
        return HTMLResponse(text, status, headers)

    def annotator_of(token: str | None) -> str | None:
        return next((name for name, secret in tokens.items() if hmac.compare_digest(secret, token or "")), None)

    def refused() -> HTMLResponse:
        return page("refused", status=403)

    @app.get("/")
    def ask(request: Request, token: str | None = None) -> Response:
        # 1. A link with a token becomes a cookie, so that the secret leaves the address bar.
        if token is not None:
            if annotator_of(token) is None:
                return refused()
            response = RedirectResponse("/", 303)
            response.set_cookie(COOKIE, token, httponly=True, samesite="strict")
            return response
        annotator = annotator_of(request.cookies.get(COOKIE))
        if annotator is None:
            return refused()

        # 2. The next question, or the end.
        done, total = book.progress(round_number, wanted=wanted)
        answered = [v for v in book.verdicts(round_number) if v.annotator == annotator]
        shared = {"annotator": annotator, "done": done, "total": total, "answered": len(answered)}
        question = book.next_for(annotator, round_number, wanted=wanted)
        if question is None:
            times = sorted(v.seconds for v in answered if v.seconds is not None)
            median = times[len(times) // 2] if times else None
            agreed = agreement(book.verdicts(round_number))
            return page("done", {**shared, "median": median, "agreement": agreed})
        left, right = question.first, question.second
        if shows_second_on_the_left(annotator, question):
            left, right = right, left
        shown = f"{time.time():.3f}"
        return page("ask", {**shared, "question": question, "left": left, "right": right, "shown": shown})

    @app.post("/")
    async def answer(request: Request) -> Response:
        annotator = annotator_of(request.cookies.get(COOKIE))
        if annotator is None:
            return refused()
        form = {name: values[0] for name, values in parse_qs((await request.body()).decode("utf-8")).items()}
        if form.get("choice") == "undo":
            book.undo(annotator, round_number)
            return RedirectResponse("/", 303)
        asked = {question.id: question for question in book.questions(round_number)}
        question = asked.get(form.get("id", ""))
        if question is None or form.get("choice") not in CHOICES:
            return page("unknown", status=400)
        choice = form["choice"]
        if choice in ("left", "right"):
            choice = "second" if (choice == "left") == shows_second_on_the_left(annotator, question) else "first"
        book.record([Verdict(question.id, choice, annotator, _seconds(form.get("shown")))])
        return RedirectResponse("/", 303)

    return app


def _seconds(shown: str | None) -> float | None:
    try:
        seconds = time.time() - float(shown or "nan")
    except ValueError:
        return None
    return seconds if 0 <= seconds <= LONGEST_SECONDS else None
