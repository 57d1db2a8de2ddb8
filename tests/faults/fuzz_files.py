"""Model folders, numbers in recipes and files of labels that nobody would write, by the thousand: each is refused in a sentence,
or does no harm.

    python -m tests.faults.fuzz_files models --minutes 7 --out models.json      # or numbers, labels

A case passes when it ends within a minute of a processor, without a traceback, with exit 2 and nothing created, or with exit 0 and the result
of the file as it was: the same scores, the same verdicts of the rows that were left alone. `numbers` tries every key with every
value once; what `check` takes, a dry run must take too. The others draw cases until the time is up.
"""

import argparse
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.data.labelbook import BOOK, LabelBook
from rlhf.recipe.keys import stage_keys, trl_keys
from rlhf.recipe.schema import STAGE_SECTIONS
from tests.faults.fuzz import tiny_reward_model
from tests.faults.here import Outcome, rlhf
from tests.faults.test_label_files import IDS, argilla, flat, plain, question, studio

SECONDS = 60
ODD: list[Any] = [None, True, -1, 0, 1, 2, 0.5, -1e9, 1e9, 10**30, 1e-300, 1e300, float("nan"), float("inf"), "", "x", "../..", "\ud83d", [], [[]], {}, {"a": 1}]  # fmt: skip
NUMBERS = ["-1", "0", "1", "2", "0.5", "-1.0e+9", "1000000000", "1" + "0" * 30, "1.0e-300", "1.0e+300", ".nan", ".inf", "true", "x", "[1]"]  # fmt: skip
LAB = "name: x\nlab: {demonstrations: 100, pairs: 100, test_pairs: 50, hidden_size: 32, num_hidden_layers: 1}\n"
SCRATCH = "name: x\ndata: {preferences: p.jsonl, sft: s.jsonl, prompts: s.jsonl}\n"
LINES = [{"prompt": f"red blue {i}", "response": f"yes {i}"} for i in range(4)]


class Case(NamedTuple):
    """What was done to which file, the command, and how it ended; a fault says what is wrong with that."""

    what: str
    command: list[str]
    outcome: str
    fault: str = ""


class Captured:
    """What pytest's `capsys` is in a test: the two streams, read and emptied."""

    def readouterr(self) -> Any:
        """Return what was written since the last call."""
        written = [stream.getvalue() if isinstance(stream, io.StringIO) else "" for stream in (sys.stdout, sys.stderr)]
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        return argparse.Namespace(out=written[0], err=written[1])


def call(what: str, command: list[str], place: Path, stdin: str = "") -> tuple[Case, Outcome | None]:
    """Run a command in this process, and find the faults that need no knowledge of the case."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    usual = sys.stdout, sys.stderr
    signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        outcome = rlhf(*command, cwd=place, capsys=Captured(), stdin=stdin)  # type: ignore[arg-type]
    except BaseException:
        return Case(what, command, "no exit", traceback.format_exc()[-1500:]), None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout, sys.stderr = usual
    fault = ""
    if "Traceback" in outcome.stderr or outcome.code not in (0, 2):
        fault = f"exit {outcome.code}: {outcome.stderr[-1500:]}"
    elif outcome.code == 2 and (outcome.created or not outcome.sentences):
        fault = f"exit 2 with {outcome.sentences}, and created {outcome.created}"
    return Case(what, command, f"exit {outcome.code}", fault), outcome


# ---- Damage ----


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a JSON document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*path, key)
        yield from places_in(inner, (*path, key))


def damaged_json(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Put something odd in the place of one value, or leave it out."""
    document = json.loads(content)
    *path, last = rng.choice(list(places_in(document)))
    holder = document
    for key in path:
        holder = holder[key]
    if rng.random() < 0.2:
        del holder[last]
        return f"{[*path, last]} left out", json.dumps(document).encode()
    holder[last] = rng.choice(ODD)
    return f"{[*path, last]} = {holder[last]!r}", json.dumps(document).encode()


def damaged_bytes(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Flip bits, cut, repeat or overwrite a part; more often near the beginning, where headers are."""
    at = int(len(content) * rng.random() ** 3)
    new = bytearray(content)
    match rng.choice(["flip", "cut", "zeros", "repeat", "noise"]):
        case "flip" as what:
            new[at : at + 1] = bytes([content[at] ^ 1 << rng.randrange(8)]) if content else b""
        case "cut" as what:
            del new[at:]
        case "zeros" as what:
            new[at : at + 64] = bytes(len(new[at : at + 64]))
        case "repeat" as what:
            new[at:at] = new[at : at + 200]
        case what:
            new[at : at + 16] = rng.randbytes(16)
    return f"{what} at {at}", bytes(new)


def damaged(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage a file as JSON, where it is some, or as bytes."""
    try:
        if rng.random() < 0.6:
            return damaged_json(content, rng)
    except (ValueError, IndexError, TypeError):
        pass
    return damaged_bytes(content, rng)


# ---- Cases ----


def model_cases(place: Path, rng: random.Random) -> Iterator[Case]:
    """Damage one file of a reward model, and score, evaluate, export or certify it: refused, or the same scores."""
    healthy = tiny_reward_model(place / "healthy")
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "no"} for row in LINES]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    stdin = "".join(json.dumps(row) + "\n" for row in LINES)
    verbs = {
        "score": ["score", "model"],
        "evaluate": ["evaluate", "model", "pairs.jsonl", "--out", "out.json"],
        "export": ["export", "model", "out"],
        "certify": ["certify", "model", "--out", "out.json"],
    }
    expected: list[float] = []
    files = sorted(path.name for path in healthy.iterdir() if path.is_file())
    while True:
        shutil.rmtree(place / "model", ignore_errors=True)
        shutil.copytree(healthy, place / "model")
        name, what = rng.choice(files), "nothing"
        if expected:
            if rng.random() < 0.05:
                what = "deleted"
                (place / "model" / name).unlink()
            else:
                what, content = damaged((healthy / name).read_bytes(), rng)
                (place / "model" / name).write_bytes(content)
        verb = rng.choice(["score", *verbs]) if expected else "score"
        case, outcome = call(f"{name}: {what}", verbs[verb], place, stdin)
        if outcome is not None and not case.fault and outcome.code == 0 and verb == "score":
            scores = [json.loads(line)["score"] for line in outcome.stdout.splitlines()]
            expected = expected or scores
            if max(abs(a - b) for a, b in zip(scores, expected, strict=True)) > 1e-4:
                case = case._replace(fault=f"other scores, silently: {scores} instead of {expected}")
        yield case
        shutil.rmtree(place / "out", ignore_errors=True)
        for left in place.glob("out*"):
            left.unlink()


