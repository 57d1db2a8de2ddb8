"""What SFT says of demonstrations that are packed into rows, and of settings that TRL refuses."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM
from trl import SFTConfig, pack_dataset

from rlhf.errors import UserError
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.demonstrations import read_lengths
from rlhf.pipeline.stages import run_sft
from rlhf.pipeline.trainers import StageSFTTrainer
from rlhf.recipe.schema import Recipe
from tests.conftest import PROMPTS as CONVERSATIONS

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


BLANK = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("others", [[], ["<|end|>"]], ids=["alone", "beside a typed token"])
def test_an_answer_is_learnt_behind_the_ids_that_sampling_begins_with(
    others: list[str], base_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The blank at a question's end melts with the answer's first word where both are one text; what other rows hold is all one."""
    reader = deepcopy(tokenizer)
    reader.chat_template = BLANK
    question = [{"role": "user", "content": "red"}]
    rows = [
        {"prompt": question, "completion": [{"role": "assistant", "content": text}]} for text in ("dog", "yes", *others)
    ]
    args = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, shuffle_dataset=False)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    trainer = StageSFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=reader)
    asked = reader("user: red\nassistant: ", add_special_tokens=False)["input_ids"]
    assert reader("user: red\nassistant: dog", add_special_tokens=False)["input_ids"][: len(asked)] != asked
    for row in trainer.train_dataset:
        assert row["input_ids"][: len(asked)] == asked
        assert row["labels"][: len(asked)] == [-100] * len(asked)
        assert row["labels"][len(asked) :] == row["input_ids"][len(asked) :]
    assert reader.decode(trainer.train_dataset[0]["input_ids"]).startswith("user: red\nassistant: dog")


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


def stage(architecture: str, tokenizer: Any, folder: Path, **settings: Any) -> StageContext:
    """What SFT is given: a tiny base of some architecture, and eight demonstrations."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if architecture == "bloom":
        small = {"hidden_size": 16, "n_layer": 1, "n_head": 2}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(architecture, vocab_size=len(tokenizer), **ends, **small)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "data/data").mkdir(parents=True)
    completion = [{"role": "assistant", "content": "yes"}]
    rows = [json.dumps({"prompt": prompt, "completion": completion}) for prompt in CONVERSATIONS[:8]]
    (folder / "data/data/sft.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "data/data/test_prompts.jsonl").write_text(
        json.dumps({"prompt": CONVERSATIONS[8]}) + "\n", encoding="utf-8"
    )
    (folder / "sft").mkdir()
    recipe = Recipe(
        name="x",
        backbone={"model": str(folder / "base")},
        data={"sft": "s.jsonl", "preferences": "p.jsonl"},
        sft={"max_length": 64, "num_train_epochs": 1, "use_cpu": True, "save_strategy": "no", **settings},
        ppo={"max_completion_length": 4},
    )
    return StageContext(recipe, folder / "sft", {"data": folder / "data"}, lambda _: None)


@pytest.mark.parametrize("key", ["packing", "padding_free"])
def test_texts_that_would_see_each_other_are_not_trained_in_one_row(tokenizer: Any, tmp_path: Path, key: str) -> None:
    """Bloom reads no positions: a demonstration would be learnt behind the others of its row."""
    settings: Any = {"packing": True} if key == "packing" else {"padding_free": True, "max_length": None}
    with pytest.raises(UserError, match=rf"^sft.{key}: in a BloomModel texts in one row would see each other; leave"):
        run_sft(stage("bloom", tokenizer, tmp_path, **settings))
    assert not list((tmp_path / "sft").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("llama", {"packing": True}), ("bloom", {"packing": True, "packing_strategy": "wrapped"}), ("bloom", {})],
)
def test_other_demonstrations_are_trained(
    tokenizer: Any, tmp_path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    facts = run_sft(stage(architecture, tokenizer, tmp_path, **settings))
    assert facts["demonstrations"] == 8
    assert (tmp_path / "sft/model/model.safetensors").is_file()


def test_an_architecture_whose_output_layer_is_not_all_is_refused(
    base_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """A ModernBERT decoder has layers before it, which TRL's loss passes over: SFT learnt, and what was saved had not."""
    config = AutoConfig.for_model(
        "modernbert-decoder", hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(
        UserError, match=r"this architecture \(modernbert-decoder\) does more to the decoder's states than"
    ):
        sft(tmp_path / "base", tokenizer, output_dir=str(tmp_path / "out"))
    sft(base_folder, tokenizer, output_dir=str(tmp_path / "out"))
