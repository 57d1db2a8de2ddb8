"""The table of objectives is complete, and everything that is read from it agrees with it."""

import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf import OBJECTIVES
from rlhf.errors import UserError
from rlhf.objectives.pairwise import pair_loss
from rlhf.objectives.strength import VoteStrength
from rlhf.pipeline.plan import plan
from rlhf.recipe import load_recipe
from rlhf.recipe.objectives import PAIR_COLUMNS, PAIR_LOSS, extras_table, objectives_table, resolve
from rlhf.recipe.schema import RewardSection
from rlhf.reward.denoise import DenoiseConfig, Denoised, denoised
from rlhf.reward.noise import NoiseEstimate

GUIDES = Path(__file__).parents[2] / "recipes" / "guides"
VOTED = [name for name, objective in OBJECTIVES.items() if objective.needs.vote]


# ---- The rows ----


def test_every_row_is_whole() -> None:
    for name, objective in OBJECTIVES.items():
        assert objective.name == name
        assert objective.summary
        assert not objective.summary.endswith(".")
        needs = objective.needs
        assert [needs.vote, needs.column is not None, needs.rankings, needs.ratings].count(True) <= 1, "one thing"
        elements = "rankings" if needs.rankings else "ratings" if needs.ratings else "pairs"
        assert objective.loss.elements == elements
        assert elements == "pairs" or objective.apply is None, "what is done to pairs is done to pairs"
        assert objective.needs.column is not None or not objective.needs.or_rating_gap
        names = [objective.apply, objective.loss.function, objective.loss.head]
        assert all(callable(resolve(dotted)) for dotted in names if dotted is not None)
        assert set(objective.loss.columns) <= set(inspect.signature(resolve(objective.loss.function)).parameters)


def test_functions_take_what_the_table_says() -> None:
    for objective in OBJECTIVES.values():
        if objective.apply is not None:
            expected = ["rows", "config", "strength", "noise"] if objective.needs.vote else ["rows", "config"]
            assert list(inspect.signature(resolve(objective.apply)).parameters) == expected


def test_columns_that_a_pair_lacks_change_nothing() -> None:
    chosen, rejected = torch.randn(5), torch.randn(5)
    loss = resolve(PAIR_LOSS.function)
    torch.testing.assert_close(loss(chosen, rejected, **PAIR_COLUMNS), loss(chosen, rejected), atol=0, rtol=0)


def test_reading_the_table_loads_no_torch() -> None:
    code = "import sys, rlhf; rlhf.OBJECTIVES; from rlhf.recipe.objectives import objectives_table; objectives_table()"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)


# ---- What is read from them ----


def test_a_recipe_takes_exactly_the_names_of_the_table(tmp_path: Path) -> None:
    assert RewardSection.model_json_schema()["properties"]["objective"]["enum"] == list(OBJECTIVES)
    file = tmp_path / "r.yaml"
    file.write_text("name: x\nlab: {}\nreward: {objective: btt}\n", encoding="utf-8")
    *names, last = [repr(name) for name in OBJECTIVES]
    with pytest.raises(UserError) as error:
        load_recipe(file)
    assert error.value.problems == [f"{file}:3: reward.objective: input should be {', '.join(names)} or {last}."]
    with pytest.raises(UserError, match="'btt' is none of bt, margin"):
        DenoiseConfig("btt")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_vote_is_planned_where_the_table_needs_one(name: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"name: x\nlab: {{}}\nreward: {{objective: {name}}}\n", encoding="utf-8")
    recipe = load_recipe(file)
    assert recipe.reward.needs_vote == (name in VOTED)
    assert ("vote" in [stage.name for stage in plan(recipe)]) == (name in VOTED)


@pytest.mark.parametrize(("guide", "name"), [("noisy_labels.md", "objectives"), ("reward_models.md", "extras")])
def test_the_guides_have_the_tables(guide: str, name: str) -> None:
    _, begin, rest = (GUIDES / guide).read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    assert begin, f"{guide} has no <!-- {name} -->"
    table, end, _ = rest.partition(f"<!-- /{name} -->")
    assert end, f"{guide} has no <!-- /{name} -->"
    tables = {"objectives": objectives_table, "extras": extras_table}
    assert table.strip() == tables[name]().strip(), (
        f"python -c 'from rlhf.recipe.objectives import {name}_table as t; print(t())'"
    )
    assert max(len(line) for line in table.splitlines()) <= 120


# ---- What each does: closed forms ----

