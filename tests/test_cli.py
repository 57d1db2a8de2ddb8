"""The top level of the command line; what the verbs do is tested with what they call."""

import json
import os
import sqlite3
import subprocess
import sys
from importlib import metadata
from importlib.abc import MetaPathFinder
from pathlib import Path

import pytest

from rlhf import cli
from rlhf.__main__ import main as entry
from rlhf.data.labelbook import LabelBook
from rlhf.data.labels import Question


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlhf", *arguments])
    return cli._exit_code()


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"rlhf-pipeline {metadata.version('rlhf-pipeline')}\n"


def test_an_unknown_verb_is_bad_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "nonsense") == 2
    assert "No such command 'nonsense'" in capsys.readouterr().err


def test_label_takes_its_options_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "label", str(tmp_path), "--status", "--port", "1", "--form", "plain") == 2
    assert "no recipe.yaml; this folder holds no run" in capsys.readouterr().err.replace("\n", " ")


def test_check_takes_overrides_among_its_recipes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A wrong override is named once, however many recipes it is for; a file whose name holds `=` is a recipe."""
    first, second = tmp_path / "a.yaml", tmp_path / "kl=0.1.yaml"
    for file in (first, second):
        file.write_text("name: r\nlab: {}\nppo: {max_completion_length: 40}\n")
    assert run(monkeypatch, "check", str(first), "ppo.kl_coef=0.25", str(second), "seed=7", "--show") == 0
    shown = capsys.readouterr().out
    assert shown.count(": fine") == shown.count("kl_coef: 0.25") == shown.count("seed: 7") == 2
    assert run(monkeypatch, "check", str(first), "ppo.kl_cof=0.25", str(second), "ppo.gamma=x") == 2
    assert capsys.readouterr().err.splitlines() == [
        "override 'ppo.kl_cof=0.25': unknown key ppo.kl_cof; did you mean 'kl_coef'?",
        "override 'ppo.gamma=x': ppo.gamma is 'x'; it must be a number.",
    ]
    assert run(monkeypatch, "check", "seed=7") == 2
    assert "name a recipe" in capsys.readouterr().err


def test_libraries_are_prepared_before_any_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"TRANSFORMERS_VERBOSITY": "info", "LRU_CACHE_CAPACITY": "7"})
    cli._prepare_libraries()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128"
    set_by_a_person = (os.environ["TRANSFORMERS_VERBOSITY"], os.environ["LRU_CACHE_CAPACITY"])
    assert set_by_a_person == ("info", "7"), "it stays"


def test_no_command_has_imported_torch_before_the_libraries_are_prepared() -> None:
    code = "import sys, rlhf.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.fault("functions that end the process")
@pytest.mark.parametrize(
    ("ending", "code", "name"),
    [
        (SystemExit(), 1, "SystemExit(None)"),
        (SystemExit(0), 1, "SystemExit(0)"),
        (SystemExit(3), 3, "SystemExit(3)"),
        (SystemExit("done"), 1, "SystemExit('done')"),
        (KeyboardInterrupt(), 1, "KeyboardInterrupt"),
    ],
    ids=str,
)
def test_foreign_code_can_not_end_a_command_with_success(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    ending: BaseException,
    code: int,
    name: str,
) -> None:
    def end(_: Path) -> Path:
        raise ending

    monkeypatch.setattr("rlhf.report.page.write_report", end)
    assert run(monkeypatch, "report", str(tmp_path)) == code
    assert f"Something raised {name} in the middle" in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_the_command_quietly(tmp_path: Path) -> None:
    """As under `| head -1`: no traceback, no sentence, the exit code of a broken pipe."""
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read_end, write_end = os.pipe()
    os.close(read_end)  # nobody reads
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-m", "rlhf", "data", str(file)],
        stdout=write_end,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        timeout=100,
        check=False,
    )
    os.close(write_end)
    assert (result.returncode, result.stderr) == (141, "")


def test_a_gguf_file_that_is_not_there_is_said_by_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Path(__file__).parents[1] / "recipes/smollm2.yaml"
    assert run(monkeypatch, "check", str(recipe), "backbone.model=no/where.gguf") == 2
    assert capsys.readouterr().err == "backbone.model: no/where.gguf: no such file.\n"


def test_people_are_shown_their_links_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Addresses lose their secrets wherever they are printed, but the link to the labelling page is nothing without its token."""
    link = "ann: http://127.0.0.1:8765/?token=abc123"
    monkeypatch.setattr("rlhf.serve.desk.serve_page", lambda run, names, repeat, host, port, say: say(link))
    assert run(monkeypatch, "label", str(tmp_path)) == 0
    assert capsys.readouterr().out == f"{link}\n"


