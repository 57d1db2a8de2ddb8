"""`rlhf plan`: rows and steps are those of the run, and what is not known is said."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from rlhf.cost.estimate import ONE_PROCESS
from rlhf.cost.memory import Memory, Processes
from rlhf.cost.sizes import Sizes
from rlhf.cost.work import Estimate, PpoWork
from rlhf.errors import UserError
from rlhf.pipeline.estimate import (
    _evaluation_note,
    _not_counted,
    _notes_of_processes,
    estimate,
    ppo_rollouts,
    section_training,
    work_of,
)
from rlhf.pipeline.plan import plan
from rlhf.pipeline.run import run as run_recipe
from rlhf.recipe import load_recipe
from tests.command import rlhf
from tests.pipeline.small import RECIPE


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plan") / "r.yaml"
    file.write_text(RECIPE)
    return file


@pytest.mark.usefixtures("timed_once")
def test_rows_and_steps_are_those_of_the_run(recipe_file: Path) -> None:
    overrides = ["reward.objective=posterior", "vote.members=3", "vote.folds=3", "rounds.count=2", "rounds.prompts=20"]
    overrides += ["rounds.responses=3", "rounds.labels=25", "ppo.total_episodes=32", "evaluate.prompts=8"]
    run = recipe_file.parent / "x"
    assert rlhf("run", str(recipe_file), "--out", str(run), *overrides, cwd=recipe_file.parent).returncode == 0
    found, notes = estimate(load_recipe(recipe_file, overrides))
    assert all(
        note.startswith("Evaluation takes ") for note in notes
    )  # nothing else is to be said; that depends on the clock
    stages = {stage.folder: stage for stage in found}
    assert list(stages) == [
        "round-0/sft",
        *(f"round-1/{name}" for name in ("vote", "reward", "ppo", "evaluate")),
        *(f"round-2/{name}" for name in ("sample", "vote", "reward", "ppo", "evaluate")),
    ]
    facts = {name: json.loads((run / name / "manifest.json").read_text())["facts"] for name in stages}

    def last_step(folder: str) -> int:
        rows = [json.loads(line) for line in (run / folder / "metrics.jsonl").read_text().splitlines()]
        return int(rows[-1]["step"])

    assert stages["round-0/sft"].rows == facts["round-0/sft"]["demonstrations"]
    assert stages["round-0/sft"].tokens == 2 * facts["round-0/sft"]["tokens"]  # two epochs; all rows are counted
    for folder in ("round-0/sft", "round-1/reward", "round-2/reward", "round-1/ppo"):
        assert stages[folder].steps == last_step(folder), folder
    for folder in ("round-1/reward", "round-2/reward", "round-1/vote", "round-2/vote"):
        assert stages[folder].rows == facts[folder]["pairs"], folder
    assert stages["round-1/ppo"].rows == facts["round-1/ppo"]["episodes"]
    assert stages["round-2/sample"].rows == facts["round-2/sample"]["samples"]
    assert stages["round-1/evaluate"].rows == 8 * 17
    assert stages["round-2/evaluate"].rows == 8  # SFT's answers are there already
    assert all(stage.seconds > 0 and stage.bytes > 0 for stage in found)
    of_run, _ = estimate(load_recipe(recipe_file, overrides), out=run)
    assert [(x.folder, x.rows, x.tokens) for x in of_run] == [(x.folder, x.rows, x.tokens) for x in found]


def test_the_command_prints_it_and_writes_nothing(recipe_file: Path) -> None:
    before = sorted(recipe_file.parent.iterdir())
    result = rlhf("plan", str(recipe_file), "--processes", "2", "--sharding", "fsdp2", cwd=recipe_file.parent)
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in ("round-0/sft", "round-1/ppo", "memory", "tokens", "steps", "time"))
    assert "memory of one of 2 processes, fsdp2, GiB" in result.stdout
    assert all(word in result.stdout for word in ("policy", "critic", "reference", "exchanged", "activations"))
    assert "round-1/evaluate: run by one process while the others wait" in result.stdout
    assert sorted(recipe_file.parent.iterdir()) == before


def test_a_folder_without_the_data_is_no_run(recipe_file: Path, tmp_path: Path) -> None:
    result = rlhf("plan", str(recipe_file), "--out", str(tmp_path / "none"), cwd=tmp_path)
    assert (result.returncode, list(tmp_path.iterdir())) == (2, [])
    assert "none/round-0/data: not there; run the recipe with `--until data` first" in result.stderr
    (tmp_path / "file").touch()
    result = rlhf("plan", str(recipe_file), "--out", str(tmp_path / "file"), cwd=tmp_path)
    assert (result.returncode, "file: a file, or a link that leads to no folder" in result.stderr) == (2, True)


@pytest.mark.usefixtures("timed_once")
@pytest.mark.parametrize("gone", ["round-0/data/data/sft.jsonl", "round-0/data/data", "round-0/lab/model"])
def test_a_run_whose_data_are_partly_gone_is_not_counted(gone: str, recipe_file: Path, tmp_path: Path) -> None:
    """A file that is not there has no rows where the plan makes the data itself."""
    recipe, run = load_recipe(recipe_file), tmp_path / "x"
    run_recipe(recipe, run, until="data", say=lambda _: None)
    assert estimate(recipe, until="sft", out=run)[0]
    (run / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"of finished stages, .* gone or were changed"):
        estimate(recipe, until="sft", out=run)


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ("reward: {extra: critique}", "reward.extra: critique"),
        ("reward: {extra: text}", "reward.extra: text"),
        ("reward: {objective: gated}", "reward.objective: gated"),
        ("reward: {experts: gate, use_peft: true}", "reward.experts"),
        ("ppo: {extra_rewards: [https://a/b]}", "ppo.extra_rewards"),
        ("ppo: {baseline_samples: 1}", "ppo.baseline_samples"),
        ("ppo: {novelty_coef: 0.1}", "ppo.novelty_coef"),
        ("ppo: {adversarial_coef: 0.1}", "ppo.adversarial_coef"),
        ("rounds: {count: 2, labels_from: verdicts, judge_model: a/c}", "rounds.labels_from: verdicts"),
        ("reward: {extra: swav}", None),
        ("ppo: {novelty_coef: 0}", None),
    ],
)
def test_what_the_figures_leave_out_is_named(said: str, key: str | None, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"name: n\nbackbone: {{model: a/b}}\ndata: {{preferences: a/b}}\n{said}\n")
    notes = _not_counted(load_recipe(tmp_path / "r.yaml"))
    assert len(notes) == (key is not None)
    assert all(note.startswith(f"Not counted: {key}") for note in notes)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--processes", "0"), "'--processes': Input should be greater than or equal to 1"),
        (("--processes", "many"), "'--processes': Input should be a valid integer"),
        (("--sharding", "zero3"), "'--sharding': Value error, 'zero3' is not one of 'ddp', 'fsdp2'"),
    ],
)
def test_a_launch_that_is_none_is_refused(arguments: tuple[str, ...], sentence: str, recipe_file: Path) -> None:
    result = rlhf("plan", str(recipe_file), *arguments, cwd=recipe_file.parent)
    assert result.returncode == 2
    assert sentence in result.stderr


def test_what_several_processes_can_not_divide_is_said(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "name: n\nbackbone: {model: a/b}\ndata: {preferences: a/b}\nvote: {trunk: 1}\n"
        "reward: {objective: posterior, use_peft: true, load_in_4bit: true}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    training = section_training(recipe)
    assert _notes_of_processes(recipe, ONE_PROCESS, ["round-1/evaluate"], training) == []
    alone, trunk, bits = _notes_of_processes(recipe, Processes(4, "fsdp2"), ["round-1/evaluate"], training)
    assert alone.startswith("round-1/evaluate: run by one process")
    assert trunk.startswith("vote.trunk: ")
    assert bits.startswith("load_in_4bit: FSDP2 leaves 4-bit weights whole")
    assert len(_notes_of_processes(recipe, Processes(4, "ddp"), [], training)) == 1


def test_rollouts_are_shared_out(tmp_path: Path) -> None:
    """640 episodes in rollouts of 32 are 20 by one process, and 5 each, of the same size, by four."""
    text = "name: n\nbackbone: {model: a/b}\ndata: {preferences: a/b}\n"
    text += "ppo: {total_episodes: 640, per_device_train_batch_size: 32, num_mini_batches: 1}\n"
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "r.yaml")
    args = section_training(recipe)["ppo"].args
    stage = next(stage for stage in plan(recipe) if stage.name == "ppo")
    sizes = Sizes({"prompts": 100}, prompts=[1], answers=[1], demonstrations=[])
    for count, rollouts in ((1, 20), (4, 5)):
        work = work_of(stage, recipe, sizes, args, count)
        assert isinstance(work, PpoWork)
        assert work.rollouts == rollouts


@pytest.mark.usefixtures("timed_once")
def test_data_on_a_hub_are_not_downloaded(base_folder: Path, tmp_path: Path) -> None:
    text = f"name: h\nbackbone: {{model: {base_folder}}}\ndata: {{preferences: a/b, sft: a/b, max_pairs: 400%s}}\n"
    text += "sft: {max_length: 64}\nppo: {total_episodes: 32, max_prompt_length: 20, max_completion_length: 10}\n"
    (tmp_path / "r.yaml").write_text(text % "")
    with pytest.raises(UserError, match=r"data.sft, data.preferences lie on a hub .* set data.max_sft"):
        estimate(load_recipe(tmp_path / "r.yaml"))
    (tmp_path / "r.yaml").write_text(text % ", max_sft: 100")
    found, (note, *_) = estimate(load_recipe(tmp_path / "r.yaml"))
    assert "upper bounds" in note
    rows = {stage.folder: (stage.rows, stage.tokens) for stage in found}
    assert rows["round-0/sft"] == (100, 100 * 64 * 3)
    assert rows["round-1/reward"] == (400, 400 * (20 + 2 * 10))


def test_an_evaluation_that_takes_long_is_said() -> None:
    """60 of 100 seconds, over both rounds, and 30 of 100."""

    def stages(evaluation: float) -> list[Estimate]:
        seconds = {"round-1/ppo": 100 - 2 * evaluation, "round-1/evaluate": evaluation, "round-2/evaluate": evaluation}
        return [Estimate(folder, 1, 1, 1, Memory(1.0, ()), value) for folder, value in seconds.items()]

    (note,) = _evaluation_note(stages(30.0), 512)
    assert note.startswith("Evaluation takes 60% of this time, with evaluate.prompts=512;")
    assert _evaluation_note(stages(15.0), 512) == []


def test_a_prompt_is_counted_as_long_as_the_context_lets_it_be(recipe_file: Path) -> None:
    """PPO reads no more of it (`rlhf.models.prompt_length`); the plan counted all that `max_prompt_length` allows."""
    recipe = load_recipe(recipe_file)

    def longest(context: int, asked: int | None) -> int | None:
        args = section_training(recipe)["ppo"].args
        args.max_prompt_length, args.max_completion_length = asked, 28
        return ppo_rollouts(recipe, args, LlamaConfig(max_position_embeddings=context)).max_prompt_length

    assert longest(128, 512) == longest(128, None) == 100
    assert longest(128, 40) == 40
    assert longest(16, 40) == 40, "an encoder's context is no policy's"
