"""`rlhf evaluate`: reward models on pairs, rankings and published benchmarks, side by side, and their biases."""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.rankings import Ranking
from rlhf.data.read import FILE_SUFFIXES, ReadReport
from rlhf.data.rows import SIDES, TIE, Compare, Pair, answer, has_ended, parting_turn, told
from rlhf.data.sources import Fit, Row, Source, count_kept, drop_rows, read_pair_rows, read_rankings
from rlhf.data.tables import is_pattern, is_saved
from rlhf.errors import UserError
from rlhf.evaluation.benchmark_files import Benchmark, named_split, read_benchmark
from rlhf.evaluation.benchmarks import (
    OVERALL,
    Arithmetic,
    Item,
    by_pairs,
    figure_values,
    length_scores,
    style_matrices,
)
from rlhf.evaluation.pairs import (
    ScoredPairs,
    compare,
    pair_report,
    pairs_of_items,
    ranking_report,
    score_items,
    score_pairs,
    score_rankings,
)
from rlhf.evaluation.probes import probe
from rlhf.evaluation.verdicts import check_room, verdicts_beside
from rlhf.files import write_text
from rlhf.models.load import find_source, load_tokenizer
from rlhf.models.tools import ToolTemplate
from rlhf.models.verdicts import load_verdict_model
from rlhf.pipeline.training import quiet_libraries
from rlhf.report.evaluation import write_evaluation
from rlhf.report.result_file import check_result_file
from rlhf.reward.load import open_reward_model
from rlhf.reward.model import RewardModel
from rlhf.reward.sides import side_texts
from rlhf.statistics import Array

# What each model's entry has of its report on the pairs.
MODEL_KEYS = ("accuracy", "accuracy_ci", "ties", "ece", "accuracy_length_controlled", "temperature")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
UNDECIDED = "ties, which nothing can be right about"


@dataclass(frozen=True)
class _Data:
    """A data set: its items, how scores become figures, and for ordinary data the canonical rows.

    Attributes:
        rankings: of ordinary data that have any.
        benchmark: the published one that it is, if it is one.
    """

    name: str
    items: list[Item]
    arithmetic: Arithmetic
    rows: list[Pair]
    rankings: list[Ranking]
    benchmark: Benchmark | None
    report: ReadReport


@dataclass(frozen=True)
class _Scored:
    """What one model says of one data set.

    Attributes:
        scores: [K] of each item's answers.
        rankings: [K] of each ranking's answers.
        outcomes: [m] as the data set's arithmetic has them.
    """

    pairs: ScoredPairs
    scores: list[Array]
    rankings: list[Array]
    outcomes: Array


