"""Experts: one LoRA adapter and head per distribution of preferences on one base, combined into one reward.

A new distribution is served without labels: the gate looks at the prompt alone and never sees which domain it is from.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Prompt
from rlhf.errors import UserError
from rlhf.models.load import load_scorer
from rlhf.models.open import adapter_weights, one_sentence
from rlhf.models.save import ADAPTER_BASE, check_base
from rlhf.models.scalar_head import SAVED_HEAD, restore_exact
from rlhf.reward.gate import GATE, Gate, mean_states
from rlhf.reward.model import NO_FEATURES
from rlhf.reward.weighed import WeighedByPrompt

EXPERTS = "experts.json"
ROUNDING = 1e-6  # of weights that sum to 1
Combination = Literal["gate", "weights", "merged"]


class ExpertRewards(WeighedByPrompt):
    """Several experts behind the interface of one reward model; each score is standardised before they are combined.

    Attributes:
        names: of the experts, one for each distribution.
        scales: [E, 2] mean and deviation of each expert's scores on SFT samples.
        weights: [E] fixed weights, or None where the gate decides.
        gate: weights by prompt, or None where they are fixed.
    """

    kind = "experts"
    unlike = "weights that nothing vouches for"

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        names: Sequence[str],
        scales: Tensor,
        weights: Tensor | None = None,
        gate: Gate | None = None,
        conversational: bool = False,
    ):
        super().__init__(model, tokenizer, conversational=conversational)
        self.names, self.scales, self.weights, self.gate = list(names), scales, weights, gate

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> Tensor:
        """Return the combined scores [n], float32 on the CPU, in the order given."""
        return (self.weights_of(prompts) * self.score_each(prompts, responses, ended=ended)).sum(dim=1)

    def score_texts(self, texts: Sequence[str], *, ended: Sequence[bool] | None = None) -> Tensor:
        """Refuse texts that hold prompt and answer in one: experts are weighed by the prompt.

        Raises:
            UserError: always.
        """
        raise UserError("experts need prompt and answer apart; send `prompts` and `responses`.")

    def score_each(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> Tensor:
        """Return each expert's score of each answer, standardised, [n, E]."""
        rows = self.encode(prompts, responses, ended)
        columns = []
        for number in range(len(self.names)):
            self._activate(number)
            columns.append(self.score_rows(rows))
        self._activate(0)
        return (torch.stack(columns, dim=1) - self.scales[:, 0]) / self.scales[:, 1]

    def weights_of(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return how much each expert counts for each prompt, [n, E]; a gate's rows sum to 1, fixed weights to what they do."""
        if self.gate is None:
            assert self.weights is not None, "either a gate or fixed weights"
            return self.weights.expand(len(prompts), -1)
        weights, is_unfamiliar = self.gate(self.prompt_features(prompts))
        self.note_unfamiliar(is_unfamiliar)
        return weights

    def prompt_features(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return the mean of the base model's last hidden states over each prompt's tokens, adapters off, [n, h]."""
        with self.uncounted():  # prompts count where they are read with an answer
            rows = self.encode(prompts, [""] * len(prompts), [False] * len(prompts))
        model: Any = self.model
        inner = model.base_model.model
        backbone = getattr(inner, inner.base_model_prefix)
        with model.disable_adapter():
            return mean_states(backbone, rows, self.batch_size)

    def features(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> Tensor:
        """Refuse to answer: each expert has a head of its own.

        Raises:
            UserError: always.
        """
        raise UserError(NO_FEATURES)

    def scale_of_copy(self, mean: float, std: float) -> tuple[float, float]:
        """Return the copy's scale: it is the first expert, which stands for all of them in its own mean and deviation."""
        expert_mean, expert_std = self.scales[0].tolist()
        unit = expert_std / self.std
        return expert_mean + (mean - self.mean) * unit, std * unit

    def _activate(self, number: int) -> None:
        self.model.set_adapter(adapter_name(number), inference_mode=True)


def adapter_name(number: int) -> str:
    """Return PEFT's name of an expert; the first has PEFT's default name, as a single reward model's adapter has."""
    return "default" if number == 0 else f"expert-{number}"


def open_experts(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, conversational: bool, load_in_4bit: bool = False
) -> ExpertRewards:
    """Read experts that `save_experts` wrote, all on one base.

    Raises:
        UserError: an expert's base is not the one it was trained on, or its head is missing.
    """
    with one_sentence(folder):
        facts = json.loads((folder / EXPERTS).read_text(encoding="utf-8"))
        folders = [folder / f"expert-{number}" for number in range(len(facts["names"]))]
        model = load_scorer(folders[0], load_in_4bit=load_in_4bit)
        base = model.peft_config["default"].base_model_name_or_path
        for number, adapter in enumerate(folders[1:], start=1):
            check_base(str(adapter), base, model.peft_config["default"].revision)
            model.load_adapter(adapter, adapter_name(number))
            model.set_adapter(adapter_name(number))
            restore_exact(model, adapter_weights(str(adapter)))
        model.set_adapter(adapter_name(0))
        model.eval().requires_grad_(False)
        weights = None if facts["weights"] is None else torch.tensor(facts["weights"])
        gate = Gate(**load_file(folder / GATE)) if facts["weights"] is None else None
        scales = torch.tensor(facts["scales"])
    return ExpertRewards(
        model, tokenizer, names=facts["names"], scales=scales, weights=weights, gate=gate, conversational=conversational
    )


def save_experts(
    folder: Path, names: Sequence[str], scales: Tensor, *, weights: Sequence[float] | None, gate: Gate | None
) -> None:
    """Write how the experts in `folder/expert-0`, `expert-1`, … are combined."""
    facts = {"names": list(names), "scales": scales.tolist(), "weights": None if weights is None else list(weights)}
    (folder / EXPERTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if gate is not None:
        save_file({name: value.contiguous() for name, value in vars(gate).items()}, folder / GATE)


def merge_experts(
    folders: Sequence[Path],
    weights: Sequence[float],
    head_weights: Sequence[float],
    out: Path,
    *,
    start: Path | None = None,
) -> None:
    """Write one adapter whose change of where the experts began is the weighted sum of their changes; likewise its head.

    This is exact: Σ_e w_e B_e A_e is the product of the stacked matrices [w_1 B_1, w_2 B_2, …] and [A_1; A_2; …]. Experts that
    began as an adapter, W_0, each hold it: Σ_e w_e W_e has it Σ_e w_e times, so it is added (1 - Σ_e w_e) times more.

    Args:
        folders: the experts' adapters.
        weights: w of each expert's change of the base.
        head_weights: w of each expert's head, since each expert's scores have a scale of their own.
        out: the folder of the new adapter.
        start: the adapter that each of them began as; None where each began at the base.

    Raises:
        UserError: an expert holds weights that can't be added up like that, or has another shape.
    """
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    config = json.loads((folders[0] / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("use_rslora") or config.get("use_dora"):
        raise UserError("reward.experts: merged adds up plain LoRA; rsLoRA and DoRA scale by their own norms.")
    if any(set(adapter) != set(adapters[0]) for adapter in adapters):
        raise UserError("reward.experts: merged needs experts of the same shape.")
    summed = ("lora_A", "lora_B", *SAVED_HEAD.values())
    others = sorted(name for name in adapters[0] if not any(part in name for part in summed))
    if others:  # on a scale of its own a linear head adds up, an embedding table or a head of several layers does not
        raise UserError(f"reward.experts: merged adds up factors and linear heads; an expert also holds {others[0]}.")
    added, weights_added = list(adapters), list(weights)
    if start is not None and abs(1 - sum(weights)) > ROUNDING:
        first = load_file(start / "adapter_model.safetensors")
        added.append({name: first.get(name, torch.zeros_like(value)) for name, value in adapters[0].items()})
        weights_added.append(1 - sum(weights))
    merged = {}
    for name in adapters[0]:
        if "lora_A" in name:
            merged[name] = torch.cat([adapter[name] for adapter in added])
        elif "lora_B" in name:
            merged[name] = torch.cat(
                [w * adapter[name] for w, adapter in zip(weights_added, added, strict=True)], dim=1
            )
        else:
            heads = [w * adapter[name] for w, adapter in zip(head_weights, adapters, strict=True)]
            merged[name] = torch.stack(heads).sum(dim=0)
    out.mkdir(parents=True, exist_ok=True)
    for key in ("r", "lora_alpha"):  # both, so that the scale stays
        config[key] *= len(added)
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {place: value * len(added) for place, value in (config.get(key) or {}).items()}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file({name: value.contiguous() for name, value in merged.items()}, out / "adapter_model.safetensors")
    (out / ADAPTER_BASE).write_bytes((folders[0] / ADAPTER_BASE).read_bytes())
