"""What is refused before a folder is made: files that are not there, settings that can't be. Loads torch only to ask TRL."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from rlhf.addresses import secret_problem
from rlhf.data.columns import named_rows
from rlhf.data.direction import directions, has_two_responses
from rlhf.data.read import ReadReport, is_local, read_rows
from rlhf.data.sources import Source
from rlhf.data.tables import is_folder, local_files
from rlhf.errors import UserError
from rlhf.models.gguf import SUFFIX
from rlhf.pipeline.finished import check_place
from rlhf.pipeline.reward_checks import reward_problems
from rlhf.ppo.source_kinds import (
    FOLDER,
    is_function_in_a_file,
    kind_of,
    missing_model,
    source_problem,
    verdict_model,
)
from rlhf.recipe.document import differences
from rlhf.recipe.schema import DATA_SOURCES, Recipe, RoundsSection
from rlhf.recipe.unused import absent_stages, mixed_bits, mixed_temperatures

CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "early_stop", "debug")  # torch's own keys
FIRST_ROWS = 100  # of a file whose layout is looked at before a run


def check_recipe_file(recipe: Recipe, out: Path) -> None:
    """Refuse a folder that was made by another recipe, before anything is touched.

    Raises:
        UserError: with every setting that differs; or the folder holds something else altogether, or its recipe is damaged; or
            it is none.
    """
    check_place(out)
    file = out / "recipe.yaml"
    if not file.is_file():
        is_run = (out / "round-0").is_dir()  # its stages say by their keys whether they are this recipe's
        if out.is_dir() and not is_run and any(entry.name != ".lock" for entry in out.iterdir()):
            raise UserError(f"{out}: not empty and not a run of this pipeline; choose another --out.")
        return
    before = _written_recipe(file, recipe)
    changes = differences(before, recipe.resolved())
    if changes:
        raise UserError(
            [
                f"{out}: holds a run of another recipe; choose another --out, or take these back:",
                *(f"  {change}" for change in changes),
            ]
        )


def recipe_text(recipe: Recipe) -> str:
    """Return what is written to `RUN/recipe.yaml`."""
    return yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True)


def _written_recipe(file: Path, recipe: Recipe) -> dict[str, Any]:
    """Read a run's resolved recipe.

    Raises:
        UserError: the file is damaged, or holds no more than the beginning of this very recipe.
    """
    try:
        text = file.read_text(encoding="utf-8")
        before = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        text, before = "", None
    complete = recipe_text(recipe)
    if not isinstance(before, dict) or (text != complete and complete.startswith(text)):
        raise UserError(
            f"{file}: cut off or damaged. Delete this file, and the same command writes it again; whether the stages are this "
            "recipe's is then compared by their own records."
        )
    return before


def check_sources(recipe: Recipe) -> None:
    """Refuse a recipe whose local files are not there, whose labels nobody can read, or whose engine is not installed.

    Raises:
        UserError: naming all of them.
    """
    problems = list(_source_problems(recipe))
    if recipe.reward.meta_samples is not None and not Path(recipe.reward.meta_samples).expanduser().is_file():
        problems.append(f"reward.meta_samples: {recipe.reward.meta_samples}: no such file.")
    for key, name in [
        ("evaluate.gold", recipe.evaluate.gold),
        *(("ppo.extra_rewards", x) for x in recipe.ppo.extra_rewards),
    ]:
        problem = None if name is None else source_problem(name)
        if problem is not None:
            problems.append(f"{key}: {problem}")
    problems += _judge_problems(recipe.rounds)
    problems += _engine_problems(recipe)
    if problems:
        raise UserError(problems)


def _judge_problems(rounds: RoundsSection) -> Iterator[str]:
    """Yield what is missing of a language model that labels: its folder, or its secrets."""
    model = rounds.judge_model
    if rounds.labels_from == "verdicts" and model is not None and (missing := missing_model(model)) is not None:
        yield f"rounds.judge_model: {missing}"
    if rounds.labels_from != "judge":
        return
    if rounds.judge_url is not None and (problem := secret_problem(rounds.judge_url)) is not None:
        yield f"rounds.judge_url: {problem}"
    if rounds.judge_key is not None and not os.environ.get(rounds.judge_key):
        yield f"rounds.judge_key: the environment variable {rounds.judge_key} is empty; put the key there."


def _source_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with the local files of the data section, each file read once."""
    entries = {
        repr((entry.source, entry.preference, entry.columns, entry.split)): (name, Source(**entry.model_dump()))
        for name in DATA_SOURCES
        for entry in recipe.data.sources(name)
        if is_local(entry.source)
    }
    for name, source in entries.values():
        if not local_files(source.source):
            yield f"data.{name}: {source.source}: {'holds no file' if is_folder(source.source) else 'no such file'}."
            continue
        try:
            check_directions(source, split="test" if name == "test" else "train")
        except UserError as error:
            yield from (f"data.{name}: {problem}" for problem in error.problems)


