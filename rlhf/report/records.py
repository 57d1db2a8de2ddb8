"""What pages and cards read of a run, as types: `summary.json`, manifests, and the JSON lines of stages."""

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import yaml

from rlhf.errors import UserError
from rlhf.files import digest, read_jsonl

# Numbers by name, an interval beside a mean as `<name>_ci`, null where a run does not know: the facts of a stage, a section
# of summary.json, a reward model's report on pairs, a pair with its two scores.
Facts = Mapping[str, Any]
MANIFEST = "manifest.json"
SEAL = "seal"  # the digest of everything else that a record says
# A row of metrics.jsonl.
Metrics = Mapping[str, float | None]


class Round(TypedDict):
    """One round of `summary.json`."""

    round: int
    policy: Facts
    reward: Facts
    labels: Facts
    second_look: NotRequired[Facts | None]
    change_in_gold: Facts | None
    hindsight: NotRequired[Facts | None]


class BestOf16(TypedDict):
    """What the best of 16 answers of SFT reach, chosen by the reward model and by the true reward."""

    by_reward: Facts
    by_gold: Facts


class CheckRow(TypedDict):
    """A check of `summary.json`: what a run measured about itself, worst of all stages; `low` only where two-sided."""

    statistic: float | None
    low: float | None
    bound: float
    unit: str
    held: bool
    times: int
    stage: str


class Summary(TypedDict):
    """A run in numbers: `summary.json`."""

    recipe: str
    seed: int
    seconds: dict[str, float]
    lab: Facts
    sft: Facts
    rounds: list[Round]
    best_round: int | None
    best_of_16: BestOf16
    gold_gap_closed: float | None
    gold_gap_closed_ci: NotRequired[list[float] | None]
    evaluated_prompts: int | None
    sampling_temperature: NotRequired[float]
    stopped: str | None
    checks: NotRequired[dict[str, CheckRow]]


class Parent(TypedDict):
    """A stage that another one read, in the other's manifest."""

    folder: str


class Manifest(TypedDict):
    """A finished stage: `manifest.json`."""

    settings: dict[str, Any]
    parents: dict[str, Parent]
    facts: Facts
    versions: dict[str, str]
    code: str | None
    key: str
    seed: int
    seconds: float


class JudgedPrompt(TypedDict):
    """A held-out prompt with SFT's answer and the policy's: a row of the evaluate stage's `samples.jsonl`."""

    prompt: str
    sft: str
    policy: str
    proxy_sft: float
    proxy_policy: float
    gold_sft: float | None
    gold_policy: float | None
    kl: float


JUDGED_KEYS = JudgedPrompt.__required_keys__
SCORED_KEYS = (
    "prompt",
    "chosen",
    "rejected",
    "score_chosen",
    "score_rejected",
)  # of a held-out pair: the reward stage's rows


def start_name(summary: Summary) -> str:
    """Return what the policies began as and are compared with: "SFT", or "the backbone" where it takes SFT's place."""
    return "SFT" if "sft" in summary["seconds"] else "the backbone"


def read_summary(run: Path) -> Summary:
    """Read the run in numbers.

    Raises:
        UserError: the folder holds no run, or the file is damaged.
    """
    file = run / "summary.json"
    if not file.is_file():
        raise UserError(f"{run}: no summary.json; this folder holds no run.")
    summary: Any = read_json(file)
    is_whole = isinstance(summary, dict) and Summary.__required_keys__ <= summary.keys()
    if not is_whole or summary.pop(SEAL, None) not in (None, _seal_of_summary(summary)):
        raise UserError(_damaged(file, "cut off, damaged or edited"))
    whole: Summary = summary
    return whole


def sealed_summary(summary: Mapping[str, object]) -> dict[str, Any]:
    """Return a run in numbers with its seal, by which `read_summary` knows an edited one; two equal runs have the same one."""
    content: dict[str, Any] = json.loads(json.dumps(summary))
    return {**content, SEAL: _seal_of_summary(content)}


def _seal_of_summary(summary: Mapping[str, object]) -> str:
    """Return the digest of all but the seconds, which differ from run to run."""
    return digest({name: value for name, value in summary.items() if name != "seconds"})


def _damaged(file: Path, damage: str) -> str:
    return f"{file}: {damage}; `rlhf run` with the same recipe and --out says what to do, or writes it again."


