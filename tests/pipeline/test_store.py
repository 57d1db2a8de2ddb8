"""Keys, manifests and checkpoint marks."""

import json
import re
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.files import write_text
from rlhf.pipeline.stage_table import STAGES
from rlhf.pipeline.store import Stage, Store, mark_checkpoint, newest_checkpoint
from rlhf.recipe.document import differences


def stages(learning_rate: float = 0.1, seed: int = 0) -> tuple[Stage, Stage]:
    sft = Stage("sft", "round-0/sft", {"learning_rate": learning_rate}, seed)
    return sft, Stage("ppo", "round-1/ppo", {}, seed, {"sft": sft})


def test_a_key_depends_on_settings_seed_and_parents() -> None:
    assert stages()[1].key == stages()[1].key
    assert stages()[1].key != stages(learning_rate=0.2)[1].key, "a parent's settings reach the child's key"
    assert stages()[0].key != stages(seed=1)[0].key


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


def test_a_changed_setting_is_refused_by_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open(stages()[0])
    store.finish(stages()[0], {}, 1.0)
    with pytest.raises(UserError, match=r"learning_rate was 0\.1, is 0\.2"):
        store.is_done(stages(learning_rate=0.2)[0])


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


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    for step in (10, 20, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model").write_text("12345")
        if step != 100:
            mark_checkpoint(folder)
    first, second, third = (tmp_path / f"checkpoint-{step}" for step in (10, 20, 100))
    assert newest_checkpoint(tmp_path) == (second, [third]), "100 has no mark"
    (second / "model").write_text("123")
    assert newest_checkpoint(tmp_path) == (first, [third, second]), "20 is truncated"
    assert newest_checkpoint(tmp_path / "nowhere") == (None, [])


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    lock = Store(tmp_path).lock()
    with pytest.raises(UserError, match="another run is at work"):
        Store(tmp_path).lock()
    lock.release()
    Store(tmp_path).lock().release()


def test_writing_leaves_no_half_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", json.dumps([1]))
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_differences_in_words() -> None:
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4}) == [
        "a.b was 1, is 3",
        "c was 2, is None",
        "d was None, is 4",
    ]


def test_a_full_disk_in_everybodys_words() -> None:
    import errno

    from rlhf.pipeline.store import is_disk_full

    assert is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert is_disk_full(
        RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file")
    )
    assert is_disk_full(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 236608 vs 236496"))
    assert is_disk_full(Exception("I/O error: No space left on device (os error 28)"))
    wrapped = ValueError("x")
    wrapped.__cause__ = OSError(errno.ENOSPC, "y")
    assert is_disk_full(wrapped)
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(None)
