"""Strict keys, every mistake at once with its line; TRL's keys as installed."""

import json
from pathlib import Path

import pytest
import yaml

from rlhf.errors import UserError
from rlhf.pipeline.plan import plan
from rlhf.recipe import load_recipe
from rlhf.recipe.document import differences
from rlhf.recipe.keys import stage_keys
from rlhf.recipe.schema import STAGE_SECTIONS
from tests.generate_trl_keys import TARGET, describe
from tests.recipes import shipped_recipes

RECIPES = shipped_recipes()
GOOD = "name: x\nlab: {}\n"


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_recipe(file, overrides)
    return [problem.replace(str(file), "r.yaml") for problem in error.value.problems]


@pytest.mark.parametrize("file", [f for f in RECIPES if "accelerate" not in f.parts], ids=lambda f: f.name)
def test_every_shipped_recipe_is_valid(file: Path) -> None:
    assert load_recipe(file).name


def test_trl_keys_are_those_of_the_installed_trl() -> None:
    installed = json.loads(json.dumps(describe(), sort_keys=True, default=str))
    assert installed == json.loads(TARGET.read_text(encoding="utf-8")), "run: python tests/generate_trl_keys.py"


@pytest.mark.fault("mistakes in a recipe")
def test_all_mistakes_at_once_with_lines(tmp_path: Path) -> None:
    text = "name: x\nlab: {}\nppo:\n  kl_coeff: 0.1\n  learning_rate: fast\n  total_episodes: 1.5\nrewards: {}\nsft:\n  torch_dtype: float32\n"
    assert problems(tmp_path, text) == [
        "r.yaml:4: unknown key ppo.kl_coeff; did you mean 'kl_coef'?",
        "r.yaml:7: unknown section 'rewards'; did you mean 'reward'?",
        "r.yaml:9: sft.torch_dtype is called dtype here.",
        "r.yaml:5: ppo.learning_rate is 'fast'; it must be a number.",
        "r.yaml:6: ppo.total_episodes is 1.5; it must be a whole number.",
    ]


@pytest.mark.fault("mistakes in a recipe", "bombs and tags")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD + "ppo:\n  beta: 0.1\n", "r.yaml:4: ppo.beta is called kl_coef here."),
        (GOOD + "ppo: {kl_coef: 0.1}\nppo: {kl_coef: 0.2}\n", "second time"),
        (GOOD + "sft:\n  learning_rate: .nan\n", "not a finite number"),
        (GOOD + "sft:\n  output_dir: x\n", "can't be set in a recipe"),
        (GOOD + "sft:\n  use_peft: 1\n", "must be true or false"),
        (GOOD + "sft:\n  lora_target_modules: all-linear\n", "it must be a list: [all-linear]."),
        (GOOD + "sft:\n  lr_scheduler_type: cosin\n", "did you mean 'cosine'"),
        (GOOD + "sft: {lora_r: 0}\n", "sft.lora_r is 0; it must be 1 or more"),
        (GOOD + "sft: {load_in_4bit: true}\n", "needs sft.use_peft"),
        (GOOD + "reward: {objective: btt}\n", "reward.objective"),
        (GOOD + "lab_size: 3\n", "unknown section"),
        (GOOD + "evaluate: {gold: file.txt}\n", "evaluate.gold"),
        (GOOD + "a: &a 1\nb: *a\n", "aliases"),
        ("name: x\n", "backbone.model"),
        ("name: x\nbackbone: {model: a}\n", "data.preferences is missing"),
        ("name: x\nlab: {}\nbackbone: {model: a, from_scratch: {architecture: llama}}\n", "exclude each other"),
        ("name: x\nlab: {}\nbackbone: {from_scratch: {architecture: gpt}}\n", "llama or qwen3"),
        (
            "name: x\nlab: {}\nbackbone: {from_scratch: {architecture: llama, hiden_size: 8}}\n",
            "did you mean 'hidden_size'",
        ),
        ("name: [\n", "broken YAML"),
        ("- a\n", "mapping of sections"),
        ("", "mapping of sections"),
        ("name: x\nlab: {pairs: 3}\n", "r.yaml:2: lab.pairs"),
    ],
)
def test_each_mistake_is_a_sentence(tmp_path: Path, text: str, expected: str) -> None:
    found = problems(tmp_path, text)
    assert any(expected in problem for problem in found), found