def check_directions(source: Source, *, split: str = "train") -> None:
    """Refuse a file of which nobody can know which of two responses is better, without keeping its rows.

    Of a file whose first rows have another layout, no more than these are read.

    Args:
        split: of a folder that has several, where the source names none.

    Raises:
        UserError: as `directions` says; or the file can't be read.
    """
    split, is_named = source.split or split, source.split is not None
    report = ReadReport(source.source)
    numbered = read_rows(source.source, report, split=split, config=source.config, is_named=is_named)
    first = list(islice(numbered, FIRST_ROWS))
    named = named_rows(first, source.source, report, columns=source.columns, label=source.label)
    if source.preference is not None or any(has_two_responses(entry.row) for entry in named):
        named = named_rows([*first, *numbered], source.source, report, columns=source.columns, label=source.label)
        directions((entry.row for entry in named), source.source, source.preference)


def _function_problems(recipe: Recipe) -> Iterator[str]:
    """Yield why functions in files can't be imported."""
    named = [("evaluate.gold", recipe.evaluate.gold), *(("ppo.extra_rewards", x) for x in recipe.ppo.extra_rewards)]
    for key, name in named:
        if name is not None and is_function_in_a_file(name):
            from rlhf.data.functions import load_function

            try:
                load_function(name, key=key)
            except UserError as error:
                yield from error.problems


def _reward_folder_problems(recipe: Recipe) -> Iterator[str]:
    """Yield why reward models in folders can't be opened when PPO begins."""
    for name in recipe.ppo.extra_rewards:
        if kind_of(name) is FOLDER:
            from rlhf.models.look import check_model
            from rlhf.reward.experts import EXPERTS
            from rlhf.reward.gated import is_gated
            from rlhf.reward.load import reward_card

            try:
                reward_card(name)
                if not (Path(name).expanduser() / EXPERTS).is_file() and not is_gated(name):
                    check_model(name, scores=True)
            except UserError as error:
                yield from (f"ppo.extra_rewards: {problem}" for problem in error.problems)


def _verdict_model_problems(recipe: Recipe, *, is_only_local: bool) -> Iterator[str]:
    """Yield why causal models that are asked for verdicts can't give any."""
    named = [("ppo.extra_rewards", verdict_model(name)) for name in recipe.ppo.extra_rewards]
    if recipe.rounds.labels_from == "verdicts":
        named.append(("rounds.judge_model", recipe.rounds.judge_model))
    for key, model in named:
        if model is not None and (_is_local(model) or not is_only_local):
            from rlhf.models.look import check_model
            from rlhf.models.verdicts import check_verdict_model

            try:
                check_verdict_model(model)
                check_model(model)
            except UserError as error:
                yield from (f"{key}: {problem}" for problem in error.problems)


def check_here(recipe: Recipe) -> None:
    """Refuse all that a run would refuse before it trains, but for what stands on a hub: that is looked at when it begins.

    Raises:
        UserError: as `check_sources` and `check_arguments` say, all at once; then as the data are refused.
    """
    problems: list[str] = []
    for check in (check_sources, partial(check_arguments, is_only_local=True)):
        try:
            check(recipe)
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise UserError(problems)
    _check_data(recipe)


class _NeedsHub(Exception):
    """A model on a hub would have to write what stands in the data."""


def _check_data(recipe: Recipe) -> None:
    """Refuse local data that the run would refuse: they are read as it will read them, in a folder that is thrown away.

    Raises:
        UserError: as the stage `data` says.
    """
    from rlhf.pipeline.estimate import hub_data, make_data

    def written_on_hub(row: Any) -> Any:
        raise _NeedsHub

    if hub_data(recipe) or not any(recipe.data.sources(name) for name in DATA_SOURCES):
        return
    model = recipe.backbone.model
    with tempfile.TemporaryDirectory() as folder, suppress(_NeedsHub):
        make_data(recipe, Path(folder), fit=None if model is None or _is_local(model) else written_on_hub)


