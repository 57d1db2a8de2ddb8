"""Stages declare which parents they read: no plan hands over others, none leaves out what a stage needs, no stage reads others."""

from pathlib import Path

import pytest

from rlhf.pipeline.context import StageContext
from rlhf.pipeline.plan import plan
from rlhf.pipeline.stage_table import STAGES
from rlhf.recipe import Recipe, load_recipe
from tests.recipes import shipped_recipes

ROOT = Path(__file__).parents[2]
MADE = {
    "plain": (),
    "vote": ("reward.objective=posterior",),
    "meta": ("reward.meta=true",),
    "members": ("reward.members=3", "reward.objective=flip"),
    "experts": ("reward.experts=gate", "reward.use_peft=true"),
    "rounds": ("rounds.count=3", "reward.objective=posterior", "reward.meta=true"),
    "rounds from sft": ("rounds.count=3", "rounds.start=sft"),
    "sampled": ("rounds.count=2", "rounds.first=sampled"),
    "people": ("rounds.count=2", "rounds.labels_from=people"),
    "judge": ("rounds.count=2", "rounds.labels_from=judge", "rounds.judge_url=http://x/v1", "rounds.judge_model=j"),
    "verdicts": ("rounds.count=2", "rounds.labels_from=verdicts", "rounds.judge_model=org/m"),
    "second look": ("rounds.count=3", "rounds.second_look=0.1"),
    "cold second look": (
        *("lab=null", "backbone.model=m", "data.prompts=p", "rounds.first=sampled", "rounds.count=2"),
        *("rounds.labels_from=people", "rounds.second_look=0.1"),
    ),
    "dataset": ("rounds.count=3", "rounds.labels_from=dataset", "reward.meta=true"),
    "a model": ("lab=null", "backbone.model=m", "data.sft=s", "data.preferences=p"),
    "no sft": ("lab=null", "backbone.model=m", "data.preferences=p", "rounds.count=2", "rounds.labels_from=people"),
    "from scratch": (
        "lab=null",
        "backbone.from_scratch={architecture: llama, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
        "intermediate_size: 64}",
        "data.sft=s",
        "data.preferences=p",
    ),
    "cold": (
        *("lab=null", "backbone.model=m", "data.prompts=p", "rounds.first=sampled", "rounds.count=3"),
        *("rounds.labels_from=people", "reward.meta=true", "reward.objective=posterior"),
    ),
}


def recipes(folder: Path) -> dict[str, Recipe]:
    """Return every shipped recipe, the made ones, and one whose meta samples are a file."""
    file = folder / "made.yaml"
    file.write_text("name: made\nlab: {}\n")
    samples = folder / "samples.jsonl"
    samples.write_text("")
    gguf = folder / "model.gguf"
    gguf.write_text("")
    on_gguf = ("lab=null", f"backbone.model={gguf}", "data.preferences=p")
    made = {
        **MADE,
        "a GGUF file": (
            *on_gguf,
            "reward.objective=posterior",
            "reward.meta=true",
            "rounds.count=2",
            "rounds.labels_from=people",
        ),
        "a second look on a GGUF file": (
            *on_gguf,
            *("rounds.count=2", "rounds.labels_from=people", "rounds.second_look=0.1"),
        ),
        "SFT on a GGUF file": (*on_gguf, "data.sft=s"),
        "a GGUF file in the world of instructions": ("lab={world: instructions}", f"backbone.model={gguf}"),
        "meta samples": ("reward.meta=true", f"reward.meta_samples={samples}"),
        "rounds of meta samples": ("reward.meta=true", f"reward.meta_samples={samples}", "rounds.count=2"),
    }
    shipped = {str(path): load_recipe(path) for path in shipped_recipes()}
    return shipped | {name: load_recipe(file, list(overrides)) for name, overrides in made.items()}


def test_every_plan_hands_a_stage_what_it_declares(tmp_path: Path) -> None:
    seen: dict[str, set[str]] = {name: set() for name in STAGES}
    always = {name: set(function.reads) | set(function.may_read) for name, function in STAGES.items()}
    for name, recipe in recipes(tmp_path).items():
        for stage in plan(recipe):
            function, roles = STAGES[stage.name], set(stage.parents)
            place = f"{name}: {stage.folder}"
            assert stage.folder.rpartition("/")[2] == stage.name, f"{place}: a context knows its stage by its folder"
            undeclared = roles - {*function.reads, *function.may_read}
            assert not undeclared, f"{place} is handed {undeclared}, which it does not declare"
            missing = set(function.reads) - roles
            assert not missing, f"{place} needs {missing}, which the plan does not hand it"
            seen[stage.name] |= roles
            always[stage.name] &= roles
    for name, function in STAGES.items():
        assert not set(function.reads) & set(function.may_read), name
        assert seen[name] == {*function.reads, *function.may_read}, f"{name} declares parents that no plan hands it"
        assert always[name] == set(function.reads), f"{name} is always handed parents that it declares as sometimes"


def test_every_function_of_the_table_is_there() -> None:
    for name, function in STAGES.items():
        assert function.load().__name__ == f"run_{name}"


def test_a_stage_cannot_read_what_it_does_not_declare(tmp_path: Path) -> None:
    recipe = recipes(tmp_path)["plain"]
    parents = {"data": tmp_path / "data", "policy": tmp_path / "policy"}
    context = StageContext(recipe, tmp_path / "round-1/reward", parents, lambda _: None)
    assert context.parent("data") == tmp_path / "data"
    assert context.find_parent("vote") is None
    with pytest.raises(LookupError, match="does not declare that reward reads a parent 'policy'"):
        context.find_parent("policy")
    with pytest.raises(LookupError, match="does not declare that reward reads a parent 'policy'"):
        context.parent("policy")
    with pytest.raises(LookupError, match="the plan gives this stage no parent 'vote'"):
        context.parent("vote")


def test_parents_are_read_through_the_context() -> None:
    """So that what a stage reads is compared with what it declares, in every run."""
    for file in (ROOT / "rlhf/pipeline").glob("*.py"):
        assert "context.parents" not in file.read_text(encoding="utf-8"), file.name
