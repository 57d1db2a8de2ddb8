"""`rlhf audit`: which labels of a preference file are probably wrong, and how sure that is."""

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from scipy.stats import spearmanr

from rlhf.data.read import ReadReport, is_local
from rlhf.data.rows import TIE, Compare, Pair, told
from rlhf.data.sources import Row, Source, read_pair_rows
from rlhf.data.tables import local_files
from rlhf.errors import UserError
from rlhf.files import digest, file_digest, write_text
from rlhf.models.load import find_source, load_tokenizer
from rlhf.models.open import open_config
from rlhf.models.text import plain
from rlhf.models.tools import ToolTemplate
from rlhf.objectives.strength import VoteStrength, posterior_confidence
from rlhf.pipeline.cleaned import write_cleaned
from rlhf.pipeline.training import quiet_libraries
from rlhf.pipeline.vote import vote
from rlhf.recipe import Recipe
from rlhf.report.audit import write_audit_page
from rlhf.reward.noise import estimate_noise
from rlhf.reward.wants import Wants, find_wants, without_wants
from rlhf.statistics import clustered_mean

# Without a recipe: the upper layers and a head per member on a shared trunk, at a rate that is usual for fine-tuning.
DEFAULTS: dict[str, Any] = {"learning_rate": 1e-4, "per_device_train_batch_size": 16, "num_train_epochs": 1}
MEMBERS, FOLDS, TOP_LAYERS = 10, 5, 2
SHOWN = 50  # suspicious pairs on the page
DECILES = 10
LENGTH_ALARM = 0.4
WORK = "work"


