"""Deliberate faults in our code, one at a time: does a test of its room notice?

    python -m tests.faults.mutants objectives --work FOLDER --out mutants.json [--minutes 9]      # or batches, trainer, data

A mutant turns a sign, a comparison, a number, a condition or a name (sum and mean, min and max) of one line into another, or
leaves a term out. It is written into a copy of the package, and the tests of that room are run in a forked process until the
first fails: then the mutant is killed. Mutants come in an order that only the seed decides, so the first of them are a fair
sample; the same command goes on from what FOLDER holds. Survivors are for reading: each needs a test, or a reason.
"""

import argparse
import ast
import copy
import hashlib
import json
import math
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# Room → its files, and where its tests are; of these, the files that name the module are run, and its doctests.
ROOMS = {
    "objectives": ("rlhf/objectives/*.py", "tests/objectives"),
    "batches": ("rlhf/ppo/batches.py", "tests/ppo"),
    "rewards": ("rlhf/ppo/rewards.py", "tests/ppo"),
    "trainer": ("rlhf/reward/trainer.py", "tests/reward"),
    "data": ("rlhf/data/*.py", "tests/data"),
}
UNFINISHED = 3
SECONDS = 120  # of a processor, after which a mutant counts as killed: it never ends
COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type, type] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
NAMES = {"sum": "mean", "mean": "sum", "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "exp": "log", "log": "exp", "any": "all", "all": "any"}  # fmt: skip


class Mutant(NamedTuple):
    """A fault: the file, the line, what it was and what it is, and the whole file with it."""

    file: str
    line: int
    was: str
    now: str
    source: str

    @property
    def key(self) -> str:
        """What it is known by from one job to the next; another text of the file makes another mutant."""
        return hashlib.sha256(f"{self.file} {self.source}".encode()).hexdigest()[:16]


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what a node may be turned into."""
    new = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[operation]) if type(operation) in COMPARISONS:
            new.ops = [COMPARISONS[type(operation)]()]
            yield new
        case ast.BinOp(op=operation) if type(operation) in OPERATORS:
            yield ast.BinOp(new.left, OPERATORS[type(operation)](), new.right)
            yield new.left
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield new.operand
        case ast.BoolOp(op=ast.And()):
            yield ast.BoolOp(ast.Or(), new.values)
        case ast.BoolOp(op=ast.Or()):
            yield ast.BoolOp(ast.And(), new.values)
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Attribute(attr=name) if name in NAMES:
            yield ast.Attribute(new.value, NAMES[name], new.ctx)
        case ast.Call(func=ast.Name(id=name)) if name in NAMES and name not in ("sum", "mean"):
            new.func = ast.Name(NAMES[name], ast.Load())
            yield new


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Yield where in a tree expressions stand: parent, field, and place in a list; annotations are no code."""
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "type_params", "decorator_list"):
                continue
            children = enumerate(value) if isinstance(value, list) else [(None, value)]
            yield from ((parent, field, at) for at, child in children if isinstance(child, ast.expr))


def without_annotations(tree: ast.Module) -> set[int]:
    """The nodes that stand in annotations and aliases of types, by identity."""
    hidden: set[int] = set()
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            part = getattr(node, field, None)
            hidden |= {id(inner) for inner in ast.walk(part)} if part is not None else set()
    return hidden


