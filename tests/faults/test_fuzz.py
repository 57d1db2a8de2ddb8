"""Both servers, some hundreds of requests that nobody would send; `python -m tests.faults.fuzz` sends them for minutes."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.faults.fuzz import Request as Sent
from tests.faults.fuzz import (
    label_page,
    label_requests,
    listening_at,
    require_sense,
    reward_requests,
    reward_server,
    send,
)

SHORT = settings(
    max_examples=150,
    database=None,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.fault("garbage and load", "requests without sense")
def test_the_reward_server_answers_whatever_is_sent(reward_folder: Path) -> None:
    statuses: Counter[int] = Counter()
    with listening_at(reward_server(reward_folder)) as port:

        @SHORT
        @given(reward_requests())
        def once(request: Sent) -> None:
            reply = send(port, request)
            statuses[reply.status] += 1
            require_sense(reply, request, is_json=True)

        once()
        well = send(port, Sent("GET", b"/health", [], b""))
    assert well.status == 200, "it stays up"
    assert {200, 401, 404, 405, 422} <= set(statuses), f"not all of them end at the door: {statuses}"


@pytest.mark.fault("odd tokens and bodies")
def test_the_labelling_page_answers_whatever_is_sent(tmp_path: Path) -> None:
    statuses: Counter[int] = Counter()
    app, book, tokens, ids = label_page(tmp_path)
    with listening_at(app) as port:

        @SHORT
        @given(label_requests(tokens=tokens, ids=ids))
        def once(request: Sent) -> None:
            reply = send(port, request)
            statuses[reply.status] += 1
            require_sense(reply, request, is_json=False)

        once()
        well = send(port, Sent("GET", f"/?token={tokens[0]}".encode(), [], b""))
    assert well.status == 303, "it stays up"
    assert {200, 303, 403, 405} <= set(statuses), statuses
    assert {verdict.annotator for verdict in book.verdicts()} <= {"ann", "bob"}
    assert {verdict.id for verdict in book.verdicts()} <= set(ids)