def models_and_data(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell the models from the data in what was named: the first name and every folder are models, all else is data.

    A folder that `datasets` saved is data, and so is a mapping (`{source: …}`).

    Raises:
        UserError: no data were named.
    """
    models, data = [names[0]], list[str]()
    for name in names[1:]:
        (data if _is_data(name) else models).append(name)
    if not data:
        raise UserError(
            "evaluate: name a file of pairs or rankings, a benchmark's file, or a dataset on the hub behind the models; "
            "folders are taken for models."
        )
    return models, data


def _is_data(name: str) -> bool:
    """Tell whether a name is one of data; a path that is not there is a model's, unless it ends as files do."""
    is_file = name.lower().endswith(FILE_SUFFIXES) or Path(name).expanduser().is_file()
    if name.lstrip().startswith("{") or is_file or is_pattern(name) or is_saved(name):
        return True
    return HUB_NAME.fullmatch(name) is not None and not Path(name).is_dir()


def evaluate_models(
    models: Sequence[str],
    data: Sequence[str | Source],
    out: Path,
    *,
    probes: bool = False,
    verdicts: str | None = None,
    say: Callable[[str], None],
    compare_as: Compare = "answers",
) -> dict[str, Any]:
    """Evaluate reward models on every data set; write the result as JSON, and a page beside it.

    Args:
        models: the first is the one that the others are compared with, on the same pairs.
        data: files or hub datasets of pairs, rankings, trees or published benchmarks. Ties are left out, for nothing can be
            right about them; tool calls are written by the first model's chat template.
        probes: whether minimal edits of the same answers are scored too.
        verdicts: a causal model whose verdicts on the same pairs stand beside.
        compare_as: whether pairs that part before their last turn are left out, or compared as whole conversations.

    Raises:
        UserError: a model can't be opened, a data set has no usable pair or is no whole benchmark, two have the same name.
    """
    quiet_libraries()

    # 1. All data are read and all models are opened before anything is scored, so that all that is wrong is said at once.
    problems: list[str] = []
    _attempt(problems, partial(check_result_file, key="models"), out, "--out")
    if not out.exists():  # an earlier result has its page beside it
        _attempt(problems, check_result_file, out.with_suffix(".html"), "--out, the page beside it,")
    sources = [Source(source) if isinstance(source, str) else source for source in data]
    names = data_names([source.source for source in sources])
    fit = ToolTemplate(lambda: load_tokenizer(find_source(models[0]).base, conversational=True, pads=False), models[0])
    sets = [
        _attempt(problems, _read, name, source, fit, compare_as) for name, source in zip(names, sources, strict=True)
    ]
    rewards = [_attempt(problems, open_reward_model, model) for model in models]
    annotator = None if verdicts is None else _attempt(problems, load_verdict_model, verdicts)
    data_sets, opened = [x for x in sets if x is not None], [x for x in rewards if x is not None]
    for data_set in data_sets if annotator is not None else ():
        _attempt(problems, check_room, annotator, data_set.rows)
    if problems:
        raise UserError(problems)
    for data_set in data_sets:
        for sentence in [data_set.benchmark.sentence] if data_set.benchmark else data_set.report.sentences():
            say(sentence)

    # 2. Every model scores every data set; the first one's report is the data set's, the others stand beside it.
    reports, shown = {}, {}
    for data_set in data_sets:
        scored = []
        for model, reward in zip(models, opened, strict=True):
            started = time.monotonic()
            scored.append(_score(reward, data_set, model))
            say(f"{data_set.name}: scored with {model} in {time.monotonic() - started:.0f} s.")
            alike = _alike_after_cut(reward, scored[-1].pairs.rows)
            if alike:
                say(
                    f"{data_set.name}: {alike} of {len(scored[-1].pairs.rows)} pairs have two answers that are the same in the "
                    f"last {reward.max_length} tokens, which are all that {model} reads; they count as ties."
                )
        reports[data_set.name] = _report(data_set, models, scored)
        if annotator is not None:
            label = f"{data_set.name}: verdicts of {annotator.name}"
            reports[data_set.name]["verdicts"] = verdicts_beside(annotator, scored[0].pairs, label=label)
        shown[data_set.name] = scored[0].pairs.samples()

    # 3. Probes: the answers of all data sets together.
    result: dict[str, Any] = {
        "model": models[0],
        "against": models[1] if len(models) > 1 else None,
        "models": list(models),
        "data": reports,
    }
    items = [item for data_set in data_sets for item in _edited_items(data_set)] if probes else []
    cut = sum(_has_cut_answer(row) for data_set in data_sets if data_set.benchmark is None for row in data_set.rows)
    if probes and cut:
        say(f"Probes: {cut} pairs are left out, as an answer of theirs was cut off.")
    if probes and not any(item.pairs for item in items):
        say("Probes: there is no pair of answers to one prompt to edit, so they are left out.")
    elif probes:
        say("Probes: the answers are edited and scored again, seven times.")
        result["probes"] = []
        for model, reward in zip(models, opened, strict=True):
            with reward.uncounted():  # nobody wrote the edited answers
                biases = probe(reward, items, special=_end_token(reward), label=f"probes: {model}")
            result["probes"].append({"model": model, **biases})

    # 4. What of the data was cut, and the files.
    for model, reward in zip(models, opened, strict=True):
        for sentence in reward.cuts(model):
            say(sentence)
    write_text(out, json.dumps(result, indent=1) + "\n")
    write_evaluation(out.with_suffix(".html"), result, shown)
    return result


def _edited_items(data_set: _Data) -> list[Item]:
    """Return the items whose answers can be edited: those with one prompt for all answers, none of which was cut off."""
    if data_set.benchmark is not None:
        return data_set.items
    return [
        item
        for item, row in zip(data_set.items, data_set.rows, strict=True)
        if parting_turn(row) is None and not _has_cut_answer(row)
    ]


def _has_cut_answer(row: Pair) -> bool:
    """Tell whether one of a pair's answers was cut off."""
    return not all(has_ended(row[side]) for side in SIDES)


def data_names(data: Sequence[str]) -> list[str]:
    """Return what each data set is called: its file's name, with the folder's where two have the same.

    Raises:
        UserError: two have the same name all the same.
    """
    names = [Path(source).name.split(".")[0] for source in data]
    folders = [Path(source).resolve().parent.name for source in data]
    names = [f"{folder}/{name}" if names.count(name) > 1 else name for name, folder in zip(names, folders, strict=True)]
    if len(set(names)) < len(names):
        raise UserError(f"evaluate: two data sets have the same name ({', '.join(names)}); rename a file.")
    return names


def _attempt(problems: list[str], function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function gives; enter what a person did wrong in `problems`, and return None."""
    try:
        return function(*arguments)
    except UserError as error:
        problems.extend(error.problems)
        return None


def _read(name: str, source: Source, fit: Fit, compare_as: Compare) -> _Data:
    """Read one data set as the benchmark that it is, or as ordinary pairs with their rankings.

    Raises:
        UserError: there is no usable pair, or no benchmark that is whole.
    """
    source = named_split(source)
    # Rows that were chosen, or columns that were named, make ordinary pairs also of a benchmark.
    is_whole = source == Source(source.source, config=source.config, split=source.split)
    benchmark = read_benchmark(source) if is_whole else None
    if benchmark is not None:
        return _Data(name, benchmark.items, benchmark.arithmetic, [], [], benchmark, benchmark.report)
    rows, report = _decided(source.source, *read_pair_rows(source, split="test", fit=fit, compare=compare_as))
    items = [Item(row["prompt"], [answer(row, "chosen"), answer(row, "rejected")], [1, 0], [(0, 1)]) for row in rows]
    pairs = by_pairs(items)
    arithmetic = Arithmetic(pairs.outcomes, pairs.clusters, {"accuracy": pairs.figures[OVERALL]})
    return _Data(name, items, arithmetic, rows, read_rankings(source), None, report)


def _decided(name: str, rows: list[Row[Pair]], report: ReadReport) -> tuple[list[Pair], ReadReport]:
    """Return the pairs whose label calls one answer better, and the report, which counts the others by their rows.

    Raises:
        UserError: all are ties.
    """
    decided = [row for row in rows if row.values.get("confidence") != TIE]
    if not decided:
        raise UserError(f"{name}: all of its pairs are ties, which nothing can be right about.")
    drop_rows((row for row in rows if row.values.get("confidence") == TIE), UNDECIDED)
    count_kept([report], [decided])
    return [row.values for row in decided], report


def _score(reward: RewardModel, data_set: _Data, model: str) -> _Scored:
    """Score a data set with one model.

    Raises:
        UserError: a score is not a finite number.
    """
    label = f"{data_set.name}: {model}"
    if data_set.benchmark is None:
        pairs = score_pairs(reward, data_set.rows, label=label)
        scores = list(np.stack([pairs.scores_chosen, pairs.scores_rejected], axis=1))
        with reward.uncounted():  # the answers of rankings were counted in their pairs
            rankings = (
                score_rankings(reward, data_set.rankings, label=f"{label}, rankings") if data_set.rankings else []
            )
    else:
        scores = score_items(reward, data_set.items, label=label)
        pairs = pairs_of_items(data_set.items, scores)
        rankings = [x for item, x in zip(data_set.items, scores, strict=True) if _is_ranking(item)]
    bad = int((~np.isfinite(pairs.scores_chosen) | ~np.isfinite(pairs.scores_rejected)).sum())
    if bad:
        raise UserError(
            f"{model}: the scores of {bad} of {len(pairs.rows)} pairs of {data_set.name} are not finite numbers; its weights or "
            "its dtype can't hold them."
        )
    return _Scored(pairs, scores, rankings, data_set.arithmetic.outcomes(scores))


def _report(data_set: _Data, models: Sequence[str], scored: Sequence[_Scored]) -> dict[str, Any]:
    """Report one data set: the first model in full, the others beside it, and length rules on the same rows."""
    first = scored[0]
    pair_reports = [pair_report(other.pairs) for other in scored]
    report = dict(pair_reports[0])
    labels = [[ranked.score for ranked in ranking.answers] for ranking in data_set.rankings]
    prompts = [ranking.prompt for ranking in data_set.rankings]
    if data_set.benchmark is not None:
        labels = [list(item.labels) for item in data_set.items if _is_ranking(item)]
        prompts = [item.prompt for item in data_set.items if _is_ranking(item)]
    if labels:
        report["rankings"] = ranking_report(labels, first.rankings, prompts)
    if len(scored) > 1:
        accuracy = float(scored[1].pairs.right.mean())
        report["against"] = {"accuracy": accuracy, **compare(first.pairs, scored[1].pairs)}
    report["models"] = []
    for model, other, full in zip(models, scored, pair_reports, strict=True):
        entry = {name: full[name] for name in MODEL_KEYS}
        if other is not first:
            entry |= compare(other.pairs, first.pairs)
        report["models"].append({"model": model, **entry})
    report["figures"] = _figures(data_set, scored)
    name = data_set.benchmark.name if data_set.benchmark else None
    report["benchmark"] = name
    if name == "RM-Bench":
        report["matrices"] = [style_matrices(data_set.items, other.outcomes) for other in scored]
    sections = {figure: entry["models"][0]["value"] for figure, entry in report["figures"].items()}
    report["reward_bench"] = sections if name == "RewardBench" else None
    if "rankings" in report:
        report["rankings"]["reward_bench_2"] = sections if name == "RewardBench 2" else None
    report["read"] = data_set.report.as_dict()
    return report


def _figures(data_set: _Data, scored: Sequence[_Scored]) -> dict[str, dict[str, Any]]:
    """Return each figure of each model with its paired difference from the first, and what length rules get."""
    arithmetic = data_set.arithmetic
    rules = {}
    for name, sign in (("longer", 1), ("shorter", -1)):
        outcomes = arithmetic.outcomes(length_scores(data_set.items, sign))
        rules[name] = {figure: float(weights @ outcomes) for figure, weights in arithmetic.figures.items()}
    values = [figure_values(arithmetic, other.outcomes) for other in scored]
    first = scored[0].outcomes
    gaps = [figure_values(arithmetic, x.outcomes - first, are_differences=True) for x in scored[1:]]
    figures = {}
    for figure, weights in arithmetic.figures.items():
        differences = [{"difference": gap[figure]["value"], "difference_ci": gap[figure]["ci"]} for gap in gaps]
        entries = zip(values, [{}, *differences], strict=True)
        figures[figure] = {
            "n": len({arithmetic.clusters[i] for i in np.nonzero(weights)[0].tolist()}),
            **{name: rule[figure] for name, rule in rules.items()},
            "models": [{**value[figure], **difference} for value, difference in entries],
        }
    return figures


def _is_ranking(item: Item) -> bool:
    """Return whether an item has three answers or more, of which some are better than others."""
    return len(item.labels) > 2 and len(set(item.labels)) > 1


def _end_token(reward: RewardModel) -> str:
    """Return the end token as somebody types it."""
    return str(reward.tokenizer.eos_token)


def _alike_after_cut(reward: RewardModel, rows: Sequence[Pair]) -> int:
    """Count the pairs whose two answers differ, but not in what a model reads of them."""
    if not reward.cut_answers:
        return 0
    with reward.uncounted():
        sides = [reward.encode(*side_texts(rows, side)) for side in SIDES]
    return sum(
        chosen == rejected and told(row, "chosen") != told(row, "rejected")
        for row, chosen, rejected in zip(rows, *sides, strict=True)
    )