def test_base_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "name: base\nlab: {}\nppo: {kl_coef: 0.1, temperature: 0.7}\n", encoding="utf-8"
    )
    (tmp_path / "r.yaml").write_text("base: base.yaml\nname: child\nppo: {kl_coef: 0.2}\n", encoding="utf-8")
    recipe = load_recipe(tmp_path / "r.yaml", ["ppo.learning_rate=1e-4", "seed=3"])
    assert recipe.name == "child"
    assert recipe.seed == 3
    assert recipe.ppo.trl_settings() == {"kl_coef": 0.2, "temperature": 0.7, "learning_rate": 1e-4}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {}),
        (["sampling.temperature=0.7"], {"temperature": 0.7}),
        (["sampling.temperature=0.7", "ppo.temperature=0.9"], {"temperature": 0.9}),
        (["ppo.temperature=0.9"], {"temperature": 0.9}),
        (["sampling.engine=vllm"], {}),
    ],
)
def test_ppo_samples_as_everything_else_does(tmp_path: Path, overrides: list[str], expected: dict[str, float]) -> None:
    (tmp_path / "r.yaml").write_text("name: x\nlab: {}\n", encoding="utf-8")
    recipe = load_recipe(tmp_path / "r.yaml", overrides)
    assert recipe.ppo.trl_settings() == expected
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe.resolved()), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml").ppo.trl_settings() == expected, "a resolved recipe says the same"
    changed = load_recipe(tmp_path / "again.yaml", ["sampling.temperature=0.5"]).ppo.trl_settings()
    assert changed == {"temperature": 0.9 if "ppo.temperature=0.9" in overrides else 0.5}
    assert ("temperature" in recipe.resolved()["sampling"]) == any("sampling.t" in x for x in overrides), (
        "as it was before"
    )


def test_one_answer_is_not_written_so_that_older_runs_go_on(tmp_path: Path) -> None:
    """A run's recipe and the key of its evaluation are compared with what the same recipe gave before the key was there."""
    (tmp_path / "r.yaml").write_text("name: x\nlab: {}\nevaluate: {prompts: 8}\n", encoding="utf-8")
    for overrides in ([], ["evaluate.answers=1"]):
        recipe = load_recipe(tmp_path / "r.yaml", overrides)
        assert recipe.resolved()["evaluate"] == {"prompts": 8}
        (stage,) = (stage for stage in plan(recipe) if stage.name == "evaluate")
        assert "answers" not in stage.settings
    recipe = load_recipe(tmp_path / "r.yaml", ["evaluate.answers=4"])
    assert recipe.resolved()["evaluate"] == {"prompts": 8, "answers": 4}
    (stage,) = (stage for stage in plan(recipe) if stage.name == "evaluate")
    assert stage.settings["answers"] == 4


