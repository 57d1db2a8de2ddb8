"""What PPO checks about itself: quiet on a run as it should be, stopped before the update on every planted fault."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
)

from rlhf.invariants.checks import InvariantError
from rlhf.invariants.ratio import LARGEST, largest_ratio_deviation
from rlhf.invariants.sampler import check_sampler
from rlhf.models.generate import generate
from rlhf.models.logprobs import response_logprobs
from rlhf.ppo.state import PPOState
from tests.ppo.test_ppo import make

LARGE = {"per_device_train_batch_size": 64, "max_completion_length": 24, "num_mini_batches": 1, "num_ppo_epochs": 1}


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_a_run_records_its_checks_and_resumes_their_sums(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**cpu_arguments, "save_strategy": "epoch", "output_dir": str(tmp_path)}
    whole, rows = make(base_folder, str(reward_folder), settings)
    whole.train()
    entry = whole.checks.entries["sampler true"]
    assert entry["held"]
    assert entry["times"] == 2 * 3, "each of three rollouts, and each time all so far"
    assert whole.checks.entries["token counts true"]["times"] == 2 * 3
    assert all(abs(row["sampler_z"]) < 4 and abs(row["token_counts_z"]) < 4 for row in rows.rows)
    resumed, _ = make(base_folder, str(reward_folder), settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert resumed.progress.surprise == whole.progress.surprise
    assert resumed.progress.counts == whole.progress.counts
    assert whole.progress.counts.variance > 0
    for name in ("sampler true", "token counts true", "ratio one", "policy is reference at start"):
        assert resumed.checks.entries[name] == whole.checks.entries[name]
    assert whole.checks.entries["reference fixed"]["bound"] == 0, "bit for bit in one process"
    assert resumed.checks.entries["reference fixed"]["bound"] == 1e-4
    values = json.loads((tmp_path / "checkpoint-8" / "ppo_state.json").read_text())
    for name in ("checks", "surprise", "counts", "golden"):
        del values[name]
    values["of_another_version"] = 1
    (tmp_path / "ppo_state.json").write_text(json.dumps(values))
    assert PPOState.load(tmp_path).checks.entries == {}, "a checkpoint from before there were checks"


def test_a_run_in_bfloat16_goes_on_in_float32(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    """ "Reference fixed" compared log-probabilities under autocast with others without, and stopped the run for good."""
    settings = {**cpu_arguments, "save_strategy": "epoch", "output_dir": str(tmp_path)}
    whole, rows = make(base_folder, str(reward_folder), settings, bf16=True)
    whole.train()
    assert whole.checks.entries["reference fixed"]["statistic"] == 0
    square, tokens = whole.progress.rounding
    assert 1e-5 < (square / tokens) ** 0.5 < 0.1, "what autocast rounds, nats a token"
    assert all(0 < row["kl_rounding"] < 1 for row in rows.rows)

    checkpoint = tmp_path / "checkpoint-8"
    before = PPOState.load(checkpoint)
    resumed, rows = make(base_folder, str(reward_folder), settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    entry = resumed.checks.entries["reference fixed"]
    assert entry["held"]
    assert (entry["bound"], entry["statistic"] < 1e-5) == (1e-4, True), "the same numbers in both precisions"
    assert resumed.progress.rounding == before.rounding, "nothing to measure without autocast"
    assert "kl_rounding" not in rows.rows[-1]

    values = json.loads((checkpoint / "ppo_state.json").read_text())
    del values["golden"]["dtype"]
    (tmp_path / "ppo_state.json").write_text(json.dumps(values))
    assert PPOState.load(tmp_path).golden is None, "of a version that took it under autocast: it is taken anew"


def test_what_autocast_rounds_is_allowed_to_a_true_sampler(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling is in float32 and log-probabilities in bfloat16; of large logits they differ by more than a constant allows."""
    allowed: list[float] = []
    monkeypatch.setattr(
        "rlhf.ppo.checks.check_sampler",
        lambda sums, *, tests, rounding: (
            allowed.append(rounding),
            check_sampler(sums, tests=tests, rounding=rounding),
        )[1],
    )
    for large in (False, True):
        trainer, _ = make(base_folder, str(reward_folder), {**cpu_arguments, "learning_rate": 1e-9}, bf16=True)
        if large:
            with torch.no_grad():
                trainer.model.policy.lm_head.weight.mul_(4)
                trainer.reference.model.lm_head.weight.mul_(4)
        allowed.clear()
        trainer.train()
        square, tokens = trainer.progress.rounding
        assert allowed[-1] == pytest.approx(max(1e-3, 2 * square / tokens))
        assert allowed[-1] > 0.004 or not large


