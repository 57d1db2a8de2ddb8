"""`rlhf audit --meter`: its key, page and lines; kept by a killed audit; refused or left out in a sentence."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.pipeline import audit as audit_module
from rlhf.pipeline import vote as vote_module
from rlhf.pipeline.audit import audit
from rlhf.pipeline.second_look import look_again
from rlhf.recipe import Recipe, load_recipe
from rlhf.report.terminal import audit_lines
from rlhf.reward import meter as meter_module
from tests.pipeline.test_second_look import RECIPE, write_pairs


def recipe(folder: Path, *overrides: str) -> Recipe:
    (folder / "r.yaml").write_text(RECIPE)
    return load_recipe(folder / "r.yaml", list(overrides))


def run(folder: Path, base: Path, name: str = "out", **arguments: Any) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    settings = {"members": None, "recipe": recipe(folder), "say": said.append, "meter": True, **arguments}
    return audit(str(folder / "pairs.jsonl"), str(base), folder / name, **settings), said


def test_an_audit_says_what_more_labels_would_bring(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    monkeypatch.setattr(meter_module, "FEWEST", 3)

    # Killed after the voters: the same command trains none of them again.
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(audit_module, "fit_meter", killed)
        run(tmp_path, base_folder)
    assert len(list((tmp_path / "out/work").rglob("differences.safetensors"))) == 4 + 3 * 2, (
        "four voters; three parts of two folds"
    )
    with monkeypatch.context() as patch:
        patch.setattr(vote_module, "_on_trunk", killed)
        result, said = run(tmp_path, base_folder)
    assert any("88% of the time of 2 voters" in line for line in said)

    meter = json.loads((tmp_path / "out/audit.json").read_text())["meter"]
    assert meter == result["meter"]
    assert meter["labels"] == 120
    assert [entry["labels"] for entry in meter["more"]] == [60, 120, 360]
    assert meter["second_look"]["verdicts"] == 6
    for low_to_high in (meter["accuracy"], meter["limit"], meter["worth"], meter["second_look"]["labels"]):
        mean, low, high = low_to_high
        assert low <= mean <= high
    page = (tmp_path / "out/audit.html").read_text()
    assert "What more labels would bring" in page
    assert "6 expert verdicts on the pairs in most doubt" in page
    assert any(line.startswith("Meter: 120 labels, ") for line in audit_lines(result))

    # It is priced once; another price is not had by asking again.
    again, said = run(tmp_path, base_folder, budget=30, expert_error=0.2)
    assert again["meter"] == meter
    assert "its meter prices 6 verdicts that are wrong in 5%" in said[-1]
    assert len(run(tmp_path, base_folder, budget=6)[1]) == 1, "only that it was done before"

    # A second look keeps it, on the page too.
    source = Source(str(tmp_path / "pairs.jsonl"))
    arguments: dict[str, Any] = {"expert_error": 0.05, "compare": "answers", "seed": 0, "say": print}
    look_again(source, str(base_folder), tmp_path / "out", budget=12, **arguments)
    assert json.loads((tmp_path / "out/audit.json").read_text())["meter"] == meter
    assert "What more labels would bring" in (tmp_path / "out/audit.html").read_text()


def test_what_cannot_be_measured_is_a_sentence(base_folder: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    for override, said in (
        ("vote.trunk=null", r"--meter: .* set vote.trunk in --recipe and leave out vote.in_sample"),
        ("vote.in_sample=true", r"--recipe: vote.in_sample: voters agree with labels that they were trained on"),
    ):
        with pytest.raises(UserError, match=said):
            run(tmp_path, base_folder, recipe=recipe(tmp_path, override))
        assert not (tmp_path / "out").exists(), "nothing is made"
    result, _ = run(tmp_path, base_folder)
    assert result["meter"] == {"reason": "120 labels are too few to say what more would bring; the meter needs 400."}
    assert audit_lines(result)[-1].startswith("Meter: 120 labels are too few")

    without, _ = run(tmp_path, base_folder, "without", meter=False)
    assert "meter" not in without
    with pytest.raises(UserError, match="was made without --meter"):
        run(tmp_path, base_folder, "without")
