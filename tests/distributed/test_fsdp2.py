"""Stages whose weights FSDP2 shards over two processes: the numbers and models of two processes that hold them whole."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from tests.distributed.sharded import FSDP2

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
RECIPE = """
name: small
lab: {demonstrations: 100, pairs: 100, test_pairs: 50, hidden_size: 32, num_hidden_layers: 2}
sft: {learning_rate: 3.0e-3, per_device_train_batch_size: 8, num_train_epochs: 1, logging_steps: 1, max_grad_norm: 1.0e+9}
vote: {members: 2, folds: 2, per_device_train_batch_size: 8, learning_rate: 1.0e-3}
reward: {learning_rate: 1.0e-3, per_device_train_batch_size: 8, logging_steps: 1, max_grad_norm: 1.0e+9}
ppo: {total_episodes: 32, per_device_train_batch_size: 8, num_ppo_epochs: 1, learning_rate: 1.0e-3, max_completion_length: 12,
  max_grad_norm: 1.0e+9, logging_steps: 1}
evaluate: {prompts: 16}
"""
# What each run asks for beside it: four roles on one base; models of their own, and the two terms that take gradients of theirs.
RUNS = {
    "lora": ["reward.use_peft=true", "reward.lora_dropout=0.0", "ppo.use_peft=true", "ppo.lora_dropout=0.0"],
    "terms": ["reward.objective=posterior", "reward.extra=simcse", "reward.meta=true", "reward.meta_pool=12"],
}
WATCHED = (
    "loss",
    "grad_norm",
    "accuracy",
    "contrastive",
    "meta_spread",
    "meta_gradient",
    "grad_norm_critic",
    "reward_proxy",
    "kl",
)


def command(*arguments: str) -> list[str]:
    """Return the command that starts `rlhf` on two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [*launcher, str(HERE / "sharded.py"), arguments[0], "r.yaml", "--out", *arguments[1:]]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def run(folder: Path, name: str, *overrides: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `rlhf ppo` on two processes."""
    (folder / "r.yaml").write_text(RECIPE)
    return subprocess.run(
        command("ppo", name, *overrides),
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def rows(folder: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", list(RUNS))
def test_sharded_stages_are_those_of_data_parallelism(name: str, tmp_path: Path) -> None:
    """Losses, gradient norms and saved weights; each process holds half of the parameters and of the optimizer's state."""
    for way, more in (("ddp", {}), ("fsdp2", {**FSDP2, "SHARD_ON_CPU": "true"})):
        result = run(tmp_path, way, *RUNS[name], **more)
        assert result.returncode == 0, result.stderr[-3000:]
    ddp, fsdp = tmp_path / "ddp", tmp_path / "fsdp2"
    for stage in ("round-0/sft", "round-1/reward", "round-1/ppo"):
        one, other = rows(ddp, stage), rows(fsdp, stage)
        assert len(one) == len(other) > 1
        for a, b in zip(one, other, strict=True):
            watched = [key for key in WATCHED if key in a]
            assert "loss" in watched
            assert "grad_norm" in watched
            for key in watched:
                assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-6), (stage, key, a["step"])
        saved, sharded = weights(ddp / stage / "model"), weights(fsdp / stage / "model")
        assert saved.keys() == sharded.keys()
        for key, value in saved.items():
            torch.testing.assert_close(sharded[key], value, atol=1e-5, rtol=0, msg=f"{stage} {key}")
        held = json.loads((fsdp / f"held-{Path(stage).name}-0.json").read_text())
        assert held["world"] == 2
        assert held["parameters"] <= 0.6 * held["all_parameters"]
        assert held["optimizer"] <= 0.6 * held["all_optimizer"]
    samples = [(folder / "round-0/sft/samples.jsonl").read_text() for folder in (ddp, fsdp)]
    assert samples[0].count("\n") == samples[1].count("\n") > 0


def test_sharding_that_is_not_at_work_is_refused(tmp_path: Path) -> None:
    """accelerate leaves FSDP out on a CPU without a word; every process would hold all of the model."""
    result = run(tmp_path, "x", **FSDP2)
    assert result.returncode != 0
    assert "FSDP was asked for (ACCELERATE_USE_FSDP=true), but accelerate does not shard on cpu" in result.stderr


def test_a_launch_that_started_one_process_is_refused(tmp_path: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    result = subprocess.run(
        [*launcher, "-m", "rlhf", "run", "r.yaml", "--out", "x"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode != 0
    assert "accelerate was asked for 2 processes and started one" in result.stderr
    assert "torchrun --nproc_per_node 2 -m rlhf" in result.stderr
    assert not (tmp_path / "x").exists()


def test_the_shipped_configuration_is_the_one_that_is_tested() -> None:
    """accelerate reads every file, and makes of fsdp2.yaml the settings that these tests give by hand."""
    files = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))
    assert {file.stem for file in files} == {"1gpu", "ddp", "fsdp2", "fsdp2_offload"}
    for file in files:
        config = load_config_from_file(str(file))
        assert config.mixed_precision == "bf16"
        if file.stem.startswith("fsdp2"):
            settings = {key.upper(): str(value).lower() for key, value in config.fsdp_config.items()}
            assert settings["FSDP_OFFLOAD_PARAMS"] == str(file.stem == "fsdp2_offload").lower()
            assert {key: settings[key].lower() for key in FSDP2 if key in settings} == {
                key: value.lower() for key, value in FSDP2.items() if key != "ACCELERATE_USE_FSDP"
            }
