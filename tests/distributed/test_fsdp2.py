"""Stages whose weights FSDP2 shards over two processes: the numbers and models of processes that hold them whole."""

import json

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from tests.distributed.conftest import REWARD, ROOT, SFT, Launch
from tests.distributed.sharded import FSDP2

PPO = "round-1/ppo"
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
    "explained_variance",
)


def assert_same(launch: Launch, stage: str, one: str, other: str) -> None:
    """Every number of every step, and every weight, to 1e-5: sums over shards are rounded in another order."""
    rows, rows_other = launch.rows(one, stage), launch.rows(other, stage)
    assert len(rows) == len(rows_other) > 1
    for a, b in zip(rows, rows_other, strict=True):
        watched = [key for key in WATCHED if key in a]
        assert a["step"] == b["step"]
        assert {"loss", "grad_norm"} <= set(watched)
        for key in watched:
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-6), (stage, key, a["step"])
    weights, weights_other = launch.weights(one, stage), launch.weights(other, stage)
    assert weights.keys() == weights_other.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(weights_other[key], weight, atol=1e-5, rtol=0, msg=f"{stage} {key}")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("stage", "whole", "sharded"),
    [
        (SFT, "lora-ddp", "killed"),
        (REWARD, "lora-ddp", "killed"),
        (PPO, "lora-ddp", "lora"),
        (REWARD, "terms-ddp", "terms"),
        (PPO, "terms-ddp", "terms"),
        (REWARD, "swav-ddp", "swav"),
    ],
)
def test_sharded_stages_are_those_of_data_parallelism(stage: str, whole: str, sharded: str, launch: Launch) -> None:
    """Two processes each, so that batches, and the answers that PPO samples, are the same."""
    assert_same(launch, stage, whole, sharded)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("stage", "one", "two"),
    [
        (SFT, "one", "killed"),
        (REWARD, "one", "two"),
        (PPO, "one-ppo", "two"),
        (REWARD, "one-lora", "killed"),
        (PPO, "one-lora-ppo", "two-lora"),
    ],
)
def test_sharded_stages_are_those_of_one_process(stage: str, one: str, two: str, launch: Launch) -> None:
    """One process makes each step of two micro-batches: those that the two processes have.

    Not compared are MetaRM, SimCSE and SwAV, each of whose processes draws its own dropout and looks at its own share of the
    prompts, and votes, whose members differ by that; with them, sharded training is compared with data parallelism. Two
    processes sample other answers than one does, so PPO's are planted here.
    """
    assert_same(launch, stage, one, two)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("run", ["killed", "lora", "terms"])
def test_a_process_holds_half(run: str, launch: Launch) -> None:
    """Of the parameters of all roles and of the optimizer's state."""
    files = list((launch.folder / run).glob("held-*.json"))
    assert len(files) % 2 == 0 < len(files), "each process of each stage"
    for file in files:
        facts = json.loads(file.read_text())
        assert facts["world"] == 2
        for groups in (("parameters", "frozen"), ("optimizer",)):
            held, of_all = map(sum, zip(*(facts[group] for group in groups if group in facts), strict=True))
            assert 0 < held <= 0.6 * of_all, (file.stem, groups)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_process_holds_half_of_frozen_models(launch: Launch) -> None:
    """Of a reference and a reward model of their own, which are as large as policy and critic."""
    facts = json.loads((launch.folder / "terms" / "held-ppo-0.json").read_text())
    held, of_all = facts["frozen"]
    assert of_all == facts["parameters"][1]
    assert 0.4 * of_all <= held <= 0.6 * of_all


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_samples_are_shown_of_whole_weights(launch: Launch) -> None:
    samples = [(launch.folder / run / SFT / "samples.jsonl").read_text() for run in ("lora-ddp", "killed")]
    assert samples[0].count("\n") == samples[1].count("\n") > 0


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        ("idle", "FSDP was asked for (ACCELERATE_USE_FSDP=true), but accelerate does not shard on cpu"),
        ("fsdp1", "FSDP 1 is not supported; set fsdp_version: 2 in accelerate's configuration."),
    ],
)
def test_sharding_that_is_not_at_work_is_refused(run: str, sentence: str, launch: Launch) -> None:
    """accelerate leaves FSDP out on a CPU without a word; every process would hold all of the model."""
    (result,) = launch.results(run)
    assert result["code"] == 2
    assert sentence in result["stderr"]


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
