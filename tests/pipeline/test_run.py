"""The whole command, on a lab small enough for seconds: finished runs, killed runs, foreign data, bad input."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.command import rlhf
from tests.pipeline.small import ENVIRONMENT, RECIPE, STAGES


def test_the_contract_of_a_run(finished: Path) -> None:
    run = finished / "x"
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) >= {"recipe", "seed", "seconds", "lab", "sft", "rounds", "best_of_16", "gold_gap_closed"}
    assert set(summary["lab"]) == {"flip_rate", "annotator_agreement", "gold_sft", "gold_best_of_16", "gold_max"}
    (only,) = summary["rounds"]
    assert {"accuracy", "accuracy_true", "ece", "length_baseline", "length_baseline_ci"} <= set(only["reward"])
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
    assert {"n", "accuracy", "accuracy_ci", "ties", "ece", "length_baseline", "length_baseline_ci"} <= set(report)
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

    from rlhf import load_reward_model, save_reward_model
    from rlhf.models.load import model_settings
    from rlhf.pipeline.model_commands import export_model
    from tests.conftest import PROMPTS
    from tests.unit_scale import build_reward_model

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


def test_a_dry_run_refuses_what_the_run_refuses(finished: Path, tmp_path: Path) -> None:
    """Of finished stages whose files are gone it said "done"."""
    shutil.copytree(finished / "x", tmp_path / "x")
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "x/round-1/reward/model/model.safetensors").unlink()
    for dry in ((), ("--dry-run",)):
        result = rlhf("run", "r.yaml", "--out", "x", *dry, cwd=tmp_path)
        assert result.returncode == 2
        assert "round-1/reward/model/model.safetensors are gone or were changed" in " ".join(result.stderr.split())


def test_a_mistake_in_the_data_burns_no_folder(tmp_path: Path) -> None:
    """It had left a run of which nothing was done, and which refused the mended recipe as another one."""
    (tmp_path / "empty.jsonl").write_text("")
    write(tmp_path / "pairs.jsonl", [{"prompt": f"say red {i}", "chosen": "yes", "rejected": "no"} for i in range(40)])
    (tmp_path / "r.yaml").write_text("""
name: foreign
backbone:
  from_scratch: {architecture: qwen3, vocab_size: 400, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64}
data: {sft: pairs.jsonl, preferences: pairs.jsonl}
ppo: {total_episodes: 32, per_device_train_batch_size: 16, max_completion_length: 8}
""")
    wrong = rlhf("run", "r.yaml", "data.preferences=empty.jsonl", "--out", "x", cwd=tmp_path)
    assert wrong.returncode == 2, wrong.stderr
    assert "nothing is left for pairs" in " ".join(wrong.stderr.split())
    assert not (tmp_path / "x").exists()
    mended = rlhf("run", "r.yaml", "--out", "x", "--until", "data", cwd=tmp_path)
    assert mended.returncode == 0, mended.stderr
