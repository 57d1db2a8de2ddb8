"""Functions from a person's file: whatever they do, the run goes on as it would, or ends with a sentence and not with 0."""

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.data.functions import load_function
from rlhf.errors import UserError
from rlhf.evaluation.gold import load_gold

BODIES = {
    "sys.exit()": "SystemExit",
    "sys.exit(0)": "SystemExit",
    "raise SystemExit('done')": "SystemExit",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "raise KeyError('x')": "KeyError",
    "1 / 0": "ZeroDivisionError",
}


@pytest.fixture(autouse=True)
def _as_on_the_command_line() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, lambda *_: None)
    yield
    signal.signal(signal.SIGINT, before)


def write(folder: Path, text: str) -> str:
    file = folder / "mine.py"
    file.write_text(f"import sys, random\nimport numpy, torch\n{text}\n", encoding="utf-8")
    return f"{file}:f"


@pytest.mark.fault("functions that end the process")
@pytest.mark.parametrize("key", ["evaluate.gold", "ppo.extra_rewards"])
@pytest.mark.parametrize("body", BODIES)
def test_an_end_in_the_middle_is_a_sentence_that_names_the_key(tmp_path: Path, body: str, key: str) -> None:
    reference = write(tmp_path, f"def f(prompts, completions):\n    {body}\n")
    function = load_function(reference, key=key)
    with pytest.raises(UserError, match=rf"^{key}: .*mine\.py.*{BODIES[body]}"):
        function(["a"], ["b"])


@pytest.mark.fault("functions that end the process")
@pytest.mark.parametrize("body", BODIES)
def test_at_import_too(tmp_path: Path, body: str) -> None:
    with pytest.raises(UserError, match=rf"^evaluate\.gold: .*mine\.py.*{BODIES[body]}"):
        load_gold(write(tmp_path, body))


@pytest.mark.fault("functions that draw")
def test_random_numbers_are_those_that_would_have_come(tmp_path: Path) -> None:
    draws = "random.random(), numpy.random.rand(), torch.rand(3)"
    seeds = "random.seed(9), numpy.random.seed(9), torch.manual_seed(9)"
    reference = write(
        tmp_path, f"{seeds}\n{draws}\ndef f(prompts, completions):\n    {seeds}; {draws}\n    return [1.0]\n"
    )

    def drawn() -> tuple[float, float, list[float]]:
        return random.random(), float(np.random.rand()), torch.rand(3).tolist()

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = drawn()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    function = load_function(reference, key="evaluate.gold")
    assert function(["a"], ["b"]) == [1.0]
    assert drawn() == expected


@pytest.mark.fault("functions that draw")
@pytest.mark.parametrize("draw", ["random.random()", "numpy.random.rand()", "float(torch.rand(1))"])
def test_random_numbers_go_on_from_call_to_call(tmp_path: Path, draw: str) -> None:
    reference = write(tmp_path, f"def f(prompts, completions):\n    return [{draw} for _ in prompts]\n")
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    function = load_function(reference, key="evaluate.gold")
    calls = []
    for _ in range(3):
        calls += function(["a", "b"], ["c", "d"])
        random.random(), np.random.rand(), torch.rand(1)  # the run's own draws make no difference
    assert len(set(calls)) == 6, "no number comes twice"
    np.random.seed(7)
    again = load_function(reference, key="evaluate.gold")
    assert again(["a"] * 6, ["b"] * 6) == calls, "in one call or in three, whatever the run drew"
    other = load_function(reference, key="ppo.extra_rewards")
    assert other(["a"], ["b"]) != calls[:1], "each key has numbers of its own"
    torch.manual_seed(1)
    assert load_function(reference, key="evaluate.gold")(["a"], ["b"]) != calls[:1], "and each run"


@pytest.mark.fault("functions that draw")
def test_a_seed_at_the_head_of_a_file_holds_for_its_function(tmp_path: Path) -> None:
    reference = write(tmp_path, "random.seed(5)\ndef f(p, c):\n    return [random.random() for _ in p]\n")
    numbers = random.Random(5)
    expected = [numbers.random(), numbers.random()]
    function = load_function(reference, key="evaluate.gold")
    assert [*function(["a"], ["b"]), *function(["a"], ["b"])] == expected


@pytest.mark.fault("functions that change lists")
def test_the_lists_are_copies(tmp_path: Path) -> None:
    reference = write(tmp_path, "def f(p, c):\n    n = len(p); p.clear(); c[:] = ['x']; return [2.0] * n\n")
    prompts, completions = ["a", "b"], ["c", "d"]
    assert load_function(reference, key="evaluate.gold")(prompts, completions) == [2.0, 2.0]
    assert (prompts, completions) == (["a", "b"], ["c", "d"])


def test_without_the_command_line_a_keyboard_interrupt_may_be_real(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function = load_function(write(tmp_path, "def f(p, c):\n    raise KeyboardInterrupt\n"), key="evaluate.gold")
    with pytest.raises(KeyboardInterrupt):
        function(["a"], ["b"])


@pytest.mark.fault("functions that end the process")
def test_a_process_ends_with_a_code_above_zero(tmp_path: Path) -> None:
    reference = write(tmp_path, "def f(p, c):\n    sys.exit(0)\n")
    code = f"from rlhf.data.functions import load_function; load_function({reference!r}, key='k')(['a'], ['b'])"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.returncode == 1
    assert "UserError: k: " in outcome.stderr
