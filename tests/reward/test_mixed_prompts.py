"""A text has the score that it has alone, whatever kind of prompt stands beside it in a batch."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf.data.rows import user_turn
from rlhf.models.load import load_tokenizer, model_settings
from rlhf.reward.load import load_reward_model, save_reward_model
from rlhf.reward.model import RewardModel
from rlhf.serve.models import Answer, open_models
from tests.unit_scale import build_reward_model

TEXT, TALK = "Name a fruit.", user_turn("Name a fruit.")


@pytest.fixture(scope="module")
def plain_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of plain texts; its tokenizer has a chat template, as that of every instruct model has."""
    folder = tmp_path_factory.mktemp("plain")
    tokenizer = load_tokenizer(base_folder, conversational=False)
    tokenizer.chat_template = AutoTokenizer.from_pretrained(base_folder).chat_template
    pad: Any = tokenizer.pad_token_id
    model = build_reward_model(base_folder, model_settings({}), pad_token_id=pad)
    save_reward_model(folder, model, tokenizer, samples=[(f"{TEXT} {i}", f"yes {i}") for i in range(6)])
    return folder


def test_a_plain_text_is_read_alike_alone_and_beside_a_conversation(plain_folder: Path) -> None:
    reward: RewardModel = load_reward_model(plain_folder)
    assert not reward.conversational
    (alone,) = reward.encode([TEXT], ["an apple"], None)
    assert alone == reward.tokenizer(TEXT + "an apple")["input_ids"] + [reward.tokenizer.eos_token_id]
    (talk,) = reward.encode([TALK], ["an apple"], None)
    assert talk != alone
    assert reward.encode([TALK, TEXT, TALK, TEXT], ["an apple"] * 4, [True, True, True, False]) == [
        talk,
        alone,
        talk,
        alone[:-1],
    ]


def test_the_server_mixes_no_two_clients(plain_folder: Path) -> None:
    (model,) = open_models([str(plain_folder)])
    texts: list[Any] = [Answer(TEXT, "an apple", True), Answer(TALK, "a pear", True)]
    (member,) = model.members
    together = model._rows(member, texts)
    assert together == [model._rows(member, [text])[0] for text in texts]
