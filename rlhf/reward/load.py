"""A trained reward model as it is used: text in, raw scalar out, the same wherever it is loaded."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Prompt
from rlhf.errors import UserError
from rlhf.models.batching import batches_by_length, pad_batch, run_batches
from rlhf.models.load import load_scorer, load_tokenizer, score_head
from rlhf.models.save import save_model
from rlhf.models.score import score_rows
from rlhf.models.text import encode_answers

CARD = "reward_model.json"
PROBE_SIZE = 8
# float32 on another machine or batch layout moves a score by about 1e-5; another model moves it by 0.1.
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class RewardModel:
    """A reward model with its tokenizer, and the scale of its scores.

    Attributes:
        model: the network, frozen.
        tokenizer: its own; the policy's may be another.
        mean, std: of raw scores on SFT samples; `(score - mean) / std` has unit scale there.
        conversational: trained on conversations, so a prompt that is a string is read as one user turn.
        max_length: longer texts lose the beginning of their prompt; default: as many tokens as the model has positions.
        cut: how many texts did so far.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mean: float = 0.0,
        std: float = 1.0,
        conversational: bool = False,
        max_length: int | None = None,
        batch_size: int = 64,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.mean, self.std = mean, std
        self.conversational = conversational
        self.max_length = position_limit(model, tokenizer) if max_length is None else max_length
        self.batch_size = batch_size
        self.cut = 0

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> Tensor:
        """Raw scores [n], float32 on the CPU, in the order given.

        Args:
            prompts: strings, or conversations ending with the turn that is answered.
            responses: texts without special tokens.
            ended: whether each answer came to its end (default: all did).
        """
        rows = self.encode(prompts, responses, ended)
        was_training = self.model.training
        self.model.eval()
        scores = score_rows(self.model, rows, pad_token_id=self.tokenizer.pad_token_id, batch_size=self.batch_size)
        self.model.train(was_training)
        return scores

    @torch.no_grad()
    def features(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """What the linear head reads at each answer's last token, [n, h], float32 on the CPU.

        Raises:
            UserError: there is no single linear head (an encoder, or experts).
        """
        head = None if hasattr(self, "score_each") else score_head(self.model)
        if head is None:
            raise UserError("reward model: no single linear head, so its features are not known; take pairs at random.")
        rows = self.encode(prompts, responses, None)
        read: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].detach()))
        device = next(self.model.parameters()).device

        def last_features(batch: list[int]) -> Tensor:
            ids, mask = pad_batch([rows[i] for i in batch], pad_token_id=0)
            self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
            return read.pop()[torch.arange(len(batch)), mask.sum(dim=1) - 1].float().cpu()

        try:
            features = run_batches(last_features, batches_by_length([len(row) for row in rows], self.batch_size))
        finally:
            handle.remove()
        return torch.stack(features) if features else torch.empty(0, head.in_features)

    def encode(
        self, prompts: Sequence[Prompt], responses: Sequence[str], ended: Sequence[bool] | None
    ) -> list[list[int]]:
        """Token rows as the model reads them; what was cut off is counted."""
        if self.conversational:
            prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        rows, cut = encode_answers(self.tokenizer, prompts, responses, ended=ended, max_length=self.max_length)
        self.cut += cut
        return rows


