"""Runs that are moved, copied, read by another user, cut, edited and older than the libraries: copies of one tiny run."""

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from rlhf.models.load import find_source
from rlhf.pipeline import store
from rlhf.pipeline.store import MARK, Store, newest_checkpoint
from rlhf.report.records import MANIFEST, SEAL, read_manifests, sealed
from tests.faults.here import POLICY, REWARD, STAGES, Outcome, require_refusal

VERBS = [
    ["lineage", "x"],
    ["report", "x"],
    ["evaluate", f"x/{REWARD}", "pairs.jsonl", "--out", "e.json"],
    ["export", f"x/{POLICY}", "exported"],
    ["certify", f"x/{REWARD}", "--out", "c.json"],
    ["serve", f"x/{REWARD}", "--port", "0"],
]
Rlhf = Callable[..., Outcome]


def weights(run: Path) -> dict[str, str]:
    """The sha256 of every weight file of a run."""
    return {
        f"{folder}/{file['path']}": file["sha256"]
        for folder, manifest in read_manifests(run).items()
        for file in manifest["files"]  # type: ignore[typeddict-item]
        if file["path"].endswith(".safetensors")
    }


def score(outcome: Outcome) -> float:
    assert outcome.code == 0, outcome.stderr
    value: float = json.loads(outcome.stdout)["score"]
    return value


# ---- Moved, copied, linked ----


@pytest.mark.fault("run moved")
@pytest.mark.parametrize("how", ["copied", "moved", "linked"])
def test_a_run_is_whole_wherever_it_lies(copied_run: Path, finished: Path, call: Rlhf, how: str) -> None:
    """The adapters' files name the folder of the original, which is there only where the run was copied."""
    expected = score(call("score", str(finished / "x" / REWARD)))
    hidden = finished / "hidden"
    if how != "copied":
        (finished / "x").rename(hidden)
    try:
        if how == "linked":
            (copied_run / "x").rename(copied_run / "y")
            (copied_run / "x").symlink_to("y")
        assert score(call("score", f"x/{REWARD}")) == expected
        assert (
            Path(find_source(copied_run / "x" / REWARD).base).resolve()
            == (copied_run / "x/round-0/sft/model").resolve()
        )
        for command in VERBS if how == "moved" else ():
            outcome = call(*command)
            assert outcome.code == 0, (command, outcome.stderr)
        outcome = call("run", "r.yaml", "--out", "x")
        assert outcome.code == 0, outcome.stderr
        assert outcome.stdout.count("done before") == len(STAGES)
    finally:
        if how != "copied":
            hidden.rename(finished / "x")


@pytest.mark.fault("run moved", "stage deleted")
def test_a_moved_run_makes_a_deleted_stage_again_with_the_same_bits(
    copied_run: Path, finished: Path, call: Rlhf
) -> None:
    expected = weights(copied_run / "x")
    for stage in ("round-1/ppo", "round-0/data"):
        shutil.rmtree(copied_run / "x" / stage)
    assert "round-0/data[/bold]" not in call("lineage", "x").stdout
    assert call("report", "x").code == 0, "what is left is shown"
    (finished / "x").rename(finished / "hidden")
    try:
        outcome = call("run", "r.yaml", "--out", "x")
    finally:
        (finished / "hidden").rename(finished / "x")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.count(": begins") == 2
    assert weights(copied_run / "x") == expected