def read_manifests(run: Path) -> dict[str, Manifest]:
    """Read the manifest of every finished stage by its folder: by rounds, and in each a stage after those that it read.

    Times of files say nothing here: a copy has new ones, and clocks jump.

    Raises:
        UserError: one is damaged.
    """
    files = sorted(run.glob(f"round-*/*/{MANIFEST}"))
    manifests: dict[str, Any] = {str(file.parent.relative_to(run)): read_record(file) for file in files}
    for name, manifest in manifests.items():
        if not Manifest.__required_keys__ <= manifest.keys():
            raise UserError(_stage_damaged(run / name / MANIFEST))
    depths: dict[str, int] = {}
    for name in sorted(manifests, key=_round):  # each after those that it reads, but for its round's
        _depth(manifests, name, depths)
    return {name: manifests[name] for name in sorted(manifests, key=lambda name: (_round(name), depths[name], name))}


def _round(folder: str) -> int:
    """Return the number of a stage's round, of folders of no round -1."""
    number = folder.partition("/")[0].removeprefix("round-")
    return int(number) if number.isdigit() else -1


def _depth(manifests: Mapping[str, Manifest], name: str, known: dict[str, int]) -> int:
    """Return how many stages lie between one and the data, at most, and note it in `known`, for all on the way."""
    if name not in known:
        parents = manifests[name]["parents"].values() if name in manifests else ()
        known[name] = 1 + max((_depth(manifests, parent["folder"], known) for parent in parents), default=0)
    return known[name]


def sealed(record: Mapping[str, object]) -> dict[str, Any]:
    """Return a record as JSON has it, with the digest of what it says, by which `read_record` knows an edited one."""
    content: dict[str, Any] = json.loads(json.dumps(record, default=str))
    return {**content, SEAL: digest(content)}


def read_record(file: Path) -> dict[str, Any] | None:
    """Read what a stage's folder says of it: a manifest, or the note that it has begun; None where there is none.

    Raises:
        UserError: the file was edited or damaged since it was written, or can't be read.
    """
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        seal = record.pop(SEAL, None)  # none: of a run that was made before there were seals
        record["key"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        record, seal = {}, "damaged"
    if seal is not None and seal != digest(record):
        raise UserError(_stage_damaged(file))
    return record


def _stage_damaged(file: Path) -> str:
    return (
        f"{file}: cut off, damaged or edited, so nobody can tell what this folder holds; put it back as it was, or delete "
        f"{file.parent}, and the same command makes it again."
    )


def read_recipe(run: Path) -> dict[str, Any]:
    """Read a run's resolved recipe; nothing where it was deleted.

    Raises:
        UserError: it is damaged.
    """
    file = run / "recipe.yaml"
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError, yaml.YAMLError):
        recipe = None
    if not isinstance(recipe, dict):
        raise UserError(f"{file}: cut off or damaged. Delete this file, and the same `rlhf run` writes it again.")
    return recipe


def read_json(file: Path) -> Any:
    """Read a file of JSON.

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(_damaged(file, "cut off or damaged")) from None


def read_note(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object that this program wrote for itself.

    Args:
        remedy: what to do where it is damaged.

    Raises:
        UserError: it is damaged.
    """
    try:
        note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        note.keys()
    except (ValueError, RecursionError, AttributeError):
        raise UserError(f"{path}: cut off or damaged; {remedy}.") from None
    return note


def read_rows(path: Path, keys: Collection[str] = ()) -> list[Any]:
    """Read the rows of a run's JSON lines, each step once and no marks of resumption; none if the file is not there.

    A last line whose writing was cut off is left out, and said.

    Args:
        keys: that every row has.

    Raises:
        UserError: another line is damaged, or lacks a key.
    """
    if not path.is_file():
        return []
    try:
        rows = read_jsonl(path)
    except (ValueError, RecursionError):
        rows = _rows_before_torn_line(path)
        warnings.warn(f"{path}: its last line was cut off and is left out.", stacklevel=2)
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: holds a line that is no row of numbers; delete the stage's folder to make it again.")
    rows = without_repeated_steps(rows)
    lacking = [(number, key) for number, row in enumerate(rows, 1) for key in sorted(keys) if key not in row]
    if lacking:
        number, key = lacking[0]
        raise UserError(f"{path}: row {number} has no {key!r}; delete the stage's folder to make it again.")
    return rows


def without_repeated_steps(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return rows without marks of resumption, and each step once: behind a mark those after its step were done again.

    >>> without_repeated_steps([{"step": 1}, {"step": 2, "kl": 1}, {"resumed_from": 1}, {"step": 2, "kl": 1}])
    [{'step': 1}, {'step': 2, 'kl': 1}]
    """
    kept: list[Any] = []
    for row in rows:
        if "resumed_from" in row:
            kept = [before for before in kept if before.get("step", 0) <= row["resumed_from"]]
        else:
            kept.append(row)
    return kept


def _rows_before_torn_line(path: Path) -> list[Any]:
    *lines, _ = path.read_bytes().rstrip(b"\n").split(b"\n")
    try:
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        raise UserError(
            f"{path}: a line in its middle is damaged; delete the stage's folder to make it again."
        ) from None
