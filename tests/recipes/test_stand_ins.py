"""Every recipe that names a model, on a tiny stand-in of that model and of its data: checked, planned, and run to the end.

A renamed key or a trap of a chat template fails here, and not on somebody's GPU. Hub ids are redirected by overrides alone.
One recipe an architecture runs to its end here; `tests/benchmarks/stand_ins.py` runs all of them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from rlhf.pipeline.plan import plan
from rlhf.pipeline.trainers import StageSFTTrainer
from rlhf.recipe import load_recipe
from rlhf.recipe.schema import DATA_SOURCES
from tests.command import rlhf
from tests.recipes.stand_ins import DATA_SETS, MODELS, RECIPES, StandIns, coverage_table, named, small

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> StandIns:
    return StandIns(tmp_path_factory.mktemp("stand_ins"))


def test_every_model_and_data_set_that_a_recipe_names_has_a_stand_in() -> None:
    assert len(RECIPES) >= 9
    for name in RECIPES:
        recipe = named(name)
        assert recipe.backbone.model in MODELS, f"{name}: add its model to tests/recipes/stand_ins.py"
        for source in (entry.source for key in DATA_SOURCES for entry in recipe.data.sources(key)):
            assert source in DATA_SETS, f"{name}: add its data set to tests/recipes/stand_ins.py"


def test_the_recipes_cover_every_model_data_set_and_tuning() -> None:
    recipes = [named(name) for name in RECIPES if name.startswith("models/")]
    tunings = {
        "QLoRA" if ppo.get("load_in_4bit") else "LoRA" if ppo.get("use_peft") else "full"
        for ppo in (recipe.ppo.trl_settings() for recipe in recipes)
    }
    assert tunings == {"full", "LoRA", "QLoRA"}
    models = {recipe.backbone.model for recipe in recipes}
    assert models == {
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-8B",
        "meta-llama/Llama-3.1-8B-Instruct",
        "google/gemma-3-1b-it",
    }
    named_sources = {entry.source for name in RECIPES for entry in named(name).data.sources("preferences")}
    assert named_sources == set(DATA_SETS)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_checked_and_planned(name: str, stand_ins: StandIns, tmp_path: Path) -> None:
    overrides = stand_ins.overrides(name)
    file = str(ROOT / "recipes" / name)
    checked = rlhf("check", file, *overrides, cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert f"{file}: fine" in checked.stdout
    if MODELS[str(named(name).backbone.model)].ends:  # an encoder makes a reward model alone
        planned = rlhf("run", file, "--dry-run", *overrides, cwd=tmp_path)
        assert planned.returncode == 0, planned.stderr
        for stage in plan(named(name)):
            assert stage.folder in planned.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name, is_run in RECIPES.items() if is_run])
def test_one_recipe_an_architecture_runs_to_its_end(name: str, stand_ins: StandIns, tmp_path: Path) -> None:
    is_encoder = not MODELS[str(named(name).backbone.model)].ends
    verb = "reward" if is_encoder else "run"
    overrides = [*stand_ins.overrides(name), *small(name)]
    result = rlhf(verb, str(ROOT / "recipes" / name), *overrides, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "not a prefix" not in result.stderr, "SFT learns behind the prompt that the policy is asked with"
    recipe = load_recipe(ROOT / "recipes" / name, overrides)
    folders = [stage.folder for stage in plan(recipe)]
    for folder in folders[: folders.index("round-1/reward") + 1] if is_encoder else folders:
        assert (tmp_path / "run" / folder / "manifest.json").is_file(), folder
    metrics = [json.loads(row) for file in tmp_path.glob("run/round-1/ppo/metrics.jsonl") for row in file.open()]
    assert [row["reward_gold"] for row in metrics if "reward_proxy" in row] == [None] * len(metrics), "nobody knows it"
    summary = json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))
    failed = {check: entry for check, entry in summary["checks"].items() if not entry["held"]}
    assert set(failed) <= {"policy ends"}, "models from nothing ramble; nothing else may fail"


@pytest.mark.parametrize("name", [name for name, stand_in in MODELS.items() if stand_in.ends])
def test_sft_learns_the_answer_that_the_template_writes(name: str, stand_ins: StandIns, tmp_path: Path) -> None:
    """TRL's own preparation of the rows, against what transformers writes for a stranger."""
    folder = stand_ins.model(name)
    stranger = AutoTokenizer.from_pretrained(folder)
    if stranger.chat_template is None:
        pytest.skip("without a template nobody else writes the conversation")
    prompt, answer = [{"role": "user", "content": "Can you say 3 ?"}], [{"role": "assistant", "content": "Yes ."}]
    stranger.pad_token = stranger.pad_token or "<|finetune_right_pad_id|>"
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = StageSFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        args,
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": answer}]),
        processing_class=stranger,
    )
    row: Any = trainer.train_dataset[0]
    options: dict[str, Any] = {"tokenize": True, "return_dict": False}
    whole = stranger.apply_chat_template(prompt + answer, **options)
    asked = stranger.apply_chat_template(prompt, add_generation_prompt=True, **options)
    assert row["input_ids"] == whole
    assert row["labels"] == [-100] * len(asked) + whole[len(asked) :]


def test_the_table_says_what_these_tests_do() -> None:
    text = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    assert coverage_table() in text, f"write this table into tests/README.md:\n{coverage_table()}"