@pytest.mark.fault("run moved")
def test_a_run_that_is_moved_while_it_is_at_work_says_so(
    copied_run: Path, call: Rlhf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move(self: Store, stage: object, *_: object) -> None:
        (copied_run / "x").rename(copied_run / "elsewhere")
        (copied_run / "x/round-1/evaluate/manifest.json").write_text("")

    shutil.rmtree(copied_run / "x/round-1/evaluate")
    monkeypatch.setattr(Store, "finish", move)
    outcome = call("run", "r.yaml", "--out", "x")
    assert outcome.code == 1
    assert "x is not there any more" in outcome.stderr
    assert "Traceback" not in outcome.stderr


# ---- Rights, locks ----


@contextmanager
def no_more_rights_than_others() -> Iterator[None]:
    """Let the rights of files count for root too: this thread gives up, for a while, to pass over them (Linux)."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] = before & ~0b110  # effective: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0


@pytest.fixture
def read_only(copied_run: Path) -> Iterator[Path]:
    """The run, of which nothing may be written, and of which a stage is still to be done."""
    folders = [copied_run / "x", *(path for path in (copied_run / "x").rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    with no_more_rights_than_others():
        yield copied_run / "x"
    for folder in folders:
        folder.chmod(0o755)


@pytest.mark.fault("read-only run")
def test_a_read_only_run_is_read(read_only: Path, call: Rlhf) -> None:
    with pytest.raises(PermissionError):
        (read_only / "a").touch()
    for command in (
        ["score", f"x/{REWARD}"],
        ["lineage", "x"],
        ["evaluate", f"x/{REWARD}", "pairs.jsonl", "--out", "e.json"],
        ["export", f"x/{POLICY}", "exported"],
    ):
        outcome = call(*command)
        assert outcome.code == 0, (command, outcome.stderr)


@pytest.mark.fault("read-only run")
@pytest.mark.parametrize(
    "command",
    [
        ["run", "r.yaml", "--out", "x"],
        ["run", "r.yaml", "--out", "x/new"],
        ["ppo", "r.yaml", "--out", "x"],
        ["report", "x"],
        ["evaluate", f"x/{REWARD}", "pairs.jsonl", "--out", "x/e.json"],
        ["export", f"x/{POLICY}", "x/exported"],
        ["certify", f"x/{REWARD}", "--out", "x/c.json"],
    ],
)
def test_what_would_write_there_says_so(read_only: Path, call: Rlhf, command: list[str]) -> None:
    outcome = call(*command)
    assert outcome.code in (1, 2), outcome.stdout
    assert "Traceback" not in outcome.stderr
    assert "Permission denied" in outcome.sentences[-1]
    assert outcome.created == []


@pytest.mark.fault("read-only run")
@pytest.mark.parametrize(
    "file", [f"{STAGES[3]}/{MANIFEST}", f"{REWARD}/adapter_model.safetensors", f"{REWARD}/adapter_config.json"]
)
def test_files_of_another_user_are_named(copied_run: Path, call: Rlhf, file: str) -> None:
    (copied_run / "x" / file).chmod(0)
    commands = [["lineage", "x"], ["report", "x"]] if file.endswith(MANIFEST) else [["score", f"x/{REWARD}"]]
    with no_more_rights_than_others():
        for command in commands:
            outcome = call(*command)
            assert outcome.code in (1, 2)
            assert "Traceback" not in outcome.stderr, outcome.stderr
            assert file in outcome.sentences[0]


@pytest.mark.fault("folder in use")
def test_two_runs_at_once(copied_run: Path, call: Rlhf) -> None:
    """Who only reads need not wait."""
    with FileLock(copied_run / "x/.lock"):
        for command in (["run", "r.yaml", "--out", "x"], ["sft", "r.yaml", "--out", "x"]):
            require_refusal(call(*command), says="another run is at work in this folder")
        assert call("lineage", "x").code == 0
        score(call("score", f"x/{REWARD}"))


# ---- Edited, deleted, cut ----

EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a key is gone": lambda m: m.pop("parents"),
    "the stage's key is gone": lambda m: m.pop("key"),
    "a file is gone": lambda m: m["files"].pop(),
    "another digest": lambda m: m["files"][0].update(sha256="0" * 64),
    "another seed": lambda m: m.update(seed=1),
    "facts of another type": lambda m: m.update(facts=[]),
    "null": lambda m: m.update(versions=None),
    "another number": lambda m: m.update(seconds=-1),
    "another seal": lambda m: m.update({SEAL: "x"}),
}


@pytest.mark.fault("records cut or edited")
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_named_by_whoever_reads_it(copied_run: Path, call: Rlhf, edit: str) -> None:
    file = copied_run / "x/round-1/reward" / MANIFEST
    manifest = json.loads(file.read_text(encoding="utf-8"))
    EDITS[edit](manifest)
    file.write_text(json.dumps(manifest), encoding="utf-8")
    for command in (["lineage", "x"], ["report", "x"], ["run", "r.yaml", "--out", "x"]):
        require_refusal(call(*command), says=f"x/round-1/reward/{MANIFEST}: cut off, damaged or edited")


@pytest.mark.fault("records cut or edited")
def test_the_form_of_a_manifest_says_nothing(copied_run: Path) -> None:
    """Only what it says: it may be indented otherwise."""
    file = copied_run / "x/round-1/reward" / MANIFEST
    before = read_manifests(copied_run / "x")
    manifest = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(dict(reversed(manifest.items())), indent=8), encoding="utf-8")
    assert read_manifests(copied_run / "x") == before
    assert sealed({"a": 1.5, "b": Path("c")}) == {"a": 1.5, "b": "c", SEAL: sealed({"b": "c", "a": 1.5})[SEAL]}


@pytest.mark.fault("records cut or edited")
@pytest.mark.parametrize("content", [b"name: [", b"[]", b"\0" * 40, b"\xff", None])
@pytest.mark.parametrize("name", ["recipe.yaml", "origin.json"])
def test_a_page_needs_no_recipe_and_reads_no_damaged_one(
    copied_run: Path, call: Rlhf, name: str, content: bytes | None
) -> None:
    """A run that was copied without them, or cut: the page is written, or one sentence names the file."""
    file = copied_run / "x" / name
    file.unlink() if content is None else file.write_bytes(content)
    outcome = call("report", "x")
    assert "Traceback" not in outcome.stderr, outcome.stderr
    assert outcome.code == (0 if content is None else 2)
    assert content is None or f"x/{name}: cut off or damaged" in outcome.sentences[0]


@pytest.mark.fault("weights replaced")
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_files_that_a_finished_run_has_lost_are_named(copied_run: Path, call: Rlhf, damage: str) -> None:
    file = copied_run / "x" / POLICY / "adapter_model.safetensors"
    file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[:-1])
    require_refusal(
        call("run", "r.yaml", "--out", "x"), says=f"x/{POLICY}/adapter_model.safetensors are gone or were changed"
    )


@pytest.mark.fault("damaged checkpoint")
def test_a_checkpoint_that_is_cut_at_any_file_gives_way(
    copied_run: Path, killed: Path, finished: Path, call: Rlhf
) -> None:
    newest, broken = newest_checkpoint(killed)
    assert newest is not None
    assert broken == []
    # 1. Whichever of its files is cut, emptied, zeroed or gone, the one before it is taken.
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", MARK} <= {
        path.name for path in files
    }
    for file in files:
        content = file.read_bytes()
        for damaged in (content[: len(content) // 2], b"", b"\0" * len(content), None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            older, broken = newest_checkpoint(killed)
            assert older is not None
            assert older != newest, file
            assert broken == [newest]
        file.write_bytes(content)
    assert newest_checkpoint(killed) == (newest, [])
    # 2. That is said, and the end is the same.
    (newest / "optimizer.pt").write_bytes(b"cut")
    outcome = call("sft", "r.yaml", "--out", "x")
    assert outcome.code == 0, outcome.stderr
    assert f"sft: leaves out {newest.name}" in outcome.stdout
    assert f"sft: goes on from {older.name}" in outcome.stdout
    expected = weights(finished / "x")
    assert weights(copied_run / "x") == {name: value for name, value in expected.items() if name.startswith("round-0")}


# ---- Other versions, other clocks ----


@pytest.mark.fault("other versions")
def test_other_versions_are_said_once(
    copied_run: Path, killed: Path, call: Rlhf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the stages that were made, and of the one that goes on from a checkpoint of theirs."""
    installed = store.versions()
    monkeypatch.setattr(store, "versions", lambda: {**installed, "torch": "99.0"})
    outcome = call("sft", "r.yaml", "--out", "x")
    assert outcome.code == 0, outcome.stderr
    said = [line for line in outcome.stdout.splitlines() if "other versions" in line]
    assert len(said) == 1
    assert said[0].startswith("round-0/lab, round-0/data, round-0/sft: made with other versions (torch ")
    assert "→ 99.0)" in said[0]
    assert "goes on from" in outcome.stdout
    outcome = call("sft", "r.yaml", "--out", "x")
    assert "round-0/sft" not in next(line for line in outcome.stdout.splitlines() if "other versions" in line)


@pytest.mark.fault("clock jumps")
def test_times_of_files_decide_nothing(copied_run: Path, call: Rlhf) -> None:
    """A copy has new times, in any order, and a clock may have been set back, or stand in the future."""
    before = [call("lineage", "x").stdout, list(read_manifests(copied_run / "x"))]
    for number, stage in enumerate(STAGES):
        for file in (copied_run / "x" / stage).rglob("*"):
            os.utime(file, (4e9 - 3e8 * number, 4e9 - 3e8 * number))
    assert [call("lineage", "x").stdout, list(read_manifests(copied_run / "x"))] == before
    assert before[1] == STAGES
    assert call("run", "r.yaml", "--out", "x").stdout.count("done before") == len(STAGES)


@pytest.mark.fault("clock jumps")
def test_a_clock_that_is_set_back_in_the_middle(copied_run: Path, call: Rlhf, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(10**9, 0, -(10**5)))
    monkeypatch.setattr("time.time", lambda: float(next(times)))
    shutil.rmtree(copied_run / "x/round-1/evaluate")
    outcome = call("run", "r.yaml", "--out", "x")
    assert outcome.code == 0, outcome.stderr
    assert "other versions" not in outcome.stdout
    assert all(manifest["seconds"] >= 0 for manifest in read_manifests(copied_run / "x").values())
