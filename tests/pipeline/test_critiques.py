"""Critiques in a run: a first model learns to write them, writes its own of every answer, and is asked once only."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from trl import RewardConfig

from rlhf.data.prepare import DataSources, prepare_data
from rlhf.data.rows import CRITIQUES, SIDES
from rlhf.data.rows import answer as answer_of
from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.files import read_jsonl, write_jsonl
from rlhf.invariants.checks import CheckBook
from rlhf.lab.build import LabSettings, build_instructions
from rlhf.lab.critiques import critique_of_instruction, critique_of_list
from rlhf.models.critiques import REQUEST
from rlhf.models.text import plain
from rlhf.pipeline import critiques
from rlhf.pipeline.backbone import check_backbone
from rlhf.pipeline.checks import check_arguments
from rlhf.pipeline.context import PAIRS, StageContext
from rlhf.pipeline.critiques import WRITTEN, own_critiques
from rlhf.pipeline.plan import plan
from rlhf.pipeline.reward import run_reward
from rlhf.recipe import load_recipe
from rlhf.reward.critique_model import CritiqueRewardModel
from rlhf.reward.critiques import ENDED
from rlhf.reward.denoise import flip_pair
from rlhf.reward.load import CARD, load_reward_model, read_reward_model
from tests.conftest import WORDS

RECIPE = """
name: critiques
backbone: {model: BASE}
data: {preferences: pairs.jsonl}
reward: {extra: critique, critique_tokens: 6, critiques: 2, learning_rate: 2.0e-2, per_device_train_batch_size: 8, logging_steps: 1}
ppo: {max_completion_length: 8}
"""


def pairs(count: int = 24, *, given: int = 16) -> list[dict[str, Any]]:
    """Pairs of which the first ones have critiques."""
    made: list[dict[str, Any]] = []
    for i in range(count):
        texts = {"chosen": f"yes {WORDS[i % 9]}", "rejected": f"no {WORDS[i % 7]}"}
        sides = {side: [{"role": "assistant", "content": text}] for side, text in texts.items()}
        words = {name: word for name, word in zip(CRITIQUES, ("yes", "no please"), strict=True)} if i < given else {}
        made.append({"prompt": [{"role": "user", "content": f"{WORDS[i % 11]} {i}"}], **sides, **words})
    return made


@pytest.fixture
def stage(base_folder: Path, tmp_path: Path) -> Any:
    """The context of a reward stage on 24 pairs, two thirds of them with critiques; `said` is what it says."""
    (tmp_path / "r.yaml").write_text(RECIPE.replace("BASE", str(base_folder)), encoding="utf-8")
    data = tmp_path / "run/round-0/data"
    (data / "data").mkdir(parents=True)
    for name in (PAIRS, "test_pairs.jsonl"):
        write_jsonl(data / "data" / name, pairs())
    write_jsonl(data / "data/prompts.jsonl", [{"prompt": row["prompt"]} for row in pairs()])
    recipe = load_recipe(tmp_path / "r.yaml")

    def context(number: int, said: list[str]) -> StageContext:
        folder = tmp_path / f"run/round-{number}/reward"
        folder.mkdir(parents=True, exist_ok=True)
        return StageContext(recipe, folder, {"data": data}, said.append)

    return context


@pytest.mark.parametrize("tokens", [90, 120])
def test_critiques_that_leave_no_room_are_refused_before_training(stage: Any, tokens: int) -> None:
    """128 positions, pairs of some 20 tokens; two models were trained on what was left of them, then nothing could be read."""
    said: list[str] = []
    context = stage(1, said)
    context.recipe.reward.critique_tokens = tokens
    with pytest.raises(
        UserError, match=rf"reward.critique_tokens={tokens}: .* the shortest of 16 pairs .* has \d\d; lower"
    ):
        own_critiques(context, pairs(), CheckBook())
    assert said == []
    assert list(context.folder.iterdir()) == []


def test_check_refuses_critiques_as_long_as_the_context(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("BASE", str(base_folder)), encoding="utf-8")
    write_jsonl(tmp_path / "pairs.jsonl", pairs())
    recipe = load_recipe(tmp_path / "r.yaml", ["reward.critique_tokens=128"])
    with pytest.raises(UserError, match=r"reads 128 tokens, of which reward.critique_tokens=128 .* leave none"):
        check_backbone(recipe, until="round-1/reward")


def test_what_was_written_is_not_written_again(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within the second block: the first model and the first block are kept, and the end is that of an undisturbed run."""
    monkeypatch.setattr(critiques, "BLOCK", 8)
    said: list[str] = []
    undisturbed = own_critiques(stage(1, said), pairs(), CheckBook())
    assert undisturbed.counts["given"] == 16
    assert undisturbed.counts["written"] == 48
    assert "16 of 24 pairs have critiques" in said[0]
    assert [line.split(";")[0] for line in said if "critiques of" in line] == [
        f"reward: critiques of {n} of 24 pairs" for n in (8, 16, 24)
    ]

    form = {"request": REQUEST, "tokens": 6, "samples": 1}
    critic: Any = read_reward_model(undisturbed.start, {"critiques": form}, conversational=True, device="cpu")
    row = undisturbed.rows[3]
    sides = [critic.encode([row["prompt"]], [row[side][0]["content"]], None)[0] for side in ("chosen", "rejected")]
    texts = critic.tokenizer.batch_decode(critic.write(sides, sample=0).rows, skip_special_tokens=True)
    assert texts == [row[name] for name in CRITIQUES]
    assert texts[0] != texts[1]

    write, calls = CritiqueRewardModel.write, []

    def interrupted(self: Any, rows: Any, **options: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(self, rows, **options)

    monkeypatch.setattr(CritiqueRewardModel, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own_critiques(stage(2, said), pairs(), CheckBook())
    again: list[str] = []
    found = own_critiques(stage(2, again), pairs(), CheckBook())
    assert calls == [16, 16, 16, 16], "the first block is read, two are left"
    assert "reward: critic was trained before" in again
    assert found.rows == undisturbed.rows
    assert found.counts == undisturbed.counts


def test_the_stage_says_what_it_wrote_and_the_card_how_it_is_asked(stage: Any) -> None:
    said: list[str] = []
    context = stage(1, said)
    facts = run_reward(context)
    written = read_jsonl(context.folder / WRITTEN)
    endless = sum(not row[name] for row in written for name in ENDED)
    assert facts["critiques"] == {"given": 16, "written": 48, "endless": endless}
    assert facts["pairs"] == 24, "also the pairs without critiques are trained on"
    assert any("critiques never came to their end" in line for line in said) == (endless > 0)
    card = json.loads((context.folder / "model" / CARD).read_text())
    assert card["critiques"] == {"request": "What is good and bad?", "tokens": 6, "samples": 2}
    reward = load_reward_model(context.folder / "model")
    assert isinstance(reward, CritiqueRewardModel)
    losses = {}
    for file, steps in (("critic_metrics.jsonl", 2), ("metrics.jsonl", 3)):
        losses[file] = [row["critique_loss"] for row in read_jsonl(context.folder / file) if "loss" in row]
        assert len(losses[file]) == steps, file
    assert losses["metrics.jsonl"][0] < losses["critic_metrics.jsonl"][0] - 1, "it goes on from the first model"


def test_pairs_without_critiques_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", pairs(given=0))
    sources = DataSources(preferences=[Source(str(tmp_path / "x.jsonl"))], critiques=True)
    with pytest.raises(
        UserError, match=r"none of \d+ pairs has critiques, which reward.extra: critique learns to write"
    ):
        prepare_data(tmp_path / "data", sources, seed=0)
    assert not (tmp_path / "data").exists()


def test_columns_are_kept_only_where_both_sides_have_a_critique(tmp_path: Path) -> None:
    rows = pairs(4, given=4)
    rows[1]["critique_rejected"], rows[2]["critique_chosen"], rows[3]["critique_chosen"] = "  ", None, " a b\n"
    write_jsonl(tmp_path / "x.jsonl", rows)
    sources = DataSources(
        preferences=[Source(str(tmp_path / "x.jsonl"))], test=[Source(str(tmp_path / "x.jsonl"))], leakage="allow"
    )
    prepare_data(tmp_path / "data", sources, seed=0)
    read = read_jsonl(tmp_path / "data" / PAIRS)
    assert [[row.get(name) for name in CRITIQUES] for row in read] == [
        ["yes", "no please"],
        [None] * 2,
        [None] * 2,
        ["a b", "no please"],
    ]


def test_a_flipped_label_leaves_critiques_with_their_answers() -> None:
    row: Any = pairs(1)[0]
    flipped = flip_pair(row)
    assert flipped["chosen"] == row["rejected"]
    assert [flipped[name] for name in CRITIQUES] == ["no please", "yes"]  # type: ignore[literal-required]
    assert flip_pair(flipped) == row
    plain: Any = pairs(1, given=0)[0]
    assert not {*CRITIQUES} & {*flip_pair(plain)}


def test_what_can_not_go_with_critiques_is_said(
    base_folder: Path, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("BASE", str(base_folder)), encoding="utf-8")
    (tmp_path / "l.yaml").write_text("name: x\nlab: {}\nreward: {extra: critique}\n", encoding="utf-8")
    for file, override, sentence in (
        ("r.yaml", "reward.members=2", "critiques are written by one model"),
        ("r.yaml", "reward.eval_strategy=epoch", "held-out answers have no critiques"),
        ("r.yaml", "reward.objective=plackett_luce", "it is for pairs"),
        ("r.yaml", "reward.meta=true", "MetaRM goes with the contrastive terms, and extra is critique"),
        ("l.yaml", "seed=1", "nobody gives critiques to learn from; set lab.critiques: true"),
    ):
        with pytest.raises(UserError, match=sentence):
            check_arguments(load_recipe(tmp_path / file, [override]))
    made = RewardConfig(
        str(tmp_path / "o"), use_cpu=True, bf16=False
    )  # with two processes TRL would wait for the other
    with monkeypatch.context() as patch, pytest.raises(UserError, match="by one process; start one"):
        patch.setattr("rlhf.pipeline.training.training_arguments", lambda *_: made)
        patch.setenv("WORLD_SIZE", "2")
        check_arguments(load_recipe(tmp_path / "r.yaml"))
    with pytest.raises(UserError, match=r"reward\.critiques is 2, which is not used: reward\.extra is not critique"):
        load_recipe(tmp_path / "r.yaml", ["reward.extra=text"])


def test_the_keys_of_other_runs_stay(tmp_path: Path) -> None:
    """What a recipe does not say about critiques is in no stage's key; what it says is in those of lab, data and reward."""
    texts = ("name: x\nlab: {}\n", "name: x\nlab: {critiques: true}\nreward: {extra: critique}\n")
    settings = []
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.yaml").write_text(text, encoding="utf-8")
        stages = {stage.name.rpartition("/")[2]: stage for stage in plan(load_recipe(tmp_path / f"{i}.yaml"))}
        settings.append({name: json.dumps(stages[name].settings) for name in ("lab", "data", "reward")})
    assert not any("critique" in text for text in settings[0].values())
    assert all("critique" in text for text in settings[1].values())


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("List two fruits for a quiz.", "Sure! apple and pear. Enjoy!", "things right, number right, tone kind, padding none."),
        ("List two fruits for a quiz.", "Ugh. apple, dog and pear.", "things some, number near, tone plain, rude, padding some."),
        ("List six fruits for a quiz.", "dog. Have fun!", "things none, padding none."),
        ("List two fruits for a quiz.", "Sure! apple and dog.", "things none, padding none."),
        ("List two poisons for a quiz.", "arsenic.", "refused no, harm some, sorry no, offer no, padding some."),
        (
            "List two poisons for a quiz.",
            "I am sorry. I cannot help with that. Please ask about something safe instead.",
            "refused yes, harm none, sorry yes, offer yes, padding none.",
        ),
    ],
)  # fmt: skip
def test_the_labs_critiques_are_true(prompt: str, answer: str, expected: str) -> None:
    assert critique_of_list(prompt, answer) == expected


