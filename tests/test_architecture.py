"""Who may import whom, read from the source, imports inside functions included; and what starts without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "rlhf"
PACKAGE = {file: ".".join(file.relative_to(ROOT.parent).with_suffix("").parts) for file in ROOT.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): file for file, name in PACKAGE.items()}
GROUND = {
    "addresses",
    "bounded",
    "errors",
    "few_labels",
    "files",
    "progress",
    "versions",
    "statistics",
    "_trl",
}  # everyone may import these; they import nothing of the house
SHARED = {"objectives", "data", "models", "invariants", "recipe.objectives"}
# The rooms, or single modules of them, that each room may import from.
ALLOWED: dict[str, set[str]] = {
    "recipe": set(),
    "objectives": set(),
    "data": set(),
    "report": set(),
    "models": {"objectives", "data"},
    "invariants": {"objectives", "models"},
    "reward": SHARED,
    "ppo": SHARED | {"reward.load"},
    "evaluation": SHARED,
    "lab": SHARED,
    "cost": SHARED,
    "serve": {"reward", "data", "report"},
    "pipeline": SHARED | {"recipe", "reward", "ppo", "evaluation", "lab", "cost", "report"},
    "cli": SHARED | {"recipe", "reward", "ppo", "evaluation", "lab", "cost", "report", "pipeline", "serve"},
}
TORCH_FREE = [
    "rlhf",
    "rlhf.cli",
    "rlhf.few_labels",
    "rlhf.files",
    "rlhf.statistics",
    *sorted(name for name in MODULES if name.startswith(("rlhf.recipe", "rlhf.report"))),
    "rlhf.pipeline.store",
    "rlhf.pipeline.stage_table",
    "rlhf.pipeline.plan",
    "rlhf.pipeline.checks",
    "rlhf.pipeline.run",
    "rlhf.data.prepare",
]


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk a file's statements, but for those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            yield node
            yield from statements(node)


def imports(file: Path) -> set[str]:
    """Return the modules that a file imports, wherever in it; of ours the module, not the name in it."""
    names: set[str] = set()
    for node in statements(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide who imports whom"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in inside}
    return names


def room(module: str) -> str:
    """Return the room of one of our modules, or the module itself where it stands at the front door or on the ground floor."""
    return module.split(".")[1] if "." in module else ""


GRAPH = {name: {found for found in imports(file) if found in MODULES} for name, file in MODULES.items()}


def test_every_room_has_its_place() -> None:
    assert {room(name) for name in MODULES} - {"", "__main__"} <= set(ALLOWED) | GROUND


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_go_down_only(name: str) -> None:
    may = ALLOWED[name] | GROUND | {name}
    illegal = {
        f"{module} imports {imported}"
        for module, found in GRAPH.items()
        if room(module) == name
        for imported in found
        if room(imported) not in may and imported.removeprefix("rlhf.") not in may
    }
    assert not illegal, sorted(illegal)


def test_the_ground_floor_stands_on_nothing() -> None:
    for name in GROUND:
        assert not GRAPH[f"rlhf.{name}"], name


def test_no_circle() -> None:
    """Neither among modules nor among rooms, imports inside functions included: none of them hides a circle."""
    rooms: dict[str, set[str]] = {}
    for module, found in GRAPH.items():
        rooms.setdefault(room(module), set()).update(room(other) for other in found if room(other) != room(module))
    for graph in (GRAPH, rooms):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(" → ".join(error.args[1]))


def test_objectives_import_torch_and_the_standard_library_only() -> None:
    for name, file in MODULES.items():
        for module in imports(file) if room(name) == "objectives" else ():
            if module in MODULES:
                assert room(module) in ("objectives", "errors"), f"{name} imports {module}"
            else:
                assert module.split(".")[0] in {"torch", *sys.stdlib_module_names}, f"{name} imports {module}"


def test_private_trl_names_stand_in_one_module() -> None:
    for name, file in MODULES.items():
        if name != "rlhf._trl":
            private = {module for module in imports(file) if module.startswith("trl.")}
            assert not private, f"{name} imports {private}"


def test_light_modules_do_not_load_torch() -> None:
    code = f"import sys, importlib\nfor name in {TORCH_FREE}: importlib.import_module(name)\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_does_no_work() -> None:
    """A module holds definitions; what else stands at its top level completes one of them, or starts the command."""
    completes = ("for _stage in ", "_Loader.add_implicit_resolver(", "if TYPE_CHECKING:", "if __name__ == ")
    definitions = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
    )
    work = [
        f"{name}:{statement.lineno} {ast.unparse(statement).splitlines()[0]}"
        for name, file in MODULES.items()
        for statement in ast.parse(file.read_text(encoding="utf-8")).body
        if not isinstance(statement, definitions)
        and not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        and not ast.unparse(statement).startswith(completes)
        and name != "rlhf.__main__"
    ]
    assert not work, "\n".join(work)


def test_modules_stay_readable() -> None:
    long = {
        str(f.relative_to(ROOT)): n
        for f in ROOT.rglob("*.py")
        if (n := len(f.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert set(long) <= {"ppo/trainer.py"}, f"over 400 lines: {long}"  # one procedure, read top to bottom
