"""Run what is not done yet of a plan, round after round, and know when to stop."""

import ctypes
import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rlhf.errors import TrainingError, UserError, Waiting, is_disk_full, is_out_of_memory
from rlhf.files import write_text
from rlhf.invariants.checks import CheckBook
from rlhf.pipeline.checks import check_arguments, check_recipe_file, recipe_text
from rlhf.pipeline.finished import made_of_what_is_gone, require_files
from rlhf.pipeline.memory import memory_sentence
from rlhf.pipeline.plan import plan, stages_until
from rlhf.pipeline.stage_table import STAGES
from rlhf.pipeline.stopping import reason_to_stop
from rlhf.pipeline.store import CHECKPOINTS, LOCK, Stage, Store
from rlhf.pipeline.summary import write_summary
from rlhf.progress import Work, a_line_a_minute
from rlhf.recipe.schema import Recipe
from rlhf.report.cards import write_cards
from rlhf.report.page import write_report

VOTES = ("vote", "second_look")  # stages that train voters
ORIGIN = "origin.json"  # which file and overrides the recipe came from; for the report


def run(
    recipe: Recipe,
    out: Path,
    *,
    until: str | None = None,
    say: Callable[[str], None] = print,
    own_process: bool = False,
) -> None:
    """Run what is not done yet, then write `summary.json` and `report.html`. The same call again goes on where it stopped.

    Args:
        out: the run's folder.
        until: stop after the first stage of this name, or after that of this folder ("round-2/label").
        say: tell the person at the terminal.
        own_process: whether this process does nothing else, before or after.

    Raises:
        UserError: the folder belongs to another recipe, another run is at work in it, or a stage finds bad input.
    """
    stages = plan(recipe)
    wanted = stages_until(stages, until)
    store = Store(out)
    is_main = int(os.environ.get("RANK", "0")) == 0

    # 1. The folder must be new, or hold this very recipe, whole; what is still to do must be possible.
    check_recipe_file(recipe, out)
    done = [store.is_done(stage) for stage in stages]  # asked of all of them: a later one may be of changed files
    if is_main:
        require_files(store, stages)
    if not all(done):
        votes = [
            is_done for stage, is_done in zip(stages, done, strict=True) if stage.name in VOTES and stage in wanted
        ]
        check_arguments(recipe, until=until, has_voted=bool(votes) and all(votes))
    if own_process:
        _keep_what_is_loaded()
    lock = store.lock() if is_main else None
    try:
        with _no_run_of_a_mistake(store, stages) if is_main else nullcontext():
            if is_main:
                write_text(out / "recipe.yaml", recipe_text(recipe))
                write_text(out / ORIGIN, json.dumps(recipe.origin, indent=1) + "\n")
            if not all(done) and (versions := store.other_versions(stages)) is not None:
                say(versions)
            if (orphans := made_of_what_is_gone(store, stages)) is not None:
                say(orphans)

            # 2. The stages, one after the other, until the last round or until there is a reason to stop.
            waiting: Waiting | None = None
            reason: str | None = None
            for stage in wanted:
                if store.is_done(stage):
                    say(f"{stage.folder}: done before")
                else:
                    try:
                        _run_stage(stage, recipe, store, is_main=is_main, say=say)
                    except Waiting as state:
                        waiting = state
                        break
                reason = reason_to_stop(recipe.rounds, stage, stages, store)
                if reason is not None:
                    say(reason)
                    break

            # 3. The run in numbers and as a page.
            if is_main:
                write_summary(recipe, stages, store, stopped=str(waiting) if waiting else reason)
                write_report(out)
                write_cards(out)
            if waiting is not None and STAGES[stage.name].together:
                wait_for_each_other()  # in other stages they wait for the file of a finished stage, until the launcher ends them
            leave_process_group()
            if waiting is not None:
                raise waiting
    finally:
        if lock is not None:
            lock.release()


@contextmanager
def _no_run_of_a_mistake(store: Store, stages: Sequence[Stage]) -> Iterator[None]:
    """Delete a new folder in which a mistake was found before anything was finished: it would refuse the mended recipe."""
    was_empty = {file.name for file in store.root.iterdir()} <= {LOCK}
    try:
        yield
    except UserError:
        if was_empty and not any(store.manifest(stage) for stage in stages):
            shutil.rmtree(store.root, ignore_errors=True)
        raise


