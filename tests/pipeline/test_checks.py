"""What is refused before anything is made."""

import contextlib
import json
from pathlib import Path

import pytest
from trl import RewardConfig

from rlhf.errors import UserError
from rlhf.pipeline.checks import check_arguments, check_here, check_recipe_file, check_sources, recipe_text
from rlhf.pipeline.ppo_checks import ppo_problems
from rlhf.pipeline.run import run
from rlhf.recipe import load_recipe
from tests.command import rlhf
from tests.pipeline.small import RECIPE


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_made(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: x\nlab: {}\nreward: {report_to: neptune}\n")
    with pytest.raises(UserError, match=r"reward.report_to: neptune is not installed \(pip install neptune\)"):
        check_arguments(load_recipe(file))


LATE: dict[str, str] = {
    "ppo.reward_weights=[1.0,0.5]": "ppo.reward_weights has 2 entries for 1 sources",
    "ppo.reward_weights=[1.0] ppo.extra_rewards=[rules.py:score]": "ppo.reward_weights has 1 entries for 2 sources",
    "ppo.reward_ensemble=worst": "ppo.reward_ensemble is worst, which needs two reward models or more",
    "ppo.reward_ensemble=mean ppo.extra_rewards=[rules.py:score]": "nobody knows the scale of rules.py:score",
    "ppo.reward_ensemble=mean ppo.normalize_reward=false": "ppo.normalize_reward: an ensemble compares its members",
    "reward.objective=regression reward.center_rewards_coefficient=0.01": "ratings say where the scores lie",
    "reward.objective=gated reward.center_rewards_coefficient=0.01": "ratings say where the scores lie",
    "ppo.reference_mixup=0.5 ppo.use_peft=true": "ppo.reference_mixup moves the reference",
    "ppo.max_completion_length=128": "leaves no room for a prompt in the 128 tokens",
    "": "ppo.max_completion_length is 256, which leaves no room",
    "reward.meta=true reward.gradient_checkpointing_kwargs.use_reentrant=true": "can't give MetaRM's",
    "ppo.gradient_checkpointing_kwargs={use_reentrant:true}": "unknown key 'use_reentrant:true'",
    "reward.experts=merged reward.use_peft=true reward.use_dora=true": "reward.use_dora: merged adds up plain LoRA",
    "ppo.use_peft=true ppo.lora_target_modules=[q_proj,nothing]": "ppo.lora_target_modules: the model has no module 'nothing'",
    "ppo.adversarial_coef=0.1 reward.experts=gate reward.use_peft=true": "experts that are not merged have a head each",
    "ppo.adversarial_coef=0.1 reward.experts=weights reward.use_peft=true": "experts that are not merged have a head each",
    "ppo.save_strategy=best": "ppo.save_strategy: best keeps what looks best",
    "sft.train_sampling_strategy=group_by_length": "an order that a stage which is interrupted can't find again",
    "reward.use_peft=true reward.lora_target_modules=[query]": "its linear layers are down_proj, gate_proj, k_proj",
    "vote.trunk=3 reward.objective=flip": "vote.trunk is 3; the lab's model has 3 layers",
    "reward.extra=length reward.per_device_train_batch_size=1": "reward.extra: length: of the two answers of one pair",
    "reward.extra=text reward.extra_weight=1.0": "reward.extra_weight is 1.0: of `text` it is a share of the loss",
    "reward.experts=weights reward.use_peft=true reward.expert_weights.harmless=0 reward.expert_weights.helpful=0": "reward.expert_weights: all are 0",
    "reward.use_peft=true reward.lora_dropout=0.1": "reward.lora_dropout: reward.disable_dropout",
    "ppo.use_peft=true ppo.lora_dropout=0.1": "ppo.lora_dropout: ppo.disable_dropout",
    "reward.experts=merged reward.use_peft=true reward.lora_modules_to_save=[embed_tokens]": "reward.lora_modules_to_save: m",
    "lab.world=instructions backbone.model=org/name ppo.ptx_coef=0.1": "ppo.ptx_coef: it reads demonstrations",
}


@pytest.mark.fault("refused after hours")
@pytest.mark.parametrize("overrides", LATE)
def test_what_a_later_stage_would_refuse_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: str
) -> None:
    """By `check` as by `run`: a reward model that PPO can't use would be hours of training for nothing."""
    monkeypatch.chdir(tmp_path)
    Path("rules.py").write_text("def score(prompts, completions):\n    return [0.0] * len(prompts)\n")
    Path("r.yaml").write_text("name: x\nlab: {}\n")
    recipe = load_recipe(Path("r.yaml"), overrides.split())
    for check in (check_here, check_arguments) if "org/name" not in overrides else (check_here,):
        with pytest.raises(UserError) as error:
            check(recipe)
        assert LATE[overrides] in "\n".join(error.value.problems)


