"""Before SFT and PPO: what the chat template refuses, what never ends, and that looking changes no random number."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from rlhf.invariants.checks import CheckBook
from rlhf.pipeline.ends import check_ends_before_ppo
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.trainer import PPOTrainer
from tests.command import Result, rlhf
from tests.conftest import PROMPTS, WORDS
from tests.models.test_thoughts import DROPS
from tests.unit_scale import build_reward_model

# The turn ends in a token that the tokenizer has and that is not its end token, as in Qwen2.5's base model with ChatML.
OTHER_END = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|system|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "be brief"}


@pytest.fixture
def run(base_folder: Path, tmp_path: Path) -> Any:
    """A function from a chat template and settings to the end of `rlhf sft` on a few demonstrations, some with a system turn."""

    def start(template: str, *settings: str, systems: int = 0, stage: str = "sft", objective: str = "bt") -> Result:
        shutil.copytree(base_folder, tmp_path / "base")
        (tmp_path / "base/chat_template.jinja").write_text(template)
        answers = [[{"role": "assistant", "content": word}] for word in WORDS]
        prompts = [[SYSTEM, *prompt] if i < systems else prompt for i, prompt in enumerate(PROMPTS)]
        sft = [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=False)]
        pairs = [
            {"prompt": p, "chosen": a, "rejected": b} for p, a, b in zip(prompts, answers, answers[1:], strict=False)
        ]
        for name, rows in (("sft", sft), ("preferences", pairs)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = "sft: sft.jsonl, " if stage == "sft" else ""
        (tmp_path / "r.yaml").write_text(
            f"name: ends\nbackbone: {{model: base}}\ndata: {{{data}preferences: preferences.jsonl, test_fraction: 0.2}}\n"
            f"reward: {{objective: {objective}}}\n"
            "sft: {num_train_epochs: 1, per_device_train_batch_size: 8}\nppo: {max_completion_length: 4}\n"
        )
        return rlhf(stage, "r.yaml", *settings, "--out", "x", cwd=tmp_path)

    return start


def test_an_end_that_sampling_never_sees_is_refused_before_sft_trains(run: Any, tmp_path: Path) -> None:
    result = run(OTHER_END)
    assert result.returncode == 2, result.stderr
    assert "ends an answer with '<|system|>' and sampling waits for '<|end|>'" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "x/round-0/sft/metrics.jsonl").exists()


def test_the_change_that_the_sentence_names_helps(run: Any, tmp_path: Path) -> None:
    result = run(OTHER_END, "sft.eos_token=<|system|>")
    assert result.returncode == 0, result.stderr
    facts = json.loads((tmp_path / "x/round-0/sft/manifest.json").read_text())["facts"]
    assert facts["checks"]["ends reachable"]["held"] is True


def test_a_template_that_refuses_system_turns_says_how_many_there_are(run: Any) -> None:
    result = run(NO_SYSTEM, systems=3)
    assert result.returncode == 2, result.stderr
    assert "data.sft: 3 prompts" in result.stderr
    assert "System role not supported" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("stage", "objective"), [("reward", "bt"), ("vote", "flip")])
def test_so_do_the_stages_that_read_pairs(run: Any, stage: str, objective: str) -> None:
    result = run(NO_SYSTEM, systems=len(PROMPTS), stage=stage, objective=objective)
    assert result.returncode == 2, result.stderr
    assert f"{stage}: pairs: " in result.stderr
    assert "System role not supported" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_answers_that_stand_behind_another_text_than_the_prompt_are_said_and_not_refused(run: Any) -> None:
    result = run(DROPS)
    assert result.returncode == 0, result.stderr
    said = " ".join((result.stdout + result.stderr).split())
    assert re.search(
        r"sft: \d+ answers without a thought \(the first is row 0\): the chat template of \S+ lets a prompt end", said
    )
    assert "leaves <think>" not in said


def test_prompts_that_fill_the_whole_length_are_said(run: Any) -> None:
    result = run(NO_SYSTEM, "sft.max_length=2")
    assert result.returncode == 2, result.stderr
    assert "raise sft.max_length" in result.stderr


@pytest.fixture
def trainer(base_folder: Path, tokenizer: Any, cpu_arguments: dict[str, Any]) -> PPOTrainer:
    """PPO on the tiny base, whose reward is a function."""
    args = PPOConfig(
        **cpu_arguments, per_device_train_batch_size=4, num_mini_batches=1, total_episodes=4, max_completion_length=6
    )
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    critic = build_reward_model(base_folder, pad_token_id=tokenizer.pad_token_id)
    return PPOTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
        critic=critic,
    )


def test_looking_before_ppo_changes_no_random_number(trainer: PPOTrainer) -> None:
    lines: list[str] = []
    context: Any = SimpleNamespace(find_parent=lambda _: None, is_main=True, say=lines.append)
    checks = CheckBook()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    check_ends_before_ppo(context, trainer, checks)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert list(checks.entries) == ["ends reachable", "policy ends"]
    assert checks.entries["policy ends"]["unit"] == "of 16 answers"


def test_a_policy_that_never_ends_and_prompts_that_are_all_cut_are_said(
    trainer: PPOTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    context: Any = SimpleNamespace(find_parent=lambda _: None, is_main=True, say=lines.append)
    head = trainer.accelerator.unwrap_model(trainer.model).policy.lm_head
    original = head.forward

    def never_ends(hidden: torch.Tensor) -> torch.Tensor:
        logits = original(hidden)
        logits[..., trainer.processing_class.eos_token_id] = -100.0
        return logits

    monkeypatch.setattr(head, "forward", never_ends)
    monkeypatch.setattr(trainer, "longest_prompt", 2)
    checks = CheckBook()
    check_ends_before_ppo(context, trainer, checks)
    assert not checks.entries["policy ends"]["held"]
    assert any("36 of the 36 prompts that were looked at are longer than the 2 tokens" in line for line in lines)
    assert any("None of 16 sampled answers ended within 6 tokens" in line for line in lines)
