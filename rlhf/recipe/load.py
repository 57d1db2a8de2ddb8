"""A checked recipe of a file and overrides, or every mistake in them at once."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlhf.addresses import hide_secrets
from rlhf.errors import UserError
from rlhf.recipe.document import Document, differences, read_document, read_override
from rlhf.recipe.foreign_keys import REFUSED_KEYS, REFUSED_SCRATCH_KEYS, RENAMED_KEYS
from rlhf.recipe.keys import stage_keys, trl_keys
from rlhf.recipe.ranges import out_of_range
from rlhf.recipe.schema import (
    STAGE_SECTIONS,
    Recipe,
    Section,
    SourceEntry,
    StageSection,
)
from rlhf.recipe.unused import corrected_twice, unused_keys

TYPE_NAMES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
    "null": "null",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, merge its base and overrides, check it.

    1. The recipe that `base:` names (one level), then the file, then the overrides in order, later ones winning.
    2. Every key against the schema and TRL's own keys, with suggestions.
    3. Every value's type, and what must fit together.

    Raises:
        UserError: with one sentence for every mistake found.
    """
    path = Path(path)
    document = _read(path)
    base = document.values.pop("base", None)
    start = document.values
    if base is not None:
        below = _read((path.parent / str(base)).resolve())
        if "base" in below.values:
            raise UserError(f"{document.place(('base',))}: {base} has a `base` of its own; only one level is allowed.")
        start, document = below.values, below.merged_with(document)
    for override in overrides:
        document = document.merged_with(read_override(override))
    document.values = {key: value for key, value in document.values.items() if value is not None}

    problems = [*document.problems, *_check_keys(document), *_check_types(document)]
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        problems += [
            _sentence(document, issue) for issue in error.errors() if not document.says(issue["loc"], problems)
        ]
    else:
        problems += [] if problems else _check_together(recipe, document)
    if problems:
        raise UserError(problems)
    changes = differences(start, document.values)
    recipe._origin.update(
        file=str(path),
        base=base,
        overrides=[hide_secrets(override) for override in overrides],
        differences=[hide_secrets(change) for change in changes],
    )
    return recipe


def load_source(text: str, *, columns: str | None = None, key: str = "DATA") -> SourceEntry:
    """Read a source of data as the command line has it: a name, or a mapping as in a recipe (`{source: …, split: …}`).

    Args:
        columns: `ours=theirs`, separated by commas, as `columns:` of a recipe has it.
        key: what the text is, for messages.

    Raises:
        UserError: it is no source.
    """
    try:
        values = yaml.safe_load(text) if text.lstrip().startswith("{") else {"source": text}
    except yaml.YAMLError:
        raise UserError(
            f"{key} {text!r} is no mapping in YAML; write {{source: FILE, columns: {{prompt: …}}}}."
        ) from None
    if columns is not None:
        parts = [part.partition("=") for part in columns.split(",")]
        if not all(name.strip() and path.strip() for name, _, path in parts):
            raise UserError(
                f"--columns {columns!r}: write ours=theirs, separated by commas: prompt=question,chosen=good."
            )
        columns_of = {name.strip(): path.strip() for name, _, path in parts}
        if len(columns_of) < len(parts):
            raise UserError(f"--columns {columns!r}: a name stands there twice; give each once.")
        values["columns"] = columns_of
    try:
        return SourceEntry.model_validate(values)
    except ValidationError as error:
        issues = [(".".join(map(str, issue["loc"])), issue["msg"]) for issue in error.errors()]
        raise UserError(
            [f"{key} {text!r}: {name}: {message[0].lower()}{message[1:]}." for name, message in issues]
        ) from None


def _read(path: Path) -> Document:
    """Read a file; a section without keys (`lab:`) stands for its defaults.

    `lab: null` over a base, and `lab=null` on the command line, remove it.
    """
    document = read_document(path)
    removed = {name for (name, *below) in document.nulls if not below and "base" in document.values}
    sections = [
        name
        for name in document.values
        if name in Recipe.model_fields and _section_class(name) is not None and name not in removed
    ]
    document.values |= {name: {} for name in sections if document.values[name] is None}
    return document


