"""Two processes under torchrun: one run, one set of files, and the same numbers as one process at the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.models.load import model_settings
from rlhf.reward.load import save_reward_model
from tests.command import run_script
from tests.conftest import PROMPTS
from tests.unit_scale import build_reward_model

SCRIPT = """
import json, os, sys, torch
import torch.distributed as dist
from datasets import Dataset
from rlhf import PPOConfig, PPOTrainer
from rlhf.models.load import load_policy, load_tokenizer, model_settings
from rlhf.errors import TrainingError
from rlhf.ppo import experience
from rlhf.ppo.rewards import RewardSource

torch.set_num_threads(1)
base, reward, out, batch = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
expected_world = int(sys.argv[5])
prompts = [[{"role": "user", "content": f"list {i}"}] for i in range(16)]
args = PPOConfig(out, total_episodes=16, per_device_train_batch_size=batch, num_ppo_epochs=1, learning_rate=1e-3,
    max_completion_length=6, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
    disable_tqdm=True, max_grad_norm=1e9)
lora = {"use_peft": True, "lora_r": 4} if os.path.exists(reward + "/adapter_config.json") else {}
torch.manual_seed(0)
trainer = PPOTrainer(load_policy(base, model_settings(lora)), reward, args,
    Dataset.from_list([{"prompt": p} for p in prompts]), processing_class=load_tokenizer(base, conversational=True))
assert trainer.accelerator.unwrap_model(trainer.model).shares_backbone == bool(lora)
assert trainer.accelerator.num_processes == expected_world, trainer.accelerator.num_processes

# The same answers for the same prompts whatever the number of processes: sampling itself is random per process.
sample = trainer.sample
def fixed(rows):
    completions = sample(rows)
    for i, row in enumerate(rows):
        generator = torch.Generator().manual_seed(int(row["prompt"][0]["content"].split()[1]))
        length = 1 + int(torch.randint(0, completions.response_ids.shape[1], (1,), generator=generator))
        completions.response_ids[i] = torch.randint(5, 200, completions.response_ids[i].shape, generator=generator)
        completions.response_mask[i] = (torch.arange(completions.response_ids.shape[1]) < length).long()
        completions.ended[i] = False
    completions.texts = trainer.processing_class.batch_decode(
        [r[m.bool()].tolist() for r, m in zip(completions.response_ids, completions.response_mask)], skip_special_tokens=True)
    return completions
trainer.sample = fixed
experience.check_sampling = lambda *_: None  # these answers are planted, which "sampler true" rightly stops
trainer.train()
if trainer.accelerator.is_main_process:
    row = next(r for r in trainer.state.log_history if "episodes" in r)
    json.dump({k: v for k, v in row.items() if isinstance(v, float | int)}, open(out + ".json", "w"))

# A reward that is no number on one process stops both, before any of them updates.
if expected_world == 2:
    rank, before = trainer.accelerator.process_index, [p.clone() for p in trainer.model.parameters()]
    bad = lambda prompts, **_: [float("nan") if rank == 1 else 0.0] * len(prompts)
    trainer.rewards.sources = [RewardSource(bad)]
    try:
        trainer.update(trainer.rollout(trainer.prompts_of(1)))
    except TrainingError as error:
        assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before))
        open(f"{out}-{rank}.error", "w").write(str(error))