def test_a_null_of_trls_is_a_value_and_is_written(tmp_path: Path) -> None:
    """Left out, the resolved recipe gave TRL's or PPO's default: a clip of 5 and prompts of 512 tokens for none."""
    (tmp_path / "r.yaml").write_text("name: x\nlab: {}\n", encoding="utf-8")
    for section in STAGE_SECTIONS:
        nullable = [key for key, entry in stage_keys(section).items() if entry.get("default") is not None]
        for key in nullable:
            try:
                recipe = load_recipe(tmp_path / "r.yaml", [f"{section}.{key}=null"])
            except UserError:
                continue  # null is no value of this key
            (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe.resolved()), encoding="utf-8")
            again = load_recipe(tmp_path / "again.yaml")
            assert getattr(again, section).trl_settings() == getattr(recipe, section).trl_settings() == {key: None}
    plain, clipped = (load_recipe(tmp_path / "r.yaml", asked) for asked in ([], ["ppo.reward_clip=null"]))
    assert not differences(plain.resolved(), clipped.resolved()), (
        "as earlier versions wrote it; keys of stages tell them apart"
    )
    differing = [a.name for a, b in zip(plan(plain), plan(clipped), strict=True) if a.settings != b.settings]
    assert differing == ["ppo"]
    scratch = ["backbone.from_scratch.architecture=qwen3", "backbone.from_scratch.num_key_value_heads=null"]
    (tmp_path / "s.yaml").write_text("name: x\ndata: {sft: a.jsonl, preferences: a.jsonl}\n", encoding="utf-8")
    made = load_recipe(tmp_path / "s.yaml", scratch)
    assert made.resolved()["backbone"]["from_scratch"] == made.backbone.named()["from_scratch"]
    assert made.backbone.named()["from_scratch"]["num_key_value_heads"] is None


@pytest.mark.parametrize("override", ["data.test=", "ppo.reward_clip= ", "evaluate.gold="])
def test_an_override_without_a_value_is_refused(tmp_path: Path, override: str) -> None:
    """It is what a shell makes of a variable that is not set, and it took the setting away."""
    (tmp_path / "r.yaml").write_text("name: x\nlab: {}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"no value behind .*=; give it one, or leave"):
        load_recipe(tmp_path / "r.yaml", [override])


def test_an_empty_section_is_there_and_null_removes_it(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: x\nlab:\nppo:\n", encoding="utf-8")
    assert load_recipe(tmp_path / "r.yaml").lab is not None
    overrides = ["lab=null", "backbone.model=m", "data.sft=s.jsonl", "data.preferences=p.jsonl"]
    assert load_recipe(tmp_path / "r.yaml", overrides).lab is None


def test_a_bad_override_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path, GOOD, "ppo.kl_coeff=0.1") == [
        "override 'ppo.kl_coeff=0.1': unknown key ppo.kl_coeff; did you mean 'kl_coef'?"
    ]
    assert "looks like section.key=value" in problems(tmp_path, GOOD, "ppo.kl_coef")[0]


def test_a_mistake_in_the_base_names_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: base\nlab: {}\nppo: {kl_coeff: 0.1}\n", encoding="utf-8")
    (tmp_path / "r.yaml").write_text("base: base.yaml\nname: child\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"base\.yaml:3"):
        load_recipe(tmp_path / "r.yaml")


def test_every_mistake_is_said_at_once_whoever_finds_it(tmp_path: Path) -> None:
    """The reader of YAML (a key twice, an alias), the keys, TRL's types and the schema; each mistake by one of them."""
    (tmp_path / "r.yaml").write_text(
        "name: x\nseed: many\nsedd: 1\nbackbone: {model: a/b}\ndata: {preferences: a/b}\n"
        "sft: {learning_rat: 1, num_train_epochs: no}\nppo: {total_episodes: 8}\nppo: {total_episodes: 8}\n"
        "evaluate: {prompts: several, gold: 3}\nrounds: {count: 0}\n"
    )
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "r.yaml", ["reward.learning_rate=fast", "vote.members=few"])
    told = [
        ":2: seed: ", ":3: unknown section 'sedd'", ":6: unknown key sft.learning_rat", ":6: sft.num_train_epochs",
        ":8: the key 'ppo' stands here a second time", ":9: evaluate.prompts", ":9: evaluate.gold", ":10: rounds.count",
        "override 'reward.learning_rate=fast'", "override 'vote.members=few'",
    ]  # fmt: skip
    for part in told:
        assert sum(part in problem for problem in caught.value.problems) == 1, part
    assert len(caught.value.problems) == len(told)
