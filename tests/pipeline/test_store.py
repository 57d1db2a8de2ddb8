"""Keys, manifests and checkpoint marks."""

import json
import os
import re
import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.files import write_text
from rlhf.pipeline import callbacks as callbacks_module
from rlhf.pipeline.callbacks import CheckpointMark, drop_torn_line
from rlhf.pipeline.finished import made_of_what_is_gone
from rlhf.pipeline.stage_table import STAGES
from rlhf.pipeline.store import (
    MARK,
    Stage,
    Store,
    checkpoints_of,
    free_checkpoints,
    mark_checkpoint,
    newest_checkpoint,
    write_seconds,
)
from rlhf.recipe.document import differences
from rlhf.report.records import sealed


def stages(learning_rate: float = 0.1, seed: int = 0) -> tuple[Stage, Stage]:
    sft = Stage("sft", "round-0/sft", {"learning_rate": learning_rate}, seed)
    return sft, Stage("ppo", "round-1/ppo", {}, seed, {"sft": sft})


def test_a_key_depends_on_settings_seed_and_parents() -> None:
    assert stages()[1].key == stages()[1].key
    assert stages()[1].key != stages(learning_rate=0.2)[1].key, "a parent's settings reach the child's key"
    assert stages()[0].key != stages(seed=1)[0].key


def test_older_checkpoints_go_when_the_new_one_is_marked_and_by_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that is set back gives the newest checkpoint the oldest time."""
    accelerator: Any = SimpleNamespace(wait_for_everyone=lambda: None)
    args: Any = SimpleNamespace(
        output_dir=str(tmp_path), world_size=1, gradient_accumulation_steps=1, save_total_limit=2
    )
    trainer: Any = SimpleNamespace(accelerator=accelerator, args=args)
    callback = CheckpointMark(trainer, seconds_before=0.0)
    assert args.save_total_limit is None, "the Trainer deletes none"
    for step in (4, 8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        file = tmp_path / f"checkpoint-{step}/model"
        file.write_text(str(step))
        for place in (file, file.parent):
            os.utime(place, (1e9 - step, 1e9 - step))
        if step == 12:

            def dies(_: Path) -> None:
                raise OSError("the disk is full")

            with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
                patched.setattr(callbacks_module, "mark_checkpoint", dies)
                callback.on_save(args, state_at(step), None)
            assert len(checkpoints_of(tmp_path)) == 3, "nothing goes before the new one is whole"
        callback.on_save(args, state_at(step), None)
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-12", "checkpoint-8"]
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-12"


def state_at(step: int) -> Any:
    return SimpleNamespace(is_world_process_zero=True, global_step=step, best_model_checkpoint=None)


def test_events_for_tensorboard_outlive_the_checkpoints(tmp_path: Path) -> None:
    """The Trainer writes them beside its checkpoints, which go when a stage is done."""
    store, (sft, _) = Store(tmp_path), stages()
    folder = store.open(sft)
    (folder / "checkpoints/runs/today").mkdir(parents=True)
    (folder / "checkpoints/runs/today/events").write_text("curve")
    (folder / "checkpoints/checkpoint-1").mkdir()
    store.finish(sft, {}, 1.0)
    assert not (folder / "checkpoints").exists()
    assert (folder / "tensorboard/today/events").read_text() == "curve"
    shutil.rmtree(folder / "tensorboard")
    assert store.missing_files([sft]) == [], "they are no result, and may be deleted"


def test_a_certificate_may_be_written_anew(tmp_path: Path) -> None:
    """`rlhf certify` advises it, and `rlhf run` then refused the whole run; also of a manifest that names the file."""
    store, (sft, _) = Store(tmp_path), stages()
    model = store.open(sft) / "model"
    model.mkdir()
    for name in ("certificate.json", "model.safetensors"):
        (model / name).write_text("1")
    store.finish(sft, {}, 1.0)
    assert [entry["path"] for entry in (store.manifest(sft) or {})["files"]] == ["model/model.safetensors"]
    (model / "certificate.json").write_text("another")
    assert (store.missing_files([sft]), store.check_files([sft]).held) == ([], True)
    record = {name: value for name, value in (store.manifest(sft) or {}).items()}
    record["files"].append({"path": "model/certificate.json", "size": 1, "sha256": "of before"})
    (tmp_path / "round-0/sft/manifest.json").write_text(json.dumps(sealed(record)))
    assert (store.missing_files([sft]), store.check_files([sft]).held) == ([], True)
    (model / "model.safetensors").write_text("22")
    assert len(store.missing_files([sft])) == 1


def test_the_docstring_of_a_stage_lists_all_names_or_none() -> None:
    name = str(Stage.__doc__).partition("name:")[2].partition("folder:")[0]
    assert set(re.findall(r"\w+", name)) & set(STAGES) in (set(), set(STAGES))


def test_a_manifest_means_done(tmp_path: Path) -> None:
    store, (sft, _) = Store(tmp_path), stages()
    folder = store.open(sft)
    assert not store.is_done(sft)
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("abc")
    (folder / "checkpoints").mkdir()
    store.finish(sft, {"rows": 3}, 1.5)
    assert store.is_done(sft)
    assert not (folder / "checkpoints").exists()
    manifest = store.manifest(sft)
    assert manifest is not None
    assert manifest["facts"] == {"rows": 3}
    # sha256 of "abc" is a published test vector.
    assert manifest["files"] == [
        {
            "path": "model/weights",
            "size": 3,
            "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        }
    ]


@pytest.mark.fault("a run that changed")
def test_a_changed_setting_is_refused_by_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open(stages()[0])
    store.finish(stages()[0], {}, 1.0)
    with pytest.raises(UserError, match=r"learning_rate was 0\.1, is 0\.2"):
        store.is_done(stages(learning_rate=0.2)[0])


@pytest.mark.fault("stage deleted")
def test_what_was_made_of_a_stage_is_refused_where_that_was_made_anew_with_other_contents(tmp_path: Path) -> None:
    """Corrected labels have the key of the wrong ones; times and configurations with folders' names are no contents."""
    store, (sft, ppo) = Store(tmp_path), stages()
    for rows, noise in (("a", "1"), ("a", "2"), ("b", "2")):
        folder = store.open(sft)
        (folder / "rows.jsonl").write_text(rows)
        (folder / "metrics.jsonl").write_text(noise)
        (folder / "config.json").write_text(noise)
        store.finish(sft, {"noise": noise}, float(noise))
        if not store.path(ppo).exists():
            store.open(ppo)
            store.finish(ppo, {}, 1.0)
        if rows == "a":
            assert store.is_done(ppo)
    with pytest.raises(
        UserError, match=r"round-1/ppo: was made of another .*round-0/sft than lies there now, which was made"
    ):
        store.is_done(ppo)
    shutil.rmtree(store.path(ppo))
    store.open(ppo)
    store.finish(ppo, {}, 1.0)
    assert made_of_what_is_gone(store, [sft, ppo]) is None
    shutil.rmtree(store.path(sft))
    assert store.is_done(ppo), "what is gone is no other one"
    said = made_of_what_is_gone(store, [sft, ppo])
    assert said is not None
    assert said.startswith("round-0/sft: gone, and round-1/ppo made of it."), said