if dist.is_initialized():  # a process that ends with the group's threads alive is sometimes aborted
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # and sometimes even then, as its libraries are taken down
"""


@pytest.mark.fault("not finite")
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", ["separate", "shared"])
def test_two_processes_make_the_step_of_one(
    layout: str, base_folder: Path, reward_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Whitening, token counts and gradients are global: 1 x 16 and 2 x 8 agree on every metric of the update.

    With four roles on one base the gradients are reduced by us, after both backward passes.
    """
    if layout == "shared":
        torch.manual_seed(1)
        lora = model_settings({"use_peft": True, "lora_r": 4})
        model = build_reward_model(base_folder, lora, pad_token_id=tokenizer.pad_token_id)
        reward_folder = tmp_path / "reward"
        save_reward_model(reward_folder, model, tokenizer, samples=[(prompt, "yes") for prompt in PROMPTS[:9]])
    (tmp_path / "s.py").write_text(SCRIPT)
    for name, batch, world in (("one", 16, 1), ("two", 8, 2)):
        arguments = (str(base_folder), str(reward_folder), name, str(batch), str(world))
        run_script("s.py", *arguments, cwd=tmp_path, processes=world)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for key in (
        "loss",
        "grad_norm",
        "grad_norm_critic",
        "policy_loss",
        "value_loss",
        "reward_proxy",
        "length",
        "explained_variance",
    ):
        assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key
    assert two["episodes"] == one["episodes"] == 16
    assert "another process stopped" in (tmp_path / "two-0.error").read_text()
    assert "returned nan for 8 of 8 answers" in (tmp_path / "two-1.error").read_text()


ELEMENTS_SCRIPT = """
import json, os, sys, torch
import torch.distributed as dist
from datasets import Dataset
from trl import RewardConfig
from rlhf import AttributeRewardTrainer, LengthRewardTrainer, RankingRewardTrainer
from rlhf.models.load import build_reward_model, load_tokenizer

torch.set_num_threads(1)
base, kind, out, batch = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
prompts = [[{"role": "user", "content": f"list {i}"}] for i in range(16)]
texts = [["yes", "no cat", "plum"][: 2 + i % 2] for i in range(16)]
weights = {"wit": 1.0, "tact": -0.5}
rankings = [{"prompt": p, "responses": [{"content": t, "score": (i + k) % 3} for k, t in enumerate(texts[i])]}
    for i, p in enumerate(prompts)]
ratings = [{"prompt": p, "completion": [{"role": "assistant", "content": texts[i][0]}],
    "attributes": {"wit": i % 5, "tact": None if i % 3 else 1.0}} for i, p in enumerate(prompts)]
pairs = [{"prompt": p, "chosen": [{"role": "assistant", "content": "yes " * (1 + i % 4)}],
    "rejected": [{"role": "assistant", "content": "no " * (1 + i % 3)}]} for i, p in enumerate(prompts)]
accumulation = 2 if kind == "length" and batch == 8 else 1  # two processes of two micro-batches against one batch
args = RewardConfig(out, per_device_train_batch_size=batch // accumulation, gradient_accumulation_steps=accumulation,
    learning_rate=1e-3, num_train_epochs=1, logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False,
    report_to="none", save_strategy="no", disable_tqdm=True, max_grad_norm=1e9)
tokenizer = load_tokenizer(base, conversational=True)
torch.manual_seed(0)
if kind == "ratings":
    model = build_reward_model(base, pad_token_id=tokenizer.pad_token_id, labels=list(weights))
    trainer = AttributeRewardTrainer(model, args, weights=weights, train_dataset=Dataset.from_list(ratings),
        processing_class=tokenizer)
elif kind == "length":
    model = build_reward_model(base, pad_token_id=tokenizer.pad_token_id, labels=["quality", "length"])
    trainer = LengthRewardTrainer(model, args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
else:
    model = build_reward_model(base, pad_token_id=tokenizer.pad_token_id)
    trainer = RankingRewardTrainer(model, args, objective=kind, train_dataset=Dataset.from_list(rankings),
        processing_class=tokenizer)
assert trainer.accelerator.num_processes == int(sys.argv[5])
trainer.train()
if trainer.accelerator.is_main_process:
    json.dump(trainer.state.log_history[0], open(out + ".json", "w"))
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["plackett_luce", "ratings", "length"])
def test_elements_are_counted_over_processes(kind: str, base_folder: Path, tmp_path: Path) -> None:
    """A ranking, or a rated answer, is one element of the global division, however many answers or ratings it has.

    ODIN's correlation with length is over all answers of the step, of both processes and both their micro-batches.
    """
    (tmp_path / "s.py").write_text(ELEMENTS_SCRIPT)
    for world in (1, 2):
        arguments = (str(base_folder), kind, str(world), str(16 // world), str(world))
        run_script("s.py", *arguments, cwd=tmp_path, processes=world)
    one, both = (json.loads((tmp_path / f"{world}.json").read_text()) for world in (1, 2))
    assert both["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    if kind == "length":
        for name in ("loss", "length_in_quality", "length_in_length"):
            assert both[name] == pytest.approx(one[name], abs=1e-4), name


RECIPE = """
name: small
lab: {demonstrations: 300, pairs: 200, test_pairs: 60, hidden_size: 32, num_hidden_layers: 1}
sft: {learning_rate: 3.0e-3, per_device_train_batch_size: 16, num_train_epochs: 1, logging_steps: 2}
vote: {members: 2, folds: 2}
reward: {learning_rate: 1.0e-3, per_device_train_batch_size: 16, logging_steps: 2, objective: posterior, meta: true, meta_pool: 12}
ppo: {total_episodes: 64, per_device_train_batch_size: 8, num_ppo_epochs: 1, learning_rate: 1.0e-3, max_completion_length: 12}
evaluate: {prompts: 24}
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_command_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "rlhf", "ppo", "r.yaml", "--out", "x"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("round-1/ppo: done") == 1, "one process speaks"
    rows = [json.loads(line) for line in (tmp_path / "x/round-1/ppo/metrics.jsonl").read_text().splitlines()]
    assert [row["episodes"] for row in rows] == [16, 32, 48, 64], "two processes sample sixteen answers a rollout"
    assert (tmp_path / "x/round-1/ppo/manifest.json").is_file()
    votes = [json.loads(line) for line in (tmp_path / "x/round-1/vote/strength.jsonl").read_text().splitlines()]
    assert {vote["strength_votes"] for vote in votes} == {1.0}, "two members, each voting on the half it did not see"
    spread = [json.loads(line) for line in (tmp_path / "x/round-1/reward/metrics.jsonl").read_text().splitlines()]
    assert all(0.4 <= row["meta_spread"] < 0.8 for row in spread)