@pytest.mark.parametrize("name", ["", "  ", "ann\nbob", "a" * 201, "\x1b[2J"])
def test_an_annotator_has_a_name_that_can_be_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    (tmp_path / "recipe.yaml").write_text("rounds: {annotators_per_pair: 1}\n")
    LabelBook(tmp_path / "labels.sqlite").ask([Question("r2-1", 2, [], "yes", "no")])
    assert run(monkeypatch, "label", str(tmp_path), "--annotator", name) == 2
    assert "give a name in one line, of 1 to 200 letters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [("a" * 300, "can't be the name of a file (File name too long)"), ("~nobody-of-this-name/x", "leads nowhere")],
)
def test_names_that_no_file_can_have_are_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    for arguments in (("data", name), ("verdict", name)):
        assert run(monkeypatch, *arguments) == 2
        assert said in capsys.readouterr().err


def test_a_loop_of_links_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert run(monkeypatch, "evaluate", "model", str(tmp_path / "a"), "--out", str(tmp_path / "e.json")) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_dry_run_knows_its_stages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text("name: r\nlab: {}\n")
    arguments = ("run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "x"), "--dry-run", "--until")
    assert run(monkeypatch, *arguments, "nosuch") == 2
    assert "--until nosuch: this recipe has the stages" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "sft") == 0
    shown = capsys.readouterr().out
    assert ("round-0/sft" in shown, "round-1/ppo" in shown) == (True, False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "m", "new", "--factor", "0.3"), "--factor says how far to go from another model"),
        (("export", "m", "new", "--average", "n", "--factor", "0.3"), "--factor says how far to go from another model"),
        (("export", "m", "new", "--samples", "s.jsonl"), "--samples sets the scale of combined reward models"),
        (("export", "m", "new", "--extrapolate", "n", "--factor", "nan"), "--factor nan: must lie between -10 and 10"),
        (("export", "m", "new", "--extrapolate", "n", "--factor", "1e30"), "must lie between -10 and 10"),
        (("serve", "m", "--timeout", "inf"), "--timeout inf: must lie between 0.1 and 86400 seconds"),
        (("verify", "http://127.0.0.1:9", "--against", "m", "--timeout", "nan"), "--timeout nan: must lie between"),
        (
            ("audit", "p.jsonl", "--model", "m", "--out", "a", "--budget", "9", "--expert-error", "2"),
            "--expert-error 2",
        ),
        (("audit", "p.jsonl", "--model", "m", "--out", "a", "--members", "0"), "Invalid value for '--members'"),
        (("data", "p.jsonl", "--columns", "prompt=a,chosen=b,prompt=c"), "a name stands there twice"),
        (("verify", "http://[::1", "--against", "m"), "verify http://[::1: is no address (Invalid IPv6 URL)"),
        (("verify", "http://me:pw@[::1", "--against", "m"), "verify http://me:***@[::1: is no address"),
    ],
)
def test_numbers_that_would_be_ignored_or_end_badly_are_refused_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    """None of the models is there: nothing was opened yet."""
    assert run(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.fault("result files that are something else")
@pytest.mark.parametrize("verb", ["export", "audit", "blame"])
def test_a_file_is_no_folder_for_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, base_folder: Path, verb: str
) -> None:
    """Said before a model is opened, and as bad input: no stage of a run has anything to do with it."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    arguments = {
        "export": ("export", str(base_folder)),
        "audit": ("audit", str(tmp_path / "pairs.jsonl"), "--model", str(base_folder), "--out"),
        "blame": ("blame", str(tmp_path), "--feature", "length", "--out"),
    }[verb]
    assert run(monkeypatch, *arguments, str(tmp_path / "file")) == 2
    assert "file: is a file; choose a new folder." in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_a_signal_while_python_still_imports_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting(MetaPathFinder):
        """The import of the command line is where Ctrl-C comes."""

        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name == "rlhf.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "rlhf.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as ending:
        entry()
    assert ending.value.code == 130
    assert capsys.readouterr().err == ""


def test_a_home_folder_behind_an_equals_sign_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell writes `--out ~/x` out, and leaves `--out=~/x` as it is; a folder named `~` was made."""
    monkeypatch.setenv("HOME", "/home/me")
    given = ["--out=~/x", "--out", "a=~/b", "--json=x~", "--columns=prompt=~"]
    assert [cli._with_home(word) for word in given] == ["--out=/home/me/x", *given[1:]]


@pytest.mark.parametrize(
    "words", ["database is locked", "attempt to write a readonly database", "database or disk is full"]
)
def test_a_book_that_cannot_be_used_is_a_sentence(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: object) -> None:
        raise sqlite3.OperationalError(words)

    monkeypatch.setattr(cli, "app", fails)
    assert cli._exit_code() == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"the book of labels, can't be read or written ({words})" in said
    assert "Traceback" not in said


def test_a_full_disk_in_a_librarys_words_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: object) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(cli, "app", fails)
    assert cli._exit_code() == 1
    said = capsys.readouterr().err
    assert "no space left on the device. Make room" in " ".join(said.split())
    assert "Traceback" not in said
