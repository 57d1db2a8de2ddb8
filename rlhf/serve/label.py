"""The labelling page: one pair at a time, by keyboard, blind, and nothing lost."""

import hashlib
import hmac
import secrets
import sqlite3
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, quote

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from rlhf.data.controls import Control, controls_expected, next_control, repeated
from rlhf.data.labelbook import SECONDS_TO_WAIT, LabelBook
from rlhf.data.labels import Question, Verdict, agreement, shows_second_on_the_left

COOKIE = "rlhf_annotator"
MOST_BYTES = 65_536  # of a form; the page sends a few hundred
LONGEST_SECONDS = 600.0  # a pair left open over lunch says nothing about how long labels take
# What the page's keys and buttons send: the side as shown, which need not be the side as stored.
CHOICES = ("left", "right", "tie", "skip")


def annotator_tokens(path: Path, names: list[str]) -> dict[str, str]:
    """Return each annotator's secret, drawn once and kept in the run's book; whoever has it labels under that name."""
    connection = sqlite3.connect(path, timeout=SECONDS_TO_WAIT)
    try:
        with connection:
            connection.execute("CREATE TABLE IF NOT EXISTS annotators (name TEXT PRIMARY KEY, token TEXT NOT NULL)")
            for name in names:
                connection.execute("INSERT OR IGNORE INTO annotators VALUES (?, ?)", (name, secrets.token_urlsafe(16)))
            return dict(connection.execute("SELECT name, token FROM annotators"))
    finally:
        connection.close()


