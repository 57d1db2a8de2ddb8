"""What signals ask of a training stage."""

import os
import signal
from collections.abc import Iterator

import pytest

from rlhf.pipeline import interrupt


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    interrupt.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.fault("kill at any moment")
def test_sigterm_twice_within_seconds_is_one_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm sends it to torchrun and its workers, and torchrun to these once more: nothing was saved."""
    saved = False
    with pytest.raises(interrupt.Interrupted), interrupt.patience():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert interrupt.requested()
        saved = True
    assert saved
    clock = iter([0.0, 6.0])
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: next(clock))
    with pytest.raises(interrupt.Interrupted), interrupt.patience():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        pytest.fail("a second one after a while ends it at once")


def test_the_first_signal_is_answered_at_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollout takes minutes; nobody shall think that nothing was heard. Of a launch one process speaks."""
    answers = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(interrupt.Interrupted), interrupt.patience("rollout"):
            send(signal.SIGTERM)
            send(signal.SIGTERM)
            answers.append(capfd.readouterr().err)
    assert (
        answers[0]
        .strip()
        .startswith("SIGTERM: training saves and stops after this rollout. A second one, some seconds later,")
    )
    assert answers[1] == ""


def test_ctrl_c_twice_ends_it_at_once_and_so_does_a_signal_outside_of_training() -> None:
    with pytest.raises(interrupt.Interrupted), interrupt.patience():
        send(signal.SIGINT)
        send(signal.SIGINT)
        pytest.fail("a person's second one is an order")
    with pytest.raises(interrupt.Interrupted):
        send(signal.SIGTERM)