@pytest.mark.parametrize("fault", ["temperature", "top_p", "min_p", "suppressed", "weights"])
def test_a_sampler_that_is_not_the_policy_is_stopped_before_the_update(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    trainer, _ = make(base_folder, str(reward_folder), cpu_arguments, **LARGE, total_episodes=64)
    policy, before = trainer.model.policy, weights(trainer)
    if fault == "temperature":
        monkeypatch.setattr(
            "rlhf.ppo.trainer.generate", lambda *a, temperature, **k: generate(*a, temperature=0.8, **k)
        )
    elif fault == "weights":
        other = type(policy)(policy.config).eval()
        monkeypatch.setattr(trainer, "generate", lambda _, rows, own=trainer.generate: own(other, rows))
    else:
        ids = torch.arange(5, 37)[:, None]
        likely = torch.softmax(policy(ids).logits[:, -1], dim=-1).mean(dim=0).topk(60).indices.tolist()
        narrow = {"top_p": {"top_p": 0.9}, "min_p": {"min_p": 0.1}, "suppressed": {"suppress_tokens": likely}}
        own = policy.generate

        def narrowed(*arguments: Any, generation_config: Any, **named: Any) -> Any:
            generation_config.update(**narrow[fault])
            return own(*arguments, generation_config=generation_config, **named)

        monkeypatch.setattr(policy, "generate", narrowed)
    with pytest.raises(InvariantError, match=r"'sampler true' failed: .*nothing was updated"):
        trainer.train()
    after = weights(trainer)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not trainer.checks.entries["sampler true"]["held"]


SIZE = {"num_attention_heads": 2, "hidden_size": 32}
MODELS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {**SIZE, "intermediate_size": 64, "num_hidden_layers": 2, "attention_dropout": 0.1}),
    "opt": (OPTConfig, {**SIZE, "ffn_dim": 64, "num_hidden_layers": 2, "word_embed_proj_dim": 32, "dropout": 0.1}
            | {"attention_dropout": 0.1, "activation_dropout": 0.1, "layerdrop": 0.1}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.1, "resid_pdrop": 0.1}),
    "falcon": (FalconConfig, {**SIZE, "num_hidden_layers": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "bloom": (BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1}),
}  # fmt: skip


def with_dropout(kind: str, tokenizer: Any, folder: Path) -> tuple[Path, Any]:
    """A model of a kind with every dropout it has, in a folder, and a critic with the same."""
    make_config, settings = MODELS[kind]
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = make_config(vocab_size=len(tokenizer), initializer_range=0.3, init_std=0.3, **ids, **settings)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config.num_labels = 1
    return folder, AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("kind", MODELS)
def test_dropout_in_whatever_form_is_off(
    kind: str, tokenizer: Any, cpu_arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a learning rate of nearly 0 nothing moves, so the ratio of every step is 1; with dropout left on, the first step stops."""
    base, critic = with_dropout(kind, tokenizer, tmp_path / "base")
    settings = {**cpu_arguments, "learning_rate": 1e-12, "total_episodes": 16}
    trainer, rows = make(base, lambda completions, **_: [1.0] * len(completions), settings, critic=critic)
    trainer.train()
    assert rows.rows[0]["approx_kl"] < 1e-9
    assert rows.rows[0]["clip_fraction"] == 0
    entry = trainer.checks.entries["ratio one"]
    assert entry["held"]
    assert entry["statistic"] < 1e-4
    kept = {name: value for name, value in trainer.model.policy.config.to_dict().items() if "drop" in name}
    assert 0.1 in kept.values(), "the configuration that is saved keeps its dropout"

    monkeypatch.setattr("rlhf.ppo.trainer.switch_off_dropout", lambda model: None)
    trainer, _ = make(base, lambda completions, **_: [1.0] * len(completions), settings, critic=critic)
    before = weights(trainer)
    with pytest.raises(InvariantError, match=r"'ratio one' failed: .* dropout that disable_dropout does not reach"):
        trainer.train()
    assert all(torch.equal(weights(trainer)[name], weight) for name, weight in before.items())


def test_one_token_among_many_stops_the_first_step_and_no_later_one(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    trainer, _ = make(base_folder, str(reward_folder), cpu_arguments)
    rollout = trainer.rollout(trainer.prompts_of(0))
    rollout.logprobs_old[3, 2] += 0.01
    with pytest.raises(InvariantError, match=r"'ratio one' failed: 0\.00995 largest"):
        trainer.update(rollout)
    rollout.logprobs_old[3, 2] -= 0.01
    trainer.update(rollout)
    assert trainer.checks.entries["ratio one"]["times"] >= 2
    trainer, _ = make(base_folder, str(reward_folder), cpu_arguments, disable_dropout=False)
    trainer.update(trainer.rollout(trainer.prompts_of(0)))
    assert "ratio one" not in trainer.checks.entries, "noise by intent is not checked"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [2, 12])
def test_two_forwards_differ_by_less_than_the_bound(dtype: torch.dtype, layers: int) -> None:
    """Other batches, other rows in them: far within, with logits up to 5 and three passes' worth of tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        initializer_range=0.12,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    ids, prompts = torch.randint(5, 500, (48, 40)), torch.randint(1, 17, (48, 1))
    mask = (torch.arange(40) >= 16 - prompts).long()
    with torch.no_grad():
        one = response_logprobs(model, ids, mask, 24, 1.0)
        other = torch.cat(
            [response_logprobs(model, *both, 24, 1.0) for both in zip(ids.split(5), mask.split(5), strict=True)]
        )
    deviation = largest_ratio_deviation(one, other, torch.ones(48, 24)).item()
    assert deviation < LARGEST[dtype] / 10  # 0 on a CPU whose sums don't depend on the batch
