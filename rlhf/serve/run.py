"""`rlhf serve`: whom it listens to, and how it ends."""

import ipaddress
import math
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
from transformers.utils.logging import disable_progress_bar

from rlhf.errors import UserError
from rlhf.serve.models import open_models
from rlhf.serve.reward import Limits, serve_app

TOKEN = "RLHF_SERVE_TOKEN"
BACKLOG = 2048
MOST_PORT = 65535
KEEP_ALIVE = 75  # seconds; longer than load balancers keep an idle connection, so that they close it and not we


def serve_models(
    names: Sequence[str], *, host: str, port: int, token: str | None, limits: Limits, say: Callable[[str], None]
) -> None:
    """Serve models until a signal comes; what was taken on is answered first.

    Args:
        names: as `open_models`.
        token: demanded from every client; needed where others than this machine are listened to.

    Raises:
        UserError: no token for the world; the address is taken; nothing there that could score.
    """
    # 1. What can be refused before a model is loaded.
    if not is_loopback(host) and not token:
        raise UserError(
            f"--host {host}: others than this machine could ask, so a token is needed; set {TOKEN}, or give --token."
        )
    if token is not None and not token.isascii():
        raise UserError("--token: only ASCII letters, digits and signs can be sent in a header.")
    listening = bind(host, port)

    # 2. The models; nobody can connect before they are there.
    disable_progress_bar()
    app = serve_app(open_models(names), token=token, limits=limits)
    listening.listen(BACKLOG)
    address, port = listening.getsockname()[:2]
    say(f"http://{f'[{address}]' if ':' in address else address}:{port}/get_reward   /score /rank /classify /docs")

    # 3. Requests, until a signal; uvicorn raises it again when all are answered.
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(limits.seconds) + 1,
    )
    uvicorn.Server(config).run(sockets=[listening])


def read_token(file: Path) -> str:
    """Return the token that a file holds, without the blanks around it.

    Raises:
        UserError: there is no such file, or no token in it.
    """
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--token-file {file}: can't be read ({error}); put the token there, one line of text."
        ) from error
    if not token:
        raise UserError(f"--token-file {file}: empty, so everybody could ask; put the token there, one line of text.")
    return token


def is_loopback(host: str) -> bool:
    """Tell whether an address is heard by this machine alone.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "my-host")]
    [True, True, True, False, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """Return a socket at an address, which nobody can connect to yet.

    Raises:
        UserError: there is no such address, or somebody has it.
    """
    if not 0 <= port <= MOST_PORT:  # which getaddrinfo takes modulo 65,536
        raise UserError(f"--port {port}: is none; choose one from 1 to {MOST_PORT}, or 0 for any that is free.")
    listening = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as error:
        if listening is not None:
            listening.close()
        raise UserError(
            f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}; choose others."
        ) from error
    return listening
