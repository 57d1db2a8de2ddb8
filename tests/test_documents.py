"""What the documents promise: lines that can be read, links, verbs, flags, keys and paths that are there."""

import ast
import importlib
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.recipes import shipped_recipes

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    file.relative_to(ROOT)
    for file in (
        *ROOT.glob("*.md"),
        *(f for f in ("recipes", "docker", ".github", "tests", "rlhf") for f in (ROOT / f).rglob("*.md")),
    )
)
GUIDES = [file for file in DOCUMENTS if "guides" in file.parts]
RECIPES = [file.relative_to(ROOT / "recipes") for file in shipped_recipes()]
SECTIONS = ("lab", "backbone", "data", "sft", "vote", "reward", "ppo", "rounds", "sampling", "evaluate")
UNCLEAR = ("turned round", "climb", "astray", "the pupil")
# Flags of other programs that the documents name outside of a command.
FOREIGN_FLAGS = {"--stop-timeout"}


def text_of(file: Path) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[str]:
    return [
        block
        for name, block in re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        if name in languages
    ]


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """What stands between backticks outside of code blocks."""
    return re.findall(r"`([^`]+)`", without_blocks(text))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def flags_of_verbs() -> dict[str, set[str]]:
    from typer.main import get_command

    from rlhf.cli import app

    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    return {
        verb: {"--help"} | {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
        for verb, command in commands.items()
    }


def commands_of(text: str) -> list[list[str]]:
    """Every command line of the code blocks, in words; a line that goes on counts as one."""
    found = []
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                if words := shlex.split(part, comments=True):
                    found.append(words)
    return found


def rlhf_commands(text: str) -> list[list[str]]:
    """The words after `rlhf`, of the commands that run it in whatever way."""
    found = []
    for words in commands_of(text):
        place = words.index("rlhf") if "rlhf" in words else None
        if place is not None and words[0] not in ("docker", "pip"):
            found.append(words[place + 1 :])
    return found


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_lines_fit_on_a_screen(file: Path) -> None:
    wide = [f"{file}:{n}" for n, line in enumerate(text_of(file).splitlines(), start=1) if len(line) > 120]
    assert not wide, f"over 120 columns: {wide}"


def test_the_readme_is_read_in_five_minutes() -> None:
    assert (ROOT / "README.md").stat().st_size <= 10_240


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_links_lead_somewhere(file: Path) -> None:
    text = without_blocks(text_of(file))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, flags=re.MULTILINE)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / file).parent / path if path else ROOT / file
        assert there.exists(), f"{file}: {target}"
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), f"{file}: {target}"


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_short_links_are_explained(file: Path) -> None:
    text = without_blocks(text_of(file))
    known = set(re.findall(r"^\[([^\]]+)\]: ", text, flags=re.MULTILINE))
    if known:
        used = {name for name in re.findall(r"\| \[([^\]\[]+)\] \|", text)}
        assert used <= known, f"{file}: {used - known}"


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_verbs_and_flags_exist(file: Path) -> None:
    text, verbs = text_of(file), flags_of_verbs()
    for words in rlhf_commands(text):
        assert words[0] in verbs, f"{file}: rlhf {' '.join(words)}"
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= verbs[words[0]], f"{file}: rlhf {' '.join(words)}"
    every_flag = set().union(*verbs.values(), FOREIGN_FLAGS, *(_flags_of_script(words) for words in commands_of(text)))
    for span in spans(text):
        if match := re.match(r"rlhf ([a-z]\S*)", span):
            assert match[1] in verbs, f"{file}: `{span}`"
            assert set(re.findall(r"--[a-z][\w-]*", span)) <= verbs[match[1]], f"{file}: `{span}`"
        elif span.startswith("--"):
            assert set(re.findall(r"--[a-z][\w-]*", span)) <= every_flag, f"{file}: `{span}`"