def check_arguments(
    recipe: Recipe, *, until: str | None = None, is_only_local: bool = False, has_voted: bool = False
) -> None:
    """Refuse settings that can't be: build every stage's configuration once, so that TRL says before a run what it refuses.

    A run begins here, so the libraries that are loaded now are silenced.

    Args:
        until: the last stage that will run, if it is not the plan's.
        is_only_local: models on a hub are passed over, and a backbone may be an encoder, which ends with its reward model.
        has_voted: the votes that will be read were all given before.

    Raises:
        UserError: with TRL's own reason for every section it refuses; or why the backbone can't be used (`check_backbone`).
    """
    from rlhf.pipeline.adapter_checks import adapter_problems
    from rlhf.pipeline.backbone import check_backbone
    from rlhf.pipeline.ppo_checks import ppo_problems
    from rlhf.pipeline.training import quiet_libraries

    quiet_libraries()
    absent = absent_stages(recipe) if until is None else ()
    for sentence in (*absent, *mixed_bits(recipe, until), *mixed_temperatures(recipe, until)):
        warnings.warn(sentence, stacklevel=2)
    problems: list[str] = []
    model = recipe.backbone.model
    try:
        if model is None or not is_only_local or _is_local(model):
            check_backbone(recipe, until=until, may_be_encoder=is_only_local)
    except UserError as error:
        problems += error.problems
    if model is None:
        problems += adapter_problems(recipe, None)
    problems += _trunk_problems(recipe, has_voted=has_voted)
    problems += _function_problems(recipe)
    problems += _reward_folder_problems(recipe)
    problems += _verdict_model_problems(recipe, is_only_local=is_only_local)
    problems += reward_problems(recipe)
    problems += ppo_problems(recipe, until=until)
    lab = recipe.lab
    if lab is not None and lab.critic_error_rate is not None and lab.annotators == "exact":
        problems.append("lab.critic_error_rate: annotators: exact hears no critic; leave one of the two out.")
    problems += _trl_problems(recipe)
    if problems:
        raise UserError(problems)


def _trunk_problems(recipe: Recipe, *, has_voted: bool) -> Iterator[str]:
    """Yield why members of a vote can't share a frozen trunk."""
    if not recipe.needs_vote or recipe.vote.trunk is None:
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not has_voted:
        yield (
            "vote.trunk: a shared trunk is one process's; run `rlhf vote` without a launcher first, with this recipe and --out; "
            "this command finds the votes then. Where every round votes, run all of it without a launcher."
        )
    layers = None if recipe.lab is None or recipe.lab.is_sampled else recipe.lab.num_hidden_layers
    if recipe.backbone.model is None and layers is not None and recipe.vote.trunk >= layers:
        yield f"vote.trunk is {recipe.vote.trunk}; the lab's model has {layers} layers, so it must be below that."


def _is_local(model: str) -> bool:
    """Tell whether a model's name is that of a file or folder on this machine."""
    return model.startswith((".", "/", "~")) or model.lower().endswith(SUFFIX) or Path(model).exists()


def _engine_problems(recipe: Recipe) -> Iterator[str]:
    """Yield why vLLM can't sample where the recipe asks for it."""
    ppo, by_engine = recipe.ppo.trl_settings(), recipe.sampling.engine == "vllm"
    asked = {"sampling.engine: vllm": by_engine, "ppo.use_vllm": bool(ppo.get("use_vllm"))}
    for key in (key for key, is_asked in asked.items() if is_asked):
        if find_spec("vllm") is None:
            yield f"{key}: vLLM is not installed (how to: recipes/guides/ppo.md); install it, or leave the key out."
    if by_engine and ppo.get("load_in_4bit"):
        yield "sampling.engine: vllm wants whole weights, not 4-bit ones; leave it out, or ppo.load_in_4bit."


def _trl_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what TRL refuses of each training stage's settings."""
    from transformers import TrainingArguments
    from transformers.integrations import get_available_reporting_integrations
    from trl import RewardConfig, SFTConfig

    from rlhf.pipeline.training import split_settings, training_arguments
    from rlhf.ppo.config import PPOConfig

    trackers = get_available_reporting_integrations()
    stages: list[tuple[str, type[TrainingArguments], dict[str, Any]]] = [
        ("sft", SFTConfig, recipe.sft.trl_settings()),
        ("vote", RewardConfig, recipe.vote_settings()),
        ("reward", RewardConfig, recipe.reward.trl_settings()),
        ("ppo", PPOConfig, recipe.ppo.trl_settings()),
    ]
    for section, config_class, keys in stages:
        if section == "vote" and not recipe.needs_vote:
            continue
        unknown = sorted({*(keys.get("gradient_checkpointing_kwargs") or {})} - {*CHECKPOINTING})
        if unknown:
            yield f"{section}.gradient_checkpointing_kwargs: unknown key {unknown[0]!r}; it has {', '.join(CHECKPOINTING)}."
            continue
        if keys.get("save_strategy") == "best":
            yield f"{section}.save_strategy: best keeps what looks best, and the last model is the result; set steps or epoch."
        if keys.get("train_sampling_strategy") == "group_by_length":
            yield (
                f"{section}.train_sampling_strategy: group_by_length draws an order that a stage which is interrupted can't find "
                "again, so rows would come twice or never; leave it out (reward models group pairs by length anyway)."
            )
        try:
            _, settings = split_settings(keys)
            args = training_arguments(config_class, settings, Path("nowhere"), recipe.seed)
        except (ValueError, TypeError, ImportError) as error:
            yield f"{section}: {str(error).strip().splitlines()[0]}"
            continue
        absent = sorted(set(args.report_to) - set(trackers) - {"none"})
        if absent:
            yield f"{section}.report_to: {', '.join(absent)} is not installed (pip install {' '.join(absent)})."