def mutants_of(file: Path) -> Iterator[Mutant]:
    """Yield every mutant of a file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    hidden = without_annotations(tree)
    for parent, field, at in list(places(tree)):
        node = getattr(parent, field) if at is None else getattr(parent, field)[at]
        if id(node) in hidden:
            continue
        for new in changed(node):
            put(parent, field, at, ast.copy_location(new, node))
            source = ast.unparse(ast.fix_missing_locations(tree))
            put(parent, field, at, node)
            yield Mutant(str(file.relative_to(ROOT)), node.lineno, ast.unparse(node), ast.unparse(new), source)


def put(parent: ast.AST, field: str, at: int | None, node: ast.AST) -> None:
    """Put a node in its place."""
    if at is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[at] = node


def tests_of(file: str, folder: str) -> list[str]:
    """A module's doctests, and the test files of its room that name it, those of its own name first."""
    module = file.removesuffix(".py").replace("/", ".")
    room, _, stem = module.rpartition(".")

    def names(path: Path) -> bool:
        text = path.read_text(encoding="utf-8")
        return module in text or f"from {room} import {stem}" in text

    found = [path for path in (ROOT / folder).rglob("test_*.py") if names(path)]
    ordered = sorted(found, key=lambda path: (stem not in path.name, path.stat().st_size))
    return [file, *(str(path.relative_to(ROOT)) for path in ordered)]


def is_killed(mutant: Mutant, place: Path, tests: list[str]) -> bool:
    """Run the tests against a mutant in a forked process, until the first that fails."""
    original = (place / mutant.file).read_text(encoding="utf-8")
    (place / mutant.file).write_text(mutant.source, encoding="utf-8")
    child = os.fork()
    if child == 0:
        run_tests(place, tests)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    finally:
        (place / mutant.file).write_text(original, encoding="utf-8")


def run_tests(place: Path, tests: list[str]) -> None:
    """Run tests in this process, silently, and end it with pytest's exit code."""
    code = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os.chdir(place)
        sys.path.insert(0, str(place))
        sys.dont_write_bytecode = True
        for name in [name for name in sys.modules if name.partition(".")[0] in ("rlhf", "tests")]:
            del sys.modules[name]
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        import pytest

        code = int(pytest.main([*tests, "-x", "-n0", "-p", "no:cacheprovider", "-m", "not slow", "--timeout", "0"]))
    finally:
        os._exit(code)


def main() -> None:
    """Try mutants until the time is up; print and write the share killed, and every survivor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="Mutants of files whose name holds this.")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    files, folder = ROOMS[arguments.room]
    chosen = [file for file in sorted(ROOT.glob(files)) if arguments.only in file.name]
    mutants = [mutant for file in chosen for mutant in mutants_of(file)]
    random.Random(arguments.seed).shuffle(mutants)

    # 1. A copy of the package and its tests, in which mutants are written; libraries are loaded once, before the forks.
    place, noted = arguments.work.resolve() / "package", arguments.work / f"{arguments.room}.json"
    shutil.rmtree(place, ignore_errors=True)
    for name in ("rlhf", "tests", "recipes", "docker"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, place)
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    tests = {file: tests_of(file, folder) for file in {mutant.file for mutant in mutants}}
    known: dict[str, bool] = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}

    # 2. Mutants, as many as the time allows.
    for mutant in mutants:
        if mutant.key not in known and time.monotonic() < end:
            healthy = mutant._replace(source=(place / mutant.file).read_text(encoding="utf-8"))
            if healthy.key not in known:
                known[healthy.key] = is_killed(healthy, place, tests[mutant.file])
                assert not known[healthy.key], f"the tests of {mutant.file} fail without a mutant"
            known[mutant.key] = is_killed(mutant, place, tests[mutant.file])
            noted.write_text(json.dumps(known), encoding="utf-8")

    # 3. What was found.
    tried = [mutant for mutant in mutants if mutant.key in known]
    survivors = sorted((m for m in tried if not known[m.key]), key=lambda m: (m.file, m.line))
    result = {
        "mutants": len(mutants),
        "tried": len(tried),
        "killed": len(tried) - len(survivors),
        "share_killed": round(1 - len(survivors) / max(len(tried), 1), 4),
        "survivors": [f"{m.file}:{m.line}: {m.was}  →  {m.now}" for m in survivors],
    }
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "survivors"}))
    raise SystemExit(UNFINISHED if len(tried) < len(mutants) else 0)


if __name__ == "__main__":
    main()