MEAN = torch.tensor([-2.0, -0.5, 1.0, 3.0, 0.4])
STRENGTH = VoteStrength(MEAN, torch.ones(5), torch.tensor([0.0, 0.25, 0.5, 1.0, 0.75]), torch.full((5,), 4))
NOISE = NoiseEstimate(flip_rate=0.25, fitted=0.2, scale=0.5, low=0.15, high=0.3)
SMALL = {"flip_fraction": 0.5, "margin_scale": 0.5}  # of four labels, two
POSTERIOR = [1 / (1 + math.exp(-0.5 * d) * 0.2 / 0.8) for d in MEAN.tolist()]


def pairs(**columns: Any) -> list[Any]:
    """Five pairs with ratings and a confidence; annotators called the last one equal."""
    return [
        {
            "prompt": [{"role": "user", "content": f"p{i}"}],
            "chosen": [{"role": "assistant", "content": f"good {i}"}],
            "rejected": [{"role": "assistant", "content": f"bad {i}"}],
            **columns,
        }
        for i in range(5)
    ]


def rated() -> list[Any]:
    return [
        {**pair, "rating_gap": 1.0 + i, "confidence": 0.5 if i == 4 else 0.9}
        for i, pair in enumerate(pairs(annotator="ann"))
    ]


# Of each objective the columns that it sets; None where a pair keeps what it has. Flips and drops are those of pairs 0 and 1.
COLUMNS: dict[str, dict[str, list[float | None]]] = {
    "bt": {},
    "margin": {"margin": [0.5, 1.0, 1.5, 2.0, 0.0]},  # the last is a tie
    "scaled": {"weight": [1.0, 2.0, 3.0, 4.0, 5.0]},
    "smoothing": {"confidence": [0.8, 0.8, 0.8, 0.8, None]},
    "soft": {},
    "flip": {},  # sides alone: whoever was 0.9 sure of one answer is taken to be as sure of the other
    "adaptive_margin": {"margin": [-1.0, -0.25, 0.5, 1.5, None]},
    "flip_margin": {"margin": [1.0, 0.25, 0.5, 1.5, None]},
    "soft_margin": {"margin": [-1.0, -0.25, 0.5, 1.5, None], "confidence": [0.8, 0.8, 1.0, 1.0, None]},
    "vote_soft": {"confidence": [0.0, 0.25, 0.5, 1.0, None]},
    "vote_sigmoid": {"confidence": [1 / (1 + math.exp(-0.5 * d)) for d in MEAN.tolist()[:4]] + [None]},
    "posterior": {"confidence": [*POSTERIOR[:4], None]},
    "weight": {"weight": [*POSTERIOR[:4], None]},
    "drop": {},
    "plackett_luce": {},
    "kwise": {},
    "regression": {},
    "gated": {},
}


