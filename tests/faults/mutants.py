"""Deliberate faults in our code, one at a time: does a test notice?

    python -m tests.faults.mutants objectives --work FOLDER --out mutants.json [--sample 100] [--minutes 9]

The rooms are objectives, batches, trainer and data. A mutant turns a sign, a comparison, a number, a condition or a name (sum
and mean, min and max) of one line into another, or leaves a term out. It is written into a copy of the package, and the tests
that call its function are run in a forked process, the quickest first, until one fails: then the mutant is killed. Which test
calls what is noted once, in a run without a mutant. Mutants come in an order that only the seed decides, so the first of them
are a fair sample; the same command goes on from what FOLDER holds, and a mutant that outlived other tests is tried again.
Survivors are for reading: each needs a test, or a reason.
"""

import argparse
import ast
import copy
import hashlib
import importlib
import json
import math
import os
import random
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
from scipy.stats import binomtest

ROOT = Path(__file__).parents[2]
# Room → its files, and where its tests are; the doctests of the files are tests too.
ROOMS = {
    "objectives": ("rlhf/objectives/*.py", ("tests/objectives",)),
    "batches": (
        "rlhf/ppo/batches.py",
        ("tests/ppo/test_batches.py", "tests/ppo/test_ppo.py", "tests/ppo/test_edges.py", "tests/ppo/test_options.py"),
    ),
    "trainer": (
        "rlhf/reward/trainer.py",
        (
            "tests/reward/test_trainer.py",
            "tests/reward/test_trainer_numbers.py",
            "tests/reward/test_votes_in_python.py",
            "tests/reward/test_weights.py",
            "tests/reward/test_extras.py",
            "tests/reward/test_rankings.py",
            "tests/reward/test_contrastive.py",
            "tests/models/test_packing.py",
        ),
    ),
    "data": (
        "rlhf/data/**/*.py",
        (
            "tests/data",
            "tests/serve/test_label.py",
            "tests/faults/test_label_files.py",
            "tests/faults/test_recipes.py",
            "tests/invariants/test_planted_in_data.py",
            "tests/models/test_tools.py",
            "tests/pipeline/test_cleaned.py",
            "tests/pipeline/test_describe.py",
            "tests/pipeline/test_verdict_labels.py",
            "tests/reward/test_annotators.py",
            "tests/reward/test_attributes.py",
            "tests/reward/test_rankings.py",
            "tests/reward/test_wants.py",
        ),
    ),
}
UNFINISHED = 3
SECONDS = 120  # of a processor, after which a mutant counts as killed: it never ends
MEMORY = 8 * 2**30
KILLED = (1, 2)  # of pytest's exit codes: a test failed, or could not be read
COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type, type] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
NAMES = {"sum": "mean", "mean": "sum", "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "exp": "log", "log": "exp", "any": "all", "all": "any"}  # fmt: skip


class Mutant(NamedTuple):
    """A fault: the file, the function ("" outside of any), the line, what it was and is, and the whole file with it."""

    file: str
    function: str
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


def places(tree: ast.AST, function: str = "", scope: str = "") -> Iterator[tuple[ast.AST, str, int | None, str]]:
    """Yield where in a tree expressions stand: parent, field, place in a list, function; annotations are no code."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "type_params", "decorator_list"):
            continue
        for at, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            match child:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    yield from places(child, scope + name, f"{scope}{name}.<locals>.")
                case ast.ClassDef(name=name):
                    yield from places(child, function, f"{scope}{name}.")
                case ast.AST():
                    if isinstance(child, ast.expr):
                        yield tree, field, at, function
                    yield from places(child, function, scope)


def mutants_of(file: Path) -> Iterator[Mutant]:
    """Yield every mutant of a file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for parent, field, at, function in list(places(tree)):
        node = getattr(parent, field) if at is None else getattr(parent, field)[at]
        for new in changed(node):
            put(parent, field, at, ast.copy_location(new, node))
            source = ast.unparse(ast.fix_missing_locations(tree))
            put(parent, field, at, node)
            name = str(file.relative_to(ROOT))
            yield Mutant(name, function, node.lineno, ast.unparse(node), ast.unparse(new), source)


def put(parent: ast.AST, field: str, at: int | None, node: ast.AST) -> None:
    """Put a node in its place."""
    if at is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[at] = node


# ---- Tests ----


class Test(NamedTuple):
    """A test: its seconds, and the functions that it or a fixture of it calls, FILE:NAME."""

    seconds: float
    calls: frozenset[str]


class Notes:
    """A plugin of pytest that notes which test calls which functions of a folder, and writes it to a file."""

    def __init__(self, place: Path, out: Path):
        self.place, self.out = f"{place}/", out
        self.tests: dict[str, tuple[float, list[str]]] = {}
        self.of_fixture: dict[str, set[str]] = {}
        self.calls: set[str] = set()  # since the last test began; at first, of imports
        threading.setprofile(self.note)
        sys.setprofile(self.note)

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        """Note a call; Python calls this at each."""
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(self.place):
            self.calls.add(f"{code.co_filename.removeprefix(self.place)}:{code.co_qualname}")

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """Note what a fixture calls: it is made once, for all tests that ask for it."""
        outer, self.calls = self.calls, set()
        result = yield
        self.of_fixture[fixturedef.argname] = self.calls
        self.calls = outer
        return result

    def pytest_collection_finish(self) -> None:
        """Note what importing calls, as a test without a name."""
        self.tests[""] = (0.0, sorted(self.calls))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Note what a test calls."""
        self.calls, begin = set(), time.perf_counter()
        result = yield
        fixtures = (self.of_fixture.get(name, set()) for name in getattr(item, "fixturenames", ()))
        self.tests[item.nodeid] = (time.perf_counter() - begin, sorted(self.calls.union(*fixtures)))
        return result

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write the notes, where all tests pass."""
        if exitstatus == 0:
            self.out.write_text(json.dumps(self.tests), encoding="utf-8")


class Only:
    """A plugin of pytest that runs these tests, in this order."""

    def __init__(self, names: list[str]):
        self.names = names

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave the others out."""
        order = {name: at for at, name in enumerate(self.names)}
        items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])


def tests_of(mutant: Mutant, tests: dict[str, Test]) -> list[str]:
    """The tests that call the function of a mutant, the quickest first; outside of functions, all that call one of its file."""
    function = f"{mutant.file}:{mutant.function}"
    is_of_file = not mutant.function or function in tests[""].calls
    calls = {call for test in tests.values() for call in test.calls if call.startswith(f"{mutant.file}:")}
    wanted = calls if is_of_file else {function}
    found = [name for name in tests if name and not wanted.isdisjoint(tests[name].calls)]
    return sorted(found, key=lambda name: tests[name].seconds)


def exit_code_of(place: Path, arguments: list[str], plugin: Callable[[], object]) -> int:
    """Run pytest silently in a forked process, in a copy of the project, until a test fails; a plugin is made in there."""
    child = os.fork()
    if child == 0:
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
            usual = ["-x", "-n0", "-p", "no:cacheprovider", "-m", "not slow"]
            code = int(pytest.main([*usual, *arguments], plugins=[plugin()]))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def noted_tests(place: Path, arguments: list[str], noted: Path) -> dict[str, Test]:
    """Run the tests without a mutant, once, and return what each calls."""
    if not noted.is_file():
        code = exit_code_of(place, arguments, lambda: Notes(place, noted))
        assert code == 0, f"the tests fail without a mutant: exit {code}"
    rows = json.loads(noted.read_text(encoding="utf-8"))
    return {name: Test(seconds, frozenset(calls)) for name, (seconds, calls) in rows.items()}


def is_killed(mutant: Mutant, place: Path, tests: list[str]) -> bool:
    """Run the tests against a mutant, until one fails, ends the process, or takes too long; none is no kill."""

    def plugin() -> Only:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        return Only(tests)

    original = (place / mutant.file).read_text(encoding="utf-8")
    (place / mutant.file).write_text(mutant.source, encoding="utf-8")
    try:
        files = list(dict.fromkeys(name.partition("::")[0] for name in tests))
        code = exit_code_of(place, files, plugin) if tests else 0
        return code in KILLED or code < 0
    finally:
        (place / mutant.file).write_text(original, encoding="utf-8")


def main() -> None:
    """Try mutants until the sample or the time is at its end; print and write the share killed, and every survivor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--sample", type=int, help="How many mutants; without it, all.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    pattern, folders = ROOMS[arguments.room]
    files = sorted(ROOT.glob(pattern))
    every = [mutant for file in files for mutant in mutants_of(file)]
    random.Random(arguments.seed).shuffle(every)
    mutants = every[: arguments.sample]

    # 1. A copy of the project, in which mutants are written; libraries are loaded once, before the forks.
    place, noted = arguments.work.resolve() / "package", arguments.work / f"{arguments.room}.json"
    shutil.rmtree(place, ignore_errors=True)
    for name in ("rlhf", "tests", "recipes", "docker"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, place)
    for name in ("torch", "hypothesis", "tests.warm"):
        importlib.import_module(name)

    # 2. Which test calls what, and what is known: a killed mutant has "", a survivor the tests that it outlived.
    texts = [*files, *(path for folder in folders for path in sorted([ROOT / folder, *(ROOT / folder).rglob("*.py")]))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in texts if path.is_file())).hexdigest()[:16]
    names = [*(str(file.relative_to(ROOT)) for file in files), *folders]
    tests = noted_tests(place, names, arguments.work / f"{arguments.room}-{digest}.json")
    known: dict[str, str] = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}

    # 3. Mutants, as many as the time allows.
    for mutant in mutants:
        if known.get(mutant.key) not in ("", digest) and time.monotonic() < end:
            known[mutant.key] = "" if is_killed(mutant, place, tests_of(mutant, tests)) else digest
            noted.write_text(json.dumps(known), encoding="utf-8")

    # 4. What was found; a survivor of other tests that there was no time to try again is a survivor.
    tried = [mutant for mutant in mutants if mutant.key in known]
    is_at_end = all(known.get(mutant.key) in ("", digest) for mutant in mutants)
    survivors = sorted((m for m in tried if known[m.key]), key=lambda m: (m.file, m.line))
    killed = len(tried) - len(survivors)
    low, high = binomtest(killed, len(tried)).proportion_ci(method="wilson") if tried else (0.0, 1.0)
    result = {
        "mutants": len(every),
        "tried": len(tried),
        "killed": killed,
        "share_killed": round(killed / max(len(tried), 1), 4),
        "share_killed_ci": [round(low, 4), round(high, 4)],
        "survivors": [f"{m.file}:{m.line} {m.function}: {m.was}  →  {m.now}" for m in survivors],
    }
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "survivors"}))
    raise SystemExit(0 if is_at_end else UNFINISHED)


if __name__ == "__main__":
    main()
