"""What an override or a child recipe replaces, and what it adds to."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.errors import UserError
from rlhf.recipe import Recipe, load_recipe

BASE: dict[str, Any] = {
    "name": "x",
    "lab": {"world": "lists", "pairs": 100},
    "backbone": {"from_scratch": {"architecture": "llama", "hidden_size": 64, "num_hidden_layers": 2}},
    "reward": {"learning_rate": 1e-3},
}
RATED: dict[str, Any] = {
    "name": "x",
    "backbone": {"model": "org/model"},
    "data": {"preferences": {"source": "old.jsonl", "max_rows": 100, "preference": {"0": "first", "1": "second"}}},
    "reward": {"objective": "regression", "attributes": {"helpfulness": 0.6, "verbosity": -0.4}},
}


def loaded(folder: Path, base: dict[str, Any], child: str = "", overrides: tuple[str, ...] = ()) -> Recipe:
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "child.yaml").write_text(f"base: base.yaml\n{child}")
    return load_recipe(folder / "child.yaml", overrides)


def test_weights_of_attributes_are_replaced_as_a_whole_and_changed_by_name(tmp_path: Path) -> None:
    whole = loaded(tmp_path, RATED, overrides=("reward.attributes={helpfulness: 1.0}",))
    assert whole.reward.attributes == {"helpfulness": 1.0}
    assert loaded(tmp_path, RATED, "reward: {attributes: {helpfulness: 1.0}}").reward.attributes == {"helpfulness": 1.0}
    one = loaded(tmp_path, RATED, overrides=("reward.attributes.verbosity=0.1",))
    assert one.reward.attributes == {"helpfulness": 0.6, "verbosity": 0.1}


def test_another_source_has_nothing_of_the_one_before(tmp_path: Path) -> None:
    """Least of all what the values of its preference mean."""
    new: Any = loaded(tmp_path, RATED, "data: {preferences: {source: new.jsonl}}").data.preferences
    assert (new.source, new.max_rows, new.preference) == ("new.jsonl", None, None)
    old: Any = loaded(tmp_path, RATED, "data: {preferences: {max_rows: 10}}").data.preferences
    assert (old.source, old.max_rows, old.preference) == ("old.jsonl", 10, {"0": "first", "1": "second"})
    old: Any = loaded(tmp_path, RATED, overrides=("data.preferences.max_rows=10",)).data.preferences
    assert (old.source, old.max_rows) == ("old.jsonl", 10)


def test_settings_are_added_to_those_of_the_base(tmp_path: Path) -> None:
    shape = loaded(tmp_path, BASE, "backbone: {from_scratch: {hidden_size: 32}}").backbone.from_scratch
    assert shape == {"architecture": "llama", "hidden_size": 32, "num_hidden_layers": 2}


@pytest.mark.parametrize(("written", "is_there"), [("lab: null", False), ("lab: ~", False), ("lab:", True)])
def test_a_null_removes_a_section_of_the_base(tmp_path: Path, written: str, is_there: bool) -> None:
    """An empty section stands for its defaults, over a base too."""
    recipe = loaded(tmp_path, {**BASE, "data": {"preferences": "x.jsonl", "sft": "y.jsonl"}}, written)
    assert (recipe.lab is not None) is is_there


def test_a_number_that_begins_with_a_zero_is_refused(tmp_path: Path) -> None:
    """YAML 1.1 counts it by eights, YAML 1.2 by tens."""
    with pytest.raises(UserError, match="seed: input should be a valid integer"):
        loaded(tmp_path, BASE, overrides=("seed=010",))


def test_a_pair_is_not_weighed_by_its_age_and_by_something_else(tmp_path: Path) -> None:
    """It has one weight, of which either would overwrite the other; a posterior is multiplied into it."""
    asking = {**BASE, "rounds": {"count": 2, "labels_from": "lab", "age_weight": 0.5}}
    with pytest.raises(
        UserError, match=r"rounds.age_weight weighs pairs by their age, and reward.objective: scaled by"
    ):
        loaded(tmp_path, asking, overrides=("reward.objective=scaled",))
    assert loaded(tmp_path, asking, overrides=("reward.objective=weight",)).rounds.age_weight == 0.5


def test_labels_are_not_corrected_twice(tmp_path: Path) -> None:
    """A rate in the loss says of an objective's P(label) what it is of P(truth): the two take each other back."""
    for objective in ("smoothing", "soft_margin", "vote_soft", "vote_sigmoid", "posterior"):
        with pytest.raises(UserError, match=rf"reward.flip_rate is .* and reward.objective: {objective} already says"):
            loaded(tmp_path, BASE, overrides=(f"reward.objective={objective}", "reward.flip_rate=0.2"))
    for objective in ("bt", "flip", "drop"):
        assert loaded(tmp_path, BASE, overrides=(f"reward.objective={objective}", "reward.flip_rate=0.2"))


