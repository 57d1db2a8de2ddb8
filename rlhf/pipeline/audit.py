"""`rlhf audit`: which labels of a preference file are probably wrong, and how sure that is."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from scipy.stats import spearmanr
from transformers import AutoConfig

from rlhf.data.read import is_local
from rlhf.data.sources import Row, read_pair_rows
from rlhf.errors import UserError
from rlhf.files import digest, file_digest, json_lines, write_text
from rlhf.models.load import find_source
from rlhf.models.text import plain
from rlhf.objectives.strength import VoteStrength, posterior_confidence
from rlhf.pipeline.training import quiet_libraries
from rlhf.pipeline.vote import vote
from rlhf.recipe import Recipe
from rlhf.report.audit import write_audit_page
from rlhf.statistics import clustered_mean

# Without a recipe: the upper layers and a head per member on a shared trunk, at a rate that is usual for fine-tuning.
DEFAULTS: dict[str, Any] = {"learning_rate": 1e-4, "per_device_train_batch_size": 16, "num_train_epochs": 1}
MEMBERS, FOLDS, TOP_LAYERS = 10, 5, 2
DECILES = 10
LENGTH_ALARM = 0.4
WORK = "work"


def audit(
    pairs: str, model: str, out: Path, *, members: int | None, recipe: Recipe | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Vote on every pair out of fold and write what follows from it.

    `audit.json`; `pairs.parquet` (a row a pair: `row`, the 0-based line of the file, `strength_mean`, `strength_std`,
    `strength_votes`, `probability_wrong`, `suspicious`); `cleaned.jsonl`, canonical pairs without the suspicious ones;
    `audit.html`. A killed audit goes on with the member it was at; a finished one is not repeated.

    Args:
        pairs: a file or hub dataset in any accepted form.
        model: what the members start from: a folder or hub id, decoder or encoder.
        members: number of voters; default 10, or the recipe's.
        recipe: its `vote` and `reward` sections say how members are trained.

    Raises:
        UserError: nothing usable in the file; the folder holds something else; an impossible vote.
    """
    quiet_libraries()
    settings, shape = _how(model, members, recipe)
    source = file_digest(Path(pairs).expanduser()) if is_local(pairs) and Path(pairs).expanduser().is_file() else pairs
    key = digest({"pairs": source, "model": model, "settings": settings, "shape": shape})
    finished = _finished(out, key)
    if finished is not None:
        say(f"{out}: done before")
        return finished

    # 1. Read, count, vote.
    rows, report = read_pair_rows(pairs)
    for sentence in report.sentences():
        say(sentence)
    values: list[Any] = [row.values for row in rows]
    seed = 0 if recipe is None else recipe.seed
    (out / WORK).mkdir(parents=True, exist_ok=True)
    write_text(out / WORK / "key.json", json.dumps(key))
    strength, noise = vote(model, values, settings, out / WORK, seed=seed, say=say, **shape)

    # 2. What the votes say about each label.
    right = torch.ones(len(rows))
    if noise.flip_rate > 0:
        right = posterior_confidence(strength.mean, flip_rate=noise.flip_rate, scale=noise.scale)
    wrong = 1 - right
    suspicious = [i for i in torch.argsort(right, stable=True).tolist() if right[i] < 0.5]
    length = length_bias(values, strength)
    alarm = length_alarm(length["correlation_with_strength"])
    if alarm is not None:
        say(f"audit: {alarm}")
    result = {
        "pairs": pairs,
        "model": model,
        "rows": report.rows,
        "kept": report.kept,
        "kept_pairs": len(rows),
        "dropped": report.dropped,
        "dropped_rows": report.examples,
        "noise_rate": {"mean": noise.flip_rate, "low": noise.low, "high": noise.high},
        "buckets": _deciles(strength, wrong),
        "suspicious": list(dict.fromkeys(rows[i].number - 1 for i in suspicious)),
        "length": {**length, "alarm": alarm},
        "by": {name: _agreement(values, name, strength, wrong) for name in ("annotator", "source", "subset")},
        "vote": {**shape, **asdict(noise), "settings": settings},
        "key": key,
    }

    # 3. Files; the JSON, which says that all is there, last.
    flags = set(suspicious)
    _write_parquet(out / "pairs.parquet", rows, strength, wrong, flags)
    _write_cleaned(out / "cleaned.jsonl", rows, strength, flags)
    shown = [_shown(rows[i], strength, wrong, i) for i in suspicious[:50]]
    write_audit_page(out / "audit.html", result, shown, strength.mean.tolist(), strength.std.tolist())
    shutil.rmtree(out / WORK)
    write_text(out / "audit.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _how(model: str, members: int | None, recipe: Recipe | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """TRL's keys of a member, and the shape of the vote."""
    if recipe is not None:
        shape = recipe.vote.shape()
        return recipe.vote_settings(), shape | ({} if members is None else {"members": members})
    try:
        depth = AutoConfig.from_pretrained(find_source(model).base).get_text_config().num_hidden_layers
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: {str(error).strip().splitlines()[0]}") from error
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
    """The result of the very same audit, if it is there.

    Raises:
        UserError: the folder holds something else.
    """
    file = out / "audit.json"
    if file.is_file():
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if result.get("key") == key:
            return result
        raise UserError(
            f"{out}: holds an audit of other pairs, or with another model or settings; choose another --out."
        )
    begun = out / WORK / "key.json"
    if begun.is_file() and json.loads(begun.read_text(encoding="utf-8")) == key:
        return None
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; choose another --out.")
    return None


def _deciles(strength: VoteStrength, wrong: torch.Tensor) -> list[dict[str, float]]:
    """Ten equally large groups from the weakest to the strongest."""
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


def length_bias(values: Sequence[dict[str, Any]], strength: VoteStrength) -> dict[str, Any]:
    """How much of labels and votes length alone explains; the correlation is Spearman's, with the difference in characters."""
    differences = np.array([len(r["chosen"][0]["content"]) - len(r["rejected"][0]["content"]) for r in values], float)
    mean, interval = clustered_mean(
        ((differences > 0) + 0.5 * (differences == 0)).tolist(), [plain(row["prompt"]) for row in values]
    )
    votes = strength.mean.double().numpy()
    varied = differences.std() > 0 and votes.std() > 0
    correlation = float(spearmanr(differences, votes).statistic) if varied else None
    return {"longer_is_chosen": mean, "longer_is_chosen_ci": interval, "correlation_with_strength": correlation}


def length_alarm(correlation: float | None) -> str | None:
    """What to say where the votes mostly follow length; the same votes then call wrong what is merely long, or short."""
    if correlation is None or abs(correlation) < LENGTH_ALARM:
        return None
    liked = "longer" if correlation > 0 else "shorter"
    return (
        f"The votes prefer the {liked} answer (correlation {correlation:.2f}), so many suspicious pairs may only be those "
        f"whose chosen answer is not the {liked} one. Read them before dropping them; a stronger model looks at more than length."
    )


def _agreement(
    values: Sequence[dict[str, Any]], name: str, strength: VoteStrength, wrong: torch.Tensor
) -> dict[str, dict[str, Any]]:
    """Of every annotator, source or subset: how often the votes agree with its labels. Empty where rows name only one."""
    labels = [row.get(name) for row in values]
    groups = sorted({label for label in labels if label is not None})
    if len(groups) < 2:
        return {}
    agrees = (strength.mean > 0).double() + 0.5 * (strength.mean == 0).double()
    report = {}
    for group in groups:
        here = [i for i, label in enumerate(labels) if label == group]
        mean, interval = clustered_mean(agrees[here].tolist(), [plain(values[i]["prompt"]) for i in here])
        likely = wrong[here].mean().item()
        report[group] = {"n": len(here), "agreement": mean, "agreement_ci": interval, "probability_wrong": likely}
    return report


def _shown(row: Row, strength: VoteStrength, wrong: torch.Tensor, i: int) -> dict[str, Any]:
    return {
        "row": row.number - 1,
        "prompt": plain(row.values["prompt"]),
        "chosen": row.values["chosen"][0]["content"],
        "rejected": row.values["rejected"][0]["content"],
        "strength_mean": strength.mean[i].item(),
        "strength_std": strength.std[i].item(),
        "strength_votes": int(strength.votes[i]),
        "probability_wrong": wrong[i].item(),
    }


def _write_parquet(
    file: Path, rows: Sequence[Row], strength: VoteStrength, wrong: torch.Tensor, suspicious: set[int]
) -> None:
    columns = {
        "row": [row.number - 1 for row in rows],
        "strength_mean": strength.mean.tolist(),
        "strength_std": strength.std.tolist(),
        "strength_votes": strength.votes.tolist(),
        "probability_wrong": wrong.tolist(),
        "suspicious": [i in suspicious for i in range(len(rows))],
    }
    parquet.write_table(pa.table(columns), file)


def _write_cleaned(file: Path, rows: Sequence[Row], strength: VoteStrength, suspicious: set[int]) -> None:
    cleaned = []
    for i, row in enumerate(rows):
        if i in suspicious:
            continue
        facts = {"strength_mean": strength.mean[i].item(), "strength_std": strength.std[i].item()}
        cleaned.append({**row.values, **facts, "strength_votes": int(strength.votes[i])})
    write_text(file, json_lines(cleaned))
