"""What SFT says of demonstrations that are packed into rows, and of settings that TRL refuses."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, pack_dataset

from rlhf.errors import UserError
from rlhf.pipeline.demonstrations import read_lengths
from rlhf.pipeline.trainers import StageSFTTrainer

LENGTHS, PROMPTS = [5, 3, 9, 2, 4], [1, 2, 8, 1, 3]
ROWS = Dataset.from_list(
    [
        {"input_ids": list(range(length)), "labels": [-100] * prompt + [1] * (length - prompt)}
        for length, prompt in zip(LENGTHS, PROMPTS, strict=True)
    ]
)


def test_demonstrations_are_counted_and_not_their_rows() -> None:
    alone = read_lengths(ROWS)
    assert (alone.tokens, alone.without_answer) == (LENGTHS, 0)
    packed = pack_dataset(ROWS, 8, "bfd")
    assert len(packed) < len(ROWS)
    read = read_lengths(packed)
    assert sorted(read.tokens) == sorted(min(length, 8) for length in LENGTHS)
    assert read.without_answer == 1, "the third one's prompt alone fills a row"


def sft(base: Path, tokenizer: Any, **settings: Any) -> StageSFTTrainer:
    args = SFTConfig(report_to="none", use_cpu=True, bf16=False, **settings)
    rows = Dataset.from_list([{"prompt": "red", "completion": " dog"}] * 4)
    return StageSFTTrainer(
        AutoModelForCausalLM.from_pretrained(base), args, train_dataset=rows, processing_class=tokenizer
    )


def test_settings_that_trl_refuses_are_a_sentence(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """They were a traceback, and the exit code of a fault of ours."""
    with pytest.raises(
        UserError, match="refuses the stage's settings: When `padding_free=True` without packing"
    ) as caught:
        sft(base_folder, tokenizer, output_dir=str(tmp_path), padding_free=True)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_fault_of_ours_keeps_its_traceback(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("ours")

    monkeypatch.setattr(StageSFTTrainer, "_prepare_dataset", fails)
    with pytest.raises(ValueError, match="ours"):
        sft(base_folder, tokenizer, output_dir=str(tmp_path))