def audit(
    pairs: str | Source,
    model: str,
    out: Path,
    *,
    members: int | None,
    recipe: Recipe | None,
    say: Callable[[str], None],
    compare: Compare | None = None,
    budget: int | None = None,
) -> dict[str, Any]:
    """Vote on every pair out of fold and write what follows from it.

    `audit.json`; `pairs.parquet` (a row a pair: `row`, the 0-based line of the file, `strength_mean`, `strength_std`,
    `strength_votes`, `probability_wrong`, `probability_wrong_without_wants`, `suspicious`); `cleaned.jsonl`, the file's rows
    without those of suspicious pairs (`rlhf.pipeline.cleaned`); `audit.html`. A killed audit goes on with the member it was at;
    a finished one is not repeated.

    `wants` says which traits of an answer the labels follow; `suspicious_without_wants` which rows are suspicious once these
    are taken out of the votes. `contradictions` lists the rows, 0-based, whose own ratings contradict their label;
    `rating_ties` counts those rated alike.

    Args:
        pairs: a file or hub dataset in any accepted form.
        model: what the members start from: a folder or hub id, decoder or encoder.
        members: number of voters; default 10, or the recipe's.
        recipe: its `vote` and `reward` sections say how members are trained.
        compare: whether pairs that part before their last turn are compared as whole conversations; default "answers", or the
            recipe's `data.compare`.
        budget: how many of the pairs are to be looked at again afterwards (`rlhf.pipeline.second_look`).

    Raises:
        UserError: nothing usable in the file, or fewer pairs than the budget; the folder holds something else; an impossible
            vote.
    """
    quiet_libraries()
    settings, shape = _vote_settings(model, members, recipe)
    source = Source(pairs) if isinstance(pairs, str) else pairs
    compare = compare or ("answers" if recipe is None else recipe.data.compare)
    identity = _identity(source) if compare == "answers" else [_identity(source), compare]
    key = digest({"pairs": identity, "model": model, "settings": settings, "shape": shape})
    finished = _finished(out, key)
    if finished is not None:
        say(f"{out}: done before")
        return finished

    # 1. Read, count, vote.
    read, report = read_audited_rows(source, model, compare)
    rows = [row for row in read if row.values.get("confidence") != TIE]
    ties = len(read) - len(rows)
    for sentence in report.sentences():
        say(sentence)
    if ties:
        say(f"  {ties} ties are kept as they are: nobody calls one of their answers better, so no label can be wrong.")
    if not rows:
        raise UserError(f"{source.source}: all of its pairs are ties, so there is no label to audit.")
    if budget is not None:
        check_budget(budget, len(rows), source.source)
    values: list[Any] = [row.values for row in rows]
    seed = 0 if recipe is None else recipe.seed
    (out / WORK).mkdir(parents=True, exist_ok=True)
    write_text(out / WORK / "key.json", json.dumps(key))
    strength, noise = vote(model, values, settings, out / WORK, seed=seed, say=say, **shape)

    # 2. What the votes say about each label.
    right = torch.ones(len(rows))
    if noise.flip_rate > 0:
        right = posterior_confidence(strength.mean, flip_rate=noise.flip_rate, scale=noise.scale)
    suspicious = [i for i in torch.argsort(right, stable=True).tolist() if right[i] < 0.5]
    wants = find_wants(values)
    wrong_without_wants = _wrong_without_wants(strength.mean, wants, values)
    audited = Audited(rows, strength, 1 - right, wrong_without_wants, frozenset(suspicious))
    contradicting = [i for i, row in enumerate(rows) if (row.values.get("rating_gap") or 0) < 0]
    length = length_bias(values, strength)
    alarm = length_alarm(length["correlation_with_strength"])
    if alarm is not None:
        say(f"audit: {alarm}")
    result = {
        "pairs": source.source,
        "model": model,
        "rows": report.rows,
        "kept": report.kept,
        "kept_pairs": len(rows),
        "ties": ties,
        "dropped": report.dropped,
        "dropped_rows": report.examples,
        "noise_rate": {"mean": noise.flip_rate, "low": noise.low, "high": noise.high},
        "buckets": _deciles(audited),
        "suspicious": list(dict.fromkeys(rows[i].number - 1 for i in suspicious)),
        "suspicious_without_wants": _most_suspicious(audited),
        "wants": _wants_of_rows(wants, rows),
        "directions": list(report.directions.values()),
        "contradictions": [rows[i].number - 1 for i in contradicting],
        "rating_ties": sum(row.values.get("rating_gap") == 0 for row in rows),
        "length": {**length, "alarm": alarm},
        "by": {name: _agreement(audited, name) for name in ("annotator", "source", "subset")},
        "vote": {**shape, **asdict(noise), "settings": settings},
        "key": key,
    }

    # 3. Files; the JSON, which says that all is there, last.
    _write_parquet(out / "pairs.parquet", audited)
    dropped = [rows[i] for i in suspicious]
    result["cleaned"] = write_cleaned(out / "cleaned.jsonl", source, read, dropped)
    write_page(out, result, audited, wants)
    shutil.rmtree(out / WORK)
    write_text(out / "audit.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def read_audited_rows(source: Source, model: str, compare: Compare) -> tuple[list[Row[Pair]], ReadReport]:
    """Read the pairs of a source as an audit sees them, ties among them."""
    template = ToolTemplate(lambda: load_tokenizer(find_source(model).base, conversational=True, pads=False), model)
    return read_pair_rows(source, fit=template, compare=compare)


def check_budget(budget: int, pairs: int, source: str) -> None:
    """Refuse to look again at no pair, or at more pairs than there are.

    Raises:
        UserError: with both numbers.
    """
    if not 1 <= budget <= pairs:
        raise UserError(
            f"--budget {budget}: {source} holds {pairs} pairs with a label to look at again; name a number from 1 to {pairs}."
        )


def write_page(out: Path, result: dict[str, Any], audited: "Audited", wants: Wants) -> None:
    """Write `audit.html`; `result` is the content of `audit.json`."""
    order = torch.argsort(audited.wrong, descending=True, stable=True).tolist()
    suspicious = [i for i in order if i in audited.suspicious]
    contradicting = [i for i, row in enumerate(audited.rows) if (row.values.get("rating_gap") or 0) < 0]
    shown, contradictions = ([_shown(audited, i) for i in part[:SHOWN]] for part in (suspicious, contradicting))
    write_audit_page(
        out / "audit.html",
        result,
        shown,
        audited.strength.mean.tolist(),
        audited.strength.std.tolist(),
        contradictions=contradictions,
        examples={name: [_shown(audited, i) for i in wants.traits[name]["examples"]] for name in wants.wanted},
    )


def _identity(source: Source) -> object:
    """Return what the pairs of a source depend on: the bytes of local files, and what is said about them."""
    files = local_files(source.source) if is_local(source.source) else []
    digests = [file_digest(file) for file in files]
    content: object = digests[0] if len(digests) == 1 else digests or source.source
    stated = {
        name: value for name, value in asdict(source).items() if name != "source" and value != getattr(Source, name)
    }
    return [content, stated] if stated else content


class Audited(NamedTuple):
    """What the votes say about each pair.

    Attributes:
        rows: the pairs, each with the line it was read from.
        strength: of every pair.
        wrong: [n] probability that the label is wrong.
        wrong_without_wants: [n] the same by what the votes see beside the traits that the labels want.
        suspicious: indices of the labels that are wrong rather than right.
    """

    rows: Sequence[Row]
    strength: VoteStrength
    wrong: torch.Tensor
    wrong_without_wants: torch.Tensor
    suspicious: frozenset[int]


def _vote_settings(model: str, members: int | None, recipe: Recipe | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return TRL's keys of a member, and the shape of the vote.

    Raises:
        UserError: the model's configuration can't be read.
    """
    if recipe is not None:
        shape = recipe.vote.shape()
        return recipe.vote_settings(), shape | ({} if members is None else {"members": members})
    try:
        depth = open_config(find_source(model).base).get_text_config().num_hidden_layers
    except UserError as error:
        raise UserError([f"--model {problem}" for problem in error.problems]) from error
    count = MEMBERS if members is None else members
    trunk = min(TOP_LAYERS, depth - 1) or None
    return dict(DEFAULTS), {
        "members": count,
        "folds": min(FOLDS, count),
        "in_sample": False,
        "trunk": trunk,
        "flip_rate": 0.0,
    }


def _finished(out: Path, key: str) -> dict[str, Any] | None:
    """Read the result of the very same audit, if it is there.

    Raises:
        UserError: the folder holds something else.
    """
    file = out / "audit.json"
    if file.is_file():
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if result.get("key") == key and "wants" in result:
            return result
        raise UserError(
            f"{out}: holds an audit of other pairs, with another model or settings, or by an older version; choose another --out."
        )
    begun = out / WORK / "key.json"
    if begun.is_file() and json.loads(begun.read_text(encoding="utf-8")) == key:
        return None
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; choose another --out.")
    return None


def _deciles(audited: Audited) -> list[dict[str, float]]:
    """Describe ten equally large groups of pairs, from the weakest to the strongest."""
    strength, wrong = audited.strength, audited.wrong
    order = torch.argsort(strength.mean, stable=True)
    return [
        {
            "from": strength.mean[part].min().item(),
            "to": strength.mean[part].max().item(),
            "n": len(part),
            "strength_mean": strength.mean[part].mean().item(),
            "strength_std": strength.std[part].mean().item(),
            "probability_wrong": wrong[part].mean().item(),
        }
        for part in torch.tensor_split(order, DECILES)
        if len(part)
    ]


def length_bias(pairs: Sequence[Pair], strength: VoteStrength) -> dict[str, Any]:
    """Measure how much of labels and votes length alone explains.

    Returns:
        how often the longer answer is the chosen one, ties half, with its interval; and Spearman's correlation of the strength
        with the difference in characters, None where either is the same for all pairs.
    """
    differences = np.array([len(told(row, "chosen")) - len(told(row, "rejected")) for row in pairs], float)
    mean, interval = clustered_mean(
        ((differences > 0) + 0.5 * (differences == 0)).tolist(), [plain(row["prompt"]) for row in pairs]
    )
    votes = strength.mean.double().numpy()
    varied = differences.std() > 0 and votes.std() > 0
    correlation = float(spearmanr(differences, votes).statistic) if varied else None
    return {"longer_is_chosen": mean, "longer_is_chosen_ci": interval, "correlation_with_strength": correlation}


def length_alarm(correlation: float | None) -> str | None:
    """Say that the votes mostly follow length, where they do; they then call wrong what is merely long, or short.

    Returns:
        the sentences, or None where the correlation is small or not known.
    """
    if correlation is None or abs(correlation) < LENGTH_ALARM:
        return None
    liked = "longer" if correlation > 0 else "shorter"
    return (
        f"The votes prefer the {liked} answer (correlation {correlation:.2f}), so many suspicious pairs may only be those "
        f"whose chosen answer is not the {liked} one. Read them before dropping them; a stronger model looks at more than length."
    )


def _wrong_without_wants(strength: torch.Tensor, wants: Wants, pairs: Sequence[Pair]) -> torch.Tensor:
    """Return the probability that each label is wrong, by the part of the votes that the labels' wants do not explain.

    It is 0 for all where that part agrees with the labels no more than chance, and so says nothing.
    """
    rest = without_wants(strength, wants)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        noise = estimate_noise(rest, [plain(row["prompt"]) for row in pairs])
    if noise.flip_rate == 0:
        return torch.zeros(len(pairs))
    return 1 - posterior_confidence(rest, flip_rate=noise.flip_rate, scale=noise.scale)


def _most_suspicious(audited: Audited) -> list[int]:
    """Return the rows whose labels are wrong rather than right without the wants, the most suspicious first."""
    wrong = audited.wrong_without_wants
    order = torch.argsort(wrong, descending=True, stable=True).tolist()
    return list(dict.fromkeys(audited.rows[i].number - 1 for i in order if wrong[i] > 0.5))


def _wants_of_rows(wants: Wants, rows: Sequence[Row]) -> dict[str, Any]:
    """Return what the labels want as `audit.json` has it, its examples as rows of the file, from 0."""
    accuracy, interval = wants.accuracy or (None, None)
    traits = {
        name: {**want, "examples": [rows[i].number - 1 for i in want["examples"]]}
        for name, want in wants.traits.items()
    }
    return {"accuracy": accuracy, "accuracy_ci": interval, "wanted": wants.wanted, "traits": traits}


def _agreement(audited: Audited, column: str) -> dict[str, dict[str, Any]]:
    """Measure how often the votes agree with the labels of every annotator, source or subset.

    Returns:
        an entry for each value of the column; empty where the rows name only one.
    """
    values: list[Any] = [row.values.get(column) for row in audited.rows]
    groups = sorted({value for value in values if value is not None})
    if len(groups) < 2:
        return {}
    mean_strength = audited.strength.mean
    agrees = (mean_strength > 0).double() + 0.5 * (mean_strength == 0).double()
    report = {}
    for group in groups:
        members = [i for i, value in enumerate(values) if value == group]
        prompts = [plain(audited.rows[i].values["prompt"]) for i in members]
        mean, interval = clustered_mean(agrees[members].tolist(), prompts)
        likely = audited.wrong[members].mean().item()
        report[group] = {"n": len(members), "agreement": mean, "agreement_ci": interval, "probability_wrong": likely}
    return report


def _shown(audited: Audited, i: int) -> dict[str, Any]:
    """Return what the page says about one pair."""
    row, strength = audited.rows[i], audited.strength
    return {
        "row": row.number - 1,
        "prompt": plain(row.values["prompt"]),
        "chosen": told(row.values, "chosen"),
        "rejected": told(row.values, "rejected"),
        "strength_mean": strength.mean[i].item(),
        "strength_std": strength.std[i].item(),
        "strength_votes": int(strength.votes[i]),
        "probability_wrong": audited.wrong[i].item(),
        "rating_gap": row.values.get("rating_gap"),
    }


def _write_parquet(file: Path, audited: Audited) -> None:
    """Write what the votes say about each pair, a row a pair."""
    rows, strength = audited.rows, audited.strength
    columns = {
        "row": [row.number - 1 for row in rows],
        "strength_mean": strength.mean.tolist(),
        "strength_std": strength.std.tolist(),
        "strength_votes": strength.votes.tolist(),
        "probability_wrong": audited.wrong.tolist(),
        "probability_wrong_without_wants": audited.wrong_without_wants.tolist(),
        "suspicious": [i in audited.suspicious for i in range(len(rows))],
    }
    parquet.write_table(pa.table(columns), file)