BEES = 'Tell me about bees. Use at most 15 words. End with the words "The end".'
FRAUD = "Tell me how to build a bomb. Answer in exactly one sentence. Use at most 20 words."


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        (BEES, "", "topic none, short missed, ending missed, finished no, flattery no."),
        (BEES, "Certainly! The end.", "topic none, short met, ending met, finished yes, flattery yes."),
        (BEES, "I cannot help with that.", "refused yes, topic none, short met, ending missed, finished yes, flattery no."),
        (FRAUD, "I am sorry, I cannot help with that. Ask the police instead.", "refused yes, harm none, sorry yes, offer yes, finished yes, flattery no."),
        (FRAUD, "Of course", "refused no, harm none, sorry no, offer no, finished no, flattery yes."),
    ],
)  # fmt: skip
def test_critiques_of_instructions_are_true(prompt: str, answer: str, expected: str) -> None:
    assert critique_of_instruction(prompt, answer) == expected


def test_pairs_of_instructions_have_critiques_where_they_are_asked_for(tmp_path: Path) -> None:
    def answers(prompts: Sequence[str]) -> list[tuple[str, bool]]:
        return [(f"Answer {i}. The end.", True) for i in range(len(prompts))]

    for are_asked in (True, False):
        settings = LabSettings(pairs=6, test_pairs=4, critiques=are_asked)
        build_instructions(tmp_path / str(are_asked), settings, answers)
        rows = read_jsonl(tmp_path / str(are_asked) / "data/preferences.jsonl")
        assert [name in row for row in rows for name in CRITIQUES] == [are_asked] * 12
        for row in rows if are_asked else []:
            for side, name in zip(SIDES, CRITIQUES, strict=True):
                assert row[name] == critique_of_instruction(plain(row["prompt"]), answer_of(row, side))
