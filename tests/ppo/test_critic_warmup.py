"""`critic_warmup`: the policy keeps every bit and its optimizer knows nothing of it, whatever else is asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from rlhf import PPOConfig, PPOTrainer
from rlhf.models.load import load_policy, model_settings
from tests.command import run_script
from tests.conftest import PROMPTS
from tests.ppo.conftest import LORA

DATA = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
DEMONSTRATIONS = Dataset.from_list(
    [{"prompt": prompt, "completion": [{"role": "assistant", "content": "yes please"}]} for prompt in PROMPTS[:4]]
)
STEPS = 4  # a rollout: two epochs of two minibatches
SETTINGS: dict[str, dict[str, Any]] = {
    "ptx": {"ptx_coef": 0.5},
    "weight_decay": {"weight_decay": 0.1},
    "kl in the loss": {"kl_estimator": "k3", "ptx_coef": 0.5, "weight_decay": 0.1},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "ptx_coef": 0.5},
}


class Seen(TrainerCallback):
    """The policy after every step, and whether anything of it had a gradient before."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.policies: list[dict[str, Tensor]] = []
        self.with_gradient: list[set[str]] = []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.with_gradient.append({role for role in ("policy", "critic") if any(has_gradient(self.trainer, role))})

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.policies.append(weights(self.trainer, "policy"))


def has_gradient(trainer: PPOTrainer, role: str) -> list[bool]:
    return [p.grad is not None for p in trainer.accelerator.unwrap_model(trainer.model).role_parameters(role)]


def weights(trainer: PPOTrainer, role: str) -> dict[str, Tensor]:
    """What belongs to a role: of adapters on one base also the frozen base, as the policy's."""
    container = trainer.accelerator.unwrap_model(trainer.model)
    critic = {id(p) for p in container.role_parameters("critic")}
    named = container.named_parameters() if container.shares_backbone else getattr(container, role).named_parameters()
    return {name: p.detach().clone() for name, p in named if (id(p) in critic) == (role == "critic")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(params=["full", "backbone"])
def make(
    request: pytest.FixtureRequest, base_folder: Path, reward_folder: Path, sft_adapter: Path, reward_adapter: Path,
    tokenizer: Any, cpu_arguments: dict[str, Any],
) -> Any:  # fmt: skip
    """A trainer in one of the two layouts: models of their own, all weights trained; or LoRA on one base."""

    def made(**settings: Any) -> tuple[PPOTrainer, Seen]:
        shared = request.param == "backbone"
        torch.manual_seed(0)
        policy = load_policy(sft_adapter, model_settings(LORA)) if shared else None
        seen = Seen()
        usual = {
            "per_device_train_batch_size": 8, "num_mini_batches": 2, "num_ppo_epochs": 2, "total_episodes": 48,
            "learning_rate": 1e-3, "max_completion_length": 8, "critic_warmup": 2,
        }  # fmt: skip
        trainer = PPOTrainer(
            AutoModelForCausalLM.from_pretrained(base_folder) if policy is None else policy,
            str(reward_adapter if shared else reward_folder),
            PPOConfig(**{**usual, **cpu_arguments, **settings}),
            DATA,
            processing_class=tokenizer,
            callbacks=[seen],
            ptx_dataset=DEMONSTRATIONS if settings.get("ptx_coef") else None,
        )
        assert trainer.accelerator.unwrap_model(trainer.model).shares_backbone == shared
        seen.trainer = trainer
        return trainer, seen

    return made


@pytest.mark.parametrize("name", SETTINGS)
def test_the_policy_keeps_every_bit_until_warm_up_ends(make: Any, name: str) -> None:
    trainer, seen = make(**SETTINGS[name])
    start = {role: weights(trainer, role) for role in ("policy", "critic")}
    trainer.train()
    assert [same(policy, start["policy"]) for policy in seen.policies] == [True] * 2 * STEPS + [False] * STEPS
    assert seen.with_gradient == [{"critic"}] * 2 * STEPS + [{"policy", "critic"}] * STEPS
    end = weights(trainer, "critic")
    moved = {name for name, value in start["critic"].items() if not torch.equal(value, end[name])}
    assert len(moved) > 0.9 * len(end), "all of the critic is trained"


@pytest.mark.parametrize("name", ["ptx", "weight_decay"])
def test_the_policys_optimizer_is_fresh_when_warm_up_ends(make: Any, name: str) -> None:
    """No moment and no step is counted: a bias correction that counted the warm-up would be another first step."""
    trainer, _ = make(**SETTINGS[name])
    for rollout in range(2):
        trainer.update(trainer.rollout(trainer.prompts_of(rollout)))
    state = trainer.optimizer.state
    container = trainer.accelerator.unwrap_model(trainer.model)
    assert not any(p in state for p in container.role_parameters("policy"))
    assert {int(state[p]["step"]) for p in container.role_parameters("critic") if p in state} == {2 * STEPS}
    longer, _ = make(**SETTINGS[name])
    longer.train()
    state = longer.optimizer.state
    container = longer.accelerator.unwrap_model(longer.model)
    assert {int(state[p]["step"]) for p in container.role_parameters("policy") if p in state} == {STEPS}


def test_the_log_of_a_warm_up_has_its_keys(make: Any) -> None:
    """The policy's numbers are measured though nothing is learnt; demonstrations are drawn for no one."""
    trainer, _ = make(ptx_coef=0.5)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "episodes" in row]
    assert [set(rows[2]) - set(row) for row in rows] == [{"ptx_loss"}, {"ptx_loss"}, set()]
    for row in rows[:2]:
        assert row["grad_norm"] == 0
        assert row["grad_norm_critic"] > 0
        assert row["ratio_first"] == pytest.approx(1, abs=1e-5)
        assert row["clip_fraction"] == 0
        assert row["loss"] == pytest.approx(row["value_loss"], rel=1e-5)
    assert rows[2]["grad_norm"] > 0