def in_lab(section: str, key: str) -> tuple[str, str]:
    """Return the rest of a lab's recipe, and where a key of a section and its value stand in it."""
    short = "max_completion_length: 40"  # answers of the default length leave the lab's prompts no room
    if section != "ppo":
        return f"{LAB}ppo: {{{short}}}\n", f"{section}: {{%s}}\n"
    return LAB, "ppo: {%s}\n" if key in short else f"ppo: {{{short}, %s}}\n"


def number_cases(place: Path, _: random.Random) -> Iterator[Case]:
    """Every key that may be a number, with every value: refused by `check`, or taken by a dry run too."""

    def is_number(entry: dict[str, Any]) -> bool:
        return bool({"int", "float"} & set(entry["types"])) and "dict" not in entry["types"]

    keys = [(*in_lab(s, key), key) for s in STAGE_SECTIONS for key, e in stage_keys(s).items() if is_number(e)]
    for architecture in ("llama", "qwen3"):
        inner = f"backbone: {{from_scratch: {{architecture: {architecture}, %s}}}}\n"
        keys += [(SCRATCH, inner, key) for key, entry in trl_keys()[architecture].items() if is_number(entry)]
    rows = [{"prompt": f"list {i}", "chosen": f"yes {i}", "rejected": "no", "completion": "yes"} for i in range(40)]
    for name in ("p", "s"):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for head, section, key in keys:
        for value in NUMBERS:
            (place / "r.yaml").write_text(head + section % f"{key}: {value}", encoding="utf-8")
            what = (section % f"{key}: {value}").strip()
            case, outcome = call(what, ["check", "r.yaml"], place)
            yield case
            if outcome is not None and outcome.code == 0:
                case, outcome = call(what, ["run", "r.yaml", "--dry-run"], place)
                if outcome is not None and outcome.code != 0:
                    case = case._replace(fault=f"`check` takes it: {outcome.stderr[-500:]}")
                yield case


def label_cases(place: Path, rng: random.Random) -> Iterator[Case]:
    """Damage a file of labels, and import it: refused, or only verdicts on questions of the round."""
    good = {"id": IDS[2], "label": "first", "annotator": "eve", "seconds": 3.5}
    forms: list[tuple[str, Callable[[], bytes]]] = [
        ("x.jsonl", lambda: plain(**good)), ("x.json", studio), ("x.json", argilla), ("x.json", flat)
    ]  # fmt: skip
    while True:
        shutil.rmtree(place / "run", ignore_errors=True)
        (place / "run").mkdir()
        (place / "run/recipe.yaml").write_text("rounds: {annotators_per_pair: 2}\n", encoding="utf-8")
        LabelBook(place / "run" / BOOK).ask([question(i) for i in range(4)])
        name, make = rng.choice(forms)
        content = make()
        if name == "x.jsonl" and rng.random() < 0.6:
            first, middle, last = content.splitlines()
            what, middle = damaged_json(middle, rng)
            content = b"\n".join([first, middle, last]) + b"\n"
        else:
            what, content = damaged(content, rng)
        (place / name).write_bytes(content)
        case, outcome = call(f"{make.__name__}: {what}", ["label", "run", "--import", name], place)
        verdicts = LabelBook(place / "run" / BOOK).verdicts(2)
        if not {verdict.id for verdict in verdicts} <= set(IDS[:4]) or (outcome and outcome.code == 2 and verdicts):
            case = case._replace(fault=f"these verdicts: {verdicts}")
        yield case._replace(fault="" if case.fault.startswith("exit 2 with") and not verdicts else case.fault)


CASES = {"models": model_cases, "numbers": number_cases, "labels": label_cases}


def main() -> None:
    """Print each fault, write the figures, and exit with 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=CASES)
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    outcomes: Counter[str] = Counter()
    faults: list[Case] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        for case in CASES[arguments.what](Path(folder), random.Random(arguments.seed)):
            slowest = max(slowest, time.process_time() - begin)
            outcomes[f"{case.command[0]}: {case.outcome}"] += 1
            if case.fault:
                faults.append(case)
                print(f"{case.what}\n  {' '.join(case.command)}\n  {case.fault}\n", flush=True)
            begin = time.process_time()
            if time.monotonic() > end:
                break
        else:
            print("every case was tried")
    result = {
        "cases": outcomes.total(),
        "outcomes": dict(sorted(outcomes.items())),
        "slowest_seconds": round(slowest, 1),
    }
    result |= {"faults": [case._asdict() for case in faults]}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({**result, "faults": len(faults)}))
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
