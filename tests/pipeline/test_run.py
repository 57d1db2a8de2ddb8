"""The whole command, on a lab small enough for seconds: finished runs, killed runs, foreign data, bad input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.command import Process, rlhf, wait_for

RECIPE = """
name: small
lab: {demonstrations: 300, pairs: 200, test_pairs: 60, hidden_size: 64, num_hidden_layers: 1}
sft: {learning_rate: 3.0e-3, per_device_train_batch_size: 32, num_train_epochs: 2, logging_steps: 1, save_steps: 2}
reward: {learning_rate: 1.0e-3, per_device_train_batch_size: 16, num_train_epochs: 2, logging_steps: 1, save_steps: 4}
ppo: {total_episodes: 64, per_device_train_batch_size: 8, num_mini_batches: 2, num_ppo_epochs: 2, learning_rate: 1.0e-3,
      max_completion_length: 12, save_steps: 4}
evaluate: {prompts: 24}
"""
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
STAGES = ["round-0/lab", "round-0/data", "round-0/sft", "round-1/reward", "round-1/ppo", "round-1/evaluate"]


def digests(run: Path, until: str = STAGES[-1]) -> dict[str, str]:
    """sha256 of every weight file of the stages up to this one."""
    files = {}
    for stage in STAGES[: STAGES.index(until) + 1]:
        for file in json.loads((run / stage / "manifest.json").read_text())["files"]:
            if file["path"].startswith("model/") and file["path"].endswith(".safetensors"):
                files[f"{stage}/{file['path']}"] = file["sha256"]
    return files


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run from a cold start, as a user starts it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "r.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "rlhf", "run", "r.yaml", "--out", "x"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_the_contract_of_a_run(finished: Path) -> None:
    run = finished / "x"
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) >= {"recipe", "seed", "seconds", "lab", "sft", "rounds", "best_of_16", "gold_gap_closed"}
    assert set(summary["lab"]) == {"flip_rate", "annotator_agreement", "gold_sft", "gold_best_of_16", "gold_max"}
    (only,) = summary["rounds"]
    assert {"accuracy", "accuracy_true", "ece", "length_baseline"} <= set(only["reward"])
    assert {"proxy", "gold", "kl", "win_rate"} <= set(only["policy"])
    assert {"gold", "kl"} <= set(summary["best_of_16"]["by_reward"])
    names = {"finished files unchanged", "nothing lost", "KL agrees with evaluation"}
    assert names <= set(summary["checks"])
    for name, check in summary["checks"].items():
        assert set(check) == {"statistic", "low", "bound", "unit", "held", "times", "stage"}
        assert check["held"] or name == "policy ends", name
        assert (run / check["stage"] / "manifest.json").is_file()
    # The definition, from the parts.
    best, sft = summary["best_of_16"]["by_gold"]["gold"], summary["sft"]["gold"]
    assert summary["gold_gap_closed"] == pytest.approx((only["policy"]["gold"] - sft) / (best - sft))
    low, high = summary["gold_gap_closed_ci"]
    assert low < summary["gold_gap_closed"] < high
    assert only["policy"]["gold_gap_closed_ci"] == [low, high]
    low, high = only["policy"]["gold_ci"]
    assert low <= only["policy"]["gold"] <= high
    for stage in STAGES:
        assert (run / stage / "manifest.json").is_file()
    rows = [json.loads(line) for line in (run / "round-1/ppo/metrics.jsonl").read_text().splitlines()]
    keys = {
        "step",
        "loss",
        "episodes",
        "reward_proxy",
        "reward_gold",
        "kl",
        "entropy",
        "clip_fraction",
        "explained_variance",
        "share_without_eos",
    }
    assert all(keys <= set(row) for row in rows)
    assert [row["episodes"] for row in rows] == [16, 32, 48, 64]
    assert "resumed_from" not in (run / "round-0/sft/metrics.jsonl").read_text()
    page = (run / "report.html").read_text()
    assert "What this run checked" in page
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "https://" not in page


def test_saved_models_load_with_plain_transformers(finished: Path) -> None:
    run = (finished / "x").resolve()
    code = f"""
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
policy = AutoModelForCausalLM.from_pretrained("{run}/round-1/ppo/model")
reward = AutoModelForSequenceClassification.from_pretrained("{run}/round-1/reward/model")
tokenizer = AutoTokenizer.from_pretrained("{run}/round-1/ppo/model")
assert reward.config.problem_type == "regression" and reward.config.num_labels == 1
ids = tokenizer("List", return_tensors="pt")
assert policy(**ids).logits.shape[-1] == len(tokenizer)
print(reward(**ids).logits.item())
"""
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, capture_output=True)


def test_the_report_says_where_the_run_comes_from(finished: Path) -> None:
    run = finished / "x"
    page = (run / "report.html").read_text()
    key = json.loads((run / "round-1/ppo/manifest.json").read_text())["key"]
    for part in (
        "How to reproduce it",
        "rlhf run r.yaml --out NEW",
        key[:12],
        "best of n by true reward",
        "Length over PPO",
    ):
        assert part in page, part
    card = (run / "round-1/ppo/model/README.md").read_text()
    gold = json.loads((run / "summary.json").read_text())["rounds"][0]["policy"]["gold"]
    assert f"| true reward | {gold:.3f} [" in card
    listed = {file["path"] for file in json.loads((run / "round-1/ppo/manifest.json").read_text())["files"]}
    assert "model/README.md" not in listed, "a card is written again; what the manifest vouches for is not"


def test_best_of_n_in_a_run_starts_at_sft_and_ends_at_best_of_16(finished: Path) -> None:
    facts = json.loads((finished / "x/round-1/evaluate/manifest.json").read_text())["facts"]
    curve = facts["best_of_n"]
    assert [row["n"] for row in curve] == [1, 2, 4, 8, 16]
    assert curve[0]["by_reward"] == pytest.approx(curve[0]["by_gold"])
    assert curve[-1]["by_gold"] == pytest.approx(facts["best_of_16"]["by_gold"]["gold"])
    assert curve[-1]["kl"] == pytest.approx(facts["best_of_16"]["by_reward"]["kl"])


def test_a_finished_run_repeats_nothing(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished / "x").rglob("manifest.json")}
    result = rlhf("run", "r.yaml", "--out", "x", cwd=finished)
    assert result.returncode == 0
    assert result.stdout.count("done before") == len(STAGES)
    assert before == {p: p.stat().st_mtime_ns for p in (finished / "x").rglob("manifest.json")}


@pytest.mark.fault("a run that changed")
def test_a_run_of_another_recipe_is_refused(finished: Path) -> None:
    result = rlhf("run", "r.yaml", "--out", "x", "ppo.kl_coef=0.2", cwd=finished)
    assert result.returncode == 2
    assert "ppo.kl_coef was None, is 0.2" in result.stderr


def begin_again_at(stage: str, finished: Path, folder: Path, *arguments: str) -> Process:
    """Copy a finished run without this stage and all after it, and start the command."""
    (folder / "r.yaml").write_text(RECIPE)
    shutil.copytree(finished / "x", folder / "x", symlinks=True)
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(folder / "x" / later)
    return Process(("run", "r.yaml", "--out", "x", *arguments), folder)


def a_checkpoint(run: Path, stage: str) -> bool:
    return any((run / stage).glob("checkpoints/checkpoint-*/complete.json"))


# Of each trained stage: its steps an epoch, how often it saves, and the checkpoint after which it is killed. PPO's epochs
# here are rollouts of 2 minibatches x 2 PPO epochs.
KILLS = [
    ("round-0/sft", 10, 2, 4),
    ("round-0/sft", 10, 2, 12),
    ("round-1/reward", 13, 4, 4),
    ("round-1/reward", 13, 4, 16),
    ("round-1/ppo", 4, 4, 4),
    ("round-1/ppo", 4, 4, 8),
]


@pytest.mark.fault("kill at any moment")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "epoch_steps", "save_steps", "after"),
    KILLS,
    ids=[f"{stage.split('/')[1]} in epoch {-(-after // steps)}" for stage, steps, _, after in KILLS],
)
def test_kill_9_and_the_same_command_again(
    finished: Path, tmp_path: Path, stage: str, epoch_steps: int, save_steps: int, after: int
) -> None:
    """Killed after a checkpoint, the run goes on from its last one, repeats at most `save_steps` updates, and ends with
    the same weights, bit for bit."""
    until = STAGES[-1] if after == KILLS[1][-1] else stage  # one of them to the end: what follows is the same too
    process = begin_again_at(stage, finished, tmp_path, "--until", until.split("/")[1])
    mark = tmp_path / "x" / stage / f"checkpoints/checkpoint-{after}/complete.json"
    wait_for(mark.is_file, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    assert mark.is_file()
    assert not (tmp_path / "x" / stage / "manifest.json").exists(), "the kill came too late to mean anything"
    result = rlhf("run", "r.yaml", "--out", "x", "--until", until.split("/")[1], cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert digests(tmp_path / "x", until) == digests(finished / "x", until)
    rows = [json.loads(line) for line in (tmp_path / "x" / stage / "metrics.jsonl").read_text().splitlines()]
    (resumed,) = [i for i, row in enumerate(rows) if "resumed_from" in row]
    step = rows[resumed]["resumed_from"]
    assert step >= after
    reached = max(row["step"] for row in rows[:resumed])
    assert 0 <= reached - step <= save_steps, "what is repeated"
    assert min(row["step"] for row in rows[resumed + 1 :]) > step, "no step before the checkpoint is repeated"
    assert rows[-1]["step"] > epoch_steps, "the stage has more than one epoch"


@pytest.mark.fault("kill at any moment")
def test_kill_9_in_the_evaluation(finished: Path, tmp_path: Path) -> None:
    process = begin_again_at("round-1/evaluate", finished, tmp_path)
    wait_for((tmp_path / "x/round-1/evaluate/started.json").is_file, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "x/round-1/evaluate/manifest.json").exists(), "the kill came too late to mean anything"
    assert rlhf("run", "r.yaml", "--out", "x", cwd=tmp_path).returncode == 0
    before, after = (json.loads((run / "x/summary.json").read_text()) for run in (finished, tmp_path))
    assert {**before, "seconds": 0} == {**after, "seconds": 0}


@pytest.mark.fault("damaged checkpoint", "checkpoint zeroed")
@pytest.mark.parametrize(
    ("stage", "damaged"), [("round-0/sft", "complete.json"), ("round-1/ppo", "critic/model.safetensors")]
)
def test_a_damaged_checkpoint_gives_way_to_the_older_one(
    finished: Path, tmp_path: Path, stage: str, damaged: str
) -> None:
    """The mark cut off, or a file of the right size full of zeros, and a last metric that was cut off: said, and the same bits."""
    until = stage.split("/")[1]
    process = begin_again_at(stage, finished, tmp_path, "--until", until)
    checkpoints = tmp_path / "x" / stage / "checkpoints"
    wait_for((checkpoints / "checkpoint-8/complete.json").is_file, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest, older = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))[:2]
    file = newest / damaged
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2] if damaged == "complete.json" else bytes(size))
    with (tmp_path / "x" / stage / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 9, "lo')
    result = rlhf("run", "r.yaml", "--out", "x", "--until", until, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"leaves out {newest.name}, whose writing was cut off or whose files are damaged" in result.stdout
    assert f"goes on from {older.name}" in result.stdout
    assert "leaves out the last line of metrics.jsonl" in result.stdout
    assert digests(tmp_path / "x", stage) == digests(finished / "x", stage)


@pytest.mark.fault("weights replaced")
@pytest.mark.parametrize("damage", ["replaced", "missing"])
def test_a_finished_file_that_changed_is_refused_by_name(finished: Path, tmp_path: Path, damage: str) -> None:
    process = begin_again_at("round-1/evaluate", finished, tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    file = tmp_path / "x/round-1/ppo/model/model.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        weights = file.read_bytes()
        file.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    result = rlhf("run", "r.yaml", "--out", "x", cwd=tmp_path)
    assert result.returncode == 2
    before = {"replaced": "round-1/evaluate: Since their stage was done: ", "missing": "x: of finished stages, "}
    assert f"{before[damage]}x/round-1/ppo/model/model.safetensors" in result.stderr
    assert "Traceback" not in result.stderr


FULL_DISK = """
import errno, sys
from transformers import Trainer
write = Trainer._save_optimizer_and_scheduler
def full(self, folder):
    if self.state.global_step >= 8:
        raise OSError(errno.ENOSPC, "No space left on device", folder)
    write(self, folder)
