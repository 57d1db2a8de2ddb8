"""A run in the world of instructions: answers that are sampled block by block, two rounds, the plan, and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.lab import answers as answers_module
from rlhf.lab import build
from rlhf.lab.answers import answers_of_model
from rlhf.lab.instructions import gold, parse_instruction, write_prompts
from rlhf.models import generate as generate_module
from rlhf.models.load import load_policy, load_tokenizer, model_settings
from rlhf.models.scratch import build_base
from rlhf.pipeline.estimate import estimate
from rlhf.pipeline.plan import plan
from rlhf.pipeline.run import run as run_recipe
from rlhf.recipe import Recipe, load_recipe

RECIPE = """
name: small
lab: {world: instructions, pairs: 100, test_pairs: 50}
reward: {learning_rate: 1.0e-3, per_device_train_batch_size: 16, num_train_epochs: 1, logging_steps: 2}
ppo: {total_episodes: 16, per_device_train_batch_size: 16, num_ppo_epochs: 1, learning_rate: 1.0e-3, max_completion_length: 16}
rounds: {count: 2, prompts: 12, responses: 2, labels: 10, stop_when_worse: false}
evaluate: {prompts: 4}
"""


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokenizer knows the words of this world."""
    import random

    folder = tmp_path_factory.mktemp("chat")
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "vocab_size": 700,
        "initializer_range": 0.2,
    }
    build_base(folder, write_prompts(500, random.Random(0)), architecture="llama", settings=settings, seed=0)
    return folder


