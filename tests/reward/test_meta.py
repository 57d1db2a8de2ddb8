"""MetaRM's extra step: the gradient is taken at θ' and applied to θ, once an optimizer step, whatever surrounds it."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import RewardConfig

from rlhf import MetaRewardTrainer, PairRewardTrainer
from rlhf.errors import UserError
from rlhf.objectives.meta import reward_spread
from rlhf.objectives.pairwise import pair_loss
from rlhf.reward.meta import group_samples
from tests.command import run_script
from tests.conftest import PROMPTS, WORDS
from tests.reward.test_trainer import build, losses


def samples(prompts: int = 12, responses: int = 3) -> list[dict[str, Any]]:
    """Lines of a `samples.jsonl`: several different answers to each prompt."""
    return [
        {"prompt": prompt, "completion": " ".join(WORDS[(i + j + n) % 15] for n in range(1 + j)), "ended": True}
        for i, prompt in enumerate(PROMPTS[:prompts])
        for j in range(responses)
    ]


META, _ = group_samples(samples())


def make(base: Path, tokenizer: Any, pairs: Dataset, arguments: dict[str, Any], **extra: Any) -> Any:
    settings = {key: extra.pop(key) for key in list(extra) if key in ("use_peft", "lora_r", "dtype")}
    cls: Any = extra.pop("cls", MetaRewardTrainer)
    config = {key: extra.pop(key) for key in list(extra) if key in RewardConfig.__dataclass_fields__}
    usual = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "num_train_epochs": 1, "logging_steps": 1}
    args = RewardConfig(**{**usual, **arguments, **config})
    if cls is MetaRewardTrainer:
        extra = {"meta_samples": META, "meta_prompts": 4, **extra}
    return cls(build(base, tokenizer, **settings), args, train_dataset=pairs, processing_class=tokenizer, **extra)


def test_samples_say_whether_they_ended_as_everywhere() -> None:
    """ "false", as a table has it, was taken for ended, and null for cut off."""
    answers = [
        {"prompt": "p", "completion": text, "ended": said} for text, said in (("a", "false"), ("b", None), ("c", True))
    ]
    (group,), _ = group_samples(answers)
    assert group["ended"] == [False, True, True]
    with pytest.raises(UserError, match="meta samples: row 1: 'ended' is 0, and must be true or false"):
        group_samples([answers[0], {**answers[1], "ended": 0}])


def test_a_step_that_16_bits_round_away_is_told_of(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    """Of normal weights in bfloat16 3 % moved."""
    with pytest.warns(UserWarning, match="the ascent's step is rounded away for most of them"):
        make(base_folder, tokenizer, pairs, cpu_arguments, dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is rounded away")
        make(base_folder, tokenizer, pairs, cpu_arguments, dtype="bfloat16", use_peft=True, lora_r=4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_step_of_0_is_the_plain_trainer_bit_for_bit(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], lora: bool
) -> None:
    """With dropout on in the adapter, so that the random state left by the ascent counts too."""
    settings = {"use_peft": True, "lora_r": 4} if lora else {}
    arguments = {**cpu_arguments, "disable_dropout": False}
    plain = make(base_folder, tokenizer, pairs, arguments, cls=PairRewardTrainer, **settings)
    plain.train()
    meta = make(base_folder, tokenizer, pairs, arguments, meta_step=0.0, **settings)
    meta.train()
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, meta.model.get_parameter(name)), name
    assert losses(meta) == losses(plain)


@pytest.mark.parametrize("normalized", [False, True])
def test_one_step_is_the_formula(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], normalized: bool
) -> None:
    """θ - α ∇L(θ + η ∇J(θ)) with plain SGD, computed here from whole sequences, one by one."""
    some = pairs.select(range(8))
    eta, alpha = (0.3, 0.05) if normalized else (2.0, 0.05)
    trainer = make(
        base_folder, tokenizer, some, cpu_arguments, optim="sgd", learning_rate=alpha, max_grad_norm=1e9,
        lr_scheduler_type="constant", meta_step=eta, meta_normalized=normalized, meta_prompts=12,
    )  # fmt: skip
    model = copy.deepcopy(trainer.model)
    model.config.pad_token_id = tokenizer.pad_token_id
    parameters = list(model.parameters())

    def score(ids: list[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([ids])).logits[0, 0]

    spread = torch.stack([reward_spread(torch.stack([score(x) for x in g])[None])[0] for g in trainer.meta_groups])
    uphill = torch.autograd.grad(spread.mean(), parameters)
    length = torch.sqrt(sum((g**2).sum() for g in uphill))  # type: ignore[arg-type]
    theta = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, g in zip(parameters, uphill, strict=True):
            p.add_(eta * g / (length if normalized else 1.0))
    data = trainer.train_dataset
    sides = [torch.stack([score(ids) for ids in data[name]]) for name in ("chosen_ids", "rejected_ids")]
    there = torch.autograd.grad(pair_loss(*sides).mean(), parameters)

    trainer.train()
    assert len(losses(trainer)) == 1
    row = next(row for row in trainer.state.log_history if "meta_spread" in row)
    assert row["meta_spread"] == pytest.approx(spread.mean().item(), abs=1e-6)
    assert row["meta_gradient"] == pytest.approx(length.item(), rel=1e-4)
    moved = 0.0
    for (name, parameter), start, gradient in zip(trainer.model.named_parameters(), theta, there, strict=True):
        torch.testing.assert_close(parameter, start - alpha * gradient, atol=2e-6, rtol=1e-5, msg=name)
        moved = max(moved, (alpha * gradient).abs().max().item())
    assert moved > 1e-3, "or the comparison says nothing"


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 4), (1, 16)])
def test_accumulation_equals_one_big_batch(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], batch: int, accumulation: int
) -> None:
    """One θ' for all micro-batches of a step, ragged last step included; sums in another order, no more."""
    arguments = {**cpu_arguments, "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.05}
    whole = make(base_folder, tokenizer, pairs, arguments, per_device_train_batch_size=16, meta_step=0.5)
    parts = make(
        base_folder, tokenizer, pairs, arguments, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, meta_step=0.5,
    )  # fmt: skip
    whole.train()
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(parts.model.get_parameter(name), parameter, atol=1e-5, rtol=1e-4)


def test_a_resumed_run_ends_bit_for_bit(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    arguments = {**cpu_arguments, "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    combined = {"extra": "swav", "flip_rate": 0.2, "prototypes": 8}  # any pair loss, any term, the extra step
    through = make(base_folder, tokenizer, pairs, arguments, **combined)
    through.train()
    resumed = make(base_folder, tokenizer, pairs, arguments, **combined)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in through.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_checkpointing_changes_nothing(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    plain, checkpointed = trainers = [
        make(base_folder, tokenizer, pairs, {**cpu_arguments, "gradient_checkpointing": on}, meta_step=0.5)
        for on in (False, True)
    ]
    for trainer in trainers:
        trainer.train()
    assert losses(checkpointed) == pytest.approx(losses(plain), abs=1e-5)
    spreads = [[row["meta_spread"] for row in t.state.log_history if "meta_spread" in row] for t in trainers]
    assert spreads[1] == pytest.approx(spreads[0], abs=1e-6)


def test_the_ascent_spreads_rewards_and_restoring_is_exact(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    trainer = make(base_folder, tokenizer, pairs, cpu_arguments, meta_step=0.05, meta_prompts=12)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    at_theta = trainer._spread(trainer.meta_groups).item()
    trainer.ascend()
    moved = torch.sqrt(sum(((p - b) ** 2).sum() for p, b in zip(trainer.model.parameters(), before, strict=True)))  # type: ignore[arg-type]
    assert moved.item() == pytest.approx(0.05, rel=1e-4), "normalised: η is the step's length"
    assert trainer._spread(trainer.meta_groups).item() > at_theta
    trainer.restore()
    assert all(torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before, strict=True))


def test_samples_that_cannot_serve_are_counted_or_refused() -> None:
    prompt = PROMPTS[0]
    single = [{"prompt": p, "completion": "yes"} for p in PROMPTS[:3]]
    with pytest.raises(UserError, match=r"of 3 prompts none has two different responses .3 with a single response."):
        group_samples(single)
    same = [{"prompt": prompt, "completion": "yes"}] * 4
    with pytest.raises(UserError, match="1 with identical responses"):
        group_samples(same)
    kept, dropped = group_samples([*samples(2), *single[2:], *[{"prompt": PROMPTS[9], "completion": "no"}] * 2])
    assert len(kept) == 2
    assert dropped == {"a single response": 1, "identical responses": 1}
    assert [len(row["responses"]) for row in kept] == [3, 3]
    with pytest.raises(UserError, match="row 0 has no 'prompt' and 'completion' as text; ids of another tokenizer"):
        group_samples([{"prompt": prompt, "completion": [5, 6, 7]}])
    with pytest.raises(UserError, match=r"of 0 prompts none .* .no rows."):
        group_samples([])
    with pytest.raises(UserError, match="row 0 has no 'prompt' and 'completion' as text"):
        group_samples([{"prompt": [{"role": "user", "content": None}], "completion": "yes"}])


def test_answers_are_grouped_by_the_identity_of_their_prompt() -> None:
    """A text, a conversation of one turn, blanks and case: one prompt, written as it came first."""
    prompts = ["Say  Yes", [{"role": "user", "content": "say yes"}], "say no"]
    rows = [{"prompt": prompt, "completion": text} for text in ("yes", "no") for prompt in prompts]
    kept, dropped = group_samples(rows)
    assert [row["prompt"] for row in kept] == ["Say  Yes", "say no"]
    assert [row["responses"] for row in kept] == [["yes", "yes", "no", "no"], ["yes", "no"]]
    assert [row["ended"] for row in kept] == [[True] * 4, [True] * 2]
    assert dropped == {}


def test_reentrant_checkpointing_is_refused(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any]
) -> None:
    arguments = {
        **cpu_arguments,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    with pytest.raises(UserError, match="set use_reentrant to false"):
        make(base_folder, tokenizer, pairs, arguments)


SCRIPT = """
import json, os, sys, torch
import torch.distributed as dist
from datasets import Dataset
from trl import RewardConfig
from rlhf import MetaRewardTrainer, build_reward_model
from rlhf.models.load import load_tokenizer

torch.set_num_threads(1)
base, rows, out, batch, world = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
data = json.load(open(rows))
torch.manual_seed(0)
tokenizer = load_tokenizer(base, conversational=True)
args = RewardConfig(out, per_device_train_batch_size=batch, learning_rate=0.05, optim="sgd", num_train_epochs=1,
    logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
    disable_tqdm=True, max_grad_norm=1e9, train_sampling_strategy="sequential")
trainer = MetaRewardTrainer(build_reward_model(base, pad_token_id=tokenizer.pad_token_id), args,
    train_dataset=Dataset.from_list(data["pairs"]), processing_class=tokenizer, meta_samples=data["meta"], meta_step=0.5,
    meta_prompts=5)
assert trainer.accelerator.num_processes == world, trainer.accelerator.num_processes
trainer.train()
if trainer.accelerator.is_main_process:
    json.dump([r for r in trainer.state.log_history if "loss" in r], open(out + ".json", "w"))
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # and sometimes even then, as its libraries are taken down
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_make_the_steps_of_one(base_folder: Path, pairs: Dataset, tmp_path: Path) -> None:
    """1 x 16 and 2 x 8, the meta prompts (five, so unevenly) dealt out: same loss, gradient and spread at every step."""
    (tmp_path / "s.py").write_text(SCRIPT)
    (tmp_path / "rows.json").write_text(json.dumps({"pairs": pairs.select(range(32)).to_list(), "meta": META}))
    for name, batch, world in (("one", 16, 1), ("two", 8, 2)):
        arguments = (str(base_folder), "rows.json", name, str(batch), str(world))
        run_script("s.py", *arguments, cwd=tmp_path, processes=world)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "meta_spread", "meta_gradient", "accuracy"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key