def check(name: str) -> None:
    """An objective does to the rated pairs what is written down above."""
    flips, drops = name in ("flip", "flip_margin"), name == "drop"
    expected = []
    for i, row in enumerate(rated()):
        values = {column: values[i] for column, values in COLUMNS[name].items() if values[i] is not None}
        turned = {"chosen": row["rejected"], "rejected": row["chosen"], "rating_gap": -row["rating_gap"]}
        sides = turned if flips and i < 2 else {}
        expected.append({**row, **sides, **{column: pytest.approx(value) for column, value in values.items()}})
    rows, flipped = denoised(rated(), DenoiseConfig(name, **SMALL), STRENGTH, NOISE)
    assert rows == (expected[2:] if drops else expected)
    assert flipped == (2 if flips else None)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_in_closed_form(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_function_of_another_objective_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = OBJECTIVES[name]
    others = {other.apply for other in OBJECTIVES.values()} - {row.apply}
    assert len(others) >= 12
    for other in others:
        monkeypatch.setitem(OBJECTIVES, name, replace(row, apply=other))
        with pytest.raises((AssertionError, TypeError)):  # another result, or called with votes that it does not take
            check(name)


# ---- What each needs ----


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_needed_is_refused_where_it_is_missing(name: str) -> None:
    needs, config = OBJECTIVES[name].needs, DenoiseConfig(name)

    def apply(rows: list[Any], strength: VoteStrength | None = None, noise: NoiseEstimate | None = None) -> Denoised:
        return denoised(rows, config, strength, noise)

    if needs.vote:
        with pytest.raises(AssertionError, match="plans a vote"):
            apply(pairs())
        with pytest.raises(AssertionError, match="comes with the votes"):
            apply(pairs(), STRENGTH)
        assert apply(pairs(), STRENGTH, NOISE).rows
    elif needs.column is None:
        assert len(apply(pairs()).rows) == 5
    else:
        ratings = " and no ratings" if needs.or_rating_gap else ""
        first, *rest = pairs(**{needs.column: 0.7})
        sentence = (
            f"reward.objective is {name}, but 5 of 5 pairs (the first is number 1) have no '{needs.column}'{ratings}; "
            "add it, or choose another objective."
        )
        with pytest.raises(UserError) as error:
            apply(pairs())
        assert error.value.problems == [sentence]
        with pytest.raises(UserError, match=r"2 of 6 pairs \(the first is number 2\)"):
            apply([first, *pairs()[:2], *rest[:3]])
        assert apply([first, *rest]).rows == [first, *rest]
        if needs.or_rating_gap:
            assert [row[needs.column] for row in apply(pairs(rating_gap=2)).rows] == [2.0] * 5
        else:
            with pytest.raises(UserError):
                apply(pairs(rating_gap=2))


def test_ratings_against_the_label_give_no_weight() -> None:
    """A negative weight would teach the label turned round."""
    rows = [{"prompt": [], "chosen": [], "rejected": [], "rating_gap": gap} for gap in (-2.0, 0.0, 1.5)]
    assert [row["weight"] for row in denoised(rows, DenoiseConfig("scaled")).rows] == [0.0, 0.0, 1.5]


Form = Callable[[Tensor, Tensor], Tensor]
# HelpSteer2-Preference's three forms, of a difference d and a gap m (arXiv:2410.01257), and one that is easily taken for the third.
FORMS: dict[str, Form] = {
    "bt": lambda d, m: -torch.log(torch.sigmoid(d)),
    "margin": lambda d, m: -torch.log(torch.sigmoid(d - m)),
    "scaled": lambda d, m: -m * torch.log(torch.sigmoid(d)),
}
STRETCHED: Form = lambda d, m: -torch.log(torch.sigmoid(m * d))  # noqa: E731


def gradient(losses: Tensor, differences: Tensor) -> list[float]:
    (slopes,) = torch.autograd.grad(losses.sum(), differences)
    values: list[float] = slopes.tolist()
    return values


@pytest.mark.parametrize("name", FORMS)
def test_the_three_forms_of_a_rating_gap(name: str) -> None:
    """Loss and gradient by autograd of the formula as it is printed, gaps of 1, 2 and 3."""
    gaps = torch.tensor([1.0, 2.0, 3.0, 3.0])
    rows = denoised(
        [{**pair, "rating_gap": m.item()} for pair, m in zip(pairs(), gaps, strict=False)], DenoiseConfig(name)
    ).rows
    columns = {c: torch.tensor([row[c] for row in rows]) for c in PAIR_COLUMNS if c in rows[0]}  # type: ignore[literal-required]
    d = torch.tensor([0.3, -2.0, 1.5, -0.1], requires_grad=True)
    losses = pair_loss(d, torch.zeros(4), **columns)
    expected = FORMS[name](d, gaps)
    assert losses.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert gradient(losses, d) == pytest.approx(gradient(expected, d), abs=1e-6)
    others = [form for other, form in {**FORMS, "stretched": STRETCHED}.items() if other != name]
    assert all(losses.tolist() != pytest.approx(other(d, gaps).tolist(), abs=1e-2) for other in others)
    if name == "scaled":
        regular = gradient(FORMS["bt"](d, gaps), d)
        assert gradient(pair_loss(d, torch.zeros(4), **columns), d) == pytest.approx(
            [m * slope for m, slope in zip(gaps.tolist(), regular, strict=True)]
        )


def test_the_table_is_written_with_its_needs() -> None:
    rows = {line.split("`")[1]: line for line in objectives_table().splitlines()[2:]}
    assert list(rows) == list(OBJECTIVES)
    assert all(("| a vote |" in line) == (name in VOTED) for name, line in rows.items())
    assert "| `margin` or ratings |" in rows["margin"]
    assert "| `confidence` |" in rows["soft"]
    assert all("| rankings |" in rows[name] for name in ("plackett_luce", "kwise"))
    assert "| ratings of attributes |" in rows["regression"]
    assert "| ratings of attributes + pairs |" in rows["gated"]


@pytest.mark.parametrize(("shape", "is_fine"), [("members: 2", False), ("members: 1, folds: 2", False),
    ("members: 2, folds: 2", True), ("members: 2, in_sample: true", True)])  # fmt: skip
def test_fewer_members_than_folds_are_refused_before_a_run(tmp_path: Path, shape: str, is_fine: bool) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"name: x\nlab: {{}}\nvote: {{{shape}}}\nreward: {{objective: flip}}\n", encoding="utf-8")
    if is_fine:
        load_recipe(file)
    else:
        with pytest.raises(UserError, match=r"r.yaml:3: vote.members is . and vote.folds .: votes on pairs that the"):
            load_recipe(file)
