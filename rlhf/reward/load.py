"""Folders of reward models: saved with a card, measured as they are read back, checked on the card's probe when opened."""

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Prompt
from rlhf.errors import TrainingError, UserError
from rlhf.invariants.checks import Check
from rlhf.invariants.scores import alone_in_batch, as_rendered, score_scale, score_tolerance
from rlhf.models.critiques import CritiqueForm, load_writer
from rlhf.models.load import computed_dtype, load_scorer, load_tokenizer
from rlhf.models.open import expand, one_sentence, open_tokenizer
from rlhf.models.save import save_model
from rlhf.models.templates import add_no_tokens, affixes, end_at_end_token, read_as_saved
from rlhf.models.text import check_vocabulary, plain
from rlhf.reward.certify import CERTIFICATE, certify, write_certificate
from rlhf.reward.cloud import read_cloud
from rlhf.reward.critique_model import CritiqueRewardModel
from rlhf.reward.digests import changed_files, scoring_digests
from rlhf.reward.experts import EXPERTS, open_experts
from rlhf.reward.gated import is_gated, open_gated
from rlhf.reward.model import Network, RewardModel

# PPO may import this module of the room and no other, so `RewardModel` and `is_gated` are offered here too.
__all__ = [
    "CARD",
    "Card",
    "RewardModel",
    "calibrate_reward_model",
    "is_gated",
    "load_reward_model",
    "open_reward_model",
    "read_reward_model",
    "reward_card",
    "save_reward_model",
]

CARD = "reward_model.json"
PROBE_SIZE = 8
ROUNDING = 1e-6  # of the largest score
# Texts of different lengths, for a model that has no probe.
FIXED_TEXTS: list[tuple[Prompt, str]] = [
    ([{"role": "user", "content": question}], answer)
    for question, answer in (
        ("Which is larger, two or three?", "Three."),
        ("Name a river.", "One of them is the Danube, which runs through ten countries on its way to the Black Sea."),
        (
            "Why is the sky blue? Please answer in a few words, so that a child would understand it.",
            "Air scatters blue light.",
        ),
    )
]


class ProbeRow(TypedDict):
    """An answer, and the raw score that the model gave it when it was saved."""

    prompt: Prompt
    response: str
    score: float


class Card(TypedDict):
    """What `reward_model.json` says of the reward model beside it.

    `mean` and `std` are those of raw scores on SFT samples; `objective` and `load_in_4bit` stand there where the
    pipeline trained it; `critiques` says how it is asked for its critiques, where it writes any. `files` holds the sha256 of
    weights and tokenizer; cards of earlier versions have none.
    """

    mean: float
    std: float
    chat_template_sha256: str
    probe: list[ProbeRow]
    files: NotRequired[dict[str, str]]
    objective: NotRequired[str]
    load_in_4bit: NotRequired[bool]
    critiques: NotRequired[CritiqueForm]


def save_reward_model(
    folder: Path,
    model: Network,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: Sequence[tuple[Prompt, str]],
    ended: Sequence[bool] | None = None,
    facts: Mapping[str, object] | None = None,
) -> RewardModel:
    """Write a trained reward model with tokenizer, card and certificate, and return the one that was read from disk again.

    Args:
        model: the trained network, with or without an adapter.
        samples: prompts and answers of the SFT policy, which set the scale of the scores; the first eight are the probe.
        ended: whether each sample came to its end; None if all did.
        facts: what else the card should say; `load_in_4bit` of a model on a 4-bit base must be there, and `critiques` of one
            that writes some.
    """
    model.config.problem_type = "regression"  # other engines lay a sigmoid on a score otherwise
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
    """Read saved weights back, measure mean and deviation of the scores on SFT samples, and write card and certificate.

    Everything on the card is measured on the model as it is loaded, not as it was in memory after training: on a
    4-bit base the two differ by the rounding of the adapter.

    Raises:
        UserError: there are no samples.
        TrainingError: scores are not finite, depend on the batch, or are not those of what the template renders.
    """
    if not samples:
        raise UserError(
            f"{folder}: no samples, so the scale of the scores can't be measured; give prompts with answers."
        )
    facts = facts or {}
    conversational = any(not isinstance(prompt, str) for prompt, _ in samples)
    if conversational:
        _write_plain_rendering(folder)
    reward = read_reward_model(folder, facts, conversational=conversational, device=device)
    prompts, responses = [prompt for prompt, _ in samples], [response for _, response in samples]
    scores = reward.score(prompts, responses, ended=ended)
    if not scores.isfinite().all():
        raise TrainingError(
            f"{folder}: the trained model's scores are not finite numbers; lower reward.learning_rate, or train in bfloat16 "
            "or float32."
        )
    for check in score_checks(reward, list(zip(prompts, responses, strict=True))):
        reward.checks.require(check)
    reward.mean, reward.std = scores.mean().item(), scores.std(correction=0).item()
    if reward.std <= ROUNDING * scores.abs().max().item():
        reward.std = 1.0
        warnings.warn(
            f"{folder}: all {len(samples)} samples have one score, so the scale of the scores is not known, and they stay as they "
            "are; give more and other samples.",
            stacklevel=3,
        )
    with reward.uncounted():
        probe_scores = reward.score(prompts[:PROBE_SIZE], responses[:PROBE_SIZE]).tolist()
    probe = zip(prompts, responses, probe_scores, strict=False)
    card = {
        "mean": reward.mean,
        "std": reward.std,
        "chat_template_sha256": template_digest(reward.tokenizer),
        "probe": [{"prompt": prompt, "response": response, "score": score} for prompt, response, score in probe],
        "files": scoring_digests(folder),
        **facts,
    }
    (folder / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False), encoding="utf-8")
    write_certificate(folder / CERTIFICATE, certify(reward))
    return reward


