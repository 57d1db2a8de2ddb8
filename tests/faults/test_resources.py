"""Too little memory, of a device or of the machine, and disk that nobody needs any more."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from trl import RewardConfig, SFTConfig

from rlhf.errors import is_out_of_memory
from rlhf.pipeline.clean import freeable
from rlhf.pipeline.memory import (
    ACCUMULATION,
    BATCH,
    DEFAULT_ACCUMULATION,
    DEFAULT_BATCH,
    DEFAULT_PARTS,
    PARTS,
    TOGETHER,
    memory_sentence,
)
from rlhf.pipeline.plan import plan
from rlhf.pipeline.store import CHECKPOINTS, newest_checkpoint, write_seconds
from rlhf.pipeline.trainers import InStage
from rlhf.ppo.config import PPOConfig
from rlhf.recipe import load_recipe
from rlhf.report.records import MANIFEST
from tests.faults.here import REWARD, STAGES, Outcome, require_refusal

Rlhf = Callable[..., Outcome]
ON_DEVICE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
ON_HOST = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


# ---- Memory ----


def raise_in_step(patch: pytest.MonkeyPatch, error: Exception) -> None:
    """A trainer that has no room for its first micro-batch."""

    def step(self: InStage, model: object, inputs: dict[str, object], *_: object, **__: object) -> None:
        self.latest_batches.append(inputs)
        raise error

    patch.setattr(InStage, "training_step", step)


@pytest.mark.fault("out of memory")
@pytest.mark.parametrize(
    ("stage", "error", "place"),
    [
        ("round-0/sft", torch.OutOfMemoryError(ON_DEVICE), "on the accelerator"),
        ("round-1/reward", RuntimeError(ON_HOST), "on this machine"),
        ("round-1/ppo", torch.OutOfMemoryError(ON_DEVICE), "on the accelerator"),
    ],
)
def test_too_little_memory_names_stage_batch_and_keys_and_the_remedy_works(
    copied_run: Path, call: Rlhf, monkeypatch: pytest.MonkeyPatch, stage: str, error: Exception, place: str
) -> None:
    for folder in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(copied_run / "x" / folder)
    name, before = stage.partition("/")[2], len(STAGES[: STAGES.index(stage)])
    rows = 8 if name == "ppo" else 32
    with monkeypatch.context() as patch:
        raise_in_step(patch, error)
        outcome = call("run", "r.yaml", "--out", "x", "--until", name)
    assert outcome.code == 1
    assert "Traceback" not in outcome.stderr
    (sentence,) = [line for line in outcome.sentences if "out of memory" in line]
    assert sentence.startswith(f"{stage}: out of memory {place} at ")
    assert f"with {rows} rows of " in sentence
    change = [f"{name}.{BATCH}={rows // 2}", f"{name}.{ACCUMULATION}=2"]
    assert f"Set {' '.join(change)} ({rows} and 1 now, the same steps in halves)" in sentence
    # What the sentence says is enough, and nothing that was done is done again.
    assert f"delete x/recipe.yaml and x/{stage}," in sentence
    (copied_run / "x/recipe.yaml").unlink()
    shutil.rmtree(copied_run / "x" / stage)
    outcome = call("run", "r.yaml", "--out", "x", "--until", name, *change)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.count("done before") == before
    assert f"{stage}: done in" in outcome.stdout


@pytest.mark.fault("out of memory")
def test_where_nothing_is_trained(copied_run: Path, call: Rlhf, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    shutil.rmtree(copied_run / "x/round-1/evaluate")
    monkeypatch.setattr("rlhf.pipeline.stages.evaluate_policies", fail)
    outcome = call("run", "r.yaml", "--out", "x")
    assert outcome.code == 1
    assert "round-1/evaluate: out of memory on this machine (MemoryError). Finished stages" in outcome.sentences[-1]
    monkeypatch.setattr("rlhf.reward.model.RewardModel.score", fail)
    outcome = call("evaluate", f"x/{REWARD}", "pairs.jsonl", "--out", "e.json")
    assert outcome.code == 1
    assert outcome.sentences[-1].startswith("rlhf evaluate: out of memory (MemoryError).")
    assert "Traceback" not in outcome.stderr
    assert not (copied_run / "e.json").exists()


@pytest.mark.fault("out of memory")
def test_the_sentence_at_the_least_batch_and_at_an_odd_one(copied_run: Path) -> None:
    recipe = load_recipe(copied_run / "r.yaml", [f"sft.{BATCH}=1", f"reward.{BATCH}=5", f"reward.{ACCUMULATION}=3"])
    stages = {stage.name: stage for stage in plan(recipe)}
    least, odd = (memory_sentence(stages[name], recipe, Path("x"), MemoryError()) for name in ("sft", "reward"))
    assert f"sft.{BATCH} is 1 already: lower sft.max_length, or train LoRA" in least
    assert f"Set reward.{BATCH}=3 reward.{ACCUMULATION}=6 (5 and 3 now)" in odd
    sampling = memory_sentence(stages["ppo"], recipe, Path("x"), MemoryError())
    settings = recipe.ppo.trl_settings()
    answers = settings[BATCH] * settings.get(ACCUMULATION, 1) * settings[PARTS]
    assert f"where it was sampling, {answers} answers at once, ppo.{TOGETHER}={-(-answers // 2)}" in sampling
    recipe = load_recipe(copied_run / "r.yaml", [f"ppo.{TOGETHER}=3"])
    assert f"3 answers at once, ppo.{TOGETHER}=2" in memory_sentence(stages["ppo"], recipe, Path("x"), MemoryError())
    assert PPOConfig.num_mini_batches == DEFAULT_PARTS
    for config in (SFTConfig, RewardConfig, PPOConfig):
        assert getattr(config, BATCH) == DEFAULT_BATCH
        assert getattr(config, ACCUMULATION) == DEFAULT_ACCUMULATION


@pytest.mark.fault("out of memory")
def test_too_little_memory_in_everybodys_words() -> None:
    said = (
        torch.OutOfMemoryError(ON_DEVICE),
        RuntimeError(ON_HOST),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    )
    assert all(is_out_of_memory(error) for error in said)
    wrapped = ValueError("x")
    wrapped.__cause__ = said[0]
    assert is_out_of_memory(wrapped)
    assert not any(
        is_out_of_memory(error) for error in (None, RuntimeError("x"), ValueError("out of memory is a word"))
    )


# ---- Disk ----


@pytest.mark.fault("disk that nobody needs")
def test_what_is_freed_of_a_finished_run_is_missed_by_nobody(copied_run: Path, call: Rlhf) -> None:
    run = copied_run / "x"
    assert freeable(run) == [], "a run that was never interrupted leaves nothing behind"
    planted = {
        "round-0/sft/checkpoints/checkpoint-3/optimizer.pt": 3_000_000,
        "round-1/ppo/manifest.json.tmp-77": 10,
        "summary.json.tmp-77": 20,
    }
    for name, size in planted.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"x" * size)
    own = (
        "round-1/reward/notes.txt",
        "thesis.tmp-final.docx",
        "data.tmp-2024/x",
        "round-1/notes/checkpoints/checkpoint-5/x",
    )
    for name in own:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("a person's")
    # 1. Shown, and nothing else.
    outcome = call("clean", "x")
    assert outcome.created == []
    assert outcome.stdout.count(" MB  ") == 3
    assert "3.0 MB  x/round-0/sft/checkpoints: the stage is finished" in outcome.stdout
    # 2. Freed.
    assert "3.0 MB were freed" in call("clean", "x", "--yes").stdout
    assert not any((run / name).exists() for name in planted)
    assert all((run / name).is_file() for name in own)
    assert "x: nothing to free" in " ".join(call("clean", "x", "--yes").stdout.split())
    # 3. Missed by nobody.
    for command in (
        ["run", "r.yaml", "--out", "x"],
        ["report", "x"],
        ["lineage", "x"],
        ["serve", f"x/{REWARD}", "--port", "0"],
        ["score", f"x/{REWARD}"],
    ):
        outcome = call(*command)
        assert outcome.code == 0, (command, outcome.stderr)


@pytest.mark.fault("disk that nobody needs")
def test_what_is_freed_of_a_begun_stage_is_not_needed_to_go_on(copied_run: Path, killed: Path, call: Rlhf) -> None:
    newest, _ = newest_checkpoint(killed)
    assert newest is not None
    cut = shutil.copytree(newest, killed / "checkpoint-90")
    (cut / "optimizer.pt").write_bytes(b"cut")
    member = killed / "member-0" / CHECKPOINTS
    shutil.copytree(newest, member / newest.name)
    write_seconds(member, 1.0)
    (killed / "features.npy").write_bytes(b"x")
    outside = copied_run / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (killed / "checkpoint-1").is_dir() or (killed / "checkpoint-1").mkdir()
    (killed / "checkpoint-0").symlink_to(outside)

    outcome = call("clean", "x", "--yes")
    assert outcome.code == 0, outcome.stderr
    assert {path.name for path in killed.glob("checkpoint-*")} == {newest.name}
    assert newest_checkpoint(member)[0] == member / newest.name
    assert not (killed / "features.npy").exists()
    assert (outside / "precious").is_file(), "a link is deleted, not what it leads to"
    outcome = call("sft", "r.yaml", "--out", "x")
    assert outcome.code == 0, outcome.stderr
    assert f"goes on from {newest.name}" in outcome.stdout


@pytest.mark.fault("disk that nobody needs", "folder in use")
def test_what_is_no_run_and_one_at_work_are_left_alone(copied_run: Path, call: Rlhf) -> None:
    (copied_run / "y").mkdir()
    for name in ("y", "nowhere", "r.yaml"):
        require_refusal(call("clean", name, "--yes"), says="this folder holds no run")
    with FileLock(copied_run / "x/.lock"):
        assert call("clean", "x").code == 0
        require_refusal(call("clean", "x", "--yes"), says="another run is at work in this folder")
    assert (copied_run / "x/round-0/sft" / MANIFEST).is_file()
