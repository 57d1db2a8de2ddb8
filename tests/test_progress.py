"""Logs that are no terminal say once a minute how far the work is."""

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig

import rlhf.progress
from rlhf.models.batching import run_batches
from rlhf.pipeline.trainers import StageSFTTrainer
from rlhf.pipeline.training import train
from rlhf.progress import Work, a_line_a_minute, track


@pytest.fixture(autouse=True)
def _a_short_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlhf.progress, "SECONDS_BETWEEN_LINES", 0.02)


def test_what_remains_goes_as_fast_as_what_was_done_since_it_began_here() -> None:
    """40 units in 120 s here, after 60 by an earlier attempt: 100 more take 300 s."""
    work = Work("sft", total=200, unit="steps", done=100, done_before=60, begin=10.0)
    assert work.line(130.0) == "sft: 100/200 steps, 2.0 min elapsed, 5.0 min remaining"
    work.done = 60
    assert work.line(130.0) == "sft: 60/200 steps, 2.0 min elapsed", "nothing is known of the rate"


def test_the_inner_work_is_told_and_silence_after_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with a_line_a_minute(Work("outer")):
        time.sleep(0.05)
        assert run_batches(lambda rows: time.sleep(0.03) or rows, [[0], [1], [2]], label="inner") == [0, 1, 2]
        time.sleep(0.05)
    lines = capsys.readouterr().err.splitlines()
    assert {line.split(":")[0] for line in lines} == {"outer", "inner"}
    assert any(re.fullmatch(r"inner: [12]/3 batches, \d+ s elapsed, \d+ s remaining", line) for line in lines), lines
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_work_that_is_left_early_is_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    with a_line_a_minute(Work("outer")):
        for item in track(range(9), "left"):
            if item == 1:
                break
        with pytest.raises(ValueError, match="planted"), a_line_a_minute(Work("failed")):
            raise ValueError("planted")
        capsys.readouterr()
        time.sleep(0.05)
        assert set(re.findall(r"^(\w+):", capsys.readouterr().err, re.MULTILINE)) == {"outer"}


@pytest.mark.parametrize("quiet", ["terminal", "second process"])
def test_no_line_on_a_terminal_and_none_of_other_processes(
    quiet: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if quiet == "terminal":
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    else:
        monkeypatch.setenv("RANK", "1")
    with a_line_a_minute(Work("silent")):
        time.sleep(0.06)
    assert "silent" not in capsys.readouterr().err


def test_a_terminal_has_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(track(range(3), "scores")) == [0, 1, 2]
    assert "scores: 100%" in capsys.readouterr().err


def test_training_says_steps_and_the_latest_figures(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    torch.manual_seed(0)
    args = SFTConfig(
        **cpu_arguments, num_train_epochs=1, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-3
    )
    demos = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs])
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    trainer = StageSFTTrainer(model, args, train_dataset=demos, processing_class=tokenizer)
    train(trainer, tmp_path, label="sft", say=lambda _: None)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sft:")]
    form = r"sft: (\d+)/10 steps, \d+ s elapsed, \d+ s remaining, loss [\d.]+"
    told = [match for line in lines if (match := re.fullmatch(form, line))]
    assert told, lines
    assert told[-1].string == lines[-1], "nothing but the form once there are figures"
    assert 0 < int(told[-1][1]) <= 10