@pytest.mark.fault("refused after hours")
def test_what_is_near_to_it_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rules.py").write_text("def score(prompts, completions):\n    return [0.0] * len(prompts)\n")
    Path("r.yaml").write_text("name: x\nlab: {}\nppo: {max_completion_length: 40}\n")
    for overrides in (
        "ppo.reward_weights=[1.0,0.5] ppo.extra_rewards=[rules.py:score]",
        "ppo.reward_ensemble=worst reward.members=2",
        "reward.objective=bt reward.center_rewards_coefficient=0.01",
        "ppo.reference_mixup=0.5",
        "ppo.max_completion_length=127",
        "reward.gradient_checkpointing_kwargs.use_reentrant=true",
        "reward.experts=weights reward.use_peft=true reward.use_dora=true",
        "reward.use_peft=true reward.lora_dropout=0.1 reward.disable_dropout=false",
        "reward.use_peft=true reward.lora_dropout=0.1 reward.extra=simcse",
        "reward.extra=length reward.per_device_train_batch_size=1 reward.gradient_accumulation_steps=2",
        "vote.trunk=2 reward.objective=flip",
        "reward.use_peft=true reward.lora_target_modules=[q_proj]",
        "reward.use_peft=true reward.lora_target_modules=[all-linear]",
        "reward.use_peft=true reward.lora_target_modules=['.*(q|v)_proj']",
        "ppo.ptx_coef=0.1",
    ):
        check_here(load_recipe(Path("r.yaml"), overrides.split()))
    Path("r.yaml").write_text("name: x\nlab: {}\n")
    check_arguments(load_recipe(Path("r.yaml")), until="reward")  # no PPO, no answers of it


def test_an_adapter_on_other_weights_is_warned_of() -> None:
    qlora = Path(__file__).parents[2] / "recipes" / "models" / "llama-3.1-8b-qlora.yaml"
    recipe = load_recipe(qlora, ["ppo.load_in_4bit=false"])
    with pytest.warns(UserWarning, match=r"ppo: SFT's adapter was trained on 4-bit"), contextlib.suppress(UserError):
        check_here(recipe)


def rows(*codes: object, column: str = "preference") -> str:
    return "".join(
        json.dumps({"prompt": f"p{i}", "response_1": "a", "response_2": "b", column: code}) + "\n"
        for i, code in enumerate(codes)
    )


PLAIN = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


@pytest.mark.parametrize("codes", [(0, 1), (-1, 1), (1, 1), (True, False)])
def test_codes_that_say_no_side_are_refused_before_anything_is_made(tmp_path: Path, codes: tuple[object, ...]) -> None:
    (tmp_path / "p.jsonl").write_text(rows(*codes * 5))
    (tmp_path / "r.yaml").write_text(
        "name: x\nbackbone: {model: base}\ndata: {preferences: p.jsonl, sft: gone.jsonl}\n"
    )
    result = rlhf("run", "r.yaml", cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "data.sft: gone.jsonl: no such file." in result.stderr, "all at once"
    assert "data.preferences: p.jsonl: `preference` holds {" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "r.yaml"]


