"""A key that a stage accepts and does not use is an error that names what decides instead."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.errors import UserError
from rlhf.recipe import load_recipe
from rlhf.recipe.unused import ADAPTER_KEYS, NEEDS, absent_stages, mixed_bits, mixed_temperatures
from tests.recipes import shipped_recipes

VALUES: dict[str, Any] = {
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["all-linear"],
    "lora_target_parameters": ["experts"],
    "lora_modules_to_save": ["embed_tokens"],
    "use_dora": True,
    "use_rslora": True,
}
OTHERS: dict[str, Any] = {"lora_r": 8, "lora_alpha": 64, "lora_dropout": 0.5, "lora_target_modules": ["q_proj"]}


def recipe(tmp_path: Path, **sections: dict[str, Any]) -> Path:
    document = {"name": "x", "backbone": {"model": "m"}, "data": {"sft": "s.jsonl", "preferences": "p.jsonl"}}
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps({**document, **sections}))
    return file


def problem(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(file, overrides)
    assert len(error.value.problems) == 1
    return error.value.problems[0]


@pytest.mark.parametrize("section", ["reward", "vote", "ppo"])
@pytest.mark.parametrize("key", ADAPTER_KEYS)
def test_after_a_lora_sft_its_adapter_decides(tmp_path: Path, section: str, key: str) -> None:
    on = {"use_peft": True}
    file = recipe(tmp_path, sft=on, **{section: {**on, key: VALUES[key]}})
    said = problem(file)
    assert f"{section}.{key} is {VALUES[key]!r}, which is not used: after a LoRA SFT" in said
    assert f"Set sft.{key}" in said
    assert said.startswith(str(file)), "with its line"
    load_recipe(recipe(tmp_path, sft={**on, key: VALUES[key]}, **{section: {**on, key: VALUES[key]}}))
    if key in OTHERS:
        both = {"sft": {**on, key: VALUES[key]}, section: {**on, key: OTHERS[key]}}
        assert f"sft.{key} is {VALUES[key]!r}" in problem(recipe(tmp_path, **both))


@pytest.mark.parametrize("key", ADAPTER_KEYS)
def test_an_adapter_of_its_own_is_used_after_a_full_sft_or_on_a_fresh_model(tmp_path: Path, key: str) -> None:
    on = {"use_peft": True}
    load_recipe(recipe(tmp_path, reward={**on, key: VALUES[key]}, ppo={**on, key: VALUES[key]}))
    load_recipe(recipe(tmp_path, data={"preferences": "p"}, sft=on, reward={**on, key: VALUES[key]}))
    scratch = {"backbone": {"from_scratch": {"architecture": "llama"}}, "sft": on}
    load_recipe(recipe(tmp_path, **scratch, reward={**on, key: VALUES[key]}))


@pytest.mark.parametrize("section", ["sft", "reward", "vote", "ppo"])
@pytest.mark.parametrize("key", ADAPTER_KEYS)
def test_without_lora_its_keys_do_nothing(tmp_path: Path, section: str, key: str) -> None:
    file = recipe(tmp_path, **{section: {key: VALUES[key]}})
    assert f"{section}.{key} is {VALUES[key]!r}, which is not used: {section}.use_peft is not true" in problem(file)
    load_recipe(file, [f"{section}.use_peft=false"])  # LoRA is switched off by name


DEPENDENT: dict[str, Any] = {
    "flip_by": "sign",
    "flip_fraction": 0.2,
    "smoothing": 0.3,
    "smoothing_mask": "all",
    "margin_scale": 2.0,
    "margin_clip": 1.0,
    "extra_weight": 0.5,
    "extra_temperature": 0.5,
    "prototypes": 7,
    "dropout": 0.2,
    "meta_pool": 9,
    "meta_responses": 3,
    "meta_prompts": 3,
    "meta_step": 0.5,
    "meta_normalized": False,
    "expert_weights": {"a": 1.0},
    "attributes": {"wit": 1.0},
    "rating_scale": [1.0, 5.0],
    "kl_horizon": 5,
    "reward_ensemble_strength": 2.0,
    "vllm_mode": "server",
    "vllm_gpu_memory_utilization": 0.5,
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_max_model_length": 100,
    "vllm_server_base_url": "http://x",
    "num_train_epochs": 2.0,
    "shaping_tokens": 4,
    "critique_tokens": 9,
    "critiques": 3,
    "labels_from": "people",
    "labels": 60,
    "prompts": 30,
    "responses": 2,
    "select": "deviation",
    "annotators_per_pair": 2,
    "judge_model": "j",
    "judge_url": "http://x/v1",
    "judge_key": "KEY",
    "judge_budget": 8,
    "age_weight": 0.5,
    "min_fresh_accuracy": 0.6,
    "kl_limit": 30.0,
}
PEOPLE: dict[str, Any] = {"count": 2, "labels_from": "people"}
JUDGE: dict[str, Any] = {"count": 2, "labels_from": "judge", "judge_model": "j", "judge_url": "http://x/v1"}
# By dependent key, what makes it count; where nothing is listed, `reason` can't be taken away in a test of one section.
MEANT: dict[str, dict[str, Any]] = {
    "flip_by": {"objective": "flip"},
    "flip_fraction": {"objective": "drop"},
    "smoothing": {"objective": "smoothing"},
    "smoothing_mask": {"objective": "soft_margin"},
    "margin_scale": {"objective": "margin"},
    "margin_clip": {"objective": "flip_margin"},
    "extra_weight": {"extra": "simcse"},
    "extra_temperature": {"extra": "simcse"},
    "prototypes": {"extra": "swav"},
    "dropout": {"extra": "swav"},
    **{key: {"meta": True} for key in DEPENDENT if key.startswith("meta_")},
    "expert_weights": {"experts": "weights"},
    "attributes": {"objective": "regression"},
    "rating_scale": {"objective": "regression"},
    "kl_horizon": {"kl_target": 3.0},
    "reward_ensemble_strength": {"reward_ensemble": "soft_min"},
    **{key: {"use_vllm": True} for key in DEPENDENT if key.startswith("vllm_")},
    "vllm_server_base_url": {"use_vllm": True, "vllm_mode": "server"},
    "num_train_epochs": {},
    "shaping_tokens": {"shaping_coef": 1.0},
    "critique_tokens": {"extra": "critique"},
    "critiques": {"extra": "critique"},
    **dict.fromkeys(("labels_from", "labels", "prompts", "responses", "select", "annotators_per_pair"), PEOPLE),
    **dict.fromkeys(("age_weight", "min_fresh_accuracy", "kl_limit"), PEOPLE),
    **dict.fromkeys(("judge_model", "judge_url", "judge_key", "judge_budget"), JUDGE),
}


@pytest.mark.parametrize(
    ("section", "key"), sorted({(needs.section, key) for needs in NEEDS for key in needs.keys}), ids="-".join
)
def test_a_key_that_waits_for_another_is_named_without_it(tmp_path: Path, section: str, key: str) -> None:
    values = {key: DEPENDENT[key], **({"total_episodes": 8} if key == "num_train_epochs" else {})}
    file = recipe(tmp_path, **{section: values})
    with pytest.raises(UserError) as error:
        load_recipe(file)
    assert all(f"{section}.{key} is {DEPENDENT[key]!r}, which is not used: " in said for said in error.value.problems)
    load_recipe(recipe(tmp_path, **{section: {key: DEPENDENT[key], **MEANT[key]}}))


@pytest.mark.parametrize(
    ("values", "switch"),
    [
        ({"reward": {"meta_pool": 12, "meta_step": 0.5}}, "reward.meta=false"),
        ({"ppo": {"vllm_mode": "colocate", "vllm_max_model_length": 9}}, "ppo.use_vllm=false"),
        ({"sft": {"bnb_4bit_quant_type": "fp4"}}, "sft.load_in_4bit=false"),
        ({"rounds": {"labels": 60, "prompts": 30, "select": "deviation", "age_weight": 0.5}}, "rounds.count=1"),
    ],
)
def test_what_is_switched_off_by_name_leaves_its_keys_alone(
    tmp_path: Path, values: dict[str, Any], switch: str
) -> None:
    file = recipe(tmp_path, **values)
    with pytest.raises(UserError, match="which is not used"):
        load_recipe(file)
    load_recipe(file, [switch])


def test_a_default_that_is_written_down_is_no_error(tmp_path: Path) -> None:
    load_recipe(recipe(tmp_path, reward={"smoothing": 0.2, "lora_r": 16}, ppo={"kl_horizon": 10000, "lora_alpha": 32}))


def test_arguments_of_a_model_that_the_stage_loads_itself(tmp_path: Path) -> None:
    file = recipe(tmp_path, ppo={"model_init_kwargs": {"dtype": "bfloat16"}})
    assert (
        "ppo.model_init_kwargs is {'dtype': 'bfloat16'}, which is not used: the stage loads its model itself"
        in problem(file)
    )
    assert "bnb_4bit_quant_type is 'fp4', which is not used: sft.load_in_4bit" in problem(
        recipe(tmp_path, sft={"bnb_4bit_quant_type": "fp4"})
    )


@pytest.mark.parametrize("key", ["extra_temperature", "dropout", "prototypes"])
def test_terms_that_are_not_contrastive_have_a_weight_alone(tmp_path: Path, key: str) -> None:
    load_recipe(recipe(tmp_path, reward={"extra": "length", "extra_weight": 0.5}))
    said = problem(recipe(tmp_path, reward={"extra": "length", key: DEPENDENT[key]}))
    assert f"reward.{key} is {DEPENDENT[key]!r}, which is not used: " in said


@pytest.mark.parametrize("labels_from", ["people", "judge", "verdicts"])
def test_labels_of_somebody_whom_no_round_asks_are_refused(tmp_path: Path, labels_from: str) -> None:
    """The file's own labels would be trained on, and taken for a judge's."""
    asked = {"labels_from": labels_from} | {key: JUDGE[key] for key in ("judge_model",) if labels_from != "people"}
    asked |= {"judge_url": JUDGE["judge_url"]} if labels_from == "judge" else {}
    file = recipe(tmp_path, rounds=asked)
    reason = "no round asks for labels, as rounds.count is 1 and rounds.first offline"
    assert f"rounds.labels_from is '{labels_from}', which is not used: {reason}" in problem(file)
    load_recipe(file, ["rounds.count=1"])  # whoever says one round, as for a first try, knows that nobody is asked
    load_recipe(file, ["rounds.count=2"])
    load_recipe(file, ["rounds.first=sampled"])
    load_recipe(recipe(tmp_path, rounds={"labels_from": "dataset"}))


@pytest.mark.parametrize("labels_from", ["lab", "judge", "dataset"])
def test_only_people_are_several_to_a_pair(tmp_path: Path, labels_from: str) -> None:
    lab: dict[str, Any] = {"lab": {}, "backbone": {}, "data": {}} if labels_from == "lab" else {}
    values = {**(JUDGE if labels_from == "judge" else {}), "count": 2, "labels_from": labels_from}
    load_recipe(recipe(tmp_path, rounds=values, **lab))
    said = problem(recipe(tmp_path, rounds={**values, "annotators_per_pair": 3}, **lab))
    assert "rounds.annotators_per_pair is 3, which is not used: rounds.labels_from is not people" in said


@pytest.mark.parametrize("key", ["labels", "prompts", "responses", "select"])
def test_rounds_that_deal_out_a_file_ask_for_nothing(tmp_path: Path, key: str) -> None:
    said = problem(recipe(tmp_path, rounds={"count": 3, "labels_from": "dataset", key: DEPENDENT[key]}))
    assert f"rounds.{key} is {DEPENDENT[key]!r}, which is not used: rounds.labels_from is dataset" in said


def test_a_judges_address_that_is_not_used_is_shown_without_its_secrets(tmp_path: Path) -> None:
    said = problem(recipe(tmp_path, rounds={**PEOPLE, "judge_url": "http://me:hush@host/v1?key=mum"}))
    assert "rounds.judge_url is 'http://me:***@host/v1?key=***', which is not used" in said


QLORA = Path(__file__).parents[2] / "recipes" / "models" / "llama-3.1-8b-qlora.yaml"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], []),
        (["ppo.load_in_4bit=false"], [("ppo", "4-bit (nf4)", "whole")]),
        (["reward.bnb_4bit_quant_type=fp4"], [("reward", "4-bit (nf4)", "4-bit (fp4)")]),
        (["sft.load_in_4bit=false"], [("reward", "whole", "4-bit (nf4)"), ("ppo", "whole", "4-bit (nf4)")]),
        (["reward.load_in_4bit=false", "reward.use_peft=false"], [("reward", "4-bit (nf4)", "whole")]),
    ],
)
def test_an_adapter_on_other_weights_than_it_was_trained_on_is_named(
    overrides: list[str], expected: list[tuple[str, str, str]]
) -> None:
    sentences = list(mixed_bits(load_recipe(QLORA, overrides)))
    starts = [
        f"{name}: SFT's adapter was trained on {a} weights and stands on {b} ones here" for name, a, b in expected
    ]
    assert [sentence.partition(", so")[0] for sentence in sentences] == starts


def test_sections_of_stages_that_a_recipe_has_not_are_named(tmp_path: Path) -> None:
    """Who forgot data.sft believed that SFT had run."""
    (tmp_path / "r.yaml").write_text("name: x\nbackbone: {model: m}\ndata: {preferences: p.jsonl}\n")
    overrides = ["sft.learning_rate=0.1", "sft.num_train_epochs=2.0", "vote.members=7"]
    sft, vote = absent_stages(load_recipe(tmp_path / "r.yaml", overrides))
    assert sft.startswith("sft.learning_rate, sft.num_train_epochs: not used; nobody gives demonstrations (data.sft)")
    assert vote.startswith("vote.members: not used; nothing votes: reward.objective: bt reads no votes")
    (only,) = absent_stages(load_recipe(tmp_path / "r.yaml", [*overrides, "data.sft=s.jsonl"]))
    assert only == vote
    assert not list(absent_stages(load_recipe(tmp_path / "r.yaml", ["vote.members=7", "reward.objective=posterior"])))
    resolved = yaml.safe_dump(load_recipe(tmp_path / "r.yaml").resolved())
    (tmp_path / "again.yaml").write_text(resolved)
    assert not list(absent_stages(load_recipe(tmp_path / "again.yaml"))), "defaults that a run wrote down"


@pytest.mark.parametrize(
    "file", [f for f in shipped_recipes() if "accelerate" not in f.parts], ids=lambda file: file.name
)
def test_shipped_recipes_set_nothing_that_is_not_used(file: Path) -> None:
    assert not list(absent_stages(load_recipe(file)))


@pytest.mark.parametrize(
    ("overrides", "until", "expected"),
    [
        ([], None, None),
        (["sampling.temperature=0.7"], None, None),
        (["ppo.temperature=0.7"], None, "ppo.temperature is 0.7 and sampling.temperature 1:"),
        (["ppo.temperature=0.7", "sampling.temperature=0.7"], None, None),
        (
            ["ppo.temperature=1", "sampling.temperature=0.7"],
            "ppo",
            "ppo.temperature is 1 and sampling.temperature 0.7:",
        ),
        (["ppo.temperature=0.7"], "round-1/ppo", "ppo.temperature is 0.7 and sampling.temperature 1:"),
        (["ppo.temperature=0.7"], "reward", None),
    ],
)
def test_two_temperatures_are_named(overrides: list[str], until: str | None, expected: str | None) -> None:
    sentences = list(mixed_temperatures(load_recipe(QLORA, overrides), until))
    assert [sentence.partition(" PPO ")[0] for sentence in sentences] == ([expected] if expected else [])


def test_a_stage_that_does_not_run_stands_on_nothing() -> None:
    recipe = load_recipe(QLORA, ["sft.load_in_4bit=false"])
    assert [sentence.partition(":")[0] for sentence in mixed_bits(recipe, "reward")] == ["reward"]
    assert list(mixed_bits(recipe, "sft")) == []


@pytest.mark.parametrize(("key", "value"), [("use_peft", True), ("optim", "sgd"), ("dtype", "bfloat16")])
def test_voters_on_a_shared_trunk_take_nothing_of_a_trainer(tmp_path: Path, key: str, value: object) -> None:
    """Each of these changed no vote by a bit."""
    file = recipe(tmp_path, reward={"objective": "posterior"}, vote={"trunk": 1, key: value})
    assert f"vote.{key} is {value!r}, which is not used: voters on a shared trunk" in problem(file)
    load_recipe(recipe(tmp_path, reward={"objective": "posterior"}, vote={key: value}))
    load_recipe(recipe(tmp_path, reward={"objective": "posterior", key: value}, vote={"trunk": 1}))


def test_voters_on_a_shared_trunk_read_no_template_of_a_trainer(tmp_path: Path) -> None:
    """They judged other texts than the reward model, which is trained on their votes."""
    template = {"chat_template_path": "t.jinja"}
    for name in ("reward", "vote"):
        sections = {"reward": {"objective": "posterior"}, "vote": {"trunk": 1}}
        sections[name] |= template
        expected = f"{name}.chat_template_path is not read by voters on a shared trunk"
        assert expected in problem(recipe(tmp_path, **sections))
    load_recipe(recipe(tmp_path, reward={"objective": "posterior", **template}))
    load_recipe(recipe(tmp_path, reward={"objective": "bt", **template}))


@pytest.mark.parametrize("overrides", [["ppo.load_in_4bit=true"], ["reward.load_in_4bit=true"], []])
def test_roles_that_can_not_share_a_base_are_named(tmp_path: Path, overrides: list[str]) -> None:
    """Also without SFT: a recipe that asked for 4 bits in PPO alone held two models more than one without."""
    lora = {"use_peft": True}
    sentences = list(mixed_bits(load_recipe(recipe(tmp_path, reward=lora, ppo=lora), overrides)))
    expected = {
        "ppo.load_in_4bit=true": "ppo: its policy stands on 4-bit (nf4) weights and the reward model on whole ones",
        "reward.load_in_4bit=true": "ppo: its policy stands on whole weights and the reward model on 4-bit (nf4) ones",
    }
    assert [sentence.partition(",")[0] for sentence in sentences] == [expected[override] for override in overrides]
    checked = load_recipe(recipe(tmp_path, reward=lora, ppo=lora), overrides)
    for until, is_said in (("reward", False), ("ppo", True), ("evaluate", True)):
        assert list(mixed_bits(checked, until)) == (sentences if is_said else [])
