"""Members on a shared trunk: the same scores as the whole model, each in its own order, and a vote that finds planted flips."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import RewardConfig

from rlhf.errors import UserError
from rlhf.models.load import load_tokenizer, model_settings
from rlhf.models.text import encode_answers
from rlhf.objectives.pairwise import bradley_terry
from rlhf.pipeline.vote import vote
from rlhf.reward.frozen_trunk import Features, Trunk
from rlhf.statistics import auroc
from tests.conftest import PROMPTS, WORDS
from tests.unit_scale import build_reward_model

ANSWERS = [" ".join(WORDS[i % 7 : i % 7 + 1 + i % 5]) for i in range(len(PROMPTS) + 1)]


def shared(folder: Path, out: Path) -> tuple[Trunk, Features]:
    tokenizer = load_tokenizer(folder, conversational=True)
    torch.manual_seed(0)
    trunk = Trunk(build_reward_model(folder, pad_token_id=tokenizer.pad_token_id), top_layers=1)
    sides = [encode_answers(tokenizer, PROMPTS, answers)[0] for answers in (ANSWERS[:-1], ANSWERS[1:])]
    return trunk, trunk.features(list(zip(*sides, strict=True)), out, pad_token_id=tokenizer.pad_token_id)


def plain_loss(rewards_chosen: torch.Tensor, rewards_rejected: torch.Tensor, _: list[int]) -> torch.Tensor:
    return bradley_terry(rewards_chosen, rewards_rejected)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_member_is_the_whole_model_from_its_layer_on(
    kind: str, base_folder: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    folder = base_folder if kind == "decoder" else encoder_folder
    trunk, features = shared(folder, tmp_path)
    assert features.shares == (kind == "decoder")
    trunk.check(features)  # raises where they differ
    features.values[:] = features.values[::-1].copy()
    with pytest.raises(UserError, match="differ from the whole model's"):
        trunk.check(features)


def test_members_train_only_what_is_theirs(base_folder: Path, tmp_path: Path, cpu_arguments: dict[str, Any]) -> None:
    trunk, features = shared(base_folder, tmp_path)
    before = {name: p.detach().clone() for name, p in trunk.model.named_parameters()}
    args = RewardConfig(**cpu_arguments, learning_rate=1e-2, per_device_train_batch_size=4, num_train_epochs=1)
    torch.manual_seed(1)
    first, second = trunk.member(), trunk.member()
    assert not torch.equal(first.model.score.weight, second.model.score.weight), "heads start apart"
    untrained = first.differences(features, range(18))
    assert torch.allclose(first.differences(features, [7, 3]), untrained[[7, 3]], atol=1e-5)
    first.train(features, range(18), args, objective=plain_loss, label="x")
    assert not torch.allclose(first.differences(features, range(18)), untrained)
    assert all(torch.equal(p, before[name]) for name, p in trunk.model.named_parameters())
    small = sum(p.numel() for p in first.model.parameters())
    assert small < 0.6 * sum(p.numel() for p in trunk.model.parameters()), "no copy of the trunk or the embeddings"


@pytest.mark.parametrize(("settings", "layers", "said"), [({}, 2, "1 to 1"), ({"use_peft": True}, 1, "use_peft")])
def test_what_cannot_be_shared_is_refused(
    base_folder: Path, tokenizer: Any, settings: dict[str, Any], layers: int, said: str
) -> None:
    model: Any = build_reward_model(base_folder, model_settings(settings), pad_token_id=tokenizer.pad_token_id)
    with pytest.raises(UserError, match=said):
        Trunk(model, top_layers=layers)


@pytest.mark.parametrize("trunk", [None, 1], ids=["independent", "trunk"])
def test_the_vote_finds_planted_flips(base_folder: Path, tmp_path: Path, trunk: int | None) -> None:
    """Answers that say yes are better; a fifth of the labels say otherwise. -strength must tell which, out of fold."""

    def turn(text: str, role: str = "assistant") -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows, flipped = [], []
    for i in range(150):
        yes, no = turn(f"yes {WORDS[i % 9]}"), turn(f"no {WORDS[(i + 4) % 9]}")
        flipped.append(i % 5 == 0)
        chosen, rejected = (no, yes) if flipped[-1] else (yes, no)
        prompt = turn(f"{WORDS[i % 11]} {WORDS[i % 13]} {i}", "user")
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    settings = {"learning_rate": 3e-3, "per_device_train_batch_size": 8, "num_train_epochs": 2, "save_strategy": "no"}
    arguments: dict[str, Any] = {"members": 4, "folds": 2, "in_sample": False, "flip_rate": 0.1, "seed": 0}
    arguments["trunk"] = trunk
    strength, noise, _ = vote(base_folder, rows, settings, tmp_path, say=lambda _: None, **arguments)
    assert strength.votes.tolist() == [2] * 150
    assert auroc((-strength.mean).tolist(), flipped) > 0.95
    assert noise.low <= 0.2 <= noise.high
    assert noise.flip_rate == pytest.approx(0.2, abs=0.13)  # 150 pairs: 4 standard errors
    # The same again reads the members from disk: nothing is trained, nothing differs.
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("member-*/differences.safetensors")}
    assert len(before) == 4
    again, *_ = vote(base_folder, rows, settings, tmp_path, say=lambda _: None, **arguments)
    assert torch.equal(again.mean, strength.mean)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.glob("member-*/differences.safetensors")}
