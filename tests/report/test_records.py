"""What pages read of a run that a crash has damaged."""

from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.report.records import read_rows, read_summary


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
@pytest.mark.parametrize("content", ["", "{", "\x00\x00"])
def test_a_damaged_summary_is_a_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=r"summary.json: cut off or damaged"):
        read_summary(tmp_path)