Trainer._save_optimizer_and_scheduler = full
sys.argv = ["rlhf", "run", "r.yaml", "--out", "x", "--until", "reward"]
from rlhf.cli import main
main()
"""


@pytest.mark.fault("full disk")
@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint(finished: Path, tmp_path: Path) -> None:
    """The third checkpoint of the reward model cannot be written: one sentence, exit 1, and the second is resumed from."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    shutil.copytree(finished / "x", tmp_path / "x", symlinks=True)
    for later in STAGES[STAGES.index("round-1/reward") :]:
        shutil.rmtree(tmp_path / "x" / later)
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )  # fmt: skip
    assert result.returncode == 1
    assert "round-1/reward: no space left on the device that holds x." in result.stderr
    assert "Traceback" not in result.stderr
    result = rlhf("run", "r.yaml", "--out", "x", "--until", "reward", cwd=tmp_path)
    assert "leaves out checkpoint-8, whose writing was cut off" in result.stdout
    assert "goes on from checkpoint-4" in result.stdout
    assert digests(tmp_path / "x", "round-1/reward") == digests(finished / "x", "round-1/reward")


@pytest.mark.fault("signals")
@pytest.mark.parametrize(
    ("stage", "sent", "code"), [("round-0/sft", signal.SIGTERM, 143), ("round-1/ppo", signal.SIGINT, 130)]
)
def test_a_signal_saves_and_exits(finished: Path, tmp_path: Path, stage: str, sent: signal.Signals, code: int) -> None:
    """The checkpoint is of the step that the signal found, and going on from it gives the uninterrupted weights."""
    until = stage.split("/")[1]
    process = begin_again_at(stage, finished, tmp_path, "--until", until)
    wait_for((tmp_path / "x" / stage / "metrics.jsonl").is_file, process)
    process.send_signal(sent)
    stopped = process.wait(60)
    assert stopped.returncode == code, stopped.stderr[-2000:]
    assert f"{sent.name}: stopped. The same command goes on" in stopped.stderr
    assert a_checkpoint(tmp_path / "x", stage)
    noted = tmp_path / "x" / stage / "checkpoints/seconds.json"
    assert 0 < json.loads(noted.read_text()) < 60
    noted.write_text("1000")  # a stage of which this much had been done
    again = rlhf("run", "r.yaml", "--out", "x", "--until", until, cwd=tmp_path)
    assert again.returncode == 0
    assert "1000 s of them before it was interrupted" in again.stdout
    assert 1000 < json.loads((tmp_path / "x" / stage / "manifest.json").read_text())["seconds"] < 1060
    assert 1000 < json.loads((tmp_path / "x/summary.json").read_text())["seconds"][until] < 1060
    assert digests(tmp_path / "x", stage) == digests(finished / "x", stage)