@pytest.mark.fault("kill at any moment")
def test_a_stage_that_dies_while_it_finishes_has_lost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    store, (sft, _) = Store(tmp_path), stages()
    folder = store.open(sft)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/weights").write_text("abc")
    with monkeypatch.context() as patch:
        patch.setattr("rlhf.pipeline.store.list_files", die)
        with pytest.raises(KeyboardInterrupt):
            store.finish(sft, {}, 1.0)
    store.open(sft)
    assert (folder / "checkpoints/weights").read_text() == "abc", "the next attempt goes on from here"
    store.finish(sft, {}, 1.0)
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    manifest = store.manifest(sft)
    assert manifest is not None
    assert manifest["files"] == []


def test_an_unfinished_stage_keeps_its_checkpoints_only_if_it_is_the_same(tmp_path: Path) -> None:
    store, (sft, _) = Store(tmp_path), stages()
    folder = store.open(sft)
    (folder / "checkpoints").mkdir()
    (folder / "half-written").write_text("x")
    store.open(sft)
    assert (folder / "checkpoints").exists()
    assert not (folder / "half-written").exists()
    store.open(stages(learning_rate=0.3)[0])
    assert not (folder / "checkpoints").exists()


def test_a_stage_that_dies_while_it_is_opened_keeps_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What says whose they are was deleted first, and the next start deleted them too."""
    store, (sft, _) = Store(tmp_path), stages()
    folder = store.open(sft)
    (folder / "checkpoints").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("rlhf.pipeline.store.write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.open(sft)
    store.open(sft)
    assert (folder / "checkpoints").exists()


def test_an_unfinished_stage_loses_what_it_made_of_a_parent_that_is_another_one_now(tmp_path: Path) -> None:
    """Votes on labels that were corrected since would call the corrected ones wrong."""
    store, (sft, ppo) = Store(tmp_path), stages()
    for rows, is_kept in (("a", False), ("a", True), ("b", False)):
        folder = store.open(sft)
        (folder / "rows.jsonl").write_text(rows)
        store.finish(sft, {}, 1.0)
        begun = store.path(ppo) / "checkpoints"
        assert store.is_begun_of_others(ppo) == (rows == "b")
        store.open(ppo)
        assert begun.exists() == is_kept
        begun.mkdir(exist_ok=True)


def test_seconds_are_those_noted_beside_checkpoints(tmp_path: Path) -> None:
    store, (sft, _) = Store(tmp_path), stages()
    folder = store.open(sft)
    assert store.seconds_kept(sft) == 0.0
    for place, seconds in (("checkpoints", 30.0), ("checkpoints/member-0/checkpoints", 4.5)):
        (folder / place).mkdir(parents=True)
        write_seconds(folder / place, seconds)
    store.open(sft)
    assert store.seconds_kept(sft) == 34.5
    damage(folder / "checkpoints/seconds.json", "zeros")
    assert store.seconds_kept(sft) == 4.5, "a number that is lost costs no run"


def checkpoints(folder: Path) -> tuple[Path, Path, Path]:
    """Three checkpoints, of which the last has no mark."""
    places = [folder / f"checkpoint-{step}" for step in (10, 20, 100)]
    for place in places:
        (place / "critic").mkdir(parents=True)
        (place / "model").write_text("12345")
        (place / "critic" / "model").write_text("678")
    mark_checkpoint(places[0])
    mark_checkpoint(places[1])
    return places[0], places[1], places[2]


def damage(file: Path, kind: str) -> None:
    """Leave a file as a crash or a disk without power leaves it."""
    content = file.read_bytes()
    if kind == "missing":
        file.unlink()
    elif kind == "cut off":
        file.write_bytes(content[:-1])
    elif kind == "zeros":
        file.write_bytes(bytes(len(content)))
    elif kind == "empty":
        file.write_bytes(b"")


DAMAGES = ["missing", "cut off", "zeros", "empty"]


@pytest.mark.fault("disk that nobody needs")
def test_a_trained_member_gives_up_its_checkpoints_and_no_more(tmp_path: Path) -> None:
    folder = tmp_path / "member-0/checkpoints"
    for name in ("checkpoint-4", "checkpoint-12", "checkpoint-final"):
        (folder / name).mkdir(parents=True)
    write_seconds(folder, 4.5)
    assert [path.name for path in checkpoints_of(folder)] == ["checkpoint-12", "checkpoint-4"]
    free_checkpoints(tmp_path / "member-0")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-final", "seconds.json"]
    free_checkpoints(tmp_path / "nowhere")


@pytest.mark.fault("damaged checkpoint", "checkpoint zeroed")
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["model", "critic/model", MARK])
def test_the_newest_whole_checkpoint_is_found(tmp_path: Path, name: str, kind: str) -> None:
    first, second, third = checkpoints(tmp_path)
    assert newest_checkpoint(tmp_path) == (second, [third]), "100 has no mark"
    damage(second / name, kind)
    assert newest_checkpoint(tmp_path) == (first, [third, second])
    assert newest_checkpoint(tmp_path / "nowhere") == (None, [])


@pytest.mark.fault("checkpoint zeroed")
@pytest.mark.parametrize("content", ["null", "[]", "3", '{"model": 5}', "{}\x00"])
def test_a_mark_of_another_form_is_no_mark(tmp_path: Path, content: str) -> None:
    first, second, third = checkpoints(tmp_path)
    (second / MARK).write_text(content)
    assert newest_checkpoint(tmp_path) == (first, [third, second])


@pytest.mark.fault("records cut or edited")
@pytest.mark.parametrize("kind", DAMAGES[1:])
@pytest.mark.parametrize("name", ["manifest.json", "started.json"])
def test_a_damaged_record_is_a_sentence(tmp_path: Path, name: str, kind: str) -> None:
    store, (sft, _) = Store(tmp_path), stages()
    store.open(sft)
    if name == "manifest.json":
        store.finish(sft, {}, 1.0)
    damage(store.path(sft) / name, kind)
    with pytest.raises(UserError, match=rf"{name}: cut off, damaged or edited.* delete .*round-0/sft"):
        store.is_done(sft)


@pytest.mark.fault("records cut or edited")
@pytest.mark.parametrize("torn", ["", '{"step": 2, "lo', "\x00\x00\x00", "\x00\x00\n", '{"step": 2, "lo\n'])
def test_a_torn_last_line_is_cut_off_and_no_other(tmp_path: Path, torn: str) -> None:
    file = tmp_path / "metrics.jsonl"
    whole = '{"step": 1}\n{"resumed_from": 1}\n'
    file.write_text(whole + torn)
    assert drop_torn_line(file) == bool(torn)
    assert file.read_text() == whole
    file.write_text(torn)
    drop_torn_line(file)
    assert file.read_text() == ""
    assert not drop_torn_line(tmp_path / "nowhere")


@pytest.mark.fault("folder in use")
def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    lock = Store(tmp_path).lock()
    with pytest.raises(UserError, match="another run is at work"):
        Store(tmp_path).lock()
    lock.release()
    Store(tmp_path).lock().release()


@pytest.mark.fault("full disk")
def test_writing_leaves_no_half_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", json.dumps([1]))
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_differences_in_words() -> None:
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4}) == [
        "a.b was 1, is 3",
        "c was 2, is None",
        "d was None, is 4",
    ]


@pytest.mark.fault("full disk")
def test_a_full_disk_in_everybodys_words() -> None:
    import errno

    from rlhf.errors import is_disk_full

    assert is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert is_disk_full(
        RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file")
    )
    assert is_disk_full(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 236608 vs 236496"))
    assert is_disk_full(Exception("I/O error: No space left on device (os error 28)"))
    assert is_disk_full(sqlite3.OperationalError("database or disk is full"))
    wrapped = ValueError("x")
    wrapped.__cause__ = OSError(errno.ENOSPC, "y")
    assert is_disk_full(wrapped)
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(None)
