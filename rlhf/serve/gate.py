"""What every request passes: its id, the token, the bound on its body; what every reply leaves: counts, and a line if it failed."""

import asyncio
import hmac
import logging
import re
import time
import traceback
import uuid

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.serve.metrics import Metrics

log = logging.getLogger("rlhf.serve")
REQUEST_ID = "X-Request-ID"
ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
OPEN = {"/health", "/docs", "/openapi.json"}  # for whoever has no token; they say nothing of the models
GONE = 499  # nginx's number for a client that went away
# Times the largest body is read and thrown away, so that a client that sends too much gets to read the reply.
DRAINED = 8


class Gate:
    """The outermost part of the application.

    Args:
        endpoints: paths that are counted under their own name.
        token: demanded as `Authorization: Bearer …`; None: nobody needs one.
        most_bytes: of a body.
        seconds: within which a body must be there.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        endpoints: set[str],
        metrics: Metrics,
        token: str | None,
        most_bytes: int,
        seconds: float,
    ):
        self.app, self.endpoints, self.metrics = app, endpoints, metrics
        self.token = None if token is None else token.encode()
        self.most_bytes, self.seconds = most_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = given if ID.fullmatch(given) else uuid.uuid4().hex
        state["is_trusted"] = self._has_token(headers)
        endpoint = scope["path"] if scope["path"] in self.endpoints else "other"
        statuses: list[int] = []

        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        async def refuse(status: int, sentence: str) -> None:
            extra = {"WWW-Authenticate": "Bearer"} if status == 401 else None
            body = {"detail": sentence, "request_id": request_id}
            await JSONResponse(body, status, extra)(scope, receive, reply)

        self.metrics.in_flight.inc()
        try:
            if not state["is_trusted"] and scope["path"] not in OPEN:
                await refuse(401, "send the server's token, `Authorization: Bearer …`.")
            elif not _is_length(headers.get("content-length", "0")):
                await refuse(400, "Content-Length is no number.")
            elif int(headers.get("content-length", "0")) > self.most_bytes:
                await _drain(receive, DRAINED * self.most_bytes, self.seconds)
                await refuse(413, self._too_large())
            else:
                await self.app(scope, self._bounded(receive), reply)
        except Exception as error:
            # The message may hold a person's text; the lines of code do not.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s: %s\n%s", request_id, type(error).__name__, where)
            if not statuses:
                await refuse(500, "the server failed; its log says where, under this request's id.")
        finally:
            self.metrics.in_flight.dec()
            status = statuses[0] if statuses else GONE
            seconds = time.monotonic() - began
            self.metrics.requests.labels(endpoint, str(status)).inc()
            self.metrics.request_seconds.labels(endpoint).observe(seconds)
            if status >= 400:
                self.metrics.errors.labels(str(status)).inc()
                log.warning("%s %s %s %d %.0f ms", request_id, scope["method"], endpoint, status, 1000 * seconds)

    def _has_token(self, headers: Headers) -> bool:
        if self.token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return hmac.compare_digest(given.strip().encode(), self.token) and scheme.lower() == "bearer"

    def _bounded(self, receive: Receive) -> Receive:
        """Return `receive` with a bound on the body's size, and on the time until it is whole."""
        size, is_whole = 0, False
        deadline = asyncio.get_running_loop().time() + self.seconds

        async def bounded() -> Message:
            nonlocal size, is_whole
            if is_whole:  # what comes now is that the client goes away
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body was not there after {self.seconds:g} s.") from None
            size += len(message.get("body", b""))
            if size > self.most_bytes:
                raise HTTPException(413, self._too_large())
            is_whole = not message.get("more_body", False)
            return message

        return bounded

    def _too_large(self) -> str:
        return f"the body has more than {self.most_bytes} bytes; send fewer texts at a time."


def _is_length(value: str) -> bool:
    return value.isascii() and value.isdecimal()


async def _drain(receive: Receive, most: int, seconds: float) -> None:
    """Read a body and throw it away, as far as `most` bytes."""
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while size <= most:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return