@pytest.mark.fault("mistakes in a recipe")
def test_a_misspelt_key_creates_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("learning_rate: 3.0e-3", "lerning_rate: 3.0e-3"))
    result = rlhf("run", "r.yaml", "--out", "x", cwd=tmp_path)
    assert result.returncode == 2
    assert "r.yaml:4: unknown key sft.lerning_rate; did you mean 'learning_rate'?" in result.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.fault("mistakes in a recipe", "folder in use")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nowhere.yaml"], "cannot read the recipe"),
        (
            [
                "run",
                "r.yaml",
                "--out",
                "x",
                "lab=null",
                "backbone.model=m",
                "data.sft=s.jsonl",
                "data.preferences=p.jsonl",
            ],
            "data.sft: s.jsonl: no such file.",
        ),
        (["run", "r.yaml", "--out", "x", "--until", "sleep"], "--until sleep"),
        (["run", "r.yaml", "--out", "full"], "not empty and not a run"),
        (["run", "r.yaml", "--out", "x", "ppo.lam=2", "ppo.temperature=0"], "ppo.temperature is 0; it must be 0.01"),
        (
            ["run", "r.yaml", "--out", "x", "sft.eval_steps=5", "reward.bf16=true", "reward.fp16=true"],
            "reward: At most one",
        ),
        (["fly", "r.yaml"], "No such command"),
        (["check", "r.yaml", "bad.yaml"], "unknown section 'labb'"),
    ],
)
def test_bad_input_is_exit_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "bad.yaml").write_text("name: x\nlabb: {}\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    result = rlhf(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "x").exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    result = rlhf("run", "r.yaml", "--out", "x", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0
    assert "round-1/ppo" in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_foreign_data_with_a_gold_function_and_a_model_from_nothing(tmp_path: Path) -> None:
    """Local demonstrations, pairs and prompts, LoRA after a full SFT, a true reward of one's own, no lab."""
    words = [f"word{i}" for i in range(40)]
    write(
        tmp_path / "sft.jsonl",
        [{"prompt": f"say {w}", "completion": f"{w} {'please' if i % 2 else 'now'}"} for i, w in enumerate(words * 4)],
    )
    write(
        tmp_path / "pairs.jsonl",
        [{"prompt": f"say {w} {i}", "chosen": f"{w} please", "rejected": f"{w} now"} for i in range(4) for w in words],
    )
    write(tmp_path / "prompts.jsonl", [{"prompt": f"say {a} {b}"} for a in words[:12] for b in words[:12]])
    (tmp_path / "mine.py").write_text(
        "def polite(prompts, completions):\n    return [float('please' in c) for c in completions]\n"
    )
    (tmp_path / "r.yaml").write_text("""
name: foreign
backbone:
  from_scratch: {architecture: qwen3, vocab_size: 400, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64}
data: {sft: sft.jsonl, preferences: pairs.jsonl, prompts: prompts.jsonl}
sft: {use_peft: true, learning_rate: 3.0e-3, per_device_train_batch_size: 16, logging_steps: 5}
reward: {use_peft: true, lora_r: 4, learning_rate: 3.0e-3, per_device_train_batch_size: 8, logging_steps: 5}
ppo: {use_peft: true, lora_r: 4, total_episodes: 32, per_device_train_batch_size: 16, num_ppo_epochs: 1, learning_rate: 1.0e-3, max_completion_length: 8}
evaluate: {gold: mine.py:polite, prompts: 16}
""")
    result = rlhf("run", "r.yaml", "--out", "x", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "all of them are trained, not an adapter" in result.stdout
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert summary["lab"] == dict.fromkeys(summary["lab"])
    assert 0 <= summary["rounds"][0]["policy"]["gold"] <= 1
    assert 0 <= summary["best_of_16"]["by_gold"]["gold"] <= 1
    judged = summary["rounds"][0]["reward"]
    assert judged["accuracy_true"] == judged["accuracy"], "here every label is what the gold function says"
    assert (tmp_path / "x/round-1/ppo/model/adapter_config.json").is_file()
    assert (tmp_path / "x/round-1/reward/model/adapter_config.json").is_file()


def test_qlora_in_every_stage(tmp_path: Path, finished: Path) -> None:
    """NF4 on the CPU: SFT, reward model and PPO as adapters on one 4-bit base, saved and read back."""
    quantised = "{use_peft: true, load_in_4bit: true, dtype: bfloat16, lora_r: 4, learning_rate: 1.0e-3, per_device_train_batch_size: 8"
    base = (finished / "x/round-0/sft/model").resolve()
    (tmp_path / "r.yaml").write_text(f"""
name: quantised
lab: {{demonstrations: 100, pairs: 100, test_pairs: 50, hidden_size: 64, num_hidden_layers: 1}}
backbone: {{model: {base}}}
sft: {quantised}}}
reward: {quantised}}}
ppo: {quantised}, total_episodes: 16, num_ppo_epochs: 1, max_completion_length: 6}}
evaluate: {{prompts: 8}}
""")
    result = rlhf("run", "r.yaml", "--out", "x", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    for stage in ("round-0/sft", "round-1/reward", "round-1/ppo"):
        config = json.loads((tmp_path / "x" / stage / "model/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base)
    policies = [load_file(tmp_path / "x" / stage / "model/adapter_model.safetensors") for stage in STAGES[2::2]]
    moved = [name for name, value in policies[0].items() if not torch.equal(value.float(), policies[1][name].float())]
    assert len(moved) == len(policies[0]), "PPO has trained every matrix of the policy's adapter"
    policy = json.loads((tmp_path / "x/summary.json").read_text())["rounds"][0]["policy"]
    assert all(math.isfinite(policy[key]) for key in ("kl", "proxy", "gold"))


def test_score_keeps_order_and_survives_bad_lines(finished: Path) -> None:
    from rlhf import load_reward_model

    lines = [
        {"prompt": "List three fruits for a picnic.", "response": "apple, pear and plum.", "id": 7},
        {
            "messages": [
                {"role": "user", "content": "Name two tools for a quiz."},
                {"role": "assistant", "content": "saw."},
            ]
        },
        {"prompt": "no response"},
        {"prompt": [{"role": "user", "content": "List three fruits for a picnic."}], "response": ""},
    ]
    text = "\n".join([json.dumps(lines[0]), "{broken", *map(json.dumps, lines[1:])]) + "\n"
    model = finished / "x/round-1/reward/model"
    command = [sys.executable, "-m", "rlhf", "score", str(model)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        command, input=text, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert ["error" in row for row in rows] == [False, True, False, True, False]
    assert {key: rows[0][key] for key in lines[0]} == lines[0], "the same object, plus its score"
    prompts = [lines[3]["prompt"], lines[1]["messages"][:1], lines[3]["prompt"]]
    expected = load_reward_model(model).score(prompts, ["apple, pear and plum.", "saw.", ""])
    assert [rows[i]["score"] for i in (0, 2, 4)] == pytest.approx(expected.tolist(), abs=1e-5)
    assert "2 lines could not be scored" in result.stderr


def test_evaluate_writes_the_contract(finished: Path, tmp_path: Path) -> None:
    model, data = finished / "x/round-1/reward/model", finished / "x/round-0/data/data/test_pairs.jsonl"
    result = rlhf("evaluate", str(model), str(data), "--out", "e.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "e.json").read_text())["data"]["test_pairs"]
    assert "<svg" in (tmp_path / "e.html").read_text()
    assert {"n", "accuracy", "accuracy_ci", "ties", "ece", "length_baseline"} <= set(report)
    inside = json.loads((finished / "x/round-1/reward/manifest.json").read_text())["facts"]
    assert report["accuracy"] == inside["accuracy"], "the code that judges inside a run"


@pytest.mark.fault("labels of a round")
def test_lineage_reaches_the_data(finished: Path) -> None:
    result = rlhf("lineage", "x", "round-1/ppo", cwd=finished)
    assert result.returncode == 0
    for part in ("round-1/ppo", "reward: round-1/reward", "sft: round-0/sft", "lab: round-0/lab", "rows"):
        assert part in result.stdout
    assert rlhf("lineage", "x", "round-9/ppo", cwd=finished).returncode == 2


@pytest.mark.fault("one score everywhere")
def test_export_merges_an_adapter_and_keeps_the_scores(tmp_path: Path, base_folder: Path, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    from rlhf import build_reward_model, load_reward_model, save_reward_model
    from rlhf.models.load import model_settings
    from rlhf.pipeline.model_commands import export_model
    from tests.conftest import PROMPTS

    torch.manual_seed(0)
    settings = model_settings({"use_peft": True, "lora_r": 4})
    model = build_reward_model(base_folder, settings, pad_token_id=tokenizer.pad_token_id)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    samples = [(prompt, "yes") for prompt in PROMPTS]
    saved = save_reward_model(tmp_path / "adapter", model, tokenizer, samples=samples)
    export_model(tmp_path / "adapter", tmp_path / "merged")
    prompts, answers = PROMPTS[:4], ["yes", "no", "apple", "dog dog"]
    merged = load_reward_model(tmp_path / "merged")
    torch.testing.assert_close(merged.score(prompts, answers), saved.score(prompts, answers), atol=1e-5, rtol=0)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert plain.config.problem_type == "regression"


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