WAITING_SCRIPT = """
import importlib, os, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch.distributed as dist
from rlhf.errors import Waiting
from rlhf.recipe import load_recipe

module = importlib.import_module("rlhf.pipeline.run")

together = sys.argv[1] == "together"

def wait(*_, is_main, **__):
    if not together and not is_main:
        until = time.monotonic() + 20
        while not Path("ended").exists() and time.monotonic() < until:  # then a launcher would end it
            time.sleep(0.1)
        os._exit(0)
    raise Waiting("people label")

def write_slowly(out):
    time.sleep(1)
    Path("written").touch()

module._run_stage, module.write_report, module.write_cards = wait, write_slowly, lambda out: None
recipe = load_recipe(Path("r.yaml"), [])
stages = {name: SimpleNamespace(together=together) for name in module.STAGES}
dist.init_process_group("gloo")
begin = time.monotonic()
module.STAGES = stages
try:
    module.run(recipe, Path("run"), say=lambda _: None)
except Waiting:
    assert time.monotonic() - begin < 15, "the other waits for a stage, not for this process"
    assert Path("written").exists(), "a launcher ends all processes with the first"
    Path("ended").touch()
else:
    raise AssertionError("it waits for people")
"""


@pytest.mark.parametrize("stage", ["together", "apart"])
def test_no_process_leaves_a_run_that_waits_before_the_first_has_written_it_up(stage: str, tmp_path: Path) -> None:
    """torchrun killed the main process before it wrote summary and report, since the other had raised `Waiting` as well."""
    (tmp_path / "s.py").write_text(WAITING_SCRIPT)
    (tmp_path / "r.yaml").write_text("name: waits\nlab: {}\nppo: {max_completion_length: 12}\n")
    run_script("s.py", stage, cwd=tmp_path, processes=2)
    assert json.loads((tmp_path / "run/summary.json").read_text())["stopped"] == "people label"
