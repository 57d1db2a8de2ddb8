"""Straight lines through one and two layers: what they say of deeper models is what those are."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MambaConfig, Qwen3Config
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


class Work:
    """A clock that counts work: a second for a layer, whatever it reads, a tenth for each of its tokens; 50 and a fifth for a head."""

    def __init__(self, found: Slices):
        self.now = 0.0
        for model in found.models:
            for layer in model.model.layers:
                layer.register_forward_pre_hook(self._tick(1.0, 0.1), with_kwargs=True)
            model.lm_head.register_forward_pre_hook(self._tick(50.0, 0.2), with_kwargs=True)

    def _tick(self, once: float, token: float) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.now += once + token * hidden.shape[0] * hidden.shape[1]

        return hook


@pytest.fixture
def found_and_work(monkeypatch: pytest.MonkeyPatch) -> tuple[Slices, Work]:
    found = slices(LlamaConfig(num_hidden_layers=6, **SIZES), has_logits=True, device=CPU)
    work = Work(found)
    monkeypatch.setattr("rlhf.cost.slices.clock", lambda: work.now)
    return found, work


def test_a_forward_takes_each_layer_once_and_the_head_once(found_and_work: tuple[Slices, Work]) -> None:
    found, _ = found_and_work
    layer, head = 1 + 0.1 * 3 * 20, 50 + 0.2 * 3 * 8
    assert found.seconds(SHAPE, training=False) == pytest.approx(6 * layer + head)
    assert found.seconds(SHAPE, training=True) == pytest.approx(6 * layer + head)
    assert found.seconds_of_update() == 0


def test_a_token_takes_a_step_of_all_rows_that_are_at_work(found_and_work: tuple[Slices, Work]) -> None:
    """The cost of a step has a part that is the same for any number of rows, so it is no sum over rows."""
    found, _ = found_and_work

    def step(rows: float, tokens: float = 1.0) -> float:
        return 6 * (1 + 0.1 * rows * tokens) + 50 + 0.2 * rows

    assert found.seconds_of_sampling(2, 5, [(16.0, 2.0), (16.0, 2.0), (8.0, 2.0)]) == pytest.approx(
        step(2, 5) + 40 * step(2)
    )
    written = 16 * step(40) + 10 * step(5)
    assert found.seconds_of_sampling(40, 5, [(16.0, 40.0), (10.0, 5.0)]) == pytest.approx(step(40, 5) + written)


def test_a_slow_machine_reads_a_part_of_the_prompts_and_writes_for_all_rows(
    found_and_work: tuple[Slices, Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 40 rows costs far less than 40 of one."""
    found, _ = found_and_work
    monkeypatch.setattr("rlhf.cost.slices.FLOPS_ON_CPU", 1.0)
    reading, step = 40 * (6 * (1 + 0.1 * 5) + 50.2), 6 * (1 + 0.1 * 40) + 50 + 0.2 * 40
    assert found.seconds_of_sampling(40, 5, [(16.0, 40.0)]) == pytest.approx(reading + 16 * step)


def test_a_step_is_timed_behind_the_whole_prompt_and_never_past_the_answer() -> None:
    """A model with learned positions has no place behind them."""
    found = slices(LlamaConfig(num_hidden_layers=6, **SIZES), has_logits=True, device=CPU)
    lengths: list[int] = []

    def look(_module: Any, _args: Any, kwargs: Any) -> None:
        cache = kwargs.get("past_key_values")
        lengths.append(int(cache.get_seq_length()) if cache is not None else 0)

    found.models[0].model.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        of_one, of_two = (found._next_token(model, torch.ones(7, 1, dtype=torch.long), 30) for model in found.models)
        found._layer(of_one, of_two, 4)
    assert lengths == [0, 29, 30, 31, 32, 33], "before each: of the prompt but for its end, and of what follows"


@pytest.mark.parametrize("busy", [3, 4])
def test_a_busy_moment_is_not_multiplied_by_the_depth(busy: int, found_and_work: tuple[Slices, Work]) -> None:
    found, work = found_and_work
    calls = iter(range(10**6))

    def of_one() -> None:
        work.now += 1.0 + 100.0 * (next(calls) % 5 == busy)

    def of_two() -> None:
        work.now += 3.0

    assert found._layer(of_one, of_two) == 2.0


def test_the_noise_of_a_head_is_not_multiplied_by_the_depth(found_and_work: tuple[Slices, Work]) -> None:
    """A head takes ten times what a layer takes, here up to twice that: of 60 layers the noise would be 30 heads."""
    found, work = found_and_work
    noise = random.Random(0)

    def busy(*_: object) -> None:
        work.now += 50 * noise.random()

    for model in found.models:
        model.lm_head.register_forward_hook(busy)
    deep = replace(found, layers=60)
    layer, head = 1 + 0.1 * 3 * 20, 50 + 0.2 * 3 * 8
    assert 60 * layer + head < deep.seconds(SHAPE, training=False) < 60 * layer + head + 50
    written = 16 * (60 * 1.2 + 50.4)
    assert 0 < deep.seconds_of_sampling(2, 5, [(16.0, 2.0)]) - written - 60 * 2 - 50.4 < 17 * 50


def test_gradient_checkpointing_does_not_take_the_cache_from_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    found = slices(LlamaConfig(num_hidden_layers=2, **SIZES), has_logits=True, device=CPU, checkpointing=True)
    work = Work(found)
    monkeypatch.setattr("rlhf.cost.slices.clock", lambda: work.now)
    trains: set[bool] = set()
    for model in found.models:
        model.model.register_forward_pre_hook(lambda module, _: trains.add(module.training))
    assert found.seconds_of_sampling(2, 5, [(16.0, 2.0)]) == pytest.approx(
        2 * (1 + 0.1 * 10) + 50 + 0.2 * 2 + 16 * (2 * 1.2 + 50.4)
    )
    assert trains == {False}
    assert all(model.training for model in found.models)


def test_an_adapter_is_in_what_a_layer_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = slices(LlamaConfig(num_hidden_layers=5, **SIZES), has_logits=True, device=CPU, adapter=LORA)
    reads: list[Any] = []
    for model in found.models:
        for name, module in model.named_modules():
            if name.endswith("q_proj.lora_A.default"):
                module.register_forward_hook(lambda *_: reads.append(1))
    monkeypatch.setattr("rlhf.cost.slices.clock", lambda: float(len(reads)))
    assert found.seconds(SHAPE, training=True) == 5
    assert found.seconds_of_sampling(2, 5, [(16.0, 2.0)]) == 5 + 16 * 5


def test_a_model_that_keeps_no_cache_reads_one_token() -> None:
    config = MambaConfig(num_hidden_layers=3, hidden_size=16, state_size=4, vocab_size=50)
    found = slices(config, has_logits=True, device=CPU)
    assert found.seconds_of_sampling(2, 5, [(4.0, 2.0)]) > 0


def test_a_clock_measures_both() -> None:
    found = slices(LlamaConfig(num_hidden_layers=4, **SIZES), has_logits=True, device=CPU)
    assert found.seconds(SHAPE, training=False) > 0
    assert found.seconds_of_update() > 0
