"""Folders of reward models: saved with a card, measured as they are read back, checked on the card's probe when opened."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Prompt
from rlhf.errors import UserError
from rlhf.models.load import load_scorer, load_tokenizer
from rlhf.models.save import save_model
from rlhf.reward.experts import EXPERTS, open_experts
from rlhf.reward.model import Network, RewardModel

# PPO may import this module of the room and no other, so `RewardModel` is offered here too.
__all__ = [
    "CARD",
    "Card",
    "RewardModel",
    "calibrate_reward_model",
    "load_reward_model",
    "open_reward_model",
    "reward_card",
    "save_reward_model",
]

CARD = "reward_model.json"
PROBE_SIZE = 8
# float32 on another machine or batch layout moves a score by about 1e-5; another model moves it by 0.1.
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class ProbeRow(TypedDict):
    """An answer, and the raw score that the model gave it when it was saved."""

    prompt: Prompt
    response: str
    score: float


class Card(TypedDict):
    """What `reward_model.json` says of the reward model beside it.

    `mean` and `std` are those of raw scores on SFT samples; `objective` and `load_in_4bit` stand there where the
    pipeline trained it.
    """

    mean: float
    std: float
    chat_template_sha256: str
    probe: list[ProbeRow]
    objective: NotRequired[str]
    load_in_4bit: NotRequired[bool]


def save_reward_model(
    folder: Path,
    model: Network,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: Sequence[tuple[Prompt, str]],
    ended: Sequence[bool] | None = None,
    facts: Mapping[str, object] | None = None,
) -> RewardModel:
    """Write a trained reward model with its tokenizer and card, and return the one that was read from disk again.

    Args:
        model: the trained network, with or without an adapter.
        samples: prompts and answers of the SFT policy, which set the scale of the scores; the first eight are the probe.
        ended: whether each sample came to its end; None if all did.
        facts: what else the card should say; `load_in_4bit` of a model on a 4-bit base must be there.
    """
    save_model(model, tokenizer, folder)
    return calibrate_reward_model(folder, samples=samples, ended=ended, facts=facts)


def calibrate_reward_model(
    folder: Path,
    *,
    samples: Sequence[tuple[Prompt, str]],
    ended: Sequence[bool] | None = None,
    facts: Mapping[str, object] | None = None,
    device: str | torch.device | None = None,
) -> RewardModel:
    """Read saved weights back, measure mean and deviation of the scores on SFT samples, and write the card.

    Everything on the card is measured on the model as it is loaded, not as it was in memory after training: on a
    4-bit base the two differ by the rounding of the adapter.
    """
    facts = facts or {}
    conversational = any(not isinstance(prompt, str) for prompt, _ in samples)
    reward = _read(folder, conversational=conversational, load_in_4bit=bool(facts.get("load_in_4bit")), device=device)
    prompts, responses = [prompt for prompt, _ in samples], [response for _, response in samples]
    scores = reward.score(prompts, responses, ended=ended)
    reward.mean, reward.std = scores.mean().item(), max(scores.std(correction=0).item(), 1e-6)
    probe_scores = reward.score(prompts[:PROBE_SIZE], responses[:PROBE_SIZE]).tolist()
    probe = zip(prompts, responses, probe_scores, strict=False)
    card = {
        "mean": reward.mean,
        "std": reward.std,
        "chat_template_sha256": _template_digest(reward.tokenizer),
        "probe": [{"prompt": prompt, "response": response, "score": score} for prompt, response, score in probe],
        **facts,
    }
    (folder / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False), encoding="utf-8")
    return reward


def _template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()


def _read(folder: Path, *, conversational: bool, load_in_4bit: bool, device: str | torch.device | None) -> RewardModel:
    """Read a folder's network, which is one model or experts on one base, onto its device."""
    tokenizer = load_tokenizer(folder, conversational=conversational)
    if (folder / EXPERTS).is_file():
        experts = open_experts(folder, tokenizer, conversational=conversational, load_in_4bit=load_in_4bit)
        experts.model = _place(experts.model, device, load_in_4bit=load_in_4bit)
        return experts
    model = _place(load_scorer(folder, load_in_4bit=load_in_4bit), device, load_in_4bit=load_in_4bit)
    return RewardModel(model, tokenizer, conversational=conversational)


def _place(model: Network, device: str | torch.device | None, *, load_in_4bit: bool) -> Network:
    """Move a network to its device; 4-bit weights were put there when they were loaded."""
    if load_in_4bit:
        return model
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def reward_card(path: str | Path) -> Card:
    """Read what a saved reward model's folder says of it.

    Raises:
        UserError: the folder holds none.
    """
    file = Path(path) / CARD
    if not file.is_file():
        raise UserError(f"{path}: no {CARD}; this folder holds no reward model of this pipeline.")
    card: Card = json.loads(file.read_text(encoding="utf-8"))
    return card


def load_reward_model(
    path: str | Path, *, device: str | torch.device | None = None, network: Network | None = None
) -> RewardModel:
    """Load a reward model that this pipeline saved, and check it on its stored probe.

    Args:
        device: where it shall live; None: on the GPU where there is one.
        network: the folder's network where somebody has loaded it already, such as onto the policy's base.

    Raises:
        UserError: the folder holds no reward model, its head is missing, or the probe scores come out differently
            (another base, a changed template, weights of another run).
    """
    folder = Path(path)
    card = reward_card(folder)
    conversational = any(not isinstance(row["prompt"], str) for row in card["probe"])
    if network is not None:
        tokenizer = load_tokenizer(folder, conversational=conversational)
        reward = RewardModel(network, tokenizer, conversational=conversational)
    else:
        in_4_bit = bool(card.get("load_in_4bit"))
        reward = _read(folder, conversational=conversational, load_in_4bit=in_4_bit, device=device)
    reward.mean, reward.std = card["mean"], card["std"]
    _check(reward, card, folder)
    return reward


def _check(reward: RewardModel, card: Card, folder: Path) -> None:
    """Compare a loaded reward model with its card.

    Raises:
        UserError: another chat template, or other scores on the probe.
    """
    if _template_digest(reward.tokenizer) != card["chat_template_sha256"]:
        raise UserError(
            f"{folder}: the chat template is not the one that this reward model was trained with; it would score other texts. "
            "Put the saved one back (chat_template.jinja)."
        )
    scores = reward.score([row["prompt"] for row in card["probe"]], [row["response"] for row in card["probe"]])
    expected = torch.tensor([row["score"] for row in card["probe"]])
    tolerance = PROBE_TOLERANCE.get(reward.model.dtype, 0.1)
    difference = (scores - expected).abs().max().item()
    if not difference <= tolerance * max(1.0, card["std"]):
        raise UserError(
            f"{folder}: the reward model does not give the scores it was saved with (largest difference {difference:.3g}, "
            f"allowed {tolerance:.3g}); its base model, tokenizer or chat template is not the one it was trained with."
        )


def open_reward_model(name: str) -> RewardModel:
    """Open a reward model of this pipeline, or any one-label classifier in a folder or on the hub, which nothing vouches for.

    Raises:
        UserError: as `load_reward_model`; nothing there that could score.
    """
    if (Path(name) / CARD).is_file():
        return load_reward_model(name)
    try:
        tokenizer = load_tokenizer(name, conversational=True)
        model = load_scorer(name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no reward model there ({str(error).strip().splitlines()[0]})") from error
    warnings.warn(f"{name}: no {CARD}, so its scores are not checked against stored ones.", stacklevel=2)
    return RewardModel(_place(model, None, load_in_4bit=False), tokenizer, conversational=True)