def _write_plain_rendering(folder: Path) -> None:
    """Change a saved tokenizer so that every program that renders a conversation with it scores what was trained.

    The template ends in the end token, and begin tokens are the template's alone. Most tokenizers stay as they are.
    """
    tokenizer = load_tokenizer(folder, conversational=True)
    if any([end_at_end_token(tokenizer), add_no_tokens(tokenizer)]):
        tokenizer.save_pretrained(folder)
    if affixes(open_tokenizer(folder)) != (0, 0) and not read_as_saved(folder, tokenizer):
        warnings.warn(
            f"{folder}: this tokenizer writes begin or end tokens by itself and can't be kept from it; tokenise rendered "
            "conversations with add_special_tokens=False in other programs, or they get other scores.",
            stacklevel=4,
        )


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of a tokenizer's chat template, as it stands on a card."""
    template = tokenizer.chat_template or ""
    return hashlib.sha256((template if isinstance(template, str) else json.dumps(template)).encode()).hexdigest()


def read_reward_model(
    folder: Path, facts: Mapping[str, Any], *, conversational: bool, device: str | torch.device | None
) -> RewardModel:
    """Read a folder's network, which is one model, attributes under a gate, or experts on one base, onto its device.

    Nothing is checked.

    Args:
        facts: of its card; `load_in_4bit` and `critiques` are read.
    """
    load_in_4bit, form = bool(facts.get("load_in_4bit")), facts.get("critiques")
    tokenizer = load_tokenizer(folder, conversational=conversational)
    if (folder / EXPERTS).is_file():
        experts = open_experts(folder, tokenizer, conversational=conversational, load_in_4bit=load_in_4bit)
        experts.model = _place(experts.model, device, load_in_4bit=load_in_4bit)
        return experts
    if is_gated(folder):
        gated = open_gated(folder, tokenizer, conversational=conversational, load_in_4bit=load_in_4bit)
        gated.model = _place(gated.model, device, load_in_4bit=load_in_4bit)
        return gated
    model = load_scorer(folder, load_in_4bit=load_in_4bit)
    writer = None if form is None else load_writer(folder, model)
    model = _place(model, device, load_in_4bit=load_in_4bit)
    check_vocabulary(tokenizer, model.config, name=str(folder))
    with one_sentence(folder):
        if form is None or writer is None:
            return RewardModel(model, tokenizer, conversational=conversational)
        return CritiqueRewardModel(model, tokenizer, writer=writer, form=form, conversational=conversational)


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
    file = Path(expand(path)) / CARD
    if not file.is_file():
        raise UserError(f"{path}: no {CARD}; this folder holds no reward model of this pipeline.")
    with one_sentence(path):
        card: Card = json.loads(file.read_text(encoding="utf-8"))
    if (problem := _card_problem(card)) is not None:
        raise UserError(f"{file}: {problem}; copy the reward model again.")
    return card


def _card_problem(card: object) -> str | None:
    """Say what is missing on a card, or of another type than it must be; None where nothing is."""
    if not isinstance(card, dict):
        return "no mapping"
    if missing := sorted(Card.__required_keys__ - set(card)):
        return f"no {', '.join(missing)}"
    if not (_is_number(card["mean"]) and _is_number(card["std"]) and card["std"] > 0):
        return "mean or std is no finite number, or std not above 0"
    rows: list[Any] = card["probe"] if isinstance(card["probe"], list) and card["probe"] else [None]
    if not all(isinstance(row, dict) and _is_scored_text(row) for row in rows):
        return "its probe is no list of prompts, responses and scores"
    digests = card.get("files", {})
    if not (isinstance(digests, dict) and all(isinstance(sha256, str) for sha256 in digests.values())):
        return "its files are no names with digests"
    return None


