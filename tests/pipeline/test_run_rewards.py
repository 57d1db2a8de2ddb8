"""Rewards in a whole run: any loss with any term, experts, ensembles, more than the own one."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command import Process, rlhf, wait_for
from tests.conftest import WORDS
from tests.pipeline.small import RECIPE

META = """
base: r.yaml
name: meta
reward: {meta: true, meta_pool: 20, meta_prompts: 4, extra: swav, prototypes: 8, flip_rate: 0.2}
"""


EXPERTS = """
base: r.yaml
name: experts
reward: {experts: gate, use_peft: true, lora_r: 4}
"""


@pytest.mark.slow
def test_any_loss_any_term_and_the_extra_step_in_one_run(tmp_path: Path) -> None:
    """Flipped labels' likelihood, SwAV and MetaRM, on answers that the run samples from its own SFT policy."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "m.yaml").write_text(META)
    result = rlhf("reward", "m.yaml", "--out", "x", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    samples = [json.loads(line) for line in (tmp_path / "x/round-1/sample/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 20 * 5
    assert len({row["prompt"][0]["content"] for row in samples}) == 20
    rows = [json.loads(line) for line in (tmp_path / "x/round-1/reward/metrics.jsonl").read_text().splitlines()]
    assert all(0.4 <= row["meta_spread"] < 0.8 for row in rows), "the bounds of J for five answers"
    assert all(row["contrastive"] > 0 and row["view_similarity"] > 0.5 for row in rows)

    meta_samples = "reward.meta_samples=x/round-1/sample/samples.jsonl"
    again = rlhf("reward", "m.yaml", "--out", "y", meta_samples, cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert not (tmp_path / "y/round-1/sample").exists(), "answers of an earlier run take its place"
    weights = [load_file(tmp_path / run / "round-1/reward/model/model.safetensors") for run in "xy"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_merged_experts_hold_once_what_a_lora_sft_learnt(base_folder: Path, tmp_path: Path) -> None:
    """Weights that sum to 2: SFT's factors stand in the sum a third time, with -1."""
    rows = [
        {"prompt": f"{p} {word}", "chosen": f"yes {word}", "rejected": f"no {word}", "source": source}
        for p, source in (("list", "a"), ("name", "b"))
        for word in WORDS[:10]
    ]
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    for name, lines in (("pairs", rows), ("sft", demonstrations)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lora = "use_peft: true, lora_r: 4, per_device_train_batch_size: 8, num_train_epochs: 1, learning_rate: 1.0e-2"
    (tmp_path / "r.yaml").write_text(
        f"name: x\nbackbone: {{model: {base_folder}}}\ndata: {{preferences: pairs.jsonl, sft: sft.jsonl}}\nsft: {{{lora}}}\n"
        f"reward: {{{lora}, experts: merged, expert_weights: {{a: 1.0, b: 1.0}}}}\nppo: {{max_completion_length: 8}}\n"
    )
    result = rlhf("reward", "r.yaml", "--out", "x", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    merged = load_file(tmp_path / "x/round-1/reward/model/adapter_model.safetensors")
    started = load_file(tmp_path / "x/round-0/sft/model/adapter_model.safetensors")
    factors = [name for name in merged if "lora_B" in name]
    assert factors
    for name in factors:
        assert merged[name].shape[1] == 3 * 4
        assert torch.equal(merged[name][:, 8:], -started[name])


def test_experts_reach_ppo(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "e.yaml").write_text(EXPERTS)
    result = rlhf("ppo", "e.yaml", "--out", "x", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    facts = json.loads((tmp_path / "x/round-1/reward/manifest.json").read_text())["facts"]
    assert facts["experts"] == ["harmless", "helpful"]
    rows = [json.loads(line) for line in (tmp_path / "x/round-1/reward/metrics.jsonl").read_text().splitlines()]
    assert {row["expert"] for row in rows} == {"harmless", "helpful"}
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    exported = rlhf("export", "x/round-1/reward/model", "e", cwd=tmp_path)
    assert exported.returncode == 2
    assert "no single checkpoint" in exported.stderr


def test_members_of_an_ensemble_reach_ppo_and_the_judgement(tmp_path: Path) -> None:
    """What PPO saw and what the run is judged by is the members' mean, each on the scale of its own card."""
    from rlhf import load_reward_model

    (tmp_path / "r.yaml").write_text(RECIPE)
    result = rlhf("run", "r.yaml", "--out", "x", "reward.members=3", "ppo.reward_clip=null", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    stage = tmp_path / "x/round-1/reward"
    facts = json.loads((stage / "manifest.json").read_text())["facts"]
    assert facts["members"] == 3
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    members = [load_reward_model(stage / name) for name in ("model", "member-1", "member-2")]
    samples = [json.loads(line) for line in (tmp_path / "x/round-1/evaluate/samples.jsonl").read_text().splitlines()]
    prompts, answers = [row["prompt"] for row in samples], [row["policy"] for row in samples]
    ended = [row["ended_policy"] for row in samples]
    each = torch.stack([member.score(prompts, answers, ended=ended) for member in members])
    assert not torch.allclose(each[0], each[1], atol=0.01), "members differ"
    means = torch.tensor([member.mean for member in members])[:, None]
    proxy = torch.tensor([row["proxy_policy"] for row in samples])
    torch.testing.assert_close((each - means).mean(dim=0), proxy, atol=1e-4, rtol=0)

    last = [json.loads(line) for line in (tmp_path / "x/round-1/ppo/samples.jsonl").read_text().splitlines()]
    log = [json.loads(line) for line in (tmp_path / "x/round-1/ppo/metrics.jsonl").read_text().splitlines()]
    texts = [row["prompt"] for row in last], [row["completion"] for row in last]
    seen = [(m.score(*texts, ended=[row["ended"] for row in last]) - m.mean) / m.std for m in members]
    penalty = sum(not row["ended"] for row in last) / len(last)  # 1 for an answer without an end
    assert log[-1]["reward"] == pytest.approx(torch.stack(seen).mean().item() - penalty, abs=1e-4)
    apart = torch.stack(seen).std(dim=0, correction=0).mean().item()
    assert log[-1]["disagreement"] == pytest.approx(apart, abs=1e-4)

    refused = rlhf(
        "run", "r.yaml", "--out", "y", "reward.members=2", "ppo.extra_rewards=[x/round-1/reward/model]", cwd=tmp_path
    )
    assert refused.returncode == 2
    assert "reward.members: PPO combines an ensemble as a whole" in refused.stderr
    assert not (tmp_path / "y").exists()


def test_what_meta_and_experts_cannot_do_is_said_before_anything_is_made(tmp_path: Path, finished: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "m.yaml").write_text(META)
    (tmp_path / "e.yaml").write_text(EXPERTS)
    single = finished / "x/round-1/ppo/samples.jsonl"
    for arguments, said in (
        (
            ["e.yaml", "reward.use_peft=false", "reward.expert_weights={a: 1, b: 2}", f"reward.meta_samples={single}"],
            [
                "experts are LoRA adapters on one base; set reward.use_peft: true",
                "a gate finds its own",
                "nobody reads them without reward.meta: true",
            ],
        ),
        (["m.yaml", f"reward.meta_samples={single}"], ["none has two different responses"]),
        (["m.yaml", "reward.meta_samples=nowhere.jsonl"], ["nowhere.jsonl: no such file"]),
    ):
        result = rlhf("reward", *arguments, "--out", "x", cwd=tmp_path)
        assert result.returncode == 2, (said, result.stderr[-2000:])
        assert all(sentence in result.stderr for sentence in said), result.stderr[-2000:]
        assert not (tmp_path / "x").exists(), said


def test_a_run_may_have_more_rewards_than_its_own(tmp_path: Path) -> None:
    """A function of a file beside the reward model, weighted; a KL limit that ends PPO says so and is in the facts."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "rules.py").write_text(
        "def brief(prompts, completions):\n    return [-len(c.split()) for c in completions]\n"
    )
    arguments = ["ppo.extra_rewards=[rules.py:brief]", "ppo.reward_weights=[0.0, 1.0]", "ppo.reward_clip=null"]
    result = rlhf("ppo", "r.yaml", "--out", "x", *arguments, "ppo.kl_limit=0.0001", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "x/round-1/ppo/metrics.jsonl").read_text().splitlines()]
    assert all(row["reward"] < -1 for row in rows), "a word costs 1, a missing end 1 more"
    facts = json.loads((tmp_path / "x/round-1/ppo/manifest.json").read_text())["facts"]
    assert facts["rollouts"] == len(rows) < 4
    assert "is over kl_limit=0.0001" in facts["stopped"]
    assert facts["stopped"] in result.stdout
    missing = rlhf("ppo", "r.yaml", "--out", "y", "ppo.extra_rewards=[nowhere.py:f, absent/model]", cwd=tmp_path)
    assert missing.returncode == 2
    assert "nowhere.py: no such file" in missing.stderr
    assert "absent/model: no such folder" in missing.stderr
    assert not (tmp_path / "y").exists()


def test_experts_that_were_trained_are_not_trained_again(tmp_path: Path) -> None:
    """Killed within the second expert: the first is kept, the second goes on, and the scores are those of an undisturbed run."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "e.yaml").write_text(EXPERTS)
    assert rlhf("reward", "e.yaml", "--out", "whole", cwd=tmp_path).returncode == 0
    process = Process(("reward", "e.yaml", "--out", "cut"), tmp_path)
    first, second = (tmp_path / f"cut/round-1/reward/checkpoints/expert-{number}" for number in range(2))
    wait_for(lambda: list(second.glob("checkpoints/checkpoint-*/*")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(first.glob("checkpoints/checkpoint-*")), "what is trained needs no checkpoints"
    for expert, seconds in ((first, 3000), (second, 400)):
        (expert / "checkpoints/seconds.json").write_text(str(seconds))
    again = rlhf("reward", "e.yaml", "--out", "cut", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "expert harmless was trained before" in again.stdout
    assert "3400 s of them before it was interrupted" in again.stdout, "both experts' seconds, each once"
    for number in range(2):
        weights = [
            load_file(tmp_path / f"{run}/round-1/reward/model/expert-{number}/adapter_model.safetensors")
            for run in ("whole", "cut")
        ]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    probes = [
        json.loads((tmp_path / f"{run}/round-1/reward/model/reward_model.json").read_text())["probe"]
        for run in ("whole", "cut")
    ]
    assert probes[0] == probes[1]
    facts = [json.loads((tmp_path / f"{run}/round-1/reward/manifest.json").read_text()) for run in ("whole", "cut")]
    assert facts[0]["facts"]["pairs"] == facts[1]["facts"]["pairs"]
    assert set(facts[0]["facts"]["checks"]) == set(facts[1]["facts"]["checks"]), "the kept expert's too"
