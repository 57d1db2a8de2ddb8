"""A run goes on with the same things, or says what changed: code files, reward folders, local models, finished files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.pipeline.audit import _identity
from rlhf.pipeline.digests import named_digests
from rlhf.pipeline.plan import plan
from rlhf.pipeline.run import run
from rlhf.pipeline.stages import check_tool_template
from rlhf.pipeline.store import Stage, Store
from rlhf.recipe import load_recipe
from rlhf.recipe.schema import Recipe

STAGES = ["round-0/data", "round-0/sft", "round-1/reward", "round-1/ppo", "round-1/evaluate"]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """Return what loads a recipe that names one thing of each kind; nothing of it has to be real."""
    monkeypatch.chdir(tmp_path)
    for name in ("lm", "base", "adapter", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("a card")
        for file in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
            (tmp_path / name / file).write_text(f"{{}} {name}")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    (tmp_path / "batches.json").write_text("{}")
    (tmp_path / "gold.py").write_text("def score(p, c): return [1.0 for _ in c]\n")
    (tmp_path / "rules.py").write_text("def score(p, c): return [1.0 for _ in c]\n")
    for name in ("turns", "scored"):
        (tmp_path / f"{name}.jinja").write_text("{{ messages }}")
    for name in ("sft", "pairs", "meta"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")

    def load(*overrides: str) -> Recipe:
        document = {
            "name": "t",
            "backbone": {"model": "lm"},
            "data": {"sft": "sft.jsonl", "preferences": "pairs.jsonl"},
            "sft": {"chat_template_path": "turns.jinja"},
            "reward": {"chat_template_path": "scored.jinja", "meta": True, "meta_samples": "meta.jsonl"},
            "ppo": {"extra_rewards": ["rules.py:score", "other", "adapter", "http://localhost:1/get_reward"]},
            "evaluate": {"gold": "gold.py:score"},
        }
        Path("r.yaml").write_text(yaml.safe_dump(document))
        return load_recipe("r.yaml", overrides)

    return load


def finish_all(stages: list[Stage], out: Path) -> None:
    store = Store(out)
    for stage in stages:
        folder = store.open(stage)
        (folder / "weights").write_text(stage.folder)
        store.finish(stage, {}, 0.0)


CHANGED = {
    "rules.py": "round-1/ppo",
    "gold.py": "round-0/sft",
    "other/model.safetensors": "round-1/ppo",
    "other/chat_template.jinja": "round-1/ppo",
    "adapter/tokenizer.json": "round-1/ppo",
    "base/model.safetensors": "round-1/ppo",  # of the adapter
    "lm/model.safetensors": "round-0/sft",
    "lm/config.json": "round-0/sft",
    "lm/tokenizer.json": "round-0/sft",
    "turns.jinja": "round-0/sft",
    "scored.jinja": "round-1/reward",
    "sft.jsonl": "round-0/data",
    "meta.jsonl": "round-1/reward",
}


@pytest.mark.fault("a run that changed", "function or model changed")
@pytest.mark.parametrize("state", ["finished", "begun"])
@pytest.mark.parametrize(("file", "first"), CHANGED.items())
def test_what_a_stage_reads_may_not_change_between_two_attempts(
    recipe: Callable[..., Recipe], tmp_path: Path, file: str, first: str, state: str
) -> None:
    loaded = recipe()
    stages, out = plan(loaded), tmp_path / "out"
    assert [stage.folder for stage in stages] == STAGES
    place = STAGES.index(first)
    finish_all(stages if state == "finished" else stages[:place], out)
    if state == "begun":
        checkpoint = Store(out).open(stages[place]) / "checkpoints" / "checkpoint-4"
        checkpoint.mkdir(parents=True)
    (out / "recipe.yaml").write_text(yaml.safe_dump(loaded.resolved()))
    before = sorted(out.rglob("*"))
    (tmp_path / file).write_text('{"base_model_name_or_path": "base", "something": "else"}')
    with pytest.raises(UserError) as error:
        run(recipe(), out, say=lambda _: None)
    message = str(error.value)
    assert message.startswith(f"{out}/{first}: {'made' if state == 'finished' else 'begun'} with other")
    assert ("meta_sha256 was" if file == "meta.jsonl" else f"{file} has changed") in message
    assert "take the change back" in message
    assert sorted(out.rglob("*")) == before, "nothing is touched"


def test_templates_of_voters_count(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """A second look trains the same voters as a vote; neither knew the vote's own template."""
    (tmp_path / "voted.jinja").write_text("{{ messages }}")
    rounds = [
        "rounds.count=2",
        "rounds.labels_from=people",
        "rounds.second_look=0.1",
        "vote.members=5",
        "reward.meta=false",
        "reward.meta_samples=null",
    ]
    overrides = [*rounds, "vote.chat_template_path=voted.jinja"]
    before = {stage.folder: stage.settings for stage in plan(recipe(*overrides))}
    for file, others in (("voted.jinja", ()), ("scored.jinja", ("reward",))):
        (tmp_path / file).write_text("{{ messages[0] }}")
        after = {stage.folder: stage.settings for stage in plan(recipe(*overrides))}
        changed = {folder.rpartition("/")[2] for folder in before if before[folder] != after[folder]}
        assert {"second_look", *others} <= changed, file
        before = after


