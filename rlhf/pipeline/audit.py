"""`rlhf audit`: which labels of a preference file are probably wrong, and how sure that is."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rlhf.data.conversations import conversation_keys
from rlhf.data.read import ReadReport, is_local
from rlhf.data.rows import TIE, Compare, Pair, pair_digest
from rlhf.data.sources import Row, Source, read_pair_rows
from rlhf.data.tables import is_folder, local_files
from rlhf.errors import UserError
from rlhf.files import digest, file_digest, write_text
from rlhf.models.load import find_source, load_tokenizer
from rlhf.models.look import check_model
from rlhf.models.open import open_config
from rlhf.models.text import check_vocabulary
from rlhf.models.tools import ToolTemplate
from rlhf.objectives.strength import VoteStrength, posterior_confidence
from rlhf.pipeline.audited import (
    Audited,
    agreement_by,
    deciles,
    length_alarm,
    length_bias,
    most_suspicious,
    probability_wrong_without_wants,
    shown_pair,
    wants_of_rows,
    worth_in_clean_labels,
    write_parquet,
)
from rlhf.pipeline.cleaned import write_cleaned
from rlhf.pipeline.digests import named_digests
from rlhf.pipeline.looked import EXPERT_ERROR
from rlhf.pipeline.store import Store
from rlhf.pipeline.training import quiet_libraries
from rlhf.pipeline.vote import vote
from rlhf.recipe import Recipe
from rlhf.report.audit import write_audit_page
from rlhf.report.meter import priced_before
from rlhf.report.records import read_note
from rlhf.report.result_file import check_new_folder
from rlhf.reward.annotators import posterior_by_annotator, report_rows
from rlhf.reward.meter import LOOKED_AT, PARTS, Measured, fit_meter, read_meter, too_few_labels
from rlhf.reward.noise import NoiseEstimate
from rlhf.reward.vote import plan_vote
from rlhf.reward.wants import Wants, find_wants

# Without a recipe: the upper layers and a head per member on a shared trunk, at a rate that is usual for fine-tuning.
DEFAULTS: dict[str, Any] = {"learning_rate": 1e-4, "per_device_train_batch_size": 16, "num_train_epochs": 1}
MEMBERS, FOLDS, TOP_LAYERS = 10, 5, 2
SHOWN = 50  # suspicious pairs on the page
WORK = "work"
VERSION = 2  # of what audit.json says of noise


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
    meter: bool = False,
    expert_error: float = EXPERT_ERROR,
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
        meter: also say what the labels are worth and what more would bring (`rlhf.reward.meter`); needs a shared trunk.
        expert_error: how often the experts err whose verdicts the meter prices.

    Raises:
        UserError: nothing usable in the file, or fewer pairs than the budget; the model can't be opened; the folder holds
            something else; an impossible vote.
    """
    quiet_libraries()
    settings, shape = _vote_settings(model, members, recipe)
    source = Source(pairs) if isinstance(pairs, str) else pairs
    compare = compare or ("answers" if recipe is None else recipe.data.compare)
    seed = 0 if recipe is None else recipe.seed
    key = _key(source, compare, model, settings, shape, seed)
    if (finished := _finished(out, key, meter=meter)) is not None:
        say(f"{out}: done before")
        if meter:
            for sentence in priced_before(finished["meter"], budget, expert_error):
                say(f"{out}: {sentence}")
        return finished

    # 1. Read and count; what can't be done is said before anything is made.
    if shape["in_sample"]:
        raise UserError(
            "--recipe: vote.in_sample: voters agree with labels that they were trained on, wrong ones too; leave it out."
        )
    read, rows, report = _read_labelled(source, model, compare, say)
    _check_voter(model)
    if budget is not None:
        check_budget(budget, [row.values for row in rows], source.source)
    unmeasured = _why_no_meter(len(rows), shape) if meter else None
    values: list[Any] = [row.values for row in rows]
    drawn = {name: shape[name] for name in ("members", "folds", "in_sample")}
    plan_vote([pair["prompt"] for pair in values], seed=seed, **drawn)

    # 2. Vote; with the meter, also by voters on parts of the labels.
    on_parts = meter and unmeasured is None
    lock = Store(out / WORK).lock()
    write_text(out / WORK / "key.json", json.dumps(key))
    if on_parts:
        cost = f"{sum(PARTS):.0%} of the time of {shape['folds']} voters"
        say(f"audit: --meter trains voters on parts of the labels too: {cost}.")
    strength, noise, parts = vote(model, values, settings, out / WORK, seed=seed, say=say, on_parts=on_parts, **shape)

    # 3. What the votes say about each label, and about all of them.
    wants = find_wants(values)
    audited, suspicious, by_annotator = _judged(rows, strength, noise, wants)
    result = {
        "pairs": source.source,
        "model": model,
        **_counted(report, rows, ties=len(read) - len(rows)),
        **_found(audited, suspicious, noise, wants),
        "by_annotator": by_annotator,
        "vote": {**shape, "voters_flip_rate": shape["flip_rate"], **asdict(noise), "settings": settings},
        "key": key,
    }
    if result["length"]["alarm"] is not None:
        say(f"audit: {result['length']['alarm']}")
    if meter:
        result["meter"] = (
            {"reason": unmeasured}
            if parts is None
            else _meter(parts, values, noise, strength.mean, budget, expert_error)
        )

    # 4. Files; the JSON, which says that all is there, last.
    write_parquet(out / "pairs.parquet", audited)
    result["cleaned"] = write_cleaned(out / "cleaned.jsonl", source, read, [rows[i] for i in suspicious])
    write_page(out, result, audited, wants)
    shutil.rmtree(out / WORK)
    write_text(out / "audit.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    lock.release()
    return result


def _read_labelled(
    source: Source, model: str, compare: Compare, say: Callable[[str], None]
) -> tuple[list[Row[Pair]], list[Row[Pair]], ReadReport]:
    """Read all pairs and say what is in the file.

    Returns:
        all of them, those with a label, which is all but ties, and what was kept and dropped.

    Raises:
        UserError: nothing usable, or nothing but ties.
    """
    read, report = read_audited_rows(source, model, compare)
    rows = [row for row in read if row.values.get("confidence") != TIE]
    for sentence in report.sentences():
        say(sentence)
    if len(rows) < len(read):
        ties = len(read) - len(rows)
        say(f"  {ties} ties are kept as they are: nobody calls one of their answers better, so no label can be wrong.")
    if not rows:
        raise UserError(f"{source.source}: all of its pairs are ties, so there is no label to audit.")
    return read, rows, report


def _check_voter(model: str) -> None:
    """Refuse a model that no member can start from.

    Raises:
        UserError: it can't be opened, or lacks what a reward model needs.
    """
    check_model(model, scores=True)
    tokenizer = load_tokenizer(model, conversational=True)
    check_vocabulary(tokenizer, open_config(find_source(model).base), name=model, pads=True)


def _judged(
    rows: list[Row[Pair]], strength: VoteStrength, noise: NoiseEstimate, wants: Wants
) -> tuple[Audited, list[int], bool]:
    """Say of each label what the votes and its annotator's own error rate make of it.

    Returns:
        that; the labels that are wrong rather than right, the most suspicious first; and whether each was judged by the error
            rate of who gave it.
    """
    values = [row.values for row in rows]
    right, by_annotator = torch.ones(len(rows)), None
    if noise.flip_rate > 0:
        right = posterior_confidence(strength.mean, flip_rate=noise.flip_rate, scale=noise.scale)
        by_annotator = posterior_by_annotator(values, strength.mean, noise)
        right = right if by_annotator is None else by_annotator.right
    suspicious = [i for i in torch.argsort(right, stable=True).tolist() if right[i] < 0.5]
    wrong_without_wants = probability_wrong_without_wants(strength.mean, wants, values)
    return (
        Audited(rows, strength, 1 - right, wrong_without_wants, frozenset(suspicious)),
        suspicious,
        (by_annotator is not None),
    )


def _counted(report: ReadReport, rows: list[Row[Pair]], *, ties: int) -> dict[str, Any]:
    """Return the keys of `audit.json` that say what was read."""
    return {
        "rows": report.rows,
        "kept": report.kept,
        "kept_pairs": len(rows),
        "ties": ties,
        "dropped": report.dropped,
        "dropped_rows": {why: [number - 1 for number in report.examples[why]] for why in report.dropped},
        "directions": list(report.directions.values()),
        "contradictions": [row.number - 1 for row in rows if (row.values.get("rating_gap") or 0) < 0],
        "rating_ties": sum(row.values.get("rating_gap") == 0 for row in rows),
    }


def _found(audited: Audited, suspicious: list[int], noise: NoiseEstimate, wants: Wants) -> dict[str, Any]:
    """Return the keys of `audit.json` that say what the votes found."""
    rows, strength = audited.rows, audited.strength
    values = [row.values for row in rows]
    length = length_bias(values, strength)
    return {
        "noise_rate": {"mean": noise.flip_rate, "low": noise.low, "high": noise.high},
        "worth": worth_in_clean_labels(noise, len(rows)),
        "buckets": deciles(audited),
        "suspicious": list(dict.fromkeys(rows[i].number - 1 for i in suspicious)),
        "suspicious_without_wants": most_suspicious(audited),
        "wants": wants_of_rows(wants, rows),
        "length": {**length, "alarm": length_alarm(length["correlation_with_strength"], len(values))},
        "by": {name: agreement_by(audited, name) for name in ("annotator", "source", "subset")},
        "annotators": report_rows(values, strength.mean, noise),
    }


def _why_no_meter(pairs: int, shape: dict[str, Any]) -> str | None:
    """Say why these labels can't be measured, if they can't.

    Raises:
        UserError: voters are not on a shared trunk, or not out of fold.
    """
    if shape["trunk"] is None or shape["in_sample"]:
        raise UserError(
            "--meter: it trains many voters on parts of the labels, which is cheap on a shared trunk only, and tests them on other "
            "pairs; set vote.trunk in --recipe and leave out vote.in_sample."
        )
    return too_few_labels(pairs, shape["folds"])


def _meter(
    parts: Measured,
    pairs: list[Any],
    noise: NoiseEstimate,
    strength: torch.Tensor,
    budget: int | None,
    expert_error: float,
) -> dict[str, Any]:
    """Return what the labels are worth and what more would bring; the reason, where that can't be said."""
    if noise.scale == 0:
        return {
            "reason": "the votes agree with the labels no more than chance, so nothing says what more labels would bring."
        }
    clusters = conversation_keys([pair["prompt"] for pair in pairs])
    curves = fit_meter(parts, strength, clusters)
    verdicts = budget or max(1, round(LOOKED_AT * len(pairs)))
    return read_meter(curves, strength, clusters, verdicts=verdicts, expert_error=expert_error)


def read_audited_rows(source: Source, model: str, compare: Compare) -> tuple[list[Row[Pair]], ReadReport]:
    """Read the pairs of a source as an audit sees them, ties among them."""
    template = ToolTemplate(lambda: load_tokenizer(find_source(model).base, conversational=True, pads=False), model)
    return read_pair_rows(source, fit=template, compare=compare)


def check_budget(budget: int, pairs: Sequence[Pair], source: str) -> None:
    """Refuse to look again at no pair, or at more pairs than there are, however many labels each has.

    Raises:
        UserError: with both numbers.
    """
    distinct = len({pair_digest(pair) for pair in pairs})
    if not 1 <= budget <= distinct:
        several = f"{len(pairs)} labels of " if distinct < len(pairs) else ""
        raise UserError(
            f"--budget {budget}: {source} holds {several}{distinct} pairs to look at again; name a number from 1 to {distinct}."
        )


def write_page(out: Path, result: dict[str, Any], audited: Audited, wants: Wants) -> None:
    """Write `audit.html`; `result` is the content of `audit.json`."""
    wrong, strength = audited.wrong.tolist(), audited.strength.mean.tolist()
    suspicious = sorted(audited.suspicious, key=lambda i: (-wrong[i], strength[i]))  # beyond doubt many are 1.0 alike
    contradicting = [i for i, row in enumerate(audited.rows) if (row.values.get("rating_gap") or 0) < 0]
    shown, contradictions = ([shown_pair(audited, i) for i in part[:SHOWN]] for part in (suspicious, contradicting))
    write_audit_page(
        out / "audit.html",
        result,
        shown,
        audited.strength.mean.tolist(),
        audited.strength.std.tolist(),
        contradictions=contradictions,
        examples={name: [shown_pair(audited, i) for i in wants.traits[name]["examples"]] for name in wants.wanted},
    )


def _identity(source: Source) -> object:
    """Return what the pairs of a source depend on: the bytes of local files, and what is said about them."""
    files = local_files(source.source) if is_local(source.source) else []
    digests = [file_digest(file) for file in files]
    content: object = digests[0] if len(digests) == 1 else digests or source.source
    if is_folder(source.source):  # where a file's name may say which split it is of
        content = {
            str(file.relative_to(Path(source.source).expanduser())): x for file, x in zip(files, digests, strict=True)
        }
    stated = {
        name: value for name, value in asdict(source).items() if name != "source" and value != getattr(Source, name)
    }
    return [content, stated] if stated else content


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


def _key(
    source: Source, compare: Compare, model: str, settings: dict[str, Any], shape: dict[str, Any], seed: int
) -> str:
    """Return what an audit's result depends on, as one digest."""
    identity = _identity(source) if compare == "answers" else [_identity(source), compare]
    drawn = {"seed": seed} if seed else {}  # which fold a pair is in; without it, that of audits of before
    files = {"model_files": files} if (files := named_digests([model])) else {}
    return digest(
        {"version": VERSION, "pairs": identity, "model": model, "settings": settings, "shape": shape, **drawn, **files}
    )


def _finished(out: Path, key: str, *, meter: bool) -> dict[str, Any] | None:
    """Read the result of the very same audit, if it is there.

    Raises:
        UserError: the folder holds something else, or lacks the meter that is asked for.
    """
    file = out / "audit.json"
    if file.is_file():
        result = read_note(file, "put it back from a copy, or choose another --out")
        if result.get("key") == key:
            if meter and "meter" not in result:
                raise UserError(f"{out}: was made without --meter, and its voters are gone; choose another --out.")
            return result
        raise UserError(
            f"{out}: holds an audit of other pairs, with another model or settings, or by an older version; choose another --out."
        )
    begun = out / WORK / "key.json"
    if not begun.is_file() or json.loads(begun.read_text(encoding="utf-8")) != key:
        check_new_folder(out, "--out")
    return None
