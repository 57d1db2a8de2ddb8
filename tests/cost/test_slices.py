"""Straight lines through one and two layers: what they say of deeper models is what those are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config
from trl import SFTConfig, SFTTrainer

from rlhf.cost.live import LiveBytes, storages
from rlhf.cost.slices import FLOPS_ON_CPU, Shape, Slices, slices

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 64,
}
SHAPE = Shape(rows=3, length=20, answer=8)
LORA = LoraConfig(r=4, target_modules="all-linear")


def whole(config: Any) -> Slices:
    """The same measurements on the model itself, in place of both slices."""
    config.use_cache = False
    model: Any = AutoModelForCausalLM.from_config(config).train()
    return Slices((model, model), 1, CPU, autocast=False)


@pytest.mark.parametrize(
    "config", [LlamaConfig(num_hidden_layers=5, **SIZES), Qwen3Config(num_hidden_layers=5, **SIZES)]
)
def test_weights_and_activations_are_those_of_the_whole_model(config: Any) -> None:
    found, true = slices(config, has_logits=True, device=CPU), whole(config)
    assert found.weights() == true.weights() == 4 * sum(p.numel() for p in true.models[0].parameters())
    assert found.weights(trainable=True) == found.weights()
    for training in (True, False):
        assert found.peak(SHAPE, training=training) == true.peak(SHAPE, training=training)


def test_memory_of_sft_is_that_of_trls_own_loss(base_folder: Path, tmp_path: Path) -> None:
    """TRL's SFT makes no logits of its own batch at once on a GPU, and several copies of them on a CPU."""
    model: Any = AutoModelForCausalLM.from_pretrained(base_folder)
    rows = torch.randint(5, 200, (3, 20))
    args = SFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=3,
        report_to="none",
    )
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list([{"input_ids": row} for row in rows.tolist()]),
        processing_class=AutoTokenizer.from_pretrained(base_folder),
    )
    model.train()
    handles = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in model.parameters()]
    batch = next(iter(trainer.get_train_dataloader()))
    with LiveBytes(storages(model.parameters())) as live:
        trainer.compute_loss(model, batch).backward()
    for handle in handles:
        handle.remove()
    found = slices(model.config, has_logits=True, device=CPU, fused_head=True).peak(Shape(3, 20, 20), training=True)
    assert found == pytest.approx(live.peak, rel=0.01)
    plain = slices(model.config, has_logits=True, device=CPU).peak(Shape(3, 20, 20), training=True)
    assert found > 1.1 * plain


def test_live_bytes_are_those_of_the_tensors_that_are_there() -> None:
    weight = torch.ones(10, 10)
    with LiveBytes(storages([weight])) as live:
        first = torch.ones(10, 10)
        second = first @ weight
        view = second.view(100)
        assert (live.live, live.peak) == (800, 800), "a view is no new tensor, and what was left out is not counted"
        del first
        third = view.exp()
        assert (live.live, live.peak) == (800, 800)
        del second, view, third
    assert (live.live, live.peak) == (0, 800)


def test_gradients_of_parameters_are_not_among_the_activations() -> None:
    """A backward of one linear layer: its input, the output and the gradient of the output, and one weight's gradient at a time."""
    found = slices(LlamaConfig(num_hidden_layers=1, **SIZES), has_logits=False, device=CPU)
    model = found.models[0]
    few = found._peak(model, Shape(1, 1, 0), training=True)
    assert few < 4 * sum(p.numel() for p in model.parameters()) / 2
    assert all(p.grad is None for p in model.parameters())


def test_with_lora_only_the_adapter_is_trained() -> None:
    found = slices(LlamaConfig(num_hidden_layers=6, **SIZES), has_logits=True, device=CPU, adapter=LORA)
    # Of each layer: q, k, v, o (32 + 32), gate, up (32 + 64) and down (64 + 32), times the rank.
    assert found.weights(trainable=True) == 4 * 6 * 4 * (4 * 64 + 3 * 96)
    assert found.layer(trainable=True) == found.weights(trainable=True) / 6
    assert found.layer() - found.layer(trainable=True) == 4 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32)


def test_checkpointing_keeps_one_layer_and_the_inputs_of_the_others() -> None:
    shape = Shape(rows=3, length=20, answer=0)  # without logits, so that layers are all there is
    config = LlamaConfig(num_hidden_layers=8, **SIZES)
    plain = slices(config, has_logits=False, device=CPU)
    saving = slices(config, has_logits=False, device=CPU, checkpointing=True)
    one, two = (plain._peak(model, shape, training=True) for model in plain.models)
    inputs = 4 * 3 * 20 * 32
    assert plain.peak(shape, training=True) - saving.peak(shape, training=True) == pytest.approx(
        7 * (two - one) - 7 * inputs, rel=0.1
    )


def test_a_slow_machine_times_a_part_of_the_batch_and_counts_the_rest() -> None:
    found = slices(LlamaConfig(num_hidden_layers=2, **SIZES), has_logits=True, device=CPU)
    for training in (True, False):
        part, share = found._part(Shape(rows=10**6, length=20, answer=8), training=training)
        assert part.rows * share == pytest.approx(10**6)
        # Operations of two layers and the head, embeddings looked up for nothing; three times as many with a backward.
        layer, head = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32, 32 * 120
        assert part.rows == int(FLOPS_ON_CPU / ((6 if training else 2) * (2 * layer * 20 + head * 8)))
    assert found._part(SHAPE, training=True) == (SHAPE, 1.0)


def test_sampling_takes_a_forward_a_token_and_training_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With forwards for seconds, in place of a clock."""
    found = slices(LlamaConfig(num_hidden_layers=4, **SIZES), has_logits=True, device=CPU)
    calls: list[int] = []
    for model in found.models:
        model.model.register_forward_pre_hook(lambda *_: calls.append(1))

    def count(work: Any) -> float:
        calls.clear()
        work(found.models[0])
        return float(len(calls))

    monkeypatch.setattr(Slices, "_timed", lambda _, work: count(work))
    assert found.seconds_of_sampling(2, 5, [(16.0, 2.0), (16.0, 2.0), (8.0, 2.0)]) == 40
    assert found.seconds(SHAPE, training=True) == found.seconds(SHAPE, training=False) == 1
    assert found.seconds_of_update() == 0


def test_a_token_costs_less_with_fewer_rows_but_not_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 3 seconds for a prompt, and 1 + rows / 10 for each token."""
    found = slices(LlamaConfig(num_hidden_layers=2, **SIZES), has_logits=True, device=CPU)
    monkeypatch.setattr(Slices, "_generated", lambda _, rows, prompt, tokens: 3 + tokens * (1 + rows / 10))
    assert found.seconds_of_sampling(40, 5, [(16.0, 40.0), (10.0, 5.0)]) == pytest.approx(3 + 16 * 5 + 10 * 1.5)


def test_a_clock_measures_both() -> None:
    found = slices(LlamaConfig(num_hidden_layers=4, **SIZES), has_logits=True, device=CPU)
    assert found.seconds(SHAPE, training=False) > 0
    assert found.seconds_of_update() > 0
