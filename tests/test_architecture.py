"""Who may import whom (design §2), read from the source; and what must start without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "rlhf"
EVERYONE = {"errors"}
ALLOWED = {
    "objectives": set(),
    "recipe": set(),
    "data": set(),
    "models": {"objectives", "data", "_trl"},
    "reward": {"objectives", "data", "models", "_trl", "evaluation"},
    "ppo": {"objectives", "data", "models", "_trl", "reward"},
    "evaluation": {"objectives", "data", "models"},
    "lab": {"objectives", "data", "models"},
    "report": set(),
    "pipeline": {"recipe", "data", "objectives", "models", "reward", "ppo", "evaluation", "report", "lab"},
    "serve": {"objectives", "data", "models", "reward"},
    "cli": {"recipe", "pipeline", "evaluation", "report", "serve"},
}
TORCH_FREE = [
    "rlhf",
    "rlhf.cli",
    "rlhf.recipe",
    "rlhf.pipeline.store",
    "rlhf.pipeline.run",
    "rlhf.report.page",
    "rlhf.data.prepare",
]


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found |= {name.split(".")[1] if "." in name else "" for name in names if name.split(".")[0] == "rlhf"}
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_down_only(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py")) if (ROOT / package).is_dir() else [ROOT / f"{package}.py"]
    assert files
    for file in files:
        illegal = imports(file) - ALLOWED[package] - EVERYONE - {package}
        assert not illegal, f"{file.relative_to(ROOT)} imports {sorted(illegal)}"


def test_ppo_uses_reward_only_to_load_a_reward_model() -> None:
    for file in (ROOT / "ppo").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf.reward"):
                assert node.module == "rlhf.reward.load"


def test_objectives_import_torch_only() -> None:
    for file in (ROOT / "objectives").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            assert all(module.split(".")[0] in ("torch", "rlhf", "math", "typing") for module in modules), file


def test_private_trl_names_stand_in_one_module() -> None:
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl."):
                assert file.name == "_trl.py", f"{file} imports {node.module}"


def test_light_modules_do_not_load_torch() -> None:
    code = f"import sys, importlib\nfor name in {TORCH_FREE}: importlib.import_module(name)\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modules_stay_readable() -> None:
    long = {
        str(f.relative_to(ROOT)): n
        for f in ROOT.rglob("*.py")
        if (n := len(f.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert set(long) <= {"ppo/trainer.py"}, f"over 400 lines: {long}"  # one procedure, read top to bottom
