"""What may be replaced by a result: an earlier result, an empty file, and nothing else."""

from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.report.result_file import check_new_folder, check_result_file


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


@pytest.mark.fault("result files that are something else")
def test_a_result_is_no_link_and_its_place_can_be_written_to(tmp_path: Path) -> None:
    """A link would be replaced, and what it leads to would stay as it was."""
    link = tmp_path / "latest.json"
    for target in (tmp_path / "nowhere", tmp_path / "real.json"):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        (tmp_path / "real.json").write_text('{"rate": 1}')
        with pytest.raises(UserError, match=r"--out .*: is a link; name the file itself"):
            check_result_file(link, "--out", key="rate")
    with pytest.raises(UserError, match=r"--out /proc/x.json: /proc can't be written to \(.*\); choose another place"):
        check_result_file(Path("/proc/x.json"), "--out")
    check_result_file(tmp_path / "x.json", "--out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "real.json"], (
        "nothing is left of the look"
    )


@pytest.mark.fault("result files that are something else")
def test_a_folder_for_results_is_new_or_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "new/deeper/still"):
        check_new_folder(tmp_path / name, "--out")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked").symlink_to(tmp_path / "empty")
    check_new_folder(tmp_path / "linked", "--out")
    for place, said in {
        tmp_path: "not empty; choose a new folder",
        tmp_path / "file": "is a file; choose a new folder",
        tmp_path / "file/deeper": r".*file is a file; choose another place",
        tmp_path / "link": "is a link that leads to no folder",
        Path("/proc/x"): "/proc can't be written to",
    }.items():
        with pytest.raises(UserError, match=f"--out {place}: {said}"):
            check_new_folder(place, "--out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "link", "linked"]
