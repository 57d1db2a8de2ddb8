"""The table of reward sources: who is what, what is said before a run, and that a name costs no torch to look at."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from rlhf import load_reward_model
from rlhf.errors import UserError
from rlhf.ppo import source_kinds
from rlhf.ppo.rewards import RewardSource
from rlhf.ppo.source_kinds import KINDS, SourceKind, kind_of, source_problem
from tests.conftest import PROMPTS
from tests.ppo.test_options import TWO


def brief(completions: list[Any], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def test_every_source_has_the_first_kind_that_it_matches(reward_folder: Path) -> None:
    sources = (
        "https://host:5000/rules.py:brief",
        "rules.py:brief",
        "verdicts:org/model",
        str(reward_folder),
        load_reward_model(reward_folder),
        AutoModelForSequenceClassification.from_pretrained(reward_folder, num_labels=1),
        brief,
    )
    assert [kind_of(source) for source in sources] == list(KINDS)
    for kind in KINDS:
        if kind.opener is not None:
            module, _, name = kind.opener.partition(":")
            assert callable(getattr(import_module(module), name))
    with pytest.raises(UserError, match="7 is no source of rewards; give the http address of a reward server, or"):
        RewardSource(7)  # type: ignore[arg-type]


def test_what_is_missing_is_said_before_anything_is_opened(tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text("raise RuntimeError('nobody opens it')")
    assert source_problem("http://127.0.0.1:9/get_reward") is None
    assert source_problem(f"{tmp_path}/rules.py:brief") is None
    assert source_problem(str(tmp_path)) is None
    assert source_problem(f"{tmp_path}/other.py:brief") == f"{tmp_path}/other.py: no such file."
    assert source_problem(f"{tmp_path}/model") == f"{tmp_path}/model: no such folder."


def test_names_are_looked_at_without_torch() -> None:
    code = """
import sys
from rlhf.ppo.source_kinds import source_problem
for name in ("http://x", "rules.py:f", "verdicts:m", "folder"):
    source_problem(name)
assert "torch" not in sys.modules, "torch was imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_function_in_a_file_is_a_source(tmp_path: Path) -> None:
    file = tmp_path / "rules.py"
    file.write_text(
        "def brief(prompts, answers):\n    return [len(p) + len(a) / 100 for p, a in zip(prompts, answers)]\n"
    )
    source = RewardSource(f"{file}:brief")
    scores, dense = source(PROMPTS[:2], TWO, {"topic": ["a", "b"]})
    expected = [len(PROMPTS[0][0]["content"]) + 0.03, len(PROMPTS[1][0]["content"]) + 0.05]
    assert scores.tolist() == pytest.approx(expected)
    assert dense is None
    assert source.name == f"{file}:brief"
    file.write_text("def brief(prompts, answers):\n    return [float('nan')]\n")
    with pytest.raises(
        UserError, match=r"ppo.extra_rewards: .*rules.py:brief must return one finite number for each of 2"
    ):
        RewardSource(f"{file}:brief")(PROMPTS[:2], TWO, {})
    with pytest.raises(UserError, match=r"ppo.extra_rewards: .*rules.py has no function 'long'"):
        RewardSource(f"{file}:long")


def test_a_new_kind_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    words = SourceKind(
        "words://N",
        lambda source: isinstance(source, str) and source.startswith("words://"),
        f"{__name__}:Words",
        problem=lambda name: None if name.removeprefix("words://").isdigit() else f"{name}: N is no number.",
    )
    monkeypatch.setattr(source_kinds, "KINDS", (words, *KINDS))
    assert source_problem("words://few") == "words://few: N is no number."
    scores, _ = RewardSource("words://2")(PROMPTS[:2], TWO, {})
    assert scores.tolist() == [0.0, 1.0]


class Words:
    """Rewards answers of N words."""

    def __init__(self, name: str):
        self.count = int(name.removeprefix("words://"))

    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        return [float(len(answer[-1]["content"].split()) == self.count) for answer in completions]