def recipe(folder: Path, *overrides: str) -> Recipe:
    (folder / "r.yaml").write_text(RECIPE)
    return load_recipe(folder / "r.yaml", list(overrides))


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer prompts to read, and no page to draw."""
    monkeypatch.setattr(build, "INSTRUCTION_PROMPTS", 200)
    monkeypatch.setattr(build, "HELD_OUT_PROMPTS", 60)
    monkeypatch.setattr("rlhf.pipeline.run.write_report", lambda _: None)


@pytest.mark.usefixtures("few_prompts")
def test_a_two_round_run_without_sft(chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, run = recipe(tmp_path, f"backbone.model={chat_folder}", "sampling.temperature=0.8"), tmp_path / "x"
    said: list[str] = []
    temperatures: list[float] = []

    def noted(own: Any = generate_module.sampling_settings, **settings: Any) -> Any:
        temperatures.append(settings["temperature"])
        return own(**settings)

    monkeypatch.setattr(generate_module, "sampling_settings", noted)
    run_recipe(made, run, say=said.append)
    assert set(temperatures) == {0.8}, "lab, scale, PPO, rounds and evaluation sample at one temperature"
    stages = {str(file.parent.relative_to(run)) for file in run.glob("round-*/*/manifest.json")}
    assert stages == {stage.folder for stage in plan(made)}
    assert not {stage for stage in stages if stage.endswith("sft")}
    assert any(line.startswith("lab: 128 of 200 answers sampled") for line in said)
    assert not (run / "round-0/lab/checkpoints").exists()

    # The labels' own numbers, counted anew; the second round asked the lab about the policy's own answers.
    summary = json.loads((run / "summary.json").read_text())
    differences = []
    for row in rows(run / "round-0/lab/data/preferences.jsonl"):
        prompt = row["prompt"][0]["content"]
        chosen, rejected = gold([prompt] * 2, [row[side][0]["content"] for side in ("chosen", "rejected")])
        differences.append(chosen - rejected)
    decided = [difference for difference in differences if difference]
    assert decided
    assert summary["lab"]["flip_rate"] == pytest.approx(sum(d < 0 for d in decided) / len(decided))
    assert set(summary["lab"]) >= {"annotator_agreement", "gold_sft", "gold_best_of_16", "gold_max"}
    assert None not in summary["lab"].values()
    fresh = rows(run / "round-2/label/fresh.jsonl")
    assert len(fresh) == 10
    for row in fresh:
        is_dangerous = parse_instruction(row["prompt"][0]["content"]).is_dangerous
        assert row["source"] == ("harmless" if is_dangerous else "helpful")

    # What is evaluated is this world's true reward, on the prompts that were held out.
    samples = rows(run / "round-2/evaluate/samples.jsonl")
    texts = [row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"] for row in samples]
    assert [row["gold_policy"] for row in samples] == gold(texts, [row["policy"] for row in samples])
    assert summary["rounds"][1]["policy"]["gold"] is not None
    sizes = {"preferences": 100, "test": 50, "shift_test": 50}
    assert {name: len(rows(run / f"round-0/lab/data/{name}.jsonl")) for name in sizes} == sizes
    resolved = load_recipe(run / "recipe.yaml")
    assert [stage.key for stage in plan(resolved)] == [stage.key for stage in plan(made)]


@pytest.mark.usefixtures("few_prompts", "timed_once")
def test_the_plan_samples_nothing(chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "sample_texts", None)
    stages, notes = estimate(recipe(tmp_path, f"backbone.model={chat_folder}"))
    sizes = {stage.folder: stage.rows for stage in stages}
    assert sizes["round-0/lab"] == 2 * (100 + 2 * 50)
    assert sizes["round-1/reward"] == 100
    assert "round-0/sft" not in sizes
    assert any("not sampled" in note for note in notes)


@pytest.mark.usefixtures("few_prompts", "timed_once")
def test_the_plan_of_a_run_counts_the_answers_that_it_sampled(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, run = recipe(tmp_path, f"backbone.model={chat_folder}"), tmp_path / "x"
    with pytest.raises(UserError, match=r"x/round-0/data: not there; run the recipe with `--until data` first"):
        estimate(made, out=run)
    run_recipe(made, run, until="data")
    monkeypatch.setattr(answers_module, "sample_texts", None)
    before, after = ({stage.folder: stage for stage in estimate(made, out=out)[0]} for out in (None, run))
    assert [stage.rows for stage in after.values()] == [stage.rows for stage in before.values()]
    tokenizer = load_tokenizer(chat_folder, conversational=True)
    pairs = rows(run / "round-0/data/data/pairs.jsonl")

    def ids(row: dict[str, Any], side: str) -> list[int]:
        found: list[int] = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False)
        return found

    texts = [(ids(row, "chosen"), ids(row, "rejected")) for row in pairs]
    shared = [next(i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b) for pair in texts]  # read once
    assert after["round-1/reward"].tokens == sum(len(one) + len(other) for one, other in texts) - sum(shared)
    assert after["round-1/reward"].tokens != before["round-1/reward"].tokens
    assert not any("not sampled" in note for note in estimate(made, out=run)[1])
    assert sorted(path.name for path in (run / "round-0").iterdir()) == ["data", "lab"], "nothing is written"
    with pytest.raises(UserError, match=r"round-0/lab: made with other settings"):
        estimate(recipe(tmp_path, f"backbone.model={chat_folder}", "lab.pairs=101"), out=run)


def test_the_lab_depends_on_its_model(chat_folder: Path, tmp_path: Path) -> None:
    def lab_key(*overrides: str) -> str:
        return next(stage.key for stage in plan(recipe(tmp_path, *overrides)) if stage.name == "lab")

    name = f"backbone.model={chat_folder}"
    keys = {
        lab_key(*overrides)
        for overrides in (
            (name,),
            ("backbone.model=some/hub-id",),
            (name, "ppo.max_completion_length=9"),
            (name, "ppo.max_prompt_length=null"),
            (name, "sampling.temperature=0.7"),
            (name, "lab.pairs=101"),
            (name, "lab.annotators=exact"),
            (name, "seed=1"),
        )
    }
    assert len(keys) == 8
    elsewhere = ("reward.learning_rate=1.0e-2", "rounds.count=3", "ppo.temperature=0.7", "sampling.temperature=1")
    assert lab_key(name) == lab_key(name, *elsewhere) in keys


def test_blocks_are_kept_when_sampling_is_interrupted(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import random

    monkeypatch.setattr(answers_module, "BLOCK", 8)
    prompts = write_prompts(12, random.Random(1))
    model = load_policy(chat_folder, model_settings({"dtype": "float32"}), trainable=False).eval()
    tokenizer = load_tokenizer(chat_folder, conversational=True)

    def sample(keep: Path, say: Any) -> Sequence[str]:
        settings: dict[str, Any] = {"batch_size": 4, "max_new_tokens": 6, "max_prompt_length": None}
        answer = answers_of_model(model, tokenizer, **settings, seed=3, keep=keep, say=say)
        return [*answer(prompts[:12]), *answer(prompts[:8])]

    whole = sample(tmp_path / "a", lambda _: None)
    assert len(whole) == 20
    assert whole[:8] != whole[12:], "each block is drawn anew"

    def stop_at_the_second(line: str) -> None:
        if " 12 of 12 " in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path / "b", stop_at_the_second)
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["answers-0.jsonl", "answers-1.jsonl"]
    said: list[str] = []
    assert sample(tmp_path / "b", said.append) == whole
    assert len(said) == 1, "one block of three was left"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], r"r\.yaml:3: lab.world is instructions, whose answers a chat model gives; set backbone.model"),
        (["lab.demonstrations=500"], "lab.demonstrations is 500, which is not used.*set data.sft. Leave it out."),
        (["lab.hidden_size=64"], "lab.hidden_size is 64, which is not used: .*backbone.model is the model"),
        (["lab.world=lists"], ""),
        (["lab.world=poems"], "lab.world"),
        (["backbone.from_scratch={architecture: llama}"], "set backbone.model"),
    ],
)
def test_what_the_recipe_may_say(chat_folder: Path, tmp_path: Path, overrides: list[str], sentence: str) -> None:
    if overrides and "from_scratch" not in overrides[0]:
        overrides = [*overrides, f"backbone.model={chat_folder}"]
    if not sentence:
        made = recipe(tmp_path, *overrides)
        assert "world" not in made.resolved()["lab"], "the first world is not named, so that its keys stay"
        return
    with pytest.raises(UserError, match=sentence):
        recipe(tmp_path, *overrides)
