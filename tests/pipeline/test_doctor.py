"""`rlhf doctor`: what holds, what does not and why, on a recipe's own data; nothing is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf.models import load
from rlhf.pipeline.affordable import affordable_prompts
from rlhf.pipeline.doctor import Finding, examine
from rlhf.recipe import load_recipe
from tests.command import rlhf
from tests.conftest import PROMPTS, WORDS
from tests.pipeline.test_ends import NO_SYSTEM, OTHER_END, SYSTEM

LAB = (
    "name: small\nlab: {demonstrations: 120, pairs: 120, test_pairs: 50, hidden_size: 32, num_hidden_layers: 1}\n"
    + "ppo: {max_completion_length: 40}\n"
)
FUNCTIONS = """
def good(prompts, completions):
    return [float(len(text)) for text in completions]

def fails(prompts, completions):
    raise ValueError("no such thing")

def leaves(prompts, completions):
    raise SystemExit(0)

def missing(prompts, completions):
    return [float("nan")] * len(prompts)
"""


@pytest.fixture
def recipe_on(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that writes a recipe on a copy of the tiny base, with pairs and demonstrations, and loads it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(FUNCTIONS)

    def write(*lines: str, template: str | None = None, model: Path = base_folder, systems: int = 0) -> Any:
        if not (tmp_path / "base").exists():
            shutil.copytree(model, tmp_path / "base")
        if template is not None:
            (tmp_path / "base/chat_template.jinja").write_text(template)
        answers = [[{"role": "assistant", "content": f"{word} {word}" * (i + 1)}] for i, word in enumerate(WORDS)]
        prompts = [[SYSTEM, *prompt] if i < systems else prompt for i, prompt in enumerate(PROMPTS)]
        pairs = [
            {"prompt": p, "chosen": a, "rejected": b} for p, a, b in zip(prompts, answers, answers[1:], strict=False)
        ]
        sft = [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=False)]
        for name, rows in (("sft", sft), ("preferences", pairs)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        head = [
            "name: own",
            "backbone: {model: base}",
            "data: {sft: sft.jsonl, preferences: preferences.jsonl, test_fraction: 0.3}",
        ]
        if not any(line.startswith("ppo:") for line in lines):
            head.append("ppo: {max_completion_length: 8}")
        (tmp_path / "r.yaml").write_text("\n".join([*head, *lines]) + "\n")
        return load_recipe(tmp_path / "r.yaml")

    return write


def failed(findings: list[Finding]) -> dict[str, str]:
    """Sentences of the checks that do not hold, by what was looked at."""
    return {finding.subject: finding.check.sentence for finding in findings if not finding.check.held}


def test_a_lab_recipe_is_sound_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(LAB)
    result = rlhf("doctor", "r.yaml", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("ends reachable", "sampler true", "policy alone = in a batch", "score as its template renders"):
        assert name in result.stdout
    assert "12 of 12 checks hold." in result.stdout
    assert result.stderr.count(": holds\n") == 12  # a line a check while it works, also where there is no terminal
    assert [file.name for file in tmp_path.iterdir()] == ["r.yaml"]


def test_what_fails_is_in_the_table_and_in_a_sentence(recipe_on: Any, tmp_path: Path) -> None:
    recipe_on(template=OTHER_END)
    result = rlhf("doctor", "r.yaml", cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAILS" in result.stdout
    assert "policy: The chat template ends an answer with '<|system|>'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_key_that_mends_it_is_believed(recipe_on: Any) -> None:
    recipe = recipe_on("sft: {eos_token: '<|system|>'}", template=OTHER_END)
    assert "policy" not in failed(examine(recipe, say=lambda _: None))


def test_a_template_that_refuses_system_turns_is_told_with_its_data(recipe_on: Any) -> None:
    sentences = failed(examine(recipe_on(template=NO_SYSTEM, systems=4), say=lambda _: None))
    assert "have the turns system, user" in sentences["data.sft"]
    assert "System role not supported" in sentences["data.sft"]


def test_every_kind_of_reward_source_is_opened_and_asked(recipe_on: Any, reward_folder: Path) -> None:
    names = [str(reward_folder), "rewards.py:good", "rewards.py:fails", "rewards.py:leaves", "rewards.py:missing"]
    recipe = recipe_on(f"ppo: {{extra_rewards: {json.dumps(names)}, max_completion_length: 8}}")
    findings = examine(recipe, say=lambda _: None)
    by_source = {name: [f.check.name for f in findings if f.subject == name and f.check.held] for name in names}
    assert by_source[names[0]] == ["score alone = in a batch", "score as its template renders"]
    assert by_source[names[1]] == ["gives every answer a score"]
    sentences = failed(findings)
    assert set(sentences) == set(names[2:])
    assert "ValueError: no such thing" in sentences["rewards.py:fails"]
    assert "SystemExit" in sentences["rewards.py:leaves"]


def test_a_true_reward_that_fails_is_told(recipe_on: Any) -> None:
    sentences = failed(examine(recipe_on("evaluate: {gold: 'rewards.py:fails'}"), say=lambda _: None))
    assert "ValueError: no such thing" in sentences["true reward"]


def test_an_encoder_is_examined_as_a_reward_model_alone(recipe_on: Any, encoder_folder: Path) -> None:
    recipe = recipe_on(model=encoder_folder)
    findings = examine(recipe, say=lambda _: None)
    assert {finding.subject for finding in findings} == {"reward model, untrained"}
    assert not failed(findings)


def test_each_model_is_opened_once(recipe_on: Any, reward_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    open_network = load.open_network

    def counted(kind: Any, name: Any, *arguments: Any, **named: Any) -> Any:
        opened.append(Path(name).name)
        return open_network(kind, name, *arguments, **named)

    monkeypatch.setattr(load, "open_network", counted)
    recipe = recipe_on(f"ppo: {{extra_rewards: [{reward_folder}], max_completion_length: 8}}")
    findings = examine(recipe, say=lambda _: None)
    assert opened == ["base", reward_folder.name]
    scores = [f.check for f in findings if f.subject == "reward model, untrained"]
    assert [check.name for check in scores] == ["score alone = in a batch", "score as its template renders"]
    # Other weights than the policy's are other models.
    opened.clear()
    examine(recipe_on("reward: {dtype: bfloat16}"), say=lambda _: None)
    assert opened == ["base", "base"]


def test_large_models_are_asked_the_shortest_prompts() -> None:
    lengths = [100, 10, 50, 20] * 40
    assert affordable_prompts(lengths, 10**6, device="cpu") == list(range(128))
    assert affordable_prompts(lengths, 10**12, device="cuda") == list(range(128))
    # 2e12 operations, 4 a parameter and token: 5,000 tokens of a model of 10^8, which 64 of the shortest prompts
    # (32 of 10 + 32 tokens, 32 of 20 + 32) and 24 of the next (50 + 32) take up to 4,976.
    chosen = affordable_prompts(lengths, 10**8, device="cpu")
    assert sum(lengths[i] + 32 for i in chosen) == 32 * 42 + 32 * 52 + 24 * 82
    assert chosen == sorted(chosen)  # neighbours differ in length
    assert len(affordable_prompts(lengths, 10**12, device="cpu")) == 8