def position_limit(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that a model can read: an encoder has no positions beyond, a decoder was not trained on them."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(tokenizer.model_max_length, positions or tokenizer.model_max_length)


def save_reward_model(
    folder: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: Sequence[tuple[Prompt, str]],
    ended: Sequence[bool] | None = None,
    facts: dict[str, Any] | None = None,
) -> RewardModel:
    """Write a trained reward model with its tokenizer and card, and give back the one that was read from disk again.

    Args:
        model: the trained network, with or without an adapter.
        samples: prompts and answers of the SFT policy, which set the scale of the scores; the first eight are the probe.
        ended: whether each sample came to its end.
        facts: what else the card should say; `load_in_4bit` of a model on a 4-bit base must be there.
    """
    save_model(model, tokenizer, folder)
    return calibrate_reward_model(folder, samples=samples, ended=ended, facts=facts)


def calibrate_reward_model(
    folder: Path,
    *,
    samples: Sequence[tuple[Prompt, str]],
    ended: Sequence[bool] | None = None,
    facts: dict[str, Any] | None = None,
    device: str | torch.device | None = None,
) -> RewardModel:
    """Read saved weights back, measure mean and deviation of the scores on SFT samples, and write the card.

    Everything on the card is measured on the model as it is loaded, not as it was in memory after training: on a
    4-bit base the two differ by the rounding of the adapter.
    """
    facts = facts or {}
    conversational = any(not isinstance(prompt, str) for prompt, _ in samples)
    reward = _read(folder, facts, conversational, device)
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


def _read(
    folder: Path,
    facts: dict[str, Any],
    conversational: bool,
    device: str | torch.device | None,
    network: nn.Module | None = None,
) -> RewardModel:
    """The network of a folder on its device: one model, or experts on one base."""
    from rlhf.reward.experts import EXPERTS, open_experts  # which are reward models themselves

    tokenizer = load_tokenizer(folder, conversational=conversational)
    if network is not None:
        return RewardModel(network, tokenizer, conversational=conversational)
    in_4_bit = bool(facts.get("load_in_4bit"))
    if (folder / EXPERTS).is_file():
        reward = open_experts(folder, tokenizer, conversational=conversational, load_in_4bit=in_4_bit)
        reward.model = _place(reward.model, facts, device)
        return reward
    model = _place(load_scorer(folder, load_in_4bit=in_4_bit), facts, device)
    return RewardModel(model, tokenizer, conversational=conversational)


def _place(model: Any, facts: dict[str, Any], device: str | torch.device | None) -> Any:
    """Move a model to its device; 4-bit weights were put there when they were loaded."""
    if facts.get("load_in_4bit"):
        return model
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def reward_card(path: str | Path) -> dict[str, Any]:
    """What a saved reward model's folder says of it.

    Raises:
        UserError: the folder holds none.
    """
    file = Path(path) / CARD
    if not file.is_file():
        raise UserError(f"{path}: no {CARD}; this folder holds no reward model of this pipeline.")
    card: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return card


def load_reward_model(
    path: str | Path, *, device: str | torch.device | None = None, network: nn.Module | None = None
) -> RewardModel:
    """Load a reward model that this pipeline saved, and check it on its stored probe.

    Args:
        network: the folder's network where somebody has loaded it already, such as onto the policy's base.

    Raises:
        UserError: the folder holds no reward model, its head is missing, or the probe scores come out differently
            (another base, a changed template, weights of another run).
    """
    folder = Path(path)
    card = reward_card(folder)
    conversational = any(not isinstance(row["prompt"], str) for row in card["probe"])
    reward = _read(folder, card, conversational, device, network)
    reward.mean, reward.std = card["mean"], card["std"]
    if _template_digest(reward.tokenizer) != card["chat_template_sha256"]:
        raise UserError(
            f"{folder}: the chat template is not the one that this reward model was trained with; it would score other texts. "
            "Put the saved one back (chat_template.jinja)."
        )
    found = reward.score([row["prompt"] for row in card["probe"]], [row["response"] for row in card["probe"]])
    expected = torch.tensor([row["score"] for row in card["probe"]])
    model: Any = reward.model
    tolerance = PROBE_TOLERANCE.get(model.dtype, 0.1)
    difference = (found - expected).abs().max().item()
    if not difference <= tolerance * max(1.0, card["std"]):
        raise UserError(
            f"{folder}: the reward model does not give the scores it was saved with (largest difference {difference:.3g}, "
            f"allowed {tolerance:.3g}); its base model, tokenizer or chat template is not the one it was trained with."
        )
    return reward


def open_reward_model(name: str) -> RewardModel:
    """A reward model of this pipeline, or any one-label classifier in a folder or on the hub, which nothing vouches for.

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
    return RewardModel(_place(model, {}, None), tokenizer, conversational=True)