def _flags_of_script(words: list[str]) -> set[str]:
    """The flags of a benchmark that a command runs."""
    if words[0] != "python" or not (ROOT / words[1]).is_file():
        return set()
    return set(re.findall(r"\"(--[\w-]+)\"", text_of(Path(words[1]))))


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_benchmarks_take_the_flags_that_are_named(file: Path) -> None:
    for words in commands_of(text_of(file)):
        if words[0] == "python" and words[1].startswith("tests/"):
            assert (ROOT / words[1]).is_file(), words
            assert {word for word in words if word.startswith("--")} <= _flags_of_script(words), words


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_recipes_and_overrides_in_commands_are_valid(file: Path) -> None:
    from rlhf.recipe import load_recipe

    for words in rlhf_commands(text_of(file)):
        recipes = [word for word in words if word.startswith("recipes/") and word.endswith(".yaml")]
        overrides = [word for word in words[1:] if re.match(r"[a-z]+[\w.]*=", word)]
        for recipe in recipes:
            load_recipe(ROOT / recipe, overrides)


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_keys_of_recipes_exist(file: Path) -> None:
    for span in spans(text_of(file)):
        for section, key in re.findall(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.([a-z_]+)(?![\w(])", span):
            if key not in ("py", "json", "jsonl", "yaml", "md"):
                assert key in _keys(section), f"{file}: `{span}`"


@cache
def _keys(section: str) -> set[str]:
    from rlhf.recipe.keys import stage_keys
    from rlhf.recipe.load import _section_class
    from rlhf.recipe.schema import STAGE_SECTIONS

    described = _section_class(section)
    assert described is not None
    return set(described.model_fields) | (set(stage_keys(section)) if section in STAGE_SECTIONS else set())


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_paths_exist(file: Path) -> None:
    for span in spans(text_of(file)):
        if match := re.match(r"((?:rlhf|tests|recipes|docker)/[\w./-]+?)(?:::?\w+)?(?: |$)", span):
            assert (ROOT / match[1]).exists(), f"{file}: `{span}`"


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_recipes_in_pages_pass_the_schema(file: Path, tmp_path: Path) -> None:
    """A whole recipe has a name; a section is put on top of the whole recipe that the guide to reward models shows."""
    from rlhf.recipe import load_recipe

    whole = next(b for b in blocks(text_of(Path("recipes/guides/reward_models.md")), "yaml") if b.startswith("name:"))
    (tmp_path / "mine.yaml").write_text(whole, encoding="utf-8")
    for number, block in enumerate(blocks(text_of(file), "yaml")):
        is_recipe = set(yaml.safe_load(block)) <= {"name", "seed", "base", *SECTIONS}
        assert is_recipe, f"{file}: a yaml block that is no recipe:\n{block}"
        part = tmp_path / f"part-{number}.yaml"
        block = block.replace("base: recipes/", f"base: {ROOT}/recipes/")
        part.write_text(block if block.startswith("name:") else f"base: mine.yaml\n{block}", encoding="utf-8")
        load_recipe(part)


def test_the_whole_recipe_and_the_mixture_mean_what_they_say(tmp_path: Path) -> None:
    from rlhf.recipe import load_recipe

    mixture, whole, *_ = blocks(text_of(Path("recipes/guides/reward_models.md")), "yaml")
    (tmp_path / "mine.yaml").write_text(whole, encoding="utf-8")
    (tmp_path / "mixture.yaml").write_text(f"base: mine.yaml\n{mixture}", encoding="utf-8")
    assert load_recipe(tmp_path / "mine.yaml").evaluate.gold == "rules.py:score"
    sources = load_recipe(tmp_path / "mixture.yaml").data.sources("preferences")
    assert [source.fraction for source in sources] == [0.5, 1.0]


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_python_in_pages_names_what_is_there(file: Path) -> None:
    for block in blocks(text_of(file), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlhf":
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{file}: {alias.name}"


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_no_private_words(file: Path) -> None:
    text = text_of(file).lower()
    assert not [word for word in UNCLEAR if re.search(rf"\b{word}", text)], file


def test_every_recipe_stands_in_the_table() -> None:
    table = text_of(Path("recipes/README.md"))
    for recipe in (*RECIPES, Path("quickstart.py")):
        assert re.search(rf"^\| \[{recipe}\]\({recipe}\) \|", table, flags=re.MULTILINE), recipe


def test_every_guide_and_every_result_is_linked() -> None:
    readme, results = text_of(Path("README.md")), text_of(Path("recipes/results/README.md"))
    for guide in GUIDES:
        assert str(guide) in readme, guide
    for page in (ROOT / "recipes/results").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in results, page


def test_the_readme_tree_names_what_is_there() -> None:
    """Rooms at the beginning of a line, and the files that a room's line names."""
    tree = next(block for block in blocks(text_of(Path("README.md")), "text") if "\nrlhf " in block)
    rooms = set()
    for line in tree.splitlines():
        indent, name, rest = re.fullmatch(r"(\s*)(\S+)\s*(.*)", line).groups()  # type: ignore[union-attr]
        place = ROOT / "rlhf" / name if indent else ROOT / name
        assert place.exists(), line
        rooms.add(name)
        for inside in re.findall(r"[\w.]+\.(?:py|md)\b|\b\w+/(?= )", rest):
            assert (place / inside).exists(), line
    there = {
        path.name for path in (ROOT / "rlhf").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert there - rooms <= {"__init__.py", "__main__.py"}, "the tree names every room"


def test_the_guide_to_ppo_names_every_alarm() -> None:
    from rlhf.ppo.health import CONCERNS, CUT
    from rlhf.ppo.reporting import UNREAD

    guide = text_of(Path("recipes/guides/ppo.md"))
    section = guide[guide.index("## 5. Alarms") : guide.index("## 6.")]
    assert re.findall(r"^\| ([a-zA-Z ]+) \|", section, flags=re.MULTILINE)[1:] == [
        UNREAD,
        CUT,
        *(concern.name for concern in CONCERNS),
    ]


def test_the_page_of_metrics_knows_every_metric_of_ppo() -> None:
    from rlhf.ppo.metrics import RolloutMetrics

    page = text_of(Path("recipes/guides/metrics.md"))
    names = set(re.findall(r"`([a-z_0-9]+)`", str(RolloutMetrics.__doc__))) - {"reward_clip"}
    assert len(names) > 20
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_hooks_before_a_commit_are_the_tools_of_ci() -> None:
    hooks = yaml.safe_load(text_of(Path(".pre-commit-config.yaml")))["repos"][0]["hooks"]
    tools = [line for line in text_of(Path(".ci/run")).splitlines() if line.startswith(("ruff", "mypy"))]
    assert [hook["entry"] for hook in hooks] == tools


def test_the_changelog_knows_this_version() -> None:
    version = tomllib.loads(text_of(Path("pyproject.toml")))["project"]["version"]
    changelog = text_of(Path(".github/CHANGELOG.md"))
    assert "## [Unreleased]" in changelog
    assert f"## [{version}]" in changelog
