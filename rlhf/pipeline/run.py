"""Run what is not done yet of a plan, round after round, and know when to stop."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from rlhf.data.read import is_local
from rlhf.errors import TrainingError, UserError, Waiting
from rlhf.files import write_text
from rlhf.pipeline.plan import plan, stages_until
from rlhf.pipeline.stopping import reason_to_stop
from rlhf.pipeline.store import Stage, Store, is_disk_full
from rlhf.pipeline.summary import write_summary
from rlhf.ppo.source_kinds import source_problem
from rlhf.recipe.document import differences
from rlhf.recipe.schema import DATA_SOURCES, Recipe
from rlhf.report.cards import write_cards
from rlhf.report.page import write_report

ORIGIN = "origin.json"  # which file and overrides the recipe came from; for the report
# With several processes these stages are run by all of them; the others by the first, while the rest wait.
TRAINED_TOGETHER = ("sft", "vote", "reward", "ppo")


def run(
    recipe: Recipe,
    out: Path,
    *,
    until: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Run what is not done yet, then write `summary.json` and `report.html`. The same call again goes on where it stopped.

    Args:
        out: the run's folder.
        until: stop after the first stage of this name, or after that of this folder ("round-2/label").
        say: tell the person at the terminal.

    Raises:
        UserError: the folder belongs to another recipe, another run is at work in it, or a stage finds bad input.
    """
    stages = plan(recipe)
    wanted = stages_until(stages, until)
    store = Store(out)
    is_main = int(os.environ.get("RANK", "0")) == 0

    # 1. The folder must be new, or hold this very recipe; what is still to do must be possible.
    check_recipe_file(recipe, out)
    if not all(store.is_done(stage) for stage in stages):
        check_arguments(recipe, until=until)
    lock = store.lock() if is_main else None
    try:
        if is_main:
            write_text(out / "recipe.yaml", yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True))
            write_text(out / ORIGIN, json.dumps(recipe.origin, indent=1) + "\n")

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
        _leave_process_group()
        if waiting is not None:
            raise waiting
    finally:
        if lock is not None:
            lock.release()


def _leave_process_group() -> None:
    """Under a launcher, end the group's threads: a process that ends while they live is sometimes aborted."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _run_stage(stage: Stage, recipe: Recipe, store: Store, *, is_main: bool, say: Callable[[str], None]) -> None:
    from rlhf.pipeline.context import StageContext
    from rlhf.pipeline.stages import STAGES  # torch is loaded when the first stage runs

    if not is_main and stage.name not in TRAINED_TOGETHER:
        store.wait_until_done(stage)
        return
    folder = store.open(stage) if is_main else store.wait_until_open(stage)
    parents = {role: store.path(parent) for role, parent in stage.parents.items()}
    begin = time.monotonic()
    say(f"{stage.folder}: begins")
    try:
        facts = STAGES[stage.name](StageContext(recipe, folder, parents, say, is_main, stage.settings))
        seconds = time.monotonic() - begin
        if is_main:
            store.finish(stage, facts, seconds)
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise TrainingError(
            f"{stage.folder}: no space left on the device that holds {store.root}. Finished stages and whole checkpoints are "
            "intact: make room, and the same command goes on."
        ) from error
    if not is_main:
        store.wait_until_done(stage)
    say(f"{stage.folder}: done in {seconds:.0f} s")


def check_recipe_file(recipe: Recipe, out: Path) -> None:
    """Refuse a folder that was made by another recipe, before anything is touched.

    Raises:
        UserError: with every setting that differs; or the folder holds something else altogether.
    """
    file = out / "recipe.yaml"
    if not file.is_file():
        if out.is_dir() and any(entry.name != ".lock" for entry in out.iterdir()):
            raise UserError(f"{out}: not empty and not a run of this pipeline; choose another --out.")
        return
    before = yaml.safe_load(file.read_text(encoding="utf-8"))
    found = differences(before, recipe.resolved())
    if found:
        raise UserError(
            [
                f"{out}: holds a run of another recipe; choose another --out, or take these back:",
                *(f"  {x}" for x in found),
            ]
        )


def check_arguments(recipe: Recipe, *, until: str | None = None) -> None:
    """Let TRL look at every stage's settings; torch is loaded here, when there is work to do."""
    from rlhf.pipeline.training import check_arguments

    check_arguments(recipe, until=until)


def check_sources(recipe: Recipe) -> None:
    """Local files that the recipe names must be there before a folder is made.

    Raises:
        UserError: naming all that are missing.
    """
    problems = [
        f"data.{name}: {entry.source}: no such file."
        for name in DATA_SOURCES
        for entry in recipe.data.sources(name)
        if is_local(entry.source) and not Path(entry.source).expanduser().is_file()
    ]
    if recipe.reward.meta_samples is not None and not Path(recipe.reward.meta_samples).expanduser().is_file():
        problems.append(f"reward.meta_samples: {recipe.reward.meta_samples}: no such file.")
    for key, name in [
        ("evaluate.gold", recipe.evaluate.gold),
        *(("ppo.extra_rewards", x) for x in recipe.ppo.extra_rewards),
    ]:
        problem = None if name is None else source_problem(name)
        if problem is not None:
            problems.append(f"{key}: {problem}")
    if problems:
        raise UserError(problems)
