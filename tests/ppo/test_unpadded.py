"""PPO without its padding makes the steps of PPO with it: the same rollout, losses, gradient norms and weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from rlhf import PPOConfig, PPOTrainer
from rlhf.models import unpadded
from rlhf.models.load import load_policy, model_settings
from tests.conftest import PROMPTS
from tests.ppo.conftest import LORA
from tests.ppo.test_ppo import make

UNEVEN = Dataset.from_list([
    {"prompt": [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + " please" * 3 * (i % 5) ** 2}]}
    for i, prompt in enumerate(PROMPTS[:16])
])  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, packs: bool, make_trainer: Any) -> tuple[Any, dict[str, float], Any]:
    """One rollout and its update; the answers are the same, since sampling reads what it always read."""
    with monkeypatch.context() as patch:
        places: list[int] = []
        if not packs:
            patch.setattr(unpadded, "can_pack", lambda *_: False)
        trainer = make_trainer()
        trainer.train_dataset = UNEVEN
        rollout = trainer.rollout(trainer.prompts_of(0))
        backbone = trainer.model.critic.policy if trainer.model.shares_backbone else trainer.model.critic
        embedding: nn.Module = backbone.get_input_embeddings()
        embedding.register_forward_hook(lambda _, __, out: places.append(out.shape[:-1].numel()))
        metrics = trainer.update(rollout)
    return rollout, metrics | {"places": sum(places)}, dict(trainer.model.named_parameters())


@pytest.mark.parametrize("layout", ["apart", "one base, checkpointed"])
def test_the_same_steps_with_and_without_padding(
    layout: str, base_folder: Path, reward_folder: Path, sft_adapter: Path, reward_adapter: Path, tokenizer: Any,
    cpu_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = {**cpu_arguments, "learning_rate": 1e-4, "max_completion_length": 24, "total_episodes": 16}
    settings["gradient_checkpointing"] = "checkpointed" in layout

    def trainer() -> Any:
        torch.manual_seed(0)
        if layout == "apart":
            return make(base_folder, str(reward_folder), settings)[0]
        policy = load_policy(sft_adapter, model_settings(LORA))
        args = PPOConfig(**settings, per_device_train_batch_size=8, num_mini_batches=2, num_ppo_epochs=2)
        return PPOTrainer(policy, str(reward_adapter), args, UNEVEN, processing_class=tokenizer)

    rollout, metrics, weights = run(monkeypatch, True, trainer)
    padded_rollout, padded_metrics, padded_weights = run(monkeypatch, False, trainer)
    keep = rollout.response_mask.bool()
    assert torch.equal(rollout.input_ids, padded_rollout.input_ids)
    lengths = rollout.attention_mask.sum(dim=1)
    assert lengths.min() < 0.5 * lengths.max(), "there is something to leave out"
    assert metrics.pop("places") < 0.8 * padded_metrics.pop("places")
    for name in ("logprobs_old", "logprobs_reference", "values_old", "advantages", "returns"):
        found, expected = (getattr(x, name)[keep] for x in (rollout, padded_rollout))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for name, value in padded_metrics.items():
        assert metrics[name] == pytest.approx(value, abs=2e-5, rel=1e-4), name
    for name, weight in padded_weights.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-5)
