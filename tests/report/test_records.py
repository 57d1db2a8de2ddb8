"""What pages read of a run that a crash has damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.report.records import read_manifests, read_recipe, read_rows, read_summary, sealed_summary


@pytest.mark.fault("records cut or edited")
@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "\x00\x00\x00", "\x00\n"])
def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path, torn: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"resumed_from": 1}\n{"step": 2}\n' + torn)
    with pytest.warns(UserWarning, match=r"metrics.jsonl: its last line was cut off and is left out"):
        assert read_rows(file) == [{"step": 1}, {"step": 2}]


@pytest.mark.fault("records cut or edited")
def test_a_damaged_line_in_the_middle_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match="a line in its middle is damaged"):
        read_rows(file)


@pytest.mark.fault("records cut or edited")
def test_a_row_without_its_keys_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text('{"prompt": "p", "sft": "s"}\n{"prompt": "q"}\n')
    assert len(read_rows(file, ("prompt",))) == 2
    with pytest.raises(
        UserError, match=r"samples.jsonl: row 2 has no 'sft'; delete the stage's folder to make it again"
    ):
        read_rows(file, ("prompt", "sft"))


@pytest.mark.fault("records cut or edited")
@pytest.mark.parametrize(
    "content", ["", "{", "\x00\x00", "{}", "[]", "null", "3", '"x"', "NaN", "[" * 5000, '{"recipe": "r"}']
)
def test_a_damaged_summary_is_a_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=r"summary.json: cut off(, damaged or edited| or damaged);"):
        read_summary(tmp_path)


SUMMARY: dict[str, Any] = {
    "recipe": "r", "seed": 0, "seconds": {"sft": 1.0}, "lab": {"flip_rate": 0.1}, "sft": {"gold": 0.5}, "rounds": [],
    "best_round": 1, "best_of_16": {"by_reward": {}, "by_gold": {}}, "gold_gap_closed": 0.5, "evaluated_prompts": 8, "stopped": None,
}  # fmt: skip


@pytest.mark.fault("records cut or edited")
def test_an_edited_summary_is_told_from_one_that_took_longer(tmp_path: Path) -> None:
    def written(**changes: Any) -> Path:
        (tmp_path / "summary.json").write_text(json.dumps({**sealed_summary(SUMMARY), **changes}))
        return tmp_path

    assert read_summary(written()) == SUMMARY
    assert read_summary(written(seconds={"sft": 9.0}))["seconds"] == {"sft": 9.0}
    for name, value in (("gold_gap_closed", 0.9), ("lab", {}), ("sft", {"gold": None}), ("more", 1)):
        with pytest.raises(UserError, match="damaged or edited"):
            read_summary(written(**{name: value}))
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert read_summary(tmp_path) == SUMMARY, "a run that was made before there were seals"


@pytest.mark.fault("records cut or edited")
@pytest.mark.parametrize("line", ["3", "null", "[]", '"x"', "NaN"])
def test_a_line_that_is_no_row_is_a_sentence(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match="holds a line that is no row"):
        read_rows(tmp_path / "metrics.jsonl")


@pytest.mark.fault("records cut or edited")
@pytest.mark.parametrize("content", ['{"key": "k"}', '{"key": "k", "parents": {}}', "[" * 5000])
def test_a_manifest_without_its_parts_is_a_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "round-0/sft").mkdir(parents=True)
    (tmp_path / "round-0/sft/manifest.json").write_text(content)
    with pytest.raises(UserError, match="nobody can tell what this folder holds"):
        read_manifests(tmp_path)


@pytest.mark.fault("records cut or edited")
@pytest.mark.parametrize("content", ["[" * 5000, f"seed: {'1' * 5000}", "3"])
def test_a_recipe_of_a_run_that_nobody_can_read_is_a_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match=r"recipe\.yaml: cut off or damaged"):
        read_recipe(tmp_path)


def test_steps_that_were_done_again_count_once(tmp_path: Path) -> None:
    """SIGKILL after step 7, from a checkpoint of step 4; curves went back and forth, and rollouts counted twice."""
    rows = [{"step": step, "kl": step} for step in range(1, 8)] + [{"resumed_from": 4}]
    rows += [{"step": step, "kl": step} for step in range(5, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl", ("step",))] == list(range(1, 10))