def _check_keys(document: Document) -> Iterable[str]:
    """Report unknown, renamed and refused keys."""
    for name, value in document.values.items():
        if name not in Recipe.model_fields:
            yield f"{document.place((name,))}: unknown section {name!r}{_suggestion(name, Recipe.model_fields) or '.'}"
            continue
        section = _section_class(name)
        if section is None:
            continue
        if not isinstance(value, dict):
            yield f"{document.place((name,))}: {name!r} is a section with keys of its own, not {value!r}."
            continue
        known = set(section.model_fields)
        if name in STAGE_SECTIONS:
            known |= set(stage_keys(name))
        for key in value:
            if key in known:
                continue
            place = document.place((name, key))
            if name in STAGE_SECTIONS and key in REFUSED_KEYS:
                yield f"{place}: {name}.{key} can't be set in a recipe: {REFUSED_KEYS[key]}."
            elif key in RENAMED_KEYS and (name in STAGE_SECTIONS):
                yield f"{place}: {name}.{key} is called {RENAMED_KEYS[key]} here."
            else:
                yield f"{place}: unknown key {name}.{key}{_suggestion(key, known) or '.'}"
    scratch = (document.values.get("backbone") or {}).get("from_scratch")
    if isinstance(scratch, dict):
        architecture = scratch.get("architecture")
        if architecture not in ("llama", "qwen3"):
            place = document.place(("backbone", "from_scratch", "architecture"))
            yield f"{place}: backbone.from_scratch.architecture must be llama or qwen3."
        else:
            known = {"architecture", *trl_keys()[architecture]}
            for key in scratch:
                place = document.place(("backbone", "from_scratch", key))
                if key in REFUSED_SCRATCH_KEYS:
                    yield f"{place}: backbone.from_scratch.{key} can't be set in a recipe: {REFUSED_SCRATCH_KEYS[key]}."
                elif key not in known:
                    yield f"{place}: unknown key backbone.from_scratch.{key}{_suggestion(key, known) or '.'}"