def label_app(
    book: LabelBook, round_number: int, tokens: dict[str, str], *, wanted: int, title: str, repeat: float = 0.0
) -> FastAPI:
    """Build the application for one round's questions, with its gold questions hidden among them.

    Args:
        tokens: annotator → secret.
        wanted: verdicts that each question should have.
        repeat: of the questions that somebody answers, the share that is asked again, hidden too.
    """
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)
    templates = Environment(loader=PackageLoader("rlhf", "serve"), autoescape=True, undefined=StrictUndefined)
    page = partial(_page, templates.get_template("label.html.jinja"), title)
    annotator_of = partial(_annotator_of, tokens)
    back = partial(_address_of_next, tokens)

    def refused() -> HTMLResponse:
        return page("refused", status=403)

    @app.get("/")
    def ask(request: Request, token: str | None = None, person: str | None = None) -> Response:
        # 1. A link with a token becomes a cookie, so that the secret leaves the address bar.
        if token is not None:
            name = annotator_of(token)
            return refused() if name is None else _remembered(request, name, token)
        annotator = annotator_of(request.cookies.get(_cookie(request, person)))
        if annotator is None:
            return refused()

        # 2. The next question, or the end.
        done, total, _ = book.progress(round_number, wanted=wanted)
        history = book.history(annotator, round_number)
        controls = len(history.gold) + len(history.repeated)
        shared = {"annotator": annotator, "answered": len(history.verdicts) + controls, "token": tokens[annotator]}
        question = book.next_for(annotator, round_number, wanted=wanted)
        if question is None:
            times = sorted(v.seconds for v in history.verdicts if v.seconds is not None)
            median = times[len(times) // 2] if times else None
            agreed = agreement(book.verdicts(round_number))
            counted = {"done": done + controls, "total": total + controls}
            return page("done", {**shared, **counted, "median": median, "agreement": agreed})

        # 3. In its place a control question, where one is due; the bar counts it like any other.
        gold, ordinary = book.gold(round_number), {q.id: q for q in book.questions(round_number)}
        control = next_control(annotator, history, gold, ordinary, repeat=repeat)
        question = question if control is None else control.question
        expected = controls_expected(annotator, total, len(gold), repeat=repeat)
        shared |= {"done": done + min(controls, expected), "total": total + expected}
        left_side = _side_on_the_left(annotator, question)
        left, right = question.first, question.second
        if left_side == "second":
            left, right = right, left
        shown = f"{time.time():.3f}"
        drawn = {"left": left, "right": right, "left_side": left_side, "shown": shown}
        return page("ask", {**shared, "question": question, **drawn})

    @app.exception_handler(sqlite3.OperationalError)
    def busy(request: Request, error: Exception) -> Response:
        return page("busy", {"back": back(request, getattr(request.state, "form", None))}, status=503)

    @app.post("/")
    async def answer(request: Request) -> Response:
        form = request.state.form = await _form(request)
        return await run_in_threadpool(record, request, form)  # the book may be busy, and others need not wait

    def record(request: Request, form: dict[str, str] | None) -> Response:
        # 1. The form says for whom it was drawn; the cookie may by now be that of somebody else in the same browser.
        if form is None:
            return page("unknown", {"back": back(request, form)}, status=400)
        cookie = request.cookies.get(_cookie(request))
        annotator = annotator_of(form.get("token", cookie)) if _is_own_page(request) else None
        if annotator is None:
            return refused()
        is_last = annotator == annotator_of(cookie)
        following = RedirectResponse("/" if is_last else f"/?person={_person_id(annotator)}", 303)
        if form.get("choice") == "undo":
            book.undo(annotator, round_number)
            return following

        # 2. What was clicked is a side of the page as it was drawn, what is recorded a side of the question.
        asked = {question.id: question for question in book.questions(round_number)}
        control = _control(book, annotator, round_number, form.get("id", ""))
        question = asked.get(form.get("id", "")) if control is None else control.question
        if question is None:
            return page("unknown", {"back": back(request, form)}, status=400)
        left_side = form.get("left_side", _side_on_the_left(annotator, question))
        label = _label(form.get("choice", ""), left_side)
        if label is None:
            return page("unknown", {"back": back(request, form)}, status=400)
        verdict = Verdict(question.id, label, annotator, _seconds(form.get("shown")))
        if control is None:
            book.record([verdict])
        else:
            book.record_control(control, verdict)
        return following

    return app


def _control(book: LabelBook, annotator: str, round_number: int, name: str) -> Control | None:
    """Return the control question of this name: a gold one, or one of this person's own that comes again; else None."""
    gold = [Control(one.question, one.question.id) for one in book.gold(round_number)]
    answered = {verdict.id for verdict in book.history(annotator, round_number).verdicts}
    again = [repeated(question) for question in book.questions(round_number) if question.id in answered]
    return next((control for control in (*gold, *again) if control.question.id == name), None)


def _side_on_the_left(annotator: str, question: Question) -> str:
    return "second" if shows_second_on_the_left(annotator, question.id) else "first"


def _remembered(request: Request, annotator: str, token: str) -> Response:
    """Return the way to the page, with two cookies: `/` is the last person's in this browser, `/?person=…` everybody's own."""
    response = RedirectResponse("/", 303)
    for cookie in (_cookie(request), _cookie(request, _person_id(annotator))):
        response.set_cookie(cookie, token, httponly=True, samesite="strict")
    return response


def _cookie(request: Request, person: str | None = None) -> str:
    """Return the name of a cookie: all ports of a host have their cookies in common, and on another one other people label."""
    port = request.headers.get("host", "").rpartition(":")[2]
    return "_".join([COOKIE, *([port] if port.isascii() and port.isdecimal() else []), *([person] if person else [])])


def _label(choice: str, left_side: str) -> str | None:
    """Return what a click means for the question, whose `left_side` stood on the left; None for what no page sends."""
    if choice not in CHOICES or left_side not in ("first", "second"):
        return None
    if choice in ("left", "right"):
        return "first" if (choice == "left") == (left_side == "first") else "second"
    return choice


def _page(
    template: Template, title: str, state: str, values: Mapping[str, object] | None = None, *, status: int = 200
) -> HTMLResponse:
    """Return the page in one of its states; no script or form of anybody else works on it."""
    nonce = secrets.token_urlsafe(12)
    text = template.render(title=title, nonce=nonce, state=state, **(values or {}))
    headers = {
        "Content-Security-Policy": f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        "Cache-Control": "no-store",
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(text, status, headers)


def _annotator_of(tokens: Mapping[str, str], token: str | None) -> str | None:
    given = (token or "").encode("utf-8", "surrogatepass")
    return next((name for name, secret in tokens.items() if hmac.compare_digest(secret.encode(), given)), None)


def _address_of_next(tokens: Mapping[str, str], request: Request, form: Mapping[str, str] | None) -> str:
    """Return the address of the next page of whoever filled in the form, or asked for a page of their own."""
    annotator = _annotator_of(tokens, (form or {}).get("token"))
    person = request.query_params.get("person") if annotator is None else _person_id(annotator)
    return "/" if person is None else f"/?person={quote(person)}"


def _is_own_page(request: Request) -> bool:
    """Tell whether a form comes from this page: a browser says which page sent it, and another port is another page.

    Over https and on localhost it compares the two itself; a proxy may have changed the host that it asked.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")  # SCHEME://HOST, or what another program made up
    return origin is None or origin.partition("://")[2] == request.headers.get("host")


async def _form(request: Request) -> dict[str, str] | None:
    """Return the fields of a form, the first value of each; None for what is no text, or larger than any form of the page."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            return None
    try:
        return {name: values[0] for name, values in parse_qs(body.decode("utf-8")).items()}
    except ValueError:
        return None


def _person_id(annotator: str) -> str:
    """Return a name for a person's cookie: letters and digits, whatever the annotator is called."""
    return hashlib.sha256(annotator.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _seconds(shown: str | None) -> float | None:
    try:
        seconds = time.time() - float(shown or "nan")
    except ValueError:
        return None
    return seconds if 0 <= seconds <= LONGEST_SECONDS else None