def test_files_that_keys_of_trl_name_count(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    override = "reward.accelerator_config=batches.json"
    before = {stage.name: stage.settings for stage in plan(recipe(override))}
    (tmp_path / "batches.json").write_text('{"split_batches": true}')
    after = {stage.name: stage.settings for stage in plan(recipe(override))}
    assert [name for name in before if before[name] != after[name]] == ["reward"]


@pytest.mark.fault("function or model changed")
def test_the_backbone_counts_where_there_is_no_sft(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    before = {stage.folder: stage.key for stage in plan(recipe("data.sft=null"))}
    (tmp_path / "lm" / "model.safetensors").write_text("other")
    after = {stage.folder: stage.key for stage in plan(recipe("data.sft=null"))}
    assert [folder for folder in before if before[folder] == after[folder]] == ["round-0/data"]


@pytest.mark.fault("a run that changed")
@pytest.mark.parametrize("change", ["bytes", "name", "more"])
def test_every_file_of_a_folder_of_data_counts(recipe: Callable[..., Recipe], tmp_path: Path, change: str) -> None:
    """A folder's files are read as a run is made, so they are no less a part of its data than a file that is named."""
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "train.jsonl").write_text("{}\n")
    loaded = recipe("data.preferences=parts")
    stages, out = plan(loaded), tmp_path / "out"
    finish_all(stages, out)
    (out / "recipe.yaml").write_text(yaml.safe_dump(loaded.resolved()))
    if change == "bytes":
        (folder / "train.jsonl").write_text('{"a": 1}\n')
    elif change == "name":
        (folder / "train.jsonl").rename(folder / "test.jsonl")
    else:
        (folder / "more.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"round-0/data: made with other(.|\n)*parts/"):
        run(recipe("data.preferences=parts"), out, say=lambda _: None)


def test_an_audit_of_a_folder_of_data_is_one_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    identities = [_identity(Source(str(tmp_path)))]
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n')
    identities.append(_identity(Source(str(tmp_path))))
    (tmp_path / "train.jsonl").rename(tmp_path / "test.jsonl")
    identities.append(_identity(Source(str(tmp_path))))
    assert len({json.dumps(identity) for identity in identities}) == 3


HELPERS = {
    "words.py": "from plain.deep import LIST\n",
    "plain/deep.py": "LIST = []\n",
    "packed/__init__.py": "from . import inner\n",
    "packed/inner.py": "from .. import words\nimport random\n",
    "late.py": "VALUE = 1\n",
    "nobody.py": "VALUE = 1\n",
    "datasets/readme.txt": "a folder with the name of a package that is installed\n",
}
IMPORTS = """
import json, datasets
import packed.inner as inner
from words import LIST
def score(p, c):
    import late
    return [1.0 for _ in c]
"""


@pytest.mark.fault("function or model changed")
@pytest.mark.parametrize("helper", [name for name in HELPERS if name.endswith(".py")])
def test_a_module_beside_a_function_may_not_change_between_two_attempts(
    recipe: Callable[..., Recipe], tmp_path: Path, helper: str
) -> None:
    for name, text in HELPERS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "rules.py").write_text(IMPORTS)
    loaded = recipe()
    stages, out = plan(loaded), tmp_path / "out"
    finish_all(stages, out)
    (out / "recipe.yaml").write_text(yaml.safe_dump(loaded.resolved()))
    (tmp_path / helper).write_text("from words import LIST\nVALUE = 2\n")
    if helper == "nobody.py":
        assert [stage.key for stage in plan(recipe())] == [stage.key for stage in stages]
        return
    with pytest.raises(UserError, match=f"round-1/ppo: made with other .*{helper} has changed"):
        run(recipe(), out, say=lambda _: None)


def test_imports_are_found_from_any_folder_and_in_code_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/gold.py").write_text("import helper\nimport rlhf.errors\n")
    (tmp_path / "here/helper.py").write_text("import gold\nthis is no Python")
    (tmp_path / "here/rlhf.py").write_text("")
    assert list(named_digests([f"{tmp_path}/here/gold.py:score"])) == [
        f"{tmp_path}/here/gold.py",
        f"{tmp_path}/here/helper.py",
    ]


def test_cards_are_no_part_of_a_model_and_names_elsewhere_have_no_digest(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    before = [stage.key for stage in plan(recipe())]
    (tmp_path / "other" / "README.md").write_text("another card")
    assert [stage.key for stage in plan(recipe())] == before
    assert named_digests([None, "http://x/get_reward", "some/hub-model", "gone.py:score"]) == {}


def test_a_recipe_that_names_nothing_local_keeps_its_keys(recipe: Callable[..., Recipe]) -> None:
    overrides = ("backbone.model=hub/model", "ppo.extra_rewards=[]", "evaluate.gold=null", "reward.meta=false")
    overrides += ("sft.chat_template_path=null", "reward.chat_template_path=null")
    stages = plan(recipe(*overrides, "reward.meta_samples=null"))
    assert not any("files" in stage.settings for stage in stages)


@pytest.mark.fault("weights replaced")
def test_files_of_finished_stages_are_compared_before_they_are_used(tmp_path: Path) -> None:
    first = Stage("sft", "round-0/sft", {}, 0)
    store = Store(tmp_path)
    finish_all([first], tmp_path)
    (store.path(first) / "metrics.jsonl").write_text("{}")
    check = store.check_files([first])
    assert (check.name, check.held, check.statistic) == ("finished files unchanged", True, 0.0)
    weights = store.path(first) / "weights"
    weights.write_text("round-0/SFT")  # of the same size
    check = store.check_files([first])
    assert not check.held
    assert f"{weights} has changed" in check.sentence
    weights.unlink()
    assert f"{weights} is not there any more" in store.check_files([first]).sentence


def test_a_file_is_read_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    monkeypatch.setattr("rlhf.pipeline.digests.file_digest", lambda path: reads.append(path) or "digest")
    file = tmp_path / "model.safetensors"
    file.write_text("a")
    for _ in range(3):
        named_digests([str(tmp_path)])
    assert len(reads) == 1
    file.write_text("ab")
    named_digests([str(tmp_path)])
    assert len(reads) == 2


CALLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}]{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.fault("function or model changed")
@pytest.mark.parametrize("has_calls", [True, False])
def test_tool_calls_are_those_of_the_template_that_is_used(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_calls: bool
) -> None:
    """Data that one template wrote were used by models that read another; without calls no template counts."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_folder, "lm")
    template = Path("lm/chat_template.jinja")
    template.write_text(CALLS)
    rows = []
    for i in range(40):
        sides = {name: [{"role": "assistant", "content": f"{name} {i}"}] for name in ("chosen", "rejected")}
        if has_calls:
            for side in sides.values():
                function = {"name": "weather", "arguments": {"city": side[0]["content"]}}
                side[0] |= {"content": "", "tool_calls": [{"type": "function", "function": function}]}
        rows.append({"prompt": [{"role": "user", "content": f"q {i}"}], **sides})
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("r.yaml").write_text(
        "name: x\nbackbone: {model: lm}\ndata: {preferences: p.jsonl}\nppo: {max_completion_length: 16}\n"
    )
    loaded = load_recipe("r.yaml")
    run(loaded, tmp_path / "run", until="data", say=lambda _: None)
    (data,) = (stage for stage in plan(loaded) if stage.name == "data")
    parents = {"data": Store(tmp_path / "run").path(data)}
    assert ("[weather" in (parents["data"] / "data/pairs.jsonl").read_text()) == has_calls
    check_tool_template(loaded, parents)
    template.write_text(CALLS.replace("[", "<tool>["))
    if not has_calls:
        check_tool_template(loaded, parents)
        return
    with pytest.raises(
        UserError, match=r"round-0/data: its tool calls were written by another chat template than lm has now"
    ):
        run(loaded, tmp_path / "run", until="reward", say=lambda _: None)
