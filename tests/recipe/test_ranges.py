"""Every numeric key has a range, its default lies inside, and what lies outside is refused before anything runs."""

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo

from rlhf.errors import UserError
from rlhf.recipe import load_recipe
from rlhf.recipe.foreign_keys import REFUSED_SCRATCH_KEYS
from rlhf.recipe.keys import stage_keys, trl_keys
from rlhf.recipe.ranges import RANGES, Range
from rlhf.recipe.schema import (
    STAGE_SECTIONS,
    Recipe,
)

MODEL = "name: x\nbackbone: {model: m}\ndata: {preferences: p.jsonl, sft: s.jsonl}\n"
SCRATCH = "name: x\ndata: {preferences: p.jsonl, sft: s.jsonl}\n"
UNBOUNDED = {"margin_scale"}  # of ours: any sign has a meaning


def numeric(entry: dict[str, Any]) -> bool:
    return bool({"int", "float"} & set(entry["types"])) and "dict" not in entry["types"]


STAGE_KEYS = sorted(
    {(section, name) for section in STAGE_SECTIONS for name, key in stage_keys(section).items() if numeric(key)}
)
SCRATCH_KEYS = sorted(
    {name for a in ("llama", "qwen3") for name, key in trl_keys()[a].items() if numeric(key)}
    - set(REFUSED_SCRATCH_KEYS)
)


def outside(range_: Range) -> list[float]:
    """Numbers just outside an interval."""
    found = [range_.low - 1] if range_.has_low else [range_.low, range_.low - 1]
    if range_.high < math.inf:
        found.append(range_.high + 1 if range_.has_high else range_.high)
    return found


@pytest.mark.fault("numbers out of range")
@pytest.mark.parametrize(("section", "key"), STAGE_KEYS)
def test_a_stage_key_outside_its_range_is_refused(section: str, key: str, tmp_path: Path) -> None:
    assert key in RANGES, f"a new number of TRL: give {key} a range in rlhf/recipe/ranges.py"
    entry = stage_keys(section)[key]
    default = entry["default"]
    assert not isinstance(default, int | float) or default in RANGES[key] or key == "local_rank"
    for value in outside(RANGES[key]):
        number = value if "float" in entry["types"] else int(value)
        (tmp_path / "r.yaml").write_text(f"{MODEL}{section}:\n  {key}: {number}\n")
        with pytest.raises(UserError) as caught:
            load_recipe(tmp_path / "r.yaml")
        sentence = f"r.yaml:5: {section}.{key} is {number!r}; it must be {RANGES[key]}."
        assert any(problem.endswith(sentence) for problem in caught.value.problems), caught.value.problems


@pytest.mark.fault("numbers out of range")
@pytest.mark.parametrize("key", SCRATCH_KEYS)
def test_a_size_outside_its_range_is_refused(key: str, tmp_path: Path) -> None:
    architecture = "llama" if key in trl_keys()["llama"] else "qwen3"
    for value in outside(RANGES[key]):
        number = value if not float(value).is_integer() else int(value)
        (tmp_path / "r.yaml").write_text(
            f"{SCRATCH}backbone:\n  from_scratch:\n    architecture: {architecture}\n    {key}: {number}\n"
        )
        with pytest.raises(UserError, match=f"backbone.from_scratch.{key} is {number}"):
            load_recipe(tmp_path / "r.yaml")


@pytest.mark.fault("numbers out of range")
@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ("hidden_size: 100, num_attention_heads: 3", "no even multiple of num_attention_heads 3"),
        ("hidden_size: 12, num_attention_heads: 4", "each head takes an even number of it"),
        ("num_attention_heads: 4, num_key_value_heads: 3", "no multiple of num_key_value_heads 3"),
        ("eos_token_id: 5", "backbone.from_scratch.eos_token_id can't be set in a recipe: the tokenizer decides it"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(sizes: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"{SCRATCH}backbone: {{from_scratch: {{architecture: llama, {sizes}}}}}\n")
    with pytest.raises(UserError, match=sentence):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.fault("numbers out of range", "mistakes in a recipe")
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("dataloader_prefetch_factor: 2", "sft.dataloader_prefetch_factor needs sft.dataloader_num_workers"),
        ("pad_to_multiple_of: x", "sft.pad_to_multiple_of is 'x'; it must be a number or auto"),
    ],
)
def test_what_trl_refuses_together_is_refused_by_check(settings: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"{MODEL}sft: {{{settings}}}\n")
    with pytest.raises(UserError, match=sentence):
        load_recipe(tmp_path / "r.yaml")
    for well in ("dataloader_prefetch_factor: 2, dataloader_num_workers: 1", "pad_to_multiple_of: auto"):
        (tmp_path / "r.yaml").write_text(f"{MODEL}sft: {{{well}}}\n")
        load_recipe(tmp_path / "r.yaml")


def bounded(field: FieldInfo) -> bool:
    return any(hasattr(limit, name) for limit in field.metadata for name in ("ge", "gt", "le", "lt"))


@pytest.mark.fault("numbers out of range")
def test_every_number_of_ours_has_a_bound() -> None:
    for section, of_recipe in Recipe.model_fields.items():
        annotation: Any = of_recipe.annotation
        for candidate in (annotation, *getattr(annotation, "__args__", ())):
            for name, field in getattr(candidate, "model_fields", {}).items():
                kinds = {field.annotation, *getattr(field.annotation, "__args__", ())}
                if kinds & {int, float}:
                    assert bounded(field) or name in UNBOUNDED, f"{section}.{name}"