def test_files_whose_sides_are_known_pass_and_are_read_no_further_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "name: x\nbackbone: {model: base}\ndata: {preferences: [{source: p.jsonl, preference: {0: first, 1: second}}, q.jsonl]}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    (tmp_path / "p.jsonl").write_text(rows(0, 1, 0))
    # A number of the response, of which the 2 comes last; and a file of another layout, whose end nobody has to read.
    (tmp_path / "q.jsonl").write_text(rows(*[1] * 500, 2))
    check_sources(recipe)
    (tmp_path / "q.jsonl").write_text(PLAIN * 500)
    read: list[int] = []
    monkeypatch.setattr("rlhf.data.read.json.loads", lambda text: read.append(1) or json.JSONDecoder().decode(text))
    check_sources(recipe)
    assert len(read) == 3 + 100


def test_a_shared_trunk_is_refused_under_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: x\nlab: {}\nvote: {trunk: 1}\nreward: {objective: flip}\nppo: {max_completion_length: 40}\n")
    check_arguments(load_recipe(file))
    made = RewardConfig(
        str(tmp_path / "o"), use_cpu=True, bf16=False
    )  # with two processes TRL would wait for the other
    monkeypatch.setattr("rlhf.pipeline.training.training_arguments", lambda *_: made)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"vote.trunk: a shared trunk is one process's"):
        check_arguments(load_recipe(file))
    check_arguments(load_recipe(file), has_voted=True)


