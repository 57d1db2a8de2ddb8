"""What may be replaced by a result: an earlier result, an empty file, and nothing else."""

from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.report.result_file import check_result_file


@pytest.mark.fault("result files that are something else")
@pytest.mark.parametrize(
    ("content", "is_replaced"),
    [
        ('{"rate": 1}', True),
        ('{"other": 1}', False),
        ('{"rate": 1}\n{"rate": 2}\n', False),
        ('["rate"]', False),
        ("rate: 1", False),
        ("", True),
        ("[" * 5000, False),
    ],
)
def test_a_file_is_replaced_only_by_the_next_result_of_its_kind(
    tmp_path: Path, content: str, is_replaced: bool
) -> None:
    file = tmp_path / "x.json"
    check_result_file(file, "--out", key="rate")
    file.write_text(content)
    if is_replaced:
        check_result_file(file, "--out", key="rate")
    else:
        with pytest.raises(UserError, match="is there already, and is no earlier result of this command; choose a new"):
            check_result_file(file, "--out", key="rate")
    with pytest.raises(UserError, match="is there already; choose a new file"):
        check_result_file(file, "--out")


@pytest.mark.fault("result files that are something else")
def test_a_result_needs_a_folder_and_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--out .*: no such folder; make it first"):
        check_result_file(tmp_path / "missing/x.json", "--out", key="rate")
    with pytest.raises(UserError, match=r"--out .*: is a folder; name a file in it"):
        check_result_file(tmp_path, "--out", key="rate")
