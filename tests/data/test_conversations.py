"""Pairs whose sides part before the last turn: left out and counted, or compared as whole conversations."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from datasets import Dataset
from trl import RewardConfig

from rlhf.data import rows as rows_module
from rlhf.data.canonical import pair
from rlhf.data.conversations import conversation_keys
from rlhf.data.prepare import DataSources, prepare_data
from rlhf.data.read import BadRow
from rlhf.data.rows import answer, asked, parting_turn, prefix_keys, prompt_key, told
from rlhf.data.sources import Source, read_pair_rows
from rlhf.errors import UserError
from rlhf.evaluation.pairs import score_pairs
from rlhf.files import read_jsonl
from rlhf.pipeline.audit import audit
from rlhf.pipeline.evaluate import evaluate_models
from rlhf.reward.load import load_reward_model
from rlhf.reward.trainer import PairRewardTrainer
from tests.unit_scale import build_reward_model


def turns(*texts: str) -> list[Any]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


EARLY = {"chosen": turns("list", "apple", "name", "pear"), "rejected": turns("list", "plum", "name", "pear")}
UNEVEN = {"chosen": turns("name", "dog"), "rejected": turns("name", "cat", "please", "yes")}
LATE = {"chosen": turns("a", "b", "two", "yes"), "rejected": turns("a", "b", "two", "no")}
AT_USER = {"chosen": turns("a", "b", "two", "yes"), "rejected": turns("a", "b", "three", "no")}
APART = {"chosen": turns("red", "yes"), "rejected": turns("blue", "no", "green", "no")}
ROWS = [EARLY, UNEVEN, LATE, AT_USER, APART]


def write(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(
    ("row", "prompt", "part"), [(EARLY, 1, 2), (UNEVEN, 1, 2), (LATE, 3, None), (AT_USER, 1, 3)], ids=str
)
def test_the_turn_where_sides_part_and_each_sides_own_conversation(row: Any, prompt: int, part: int | None) -> None:
    canonical = pair(row)
    assert canonical["prompt"] == row["chosen"][:prompt]
    assert parting_turn(canonical) == part
    for side in ("chosen", "rejected"):
        whole = row[side]
        assert asked(canonical, side) == whole[:-1]  # type: ignore[arg-type]
        assert answer(canonical, side) == whole[-1]["content"]  # type: ignore[arg-type]
        assert canonical["prompt"] + canonical[side] == whole  # type: ignore[literal-required]
    shared = row["chosen"][:1]
    beside = {"prompt": shared, "chosen": row["chosen"][1:], "rejected": row["rejected"][1:]}
    assert pair(beside) == canonical, "TRL's form, with the prompt beside"


def test_conversations_that_share_nothing_are_refused() -> None:
    with pytest.raises(BadRow, match="part at turn 1 and share no turn of the user"):
        pair(APART)
    with pytest.raises(BadRow, match="are the same"):
        pair({"chosen": EARLY["chosen"], "rejected": EARLY["chosen"]})
    with pytest.raises(BadRow, match="rejected is not an assistant's answer"):
        pair({"chosen": EARLY["chosen"], "rejected": turns("list", "plum", "name")})


def test_they_are_left_out_and_counted_with_their_turn_unless_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", ROWS)
    rows, report = read_pair_rows(file)
    assert [row.number for row in rows] == [3]
    counts = {reason.split(",")[0]: count for reason, count in report.dropped.items()}
    assert counts == {
        "chosen and rejected part at turn 2": 2,
        "chosen and rejected part at turn 3": 1,
        "chosen and rejected part at turn 1 and share no turn of the user": 1,
    }
    assert any("data.compare: conversations" in sentence for sentence in report.sentences())
    rows, report = read_pair_rows(file, compare="conversations")
    assert [row.number for row in rows] == [1, 2, 3, 4]
    assert told(rows[0].values, "chosen") == "assistant: apple\n\nuser: name\n\nassistant: pear"
    assert told(rows[2].values, "chosen") == "yes"
    only = [EARLY, {"chosen": EARLY["rejected"], "rejected": EARLY["chosen"]}]
    with pytest.raises(UserError, match="holds no usable pair"):
        read_pair_rows(write(tmp_path / "y.jsonl", only), compare="conversations")  # they stand in both orders


def test_a_run_reads_them_where_its_recipe_says_so(tmp_path: Path) -> None:
    source = [Source(write(tmp_path / "x.jsonl", [*ROWS, {**LATE, "split": "test"}, {**EARLY, "split": "test"}]))]
    for compare, train, test in (("answers", 1, 1), ("conversations", 4, 2)):
        folder = tmp_path / compare
        given = DataSources(preferences=source, compare=compare, leakage="allow")  # type: ignore[arg-type]
        prepare_data(folder, given, seed=0)
        assert (len(read_jsonl(folder / "pairs.jsonl")), len(read_jsonl(folder / "test_pairs.jsonl"))) == (train, test)
    assert all(row["prompt"][-1]["role"] == "user" for row in read_jsonl(tmp_path / "conversations" / "prompts.jsonl"))


def test_each_side_has_the_score_of_its_whole_conversation_alone(reward_folder: Path, tmp_path: Path) -> None:
    """Against plain transformers on what the chat template writes of each side."""
    reward = load_reward_model(reward_folder)
    file = write(tmp_path / "x.jsonl", ROWS)
    rows, _ = read_pair_rows(file, compare="conversations")
    scored = score_pairs(reward, [row.values for row in rows])
    for side, scores in (("chosen", scored.scores_chosen), ("rejected", scored.scores_rejected)):
        for row, score in zip(ROWS, scores, strict=False):
            ids = reward.tokenizer.apply_chat_template(row[side], return_tensors="pt")["input_ids"]
            with torch.no_grad():
                assert score == pytest.approx(reward.model(input_ids=ids).logits.item(), abs=1e-5)
    assert abs(scored.scores_chosen[0] - scored.scores_rejected[0]) > 1e-4, "their last turns alone are the same"
    said: list[str] = []
    models = [str(reward_folder)]
    whole = evaluate_models(
        models, [file], tmp_path / "a.json", say=said.append, compare_as="conversations", probes=True
    )
    assert whole["data"]["x"]["n"] == 4
    assert evaluate_models(models, [file], tmp_path / "b.json", say=said.append)["data"]["x"]["n"] == 1


def test_training_reads_each_sides_own_turns(base_folder: Path, tokenizer: Any, cpu_arguments: dict[str, Any]) -> None:
    """The ids are those of plain transformers, and scores behind a shared prefix those of each conversation alone."""
    rows = [pair(row) for row in ROWS[:4]]
    torch.manual_seed(0)
    model = build_reward_model(base_folder, pad_token_id=tokenizer.pad_token_id)
    args = RewardConfig(**cpu_arguments, per_device_train_batch_size=4, num_train_epochs=1)
    trainer = PairRewardTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    for row, entry in zip(ROWS, trainer.train_dataset, strict=False):
        for side in ("chosen", "rejected"):
            assert entry[f"{side}_ids"] == tokenizer.apply_chat_template(row[side])["input_ids"]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    model.eval()
    with torch.no_grad():
        scored = trainer.scored(model, batch)
        assert trainer._shares
        differences = scored.rewards[scored.pairs].diff(dim=1).squeeze(1)
        for row, difference in zip(ROWS, differences, strict=False):
            chosen, rejected = (
                model(input_ids=tokenizer.apply_chat_template(row[side], return_tensors="pt")["input_ids"]).logits
                for side in ("chosen", "rejected")
            )
            assert difference.item() == pytest.approx((rejected - chosen).item(), abs=1e-5)


def test_an_audit_takes_them(base_folder: Path, tmp_path: Path) -> None:
    rows = [
        {
            "chosen": turns(f"list {i}", f"apple {i}", "name", "pear"),
            "rejected": turns(f"list {i}", "no", "name", "pear"),
        }
        for i in range(12)
    ]
    file = write(tmp_path / "x.jsonl", rows)
    audit(
        file,
        str(base_folder),
        tmp_path / "out",
        members=2,
        recipe=None,
        say=lambda _: None,
        compare="conversations",
    )
    result = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert result["kept_pairs"] == 12
    strengths = parquet.read_table(tmp_path / "out" / "pairs.parquet")["strength_mean"].to_pylist()
    assert len(strengths) == 12
    assert all(abs(strength) > 0 for strength in strengths), "their last turns alone are the same"
    with pytest.raises(UserError, match="holds no usable pair"):
        audit(file, str(base_folder), tmp_path / "no", members=2, recipe=None, say=lambda _: None)


def test_keys_of_long_conversations_take_time_in_proportion() -> None:
    """Every beginning was hashed anew: 41 turns took 400 times as long as one."""
    texts: list[Any] = [
        {
            "role": ("user", "assistant")[i % 2],
            "content": f"Turn  {i} ",
            **({"tool_calls": [{"id": i}]} if i == 5 else {}),
        }
        for i in range(9)
    ]
    assert prefix_keys(texts) == [prompt_key(texts[: i + 1]) for i in range(9)]
    assert len(set(prefix_keys(texts))) == 9
    hashed = []

    class Counted:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def update(self, data: bytes) -> None:
            hashed.append(len(data))
            self.inner.update(data)

        def copy(self) -> Any:
            return self.inner.copy()

    plain = [{"role": "user", "content": "x" * 100}] * 41
    original = rows_module.hashlib.sha256
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module.hashlib, "sha256", lambda *data: Counted(original(*data)))
        conversation_keys([plain])
    assert sum(hashed) < 41 * 110


def test_system_turns_that_ask_make_conversations_of_their_own() -> None:
    """Ten before one question are still styles; eleven are what is asked for, and the question a template."""

    def asked(count: int) -> list[Any]:
        return [[{"role": "system", "content": f"task {i}"}, {"role": "user", "content": "Go."}] for i in range(count)]

    assert len(set(conversation_keys(asked(10)))) == 1
    assert len(set(conversation_keys(asked(11)))) == 11