def wait_for_each_other() -> None:
    """Wait until all processes of a launch are here: a launcher ends the others when the first one exits."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave_process_group() -> None:
    """End the threads of a launcher's process group: a process that ends while they live is sometimes aborted.

    An engine of vLLM's in this process has groups of its own, and would look for them in vain when Python ends.
    """
    vllm: Any = sys.modules.get("vllm.distributed.parallel_state")
    if vllm is not None:
        vllm.cleanup_dist_env_and_memory()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _keep_what_is_loaded() -> None:
    """Let the garbage collector pass over the libraries that are loaded; a look through all of them takes a third of a second."""
    gc.collect()
    gc.freeze()


def _give_memory_back() -> None:
    """Give the memory of a finished stage back to the system; glibc would keep gibibytes of it for the next one."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not there in other C libraries
    if trim is not None:
        trim(0)


def _run_stage(stage: Stage, recipe: Recipe, store: Store, *, is_main: bool, say: Callable[[str], None]) -> None:
    """Run one stage and write its manifest, or wait for the process that does.

    Raises:
        UserError: a file that an earlier stage wrote is not what it was.
        TrainingError: the disk or the memory is full, the run's folder is gone, or foreign code tried to end the process;
            whatever else the stage raises.
    """
    if not is_main and not STAGES[stage.name].together:
        store.wait_until_done(stage)
        return
    from rlhf.pipeline.context import StageContext  # torch is loaded when the first stage runs
    from rlhf.pipeline.precision import kept_precision
    from rlhf.pipeline.stages import check_tool_template

    book = CheckBook()
    if is_main:
        book.record(store.check_files(stage.parents.values()))
        unchanged = book.entries["finished files unchanged"]
        if not unchanged["held"]:
            raise UserError(f"{stage.folder}: {unchanged['sentence']}")
        check_tool_template(recipe, {role: store.path(parent) for role, parent in stage.parents.items()})
    if is_main and store.is_begun_of_others(stage):
        say(f"{stage.folder}: what it is made of was made again since it began, so it begins anew.")
    folder = store.open(stage) if is_main else store.wait_until_open(stage)
    parents = {role: store.path(parent) for role, parent in stage.parents.items()}
    seconds_before = store.seconds_kept(stage)
    begin = time.monotonic() - seconds_before
    say(f"{stage.folder}: begins")
    try:
        with a_line_a_minute(Work(stage.folder)):
            facts = STAGES[stage.name].load()(StageContext(recipe, folder, parents, say, is_main, stage.settings))
        seconds = time.monotonic() - begin
        if is_main:
            book.merge(facts.get("checks", {}))
            facts["checks"] = book.entries
            facts |= kept_precision(folder / CHECKPOINTS)
            store.finish(stage, facts, seconds)
    except (SystemExit, KeyboardInterrupt) as ending:
        raise TrainingError(
            f"{stage.folder}: something raised {type(ending).__name__} in the middle of this stage, most likely a function of your "
            "own (evaluate.gold, ppo.extra_rewards); let it raise an exception that says what is wrong. The same command goes on."
        ) from ending
    except Exception as error:
        if not store.root.is_dir():
            raise TrainingError(
                f"{stage.folder}: {store.root} is not there any more; it was moved or deleted while this run was at work in it. "
                "Give the same command with its new place as --out, and it goes on from the last whole checkpoint."
            ) from error
        if is_out_of_memory(error):
            raise TrainingError(memory_sentence(stage, recipe, store.root, error)) from error
        if not is_disk_full(error):
            raise
        raise TrainingError(
            f"{stage.folder}: no space left on the device that holds {store.root}. Finished stages and whole checkpoints are "
            "intact: make room, and the same command goes on."
        ) from error
    _give_memory_back()
    if not is_main:
        store.wait_until_done(stage)
    earlier = f", {seconds_before:.0f} s of them before it was interrupted" if seconds_before else ""
    say(f"{stage.folder}: done in {seconds:.0f} s{earlier}")
