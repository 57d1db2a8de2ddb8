"""A mixture of experts is saved expert by expert and held in one tensor: its weights come back all the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeForSequenceClassification

from rlhf.errors import UserError
from rlhf.models.merge import adapts_parameters, merged_weights
from rlhf.models.save import load_weights
from rlhf.pipeline.trainers import InStage
from rlhf.pipeline.training import quiet_libraries

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
    "decoder_sparse_step": 1, "pad_token_id": 0, "num_labels": 1,
}  # fmt: skip


def made(kind: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return kind(Qwen3MoeConfig(**SIZES))


@pytest.mark.fault("kill at any moment")
@pytest.mark.parametrize("kind", [Qwen3MoeForCausalLM, Qwen3MoeForSequenceClassification])
def test_weights_of_experts_come_back(kind: Any, tmp_path: Path) -> None:
    saved, other = made(kind, 0), made(kind, 1)
    saved.save_pretrained(tmp_path)
    load_weights(other, tmp_path)
    for name, weight in saved.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight), name


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """And not made up where they are missing, as `from_pretrained` does."""
    made(Qwen3MoeForCausalLM, 0).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="weights do not fit"):
        load_weights(made(Qwen3MoeForSequenceClassification, 1), tmp_path)


@pytest.mark.fault("kill at any moment")
def test_a_resumed_stage_has_its_experts_again(tmp_path: Path) -> None:
    """The Trainer passes over names that it doesn't know, so training would go on with the experts of the start."""
    from transformers import Trainer, TrainingArguments

    class Stage(InStage, Trainer):
        """A trainer of whole models in a stage."""

    quiet_libraries()
    saved, start = made(Qwen3MoeForCausalLM, 0), made(Qwen3MoeForCausalLM, 1)
    saved.save_pretrained(tmp_path)
    trainer = Stage(start, TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none"))
    trainer._load_from_checkpoint(str(tmp_path))
    for name, weight in saved.state_dict().items():
        assert torch.equal(start.state_dict()[name], weight), name


@pytest.mark.parametrize(("targets", "of_experts"), [("all-linear", True), (["q_proj", "v_proj"], False)])
def test_an_adapter_of_experts_goes_to_no_other_engine(targets: Any, of_experts: bool) -> None:
    """vLLM was given the base's own experts under names that the base has not: logits 8.9 of 8.8 off."""
    base = made(Qwen3MoeForCausalLM, 0)
    names = {name for name, _ in base.named_parameters()}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets))
    assert adapts_parameters(model) == of_experts
    if of_experts:
        with pytest.raises(UserError, match="the adapter trains the weights of experts"):
            next(merged_weights(model))
    else:
        assert {name for name, _ in merged_weights(model)} == names