def _is_scored_text(row: Mapping[str, object]) -> bool:
    is_text = isinstance(row.get("prompt"), str | list) and isinstance(row.get("response"), str)
    return is_text and _is_number(row.get("score"))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # neither NaN nor 10^400


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
    folder = Path(expand(path))
    card = reward_card(folder)
    conversational = any(not isinstance(row["prompt"], str) for row in card["probe"])
    if network is not None:
        tokenizer = load_tokenizer(folder, conversational=conversational)
        reward = RewardModel(network, tokenizer, conversational=conversational)
    else:
        reward = read_reward_model(folder, card, conversational=conversational, device=device)
    reward.mean, reward.std = float(card["mean"]), float(card["std"])
    reward.cloud = read_cloud(folder)
    with one_sentence(folder):
        _check(reward, card, folder)
        check_scores(reward, [(row["prompt"], row["response"]) for row in card["probe"]], name=folder)
    return reward


def _check(reward: RewardModel, card: Card, folder: Path) -> None:
    """Compare a loaded reward model with its card.

    Raises:
        UserError: another chat template, other scores on the probe, or files that have changed since.
    """
    if template_digest(reward.tokenizer) != card["chat_template_sha256"]:
        raise UserError(
            f"{folder}: the chat template is not the one that this reward model was trained with; it would score other texts. "
            "Put the saved one back (chat_template.jinja)."
        )
    end_at_end_token(reward.tokenizer)  # folders of earlier versions hold the policy's template
    with reward.uncounted():  # nobody asked about the card's texts
        scores = reward.score([row["prompt"] for row in card["probe"]], [row["response"] for row in card["probe"]])
    expected = torch.tensor([float(row["score"]) for row in card["probe"]])
    difference = (scores - expected).abs().max().item()
    changed = ", ".join(changed_files(folder, card.get("files", {})))
    allowed = score_tolerance(computed_dtype(reward.model)) * max(card["std"], score_scale(expected))
    if not difference <= allowed:
        cause = (
            f"{changed} changed since"
            if changed
            else "its base model or chat template is not the one it was trained with"
        )
        raise UserError(
            f"{folder}: the reward model does not give the scores it was saved with (largest difference {difference:.3g}, "
            f"allowed {allowed:.3g}); {cause}. Copy it again."
        )
    if changed:
        raise UserError(
            f"{folder}: {changed} changed since the reward model was saved. The few texts on its card still have their scores, "
            f'others may not; copy it again, or delete "files" from {CARD} if you changed it yourself.'
        )


def open_reward_model(name: str) -> RewardModel:
    """Open a reward model of this pipeline, or any one-label classifier in a folder or on the hub, which nothing vouches for.

    Raises:
        UserError: as `load_reward_model`; nothing there that could score; scores that depend on the batch or are not
            those of what the model's template renders.
    """
    name = expand(name)
    if (Path(name) / CARD).is_file():
        return load_reward_model(name)
    try:
        tokenizer = load_tokenizer(name, conversational=True, pads=False)
        model = load_scorer(name)
    except UserError as error:
        raise UserError(f"{name}: no reward model there ({str(error).removeprefix(f'{name}: ')})") from error
    warnings.warn(f"{name}: no {CARD}, so its scores are not checked against stored ones.", stacklevel=2)
    check_vocabulary(tokenizer, model.config, name=name)
    with one_sentence(name):
        reward = RewardModel(_place(model, None, load_in_4bit=False), tokenizer, conversational=True)
    check_scores(reward, FIXED_TEXTS, name=name)
    return reward


def check_scores(reward: RewardModel, texts: Sequence[tuple[Prompt, str]], *, name: str | Path) -> None:
    """Refuse a reward model whose scores depend on the batch or are not those of what its template renders.

    The checks are entered in `reward.checks`.

    Raises:
        UserError: a check does not hold; scores are not finite.
    """
    checks = score_checks(reward, texts)
    if not all(math.isfinite(check.statistic) for check in checks):
        raise UserError(
            f"{name}: its scores are not finite numbers; its weights hold NaN or infinite values, or are too large for their "
            "dtype. Train or copy it again."
        )
    for check in checks:
        reward.checks.record(check)
        if not check.held:
            raise UserError(f"{name}: {check.message()}")


def score_checks(reward: RewardModel, texts: Sequence[tuple[Prompt, str]]) -> list[Check]:
    """Compare scores alone, in a batch, and at the end of what the model's template renders.

    Of the texts the shortest, a middle and the longest are scored. Experts have several scores a text and are compared
    alone and in a batch only.
    """
    ordered = sorted(texts, key=lambda text: len(plain(text[0])) + len(text[1]))
    texts = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
    prompts, responses = [prompt for prompt, _ in texts], [response for _, response in texts]
    with reward.uncounted():
        together = reward.score(prompts, responses)
        alone = torch.cat([reward.score([prompt], [response]) for prompt, response in texts])
    dtype = computed_dtype(reward.model)
    checks = [alone_in_batch(alone, together, dtype=dtype)]
    if type(reward) is RewardModel:
        expected = [None if isinstance(x, str) else reward.score_of_rendering(x, response) for x, response in texts]
        read = [i for i, score in enumerate(expected) if score is not None]
        if read:
            scores = torch.tensor([score for score in expected if score is not None])
            checks.append(as_rendered(together[read], scores, dtype=dtype))
    return checks