def _check_shape(scratch: dict[str, Any], document: Document) -> Iterable[str]:
    """Report sizes of a model built from nothing that don't go together."""
    width, heads = scratch.get("hidden_size"), scratch.get("num_attention_heads")
    shared = scratch.get("num_key_value_heads")
    numbers = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": shared}
    if not all(value is None or (isinstance(value, int) and value > 0) for value in numbers.values()):
        return  # reported by its type or range
    place = document.place(("backbone", "from_scratch", "num_attention_heads"))
    if width and heads and "head_dim" not in scratch and (width % heads or (width // heads) % 2):
        yield (
            f"{place}: backbone.from_scratch: hidden_size {width} is no even multiple of num_attention_heads {heads}; each head "
            "takes an even number of it."
        )
    if heads and shared and heads % shared:
        yield f"{place}: backbone.from_scratch: num_attention_heads {heads} is no multiple of num_key_value_heads {shared}."


def _check_types(document: Document) -> Iterable[str]:
    """Report values whose type is not that of their key: TRL's keys, and those of a model built from nothing."""
    tables: list[tuple[tuple[str, ...], dict[str, Any]]] = [((name,), stage_keys(name)) for name in STAGE_SECTIONS]
    scratch = (document.values.get("backbone") or {}).get("from_scratch")
    if isinstance(scratch, dict) and scratch.get("architecture") in trl_keys():
        tables.append((("backbone", "from_scratch"), trl_keys()[scratch["architecture"]]))
        yield from _check_shape(scratch, document)
    for path, keys in tables:
        section: Any = document.values
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            continue
        for key, value in section.items():
            if key not in keys:
                continue
            allowed, choices = keys[key]["types"], keys[key].get("choices")
            name = ".".join((*path, key))
            if name.endswith(".bf16") and value == "auto":
                continue  # the machine decides: `rlhf.pipeline.precision`
            if not _has_type(value, allowed):
                wanted = " or ".join(TYPE_NAMES[kind] for kind in allowed if kind != "null")
                if isinstance(value, bool) and "text" in wanted:
                    wanted += ", in quotes: YAML reads a bare no, off, yes or on as a truth value"
                elif isinstance(value, str) and wanted == TYPE_NAMES["list"]:
                    wanted += f": [{value}]"
                yield f"{document.place((*path, key))}: {name} is {value!r}; it must be {wanted}."
            elif choices and isinstance(value, str) and value not in choices:
                hint = _suggestion(value, choices) or ";"
                yield f"{document.place((*path, key))}: {name} is {value!r}{hint} one of {', '.join(choices)}."
            elif (range_of_key := out_of_range(key, value)) is not None:
                yield f"{document.place((*path, key))}: {name} is {value!r}; it must be {range_of_key}."


def _has_type(value: object, allowed: Sequence[str]) -> bool:
    if value is None:
        return "null" in allowed
    if isinstance(value, bool):
        return "bool" in allowed
    if isinstance(value, int):
        return "int" in allowed or "float" in allowed
    if isinstance(value, float):
        return "float" in allowed and math.isfinite(value)
    return any(
        isinstance(value, kind) and name in allowed for name, kind in (("str", str), ("list", list), ("dict", dict))
    )


def _check_together(recipe: Recipe, document: Document) -> Iterable[str]:
    """Report what is missing, and what excludes what."""
    backbone, data = recipe.backbone, recipe.data
    sources = [backbone.model is not None, backbone.from_scratch is not None, recipe.lab is not None]
    if sum(sources) == 0:
        yield f"{document.place(('backbone',))}: set backbone.model (a hub id or folder) or backbone.from_scratch, or use `lab:`."
    if backbone.model is not None and backbone.from_scratch is not None:
        place = document.place(("backbone", "from_scratch"))
        yield f"{place}: backbone.model and backbone.from_scratch exclude each other; keep one."
    yield from _check_rounds(recipe, document)
    yield from _check_lab(recipe, document)
    if recipe.lab is None:
        starts_cold = recipe.rounds.first == "sampled" and recipe.rounds.labels_from in ("people", "judge", "verdicts")
        if data.preferences is None and not starts_cold:
            yield f"{document.place(('data',))}: data.preferences is missing (a hub id or a local file)."
        if data.preferences is None and starts_cold and data.prompts is None:
            yield f"{document.place(('data',))}: data.prompts is missing: without data.preferences nobody knows what to answer."
        if data.sft is None and backbone.model is None:
            yield (
                f"{document.place(('data',))}: data.sft is missing (a hub id or a local file); only a backbone.model that "
                "can answer already does without SFT."
            )
    if recipe.sft.trl_settings().get("eval_strategy", "no") != "no":
        yield f"{document.place(('sft', 'eval_strategy'))}: sft.eval_strategy: demonstrations are not held out; leave it off."
    for stage in STAGE_SECTIONS:
        for key, sentence in _stage_problems(stage, getattr(recipe, stage).trl_settings()):
            yield f"{document.place((stage, key))}: {stage}.{key} {sentence}"
    vote = recipe.vote
    if recipe.needs_vote and not vote.in_sample and vote.members < max(2, vote.folds):
        yield (
            f"{document.place(('vote', 'members'))}: vote.members is {vote.members} and vote.folds {vote.folds}: votes on pairs "
            "that the voter was not trained on need two members or more, and one a fold; raise vote.members or lower vote.folds."
        )
    for path, sentence in (*corrected_twice(recipe), *unused_keys(recipe)):
        yield f"{document.place(path)}: {sentence}"


def _stage_problems(stage: str, settings: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield the key and the rest of the sentence where two of TRL's settings of a stage can't be together."""
    if settings.get("load_in_4bit") and not settings.get("use_peft"):
        yield "load_in_4bit", f"needs {stage}.use_peft: true; 4-bit weights can't be trained themselves."
    template = settings.get("chat_template_path")
    if template is not None and settings.get("use_peft") and Path(str(template)).suffix != ".jinja":
        yield (
            "chat_template_path",
            "names another model, whose new tokens an adapter does not learn; name a .jinja file, or give backbone.model these "
            "tokens first.",
        )
    if settings.get("dataloader_prefetch_factor") is not None and not settings.get("dataloader_num_workers"):
        yield (
            "dataloader_prefetch_factor",
            f"needs {stage}.dataloader_num_workers: 1 or more, whose reading it is about.",
        )
    padding = settings.get("pad_to_multiple_of")
    if isinstance(padding, str) and padding != "auto":
        yield "pad_to_multiple_of", f"is {padding!r}; it must be a number or auto."


def _check_lab(recipe: Recipe, document: Document) -> Iterable[str]:
    """Report what the world of instructions lacks, and the keys that only the world of lists has."""
    lab = recipe.lab
    if lab is not None and not lab.is_sampled and "answers" in lab.model_fields_set:
        yield (
            f"{document.place(('lab', 'answers'))}: lab.answers is {lab.answers}, which is not used: in the world of lists writers "
            "answer twice. Leave it out."
        )
    if lab is None or not lab.is_sampled:
        return
    if recipe.backbone.model is None:
        yield (
            f"{document.place(('lab', 'world'))}: lab.world is instructions, whose answers a chat model gives; set backbone.model "
            "(a hub id or a folder)."
        )
    for key in sorted(lab.model_fields_set & {"demonstrations", "hidden_size", "num_hidden_layers"}):
        reason = "backbone.model answers" if key == "demonstrations" else "backbone.model is the model"
        hint = "; for an SFT of your own set data.sft" if key == "demonstrations" else ""
        yield (
            f"{document.place(('lab', key))}: lab.{key} is {getattr(lab, key)}, which is not used: in the world of instructions "
            f"{reason}{hint}. Leave it out."
        )


def _check_rounds(recipe: Recipe, document: Document) -> Iterable[str]:
    """Report what the labels of a round lack."""
    rounds = recipe.rounds
    asks = rounds.count > 1 or rounds.first == "sampled"
    if asks and rounds.labels_from == "lab" and recipe.lab is None:
        yield (
            f"{document.place(('rounds', 'labels_from'))}: rounds.labels_from is lab, but there is no `lab:`; use people, judge, "
            "verdicts or dataset."
        )
    if rounds.labels_from == "judge" and (rounds.judge_url is None or rounds.judge_model is None):
        yield f"{document.place(('rounds',))}: rounds.labels_from is judge; set rounds.judge_url and rounds.judge_model."
    if rounds.labels_from == "verdicts" and rounds.judge_model is None:
        yield (
            f"{document.place(('rounds',))}: rounds.labels_from is verdicts; set rounds.judge_model (a folder or hub id of a "
            "causal model)."
        )
    if rounds.labels_from == "dataset" and rounds.first == "sampled":
        yield f"{document.place(('rounds', 'first'))}: rounds.first is sampled, but labels_from: dataset samples nothing."
    if rounds.age_weight < 1 and recipe.reward.objective == "scaled":
        yield (
            f"{document.place(('rounds', 'age_weight'))}: rounds.age_weight weighs pairs by their age, and reward.objective: "
            f"{recipe.reward.objective} by something else, of which a pair keeps one; leave one of both out."
        )
    if rounds.max_noise is not None and not recipe.needs_vote:
        yield (
            f"{document.place(('rounds', 'max_noise'))}: rounds.max_noise is not used: nobody votes on the labels; take an "
            "objective with a vote, or rounds.second_look."
        )
    if rounds.second_look is not None:
        yield from (
            f"{document.place(('rounds', 'second_look'))}: {problem}" for problem in _second_look_problems(recipe)
        )
    if rounds.start == "sft" and rounds.reference == "previous":
        yield (
            f"{document.place(('rounds', 'reference'))}: rounds.reference is previous, but PPO starts from sft, far from it; set "
            "rounds.start: previous."
        )


def _second_look_problems(recipe: Recipe) -> Iterable[str]:
    """Yield what stands in the way of a second look."""
    rounds, reward = recipe.rounds, recipe.reward
    if rounds.labels_from == "dataset" or (rounds.count == 1 and rounds.first == "offline"):
        yield "rounds.second_look is a share of the labels that a round asks for, and no round of this recipe asks; leave it out."
    if not 1 <= rounds.looked_at < rounds.labels:
        yield (
            f"rounds.second_look={rounds.second_look:g} of {rounds.labels} labels is {rounds.looked_at} pairs; both second looks "
            "and new labels must be one at least."
        )
    if reward.objective != "bt" or reward.flip_rate > 0:
        yield (
            "rounds.second_look tells the reward model how likely every label is right, which an objective that corrects labels "
            "would do twice; set reward.objective: bt and leave out reward.flip_rate (vote.flip_rate is the voters')."
        )
    if recipe.vote.in_sample:
        yield "rounds.second_look needs votes of models that were not trained on the pair; leave out vote.in_sample."


def _section_class(name: str) -> type[Section] | type[StageSection] | None:
    annotation = Recipe.model_fields[name].annotation
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Section | StageSection):
            return candidate
    return None


def _suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _sentence(document: Document, issue: ErrorDetails) -> str:
    path = tuple(str(part) for part in issue["loc"])
    # YAML reads `no`, 2026-01-01 and 1 as something else than text.
    remedy = (
        "; put it in quotes" if issue["type"] == "string_type" and not isinstance(issue["input"], list | dict) else ""
    )
    return f"{document.place(path)}: {'.'.join(path)}: {issue['msg'][0].lower()}{issue['msg'][1:]}{remedy}."
