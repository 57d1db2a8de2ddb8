"""Settings that pass `rlhf check` and fail hours later: pairs of settings, drawn at random, each run to its end in a small lab.

    python -m tests.faults.late --minutes 20 --out late.json [--seed 0]

A run passes that ends with 0, or is refused (2) before its first stage. Late is one that is refused when a model was trained
already, or that ends in a traceback. A run takes about half a minute of a processor.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import tests.warm  # noqa: F401
from rlhf import cli

SMALL = """
name: x
lab: {pairs: 120, test_pairs: 50, demonstrations: 120, hidden_size: 32, num_hidden_layers: 2}
vote: {members: 2, folds: 2}
reward: {learning_rate: 1.0e-3}
ppo: {total_episodes: 32, per_device_train_batch_size: 8, num_mini_batches: 2, num_ppo_epochs: 1, max_completion_length: 24}
evaluate: {prompts: 8}
"""
# One of each line is one setting; keys beside each other belong together.
SETTINGS = """
reward.objective=flip
reward.objective=posterior
reward.objective=flip_margin
reward.objective=drop
reward.objective=smoothing
reward.objective=plackett_luce
reward.objective=kwise
reward.objective=regression reward.attributes.things=1 reward.attributes.refusal=1 reward.rating_scale=[0,4]
reward.objective=gated reward.attributes.things=1 reward.attributes.refusal=1 reward.rating_scale=[0,4]
reward.ratings_first=true reward.attributes.things=1 reward.attributes.refusal=1 reward.rating_scale=[0,4]
reward.extra=simcse reward.dropout=0.1
reward.extra=swav_diff reward.dropout=0.1
reward.extra=text
reward.extra=length
reward.extra=bottleneck
reward.extra=critique lab.critiques=true
reward.meta=true
reward.members=2
reward.experts=weights reward.use_peft=true
reward.experts=merged reward.use_peft=true
reward.experts=gate reward.use_peft=true
reward.group_weight=prompt
reward.flip_rate=0.2
reward.center_rewards_coefficient=0.01
reward.eval_strategy=epoch
reward.use_peft=true
reward.use_peft=true reward.load_in_4bit=true
reward.use_peft=true reward.lora_target_modules=[q_proj]
reward.use_peft=true reward.use_dora=true
reward.gradient_checkpointing=true
reward.per_device_train_batch_size=1000
reward.max_length=64
reward.bf16=true
vote.trunk=1 reward.objective=posterior
vote.in_sample=true reward.objective=soft_margin
sft.packing=true
sft.gradient_checkpointing=true
sft.neftune_noise_alpha=5
ppo.use_peft=true
ppo.use_peft=true ppo.load_in_4bit=true
ppo.use_peft=true ppo.lora_target_modules=[q_proj,v_proj]
ppo.gradient_checkpointing=true
ppo.kl_estimator=k2
ppo.kl_estimator=k3
ppo.kl_target=2.0
ppo.kl_limit=0.001
ppo.cliprange_dual=3.0
ppo.reference_mixup=0.5
ppo.ptx_coef=0.1
ppo.adversarial_coef=0.1
ppo.shaping_coef=0.5
ppo.baseline_samples=1
ppo.self_certainty_coef=0.1
ppo.novelty_coef=0.1
ppo.reward_ensemble=worst
ppo.reward_weights=[1.0,1.0]
ppo.normalize_reward=false
ppo.running_reward_norm=true
ppo.critic_warmup=1
ppo.calibrate_values=true
ppo.eval_strategy=steps ppo.eval_steps=1
ppo.save_strategy=steps ppo.save_steps=1 ppo.save_total_limit=1
ppo.temperature=0.5
ppo.max_prompt_length=8
ppo.gradient_accumulation_steps=2
ppo.missing_eos_penalty=null
ppo.reward_clip=null
ppo.disable_dropout=false
ppo.stop_when_unhealthy=true
rounds.count=2 rounds.labels=40 rounds.prompts=32
rounds.count=2 rounds.labels=40 rounds.prompts=32 rounds.second_look=0.25
lab.annotators=exact
lab.flip_rate=0.25
lab.critic_error_rate=0.1
"""
TRAINED = ("sft", "vote", "reward", "ppo")


class Ended(NamedTuple):
    """How a run ended: its settings, exit code, the stages that were finished, its last line; late if it should not have."""

    settings: str
    code: int
    stages: list[str]
    line: str
    is_late: bool


def run(settings: str, place: Path) -> Ended:
    """Run a recipe with settings in a forked process, and look at what it left."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "r.yaml").write_text(SMALL, encoding="utf-8")
    child = os.fork()
    if child == 0:
        log = os.open(place / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2), os.chdir(place)
        sys.argv = ["rlhf", "run", "r.yaml", "--out", "run", *settings.split()]
        code = 1
        try:
            cli.main()
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else 1
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = (place / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    stages = sorted(str(file.parent.relative_to(place / "run")) for file in place.glob("run/round-*/*/manifest.json"))
    has_trained = any(stage.rpartition("/")[2] in TRAINED for stage in stages)
    is_right = code == 0 or (code == 2 and not has_trained)
    return Ended(settings, code, stages, lines[-1][:300], not is_right or any("Traceback" in line for line in lines))


def main() -> None:
    """Draw pairs of settings until the time is up; print and write every run that ended late."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, every = random.Random(arguments.seed), SETTINGS.strip().splitlines()
    end, codes, late = time.monotonic() + 60 * arguments.minutes, Counter[int](), []
    with tempfile.TemporaryDirectory(prefix="rlhf-late-") as folder:
        while time.monotonic() < end:
            ended = run(" ".join(rng.sample(every, 2)), Path(folder) / "run")
            codes[ended.code] += 1
            if ended.is_late:
                late.append(ended._asdict())
                print(json.dumps(late[-1], ensure_ascii=False), flush=True)
    result = {"runs": codes.total(), "codes": dict(codes), "late": late}
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{codes.total()} runs, {len(late)} late; by exit code {dict(codes)}")
    raise SystemExit(1 if late else 0)


if __name__ == "__main__":
    main()