class Coefficients:
    """In place of a penalty: it keeps what it is multiplied with, and is 0."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __rmul__(self, coefficient: float) -> float:
        self.seen.append(coefficient)
        return 0.0


def test_kl_coef_waits_for_the_policy_and_is_that_of_the_answers(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an untrained policy the KL is 0, which says nothing of the coefficient; an update is made with what its log says."""
    penalty = Coefficients()
    monkeypatch.setattr("rlhf.ppo.trainer.kl_k3", lambda *_: penalty)
    trainer, _ = make(kl_estimator="k3", kl_target=50.0, kl_horizon=16, total_episodes=80, critic_warmup=2)
    trainer.train()
    logged = [row["kl_coef"] for row in trainer.state.log_history if "episodes" in row]
    assert logged[:3] == [0.05] * 3
    assert 0.05 > logged[3] > logged[4]
    of_updates = list(dict.fromkeys(penalty.seen))
    assert of_updates == logged[2:]


def test_a_warm_up_cut_in_the_middle_ends_bit_for_bit(make: Any, tmp_path: Path) -> None:
    settings = {
        **SETTINGS["ptx"], **SETTINGS["weight_decay"], "save_strategy": "epoch", "output_dir": str(tmp_path),
        "total_episodes": 64,
    }  # fmt: skip
    whole, _ = make(**settings)
    whole.train()
    for steps in (STEPS, 2 * STEPS):
        resumed, seen = make(**settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
        assert len(seen.policies) == 4 * STEPS - steps
        for role in ("policy", "critic"):
            assert same(weights(resumed, role), weights(whole, role)), (steps, role)


def test_a_loop_of_ones_own_warms_up_too(make: Any) -> None:
    settings = {**SETTINGS["ptx"], **SETTINGS["weight_decay"], "lr_scheduler_type": "constant"}
    trained, seen = make(**settings)
    trained.train()
    trainer, _ = make(**settings)
    start = weights(trainer, "policy")
    for number in range(3):
        trainer.update(trainer.rollout(trainer.prompts_of(number)))
        assert same(weights(trainer, "policy"), start) == (number < 2)
    assert same(weights(trainer, "policy"), seen.policies[-1])


def test_weights_that_both_roles_read_belong_to_the_policy(
    base_folder: Path, reward_adapter: Path, tokenizer: Any, cpu_arguments: dict[str, Any]
) -> None:
    """An embedding that is trained beside the policy's adapter lies under the critic's too."""
    policy = load_policy(base_folder, model_settings({**LORA, "lora_modules_to_save": ["embed_tokens"]}))
    settings = {"per_device_train_batch_size": 8, "total_episodes": 16, "num_ppo_epochs": 1, "critic_warmup": 1}
    args = PPOConfig(**cpu_arguments, **settings, max_completion_length=8, learning_rate=1e-3)  # type: ignore[arg-type]
    trainer = PPOTrainer(policy, str(reward_adapter), args, DATA, processing_class=tokenizer)
    shared = {name: p for name, p in trainer.model.named_parameters() if "embed_tokens" in name and p.requires_grad}
    before = {name: p.detach().clone() for name, p in shared.items()}
    assert len(before) == 1
    trainer.update(trainer.rollout(trainer.prompts_of(0)))
    assert same(shared, before)
    trainer.update(trainer.rollout(trainer.prompts_of(1)))
    assert not same(shared, before)


SCRIPT = """
import os, sys, torch
import torch.distributed as dist
from datasets import Dataset
from rlhf import PPOConfig, PPOTrainer
from rlhf.models.load import load_policy, load_tokenizer, model_settings
from tests.conftest import PROMPTS
from tests.ppo.conftest import LORA
from tests.ppo.test_critic_warmup import DATA, DEMONSTRATIONS, Seen, same, weights

torch.set_num_threads(1)
base, reward, sft, reward_adapter = sys.argv[1:]
for layout, settings in (
    ("separate", {"weight_decay": 0.1, "ddp_find_unused_parameters": False}),
    ("shared", {"weight_decay": 0.1, "ptx_coef": 0.5}),
):
    shared, seen = layout == "shared", Seen()
    policy = load_policy(sft if shared else base, model_settings(LORA if shared else {}))
    args = PPOConfig("out-" + layout, total_episodes=48, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        num_ppo_epochs=1, learning_rate=1e-3, max_completion_length=6, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, critic_warmup=2, **settings)
    trainer = PPOTrainer(policy, reward_adapter if shared else reward, args, DATA, callbacks=[seen],
        processing_class=load_tokenizer(base, conversational=True), ptx_dataset=DEMONSTRATIONS if shared else None)
    assert trainer.accelerator.num_processes == 2
    assert trainer.accelerator.unwrap_model(trainer.model).shares_backbone == shared
    seen.trainer = trainer
    start = {role: weights(trainer, role) for role in ("policy", "critic")}
    trainer.train()
    assert [same(one, start["policy"]) for one in seen.policies] == [True, True, False], layout
    assert not same(weights(trainer, "critic"), start["critic"]), layout
    for role in ("policy", "critic"):
        for name, value in weights(trainer, role).items():
            both = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(both, value)
            assert torch.equal(*both), (layout, name)
    if trainer.accelerator.is_main_process:
        open(layout, "w").close()
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # a process that ends with the group's threads alive is sometimes aborted
"""


@pytest.mark.timeout(240)
def test_two_processes_warm_up_as_one(
    base_folder: Path, reward_folder: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    """Each sees answers of its own; both end with the same critic, and the wrapper never misses the policy's gradients."""
    (tmp_path / "s.py").write_text(SCRIPT)
    folders = [str(folder) for folder in (base_folder, reward_folder, sft_adapter, reward_adapter)]
    run_script("s.py", *folders, cwd=tmp_path, processes=2)
    assert all((tmp_path / layout).is_file() for layout in ("separate", "shared"))