def test_voters_that_know_the_labels_say_nothing_of_how_many_are_wrong(tmp_path: Path) -> None:
    for objective in ("posterior", "weight", "vote_sigmoid"):
        with pytest.raises(UserError, match=r"vote.in_sample lets voters vote on what they were trained on"):
            loaded(tmp_path, BASE, overrides=(f"reward.objective={objective}", "vote.in_sample=true"))
    limit = ("rounds.count=2", "rounds.labels_from=lab", "rounds.max_noise=0.2")
    with pytest.raises(UserError, match=r"rounds.max_noise want that"):
        loaded(tmp_path, BASE, overrides=("reward.objective=flip", "vote.in_sample=true", *limit))
    assert loaded(tmp_path, BASE, overrides=("reward.objective=soft_margin", "vote.in_sample=true"))


@pytest.mark.parametrize("section", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("key", ["save_only_model", "ignore_data_skip", "enable_jit_checkpoint"])
def test_a_stage_that_is_interrupted_can_go_on(tmp_path: Path, section: str, key: str) -> None:
    """Without its optimizer, or from the first row on, it went on as if it were a new one, and said nothing; and transformers'
    own checkpoint at SIGTERM ended training as if that were done."""
    with pytest.raises(UserError, match=r"a stage that is interrupted goes on with|the same command goes on from it"):
        loaded(tmp_path, BASE, overrides=(f"{section}.{key}=true",))


def test_smoothing_of_tokens_is_no_smoothing_of_pairs(tmp_path: Path) -> None:
    for section, other in (("reward", "set reward.objective: smoothing"), ("vote", "voters have vote.flip_rate")):
        overrides = (f"{section}.label_smoothing_factor=0.1", "reward.objective=flip")
        with pytest.raises(UserError, match=rf"{section}.label_smoothing_factor is 0.1, which is not used: .*{other}"):
            loaded(tmp_path, BASE, overrides=overrides)


def test_padding_and_templates_are_the_tokenizers(tmp_path: Path) -> None:
    for section in ("sft", "reward", "ppo"):
        with pytest.raises(UserError, match="the tokenizer decides it"):
            loaded(tmp_path, BASE, overrides=(f"{section}.pad_token=<|end|>",))
    for section in ("sft", "reward"):
        with pytest.raises(UserError, match=rf"{section}.chat_template_path names another model, whose new tokens"):
            loaded(tmp_path, BASE, overrides=(f"{section}.chat_template_path=org/name", f"{section}.use_peft=true"))


@pytest.mark.parametrize("section", ["sft", "reward", "ppo"])
def test_what_a_stage_does_is_no_setting(tmp_path: Path, section: str) -> None:
    """`do_train: false` trained all the same."""
    with pytest.raises(UserError, match=rf"{section}.do_train can't be set in a recipe: the verb decides what is done"):
        loaded(tmp_path, BASE, overrides=(f"{section}.do_train=false",))
    if section == "sft":
        for key, value in (("dataset_kwargs", "{skip_prepare_dataset: true}"), ("dataset_text_field", "other")):
            with pytest.raises(UserError, match="the stage prepares the rows itself"):
                loaded(tmp_path, BASE, overrides=(f"sft.{key}={value}",))


@pytest.mark.parametrize("name", ["no", "1", "2026-01-01"])
def test_a_word_that_yaml_reads_as_something_else_wants_quotes(tmp_path: Path, name: str) -> None:
    (tmp_path / "r.yaml").write_text(f"name: {name}\nlab: {{}}\n")
    with pytest.raises(UserError, match="name: input should be a valid string; put it in quotes"):
        load_recipe(tmp_path / "r.yaml")