def test_votes_on_a_trunk_that_are_there_do_not_keep_a_launch_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal names a way, which led back to it."""
    overrides = ["vote.trunk=1", "vote.members=2", "vote.folds=2", "reward.objective=flip", "lab.num_hidden_layers=2"]
    (tmp_path / "r.yaml").write_text(RECIPE)
    recipe, out = load_recipe(tmp_path / "r.yaml", overrides), tmp_path / "x"
    asked: list[bool] = []

    class Asked(Exception): ...

    def ask(*_: object, has_voted: bool, **__: object) -> None:
        asked.append(has_voted)
        raise Asked

    with monkeypatch.context() as patched:
        patched.setattr("rlhf.pipeline.run.check_arguments", ask)
        with pytest.raises(Asked):
            run(recipe, out, say=lambda _: None)
    run(recipe, out, until="vote", say=lambda _: None)
    monkeypatch.setattr("rlhf.pipeline.run.check_arguments", ask)
    with pytest.raises(Asked):
        run(recipe, out, say=lambda _: None)
    assert asked == [False, True]


def test_demonstrations_beside_ppo_on_models_of_their_own_are_one_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was refused once SFT and the reward model were trained."""
    quickstart = Path(__file__).parents[2] / "recipes/quickstart.yaml"
    asked = ["ppo.ptx_coef=0.1", "ppo.use_peft=false"]
    assert not list(ppo_problems(load_recipe(quickstart, asked)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    (sentence,) = ppo_problems(load_recipe(quickstart, asked))
    assert sentence.startswith("ppo.ptx_coef: with several processes it needs the four roles on one base")
    assert not list(ppo_problems(load_recipe(quickstart, ["ppo.ptx_coef=0.1", "ppo.use_peft=true"])))
    for until, refused in (("sft", 0), ("reward", 0), ("ppo", 1)):  # PPO may be another launch's
        assert len(list(ppo_problems(load_recipe(quickstart, asked), until=until))) == refused


@pytest.mark.fault("records cut or edited")
@pytest.mark.parametrize("cut", [0, 10, 60, "zeros", "no text"])
def test_a_damaged_recipe_of_a_run_is_a_sentence_and_may_be_deleted(tmp_path: Path, cut: int | str) -> None:
    file, out = tmp_path / "r.yaml", tmp_path / "out"
    file.write_text("name: x\nlab: {}\n")
    recipe = load_recipe(file)
    (out / "round-0").mkdir(parents=True)
    whole = recipe_text(recipe).encode()
    damaged = whole[:cut] if isinstance(cut, int) else {"zeros": bytes(len(whole)), "no text": b"\xff\xfe"}[cut]
    (out / "recipe.yaml").write_bytes(damaged)
    with pytest.raises(UserError, match=r"recipe.yaml: cut off or damaged. Delete this file"):
        check_recipe_file(recipe, out)
    (out / "recipe.yaml").unlink()
    check_recipe_file(recipe, out)
    (out / "recipe.yaml").write_bytes(whole)
    check_recipe_file(recipe, out)


@pytest.mark.fault("refused after hours")
def test_a_column_that_no_pair_has_is_said_before_sft(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("".join(PLAIN.replace('"p"', f'"p {i}"') for i in range(9)))
    (tmp_path / "s.jsonl").write_text("".join(f'{{"prompt": "p {i}", "completion": "a"}}\n' for i in range(9)))
    (tmp_path / "r.yaml").write_text(
        f"name: x\nbackbone: {{model: {base_folder}}}\nreward: {{objective: soft}}\n"
        "data: {preferences: p.jsonl, sft: s.jsonl, test_fraction: 0.3}\nppo: {max_completion_length: 16}\n"
    )
    result = rlhf("run", "r.yaml", cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "reward.objective is soft, but 7 of 7 pairs (the first is number 1) have no 'confidence'" in result.stderr
    assert not (tmp_path / "runs/x").exists(), "what a mistake was found in is no run"


DEMONSTRATIONS = "".join(json.dumps({"prompt": f"p{i}", "completion": "a"}) + "\n" for i in range(20))
PAIRS = "".join(json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(20))
REFUSED_BY_THE_DATA = {
    "data.test=pairs.jsonl": "also on the given test side",
    "reward.objective=soft": "reward.objective is soft, but 1",
    "reward.experts=gate reward.use_peft=true": "pairs have none",
    "data.max_characters=1 data.test_fraction=0.5": "nothing is left",
}


@pytest.mark.fault("refused after hours")
@pytest.mark.parametrize("overrides", REFUSED_BY_THE_DATA)
def test_check_reads_local_data_as_a_run_will(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: str) -> None:
    """What the stage `data` refuses was "fine" before; a model on a hub is not asked for that."""
    monkeypatch.chdir(tmp_path)
    Path("sft.jsonl").write_text(DEMONSTRATIONS)
    Path("pairs.jsonl").write_text(PAIRS)
    Path("r.yaml").write_text(
        "name: x\nbackbone: {model: org/name}\ndata: {sft: sft.jsonl, preferences: pairs.jsonl, test_fraction: 0.2}\n"
    )
    check_here(load_recipe(Path("r.yaml")))
    with pytest.raises(UserError) as error:
        check_here(load_recipe(Path("r.yaml"), overrides.split()))
    assert REFUSED_BY_THE_DATA[overrides] in "\n".join(error.value.problems)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "r.yaml", "sft.jsonl"]


def test_tool_calls_that_a_model_on_a_hub_would_write_are_left_to_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    row = {"prompt": [{"role": "user", "content": "1+1"}], "chosen": turns}
    row["rejected"] = [{"role": "assistant", "content": "3"}]
    Path("pairs.jsonl").write_text(json.dumps(row) + "\n")
    Path("r.yaml").write_text("name: x\nbackbone: {model: org/name}\ndata: {preferences: pairs.jsonl}\n")
    check_here(load_recipe(Path("r.yaml")))


@pytest.mark.fault("refused after hours")
def test_experts_of_an_encoder_are_not_merged(encoder_folder: Path, tmp_path: Path) -> None:
    """Its head has two layers with a tanh between: a scale that is one's went into both."""
    (tmp_path / "pairs.jsonl").write_text("".join(f'{{"source": "{s}", {PLAIN[1:]}' for s in "ab"))
    (tmp_path / "r.yaml").write_text(
        f"name: x\nbackbone: {{model: {encoder_folder}}}\ndata: {{preferences: {tmp_path / 'pairs.jsonl'}}}\n"
        "reward: {use_peft: true, experts: merged}\n"
    )
    with pytest.raises(UserError, match="is an encoder, whose head of several layers does not add up"):
        check_here(load_recipe(tmp_path / "r.yaml"))
