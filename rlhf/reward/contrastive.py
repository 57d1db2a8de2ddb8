"""`ContrastiveRewardTrainer`: beside the pair loss, SimCSE or SwAV on two dropout views of what the reward head reads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel
from trl import RewardConfig

from rlhf.errors import UserError
from rlhf.models.scalar_head import score_head
from rlhf.objectives.contrastive import info_nce, swapped_prediction, with_negatives
from rlhf.recipe.objectives import EXTRAS
from rlhf.reward.beside import BesideRewardTrainer
from rlhf.reward.trainer import Scored


@dataclass(frozen=True)
class Contrast:
    """A contrastive term and its numbers.

    Attributes:
        weight: β, the factor of the term beside the pair loss.
        temperature: τ.
        prototypes: K of SwAV; 0 is SimCSE.
        differences: whether the elements are each pair's difference and its negative, not the answers themselves.
    """

    weight: float
    temperature: float
    prototypes: int = 0
    differences: bool = False


# β and K are those of arXiv:2401.06080 section 3.1, which leaves τ and the β of simcse_diff open.
CONTRASTS = {
    "simcse": Contrast(EXTRAS["simcse"].weight, 0.05),
    "simcse_diff": Contrast(EXTRAS["simcse_diff"].weight, 0.05, differences=True),
    "swav": Contrast(EXTRAS["swav"].weight, 0.1, prototypes=50),
    "swav_diff": Contrast(EXTRAS["swav_diff"].weight, 0.1, prototypes=20, differences=True),
}


class ContrastiveRewardTrainer(BesideRewardTrainer):
    """Any pair loss of `PairRewardTrainer`, and a contrastive term over the batch (arXiv:2401.06080 section 3.1).

    Every answer is encoded twice in one forward, under other dropout; the pair loss is the mean over both views. The
    other elements of a micro-batch are an element's negatives: the term is per process, and 4 x 4 is not 1 x 16.

    `dropout` is switched on wherever the model has a place for it, attention's included (which these backbones read once,
    when they are built, and TRL turns off); evaluation is not touched by it.

    Args:
        extra: `simcse` or `swav`, on answers or (`_diff`) on differences; None for no term.
        extra_weight, extra_temperature, prototypes: in place of the term's usual numbers (`CONTRASTS`).
        dropout: the probability; 0.05 is the paper's.

    Raises:
        UserError: the model has no place for dropout, so both views would be the same.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        extra: str | None = "simcse",
        extra_weight: float | None = None,
        extra_temperature: float | None = None,
        prototypes: int | None = None,
        dropout: float = 0.05,
        **arguments: Any,
    ):
        super().__init__(model, args, **arguments)
        self.contrast: Contrast | None = None
        self.prototypes: nn.Parameter | None = None
        if extra is None:
            return
        if extra not in CONTRASTS:
            raise UserError(f"reward.extra: {extra!r} is none of {', '.join(CONTRASTS)}.")
        usual = CONTRASTS[extra]
        self.contrast = Contrast(
            usual.weight if extra_weight is None else extra_weight,
            usual.temperature if extra_temperature is None else extra_temperature,
            usual.prototypes if prototypes is None else prototypes,
            usual.differences,
        )
        if not set_dropout(self.model, dropout) or dropout == 0:
            raise UserError(
                f"reward.extra: with dropout {dropout} in no place of this model, both views of an answer are the same; set "
                "dropout above 0, or lora_dropout."
            )
        if self.contrast.prototypes:
            width = self.model.config.get_text_config().hidden_size
            generator = torch.Generator().manual_seed(self.args.seed)
            start = torch.randn(self.contrast.prototypes, width, generator=generator)
            self.prototypes = self.train_beside("prototypes", start)

    def scored(self, model: nn.Module, inputs: dict[str, Any]) -> Scored:
        """Score a batch's answers; in training both views of each, the first view's answers before the second's."""
        if self.contrast is None or not model.training:
            return super().scored(model, inputs)
        with head_input(self.model) as head_inputs:
            scored = super().scored(model, two_views(inputs))
        hidden = head_inputs[-1]
        representations = hidden if hidden.dim() == 2 else hidden[scored.rows, self._read_at(scored)]
        return replace(scored, views=2, representations=representations.float())

    def _read_at(self, scored: Scored) -> Tensor:
        """Return where in its row each score is read, [n]: a decoder's at the answer's last token, an encoder's at the first."""
        return torch.zeros_like(scored.ends) if score_head(self.model) is None else scored.ends

    def extra_term(self, scored: Scored) -> Tensor | float:
        """Return β times the contrastive loss, averaged over the elements of this micro-batch."""
        if self.contrast is None or scored.representations is None:
            return 0.0
        first, second = scored.representations.chunk(2)
        if self.contrast.differences:
            pairs = scored.pairs[: len(scored.pairs) // 2]
            first, second = (with_negatives(view[pairs[:, 0]] - view[pairs[:, 1]]) for view in (first, second))
        if self.prototypes is None:
            losses = info_nce(first, second, temperature=self.contrast.temperature)
        else:
            losses = swapped_prediction(first, second, self.prototypes, temperature=self.contrast.temperature)
        metrics = self._metrics["train"]
        metrics["contrastive"].append(losses.mean().item())
        metrics["view_similarity"].append(cosine_similarity(first, second).mean().item())
        return self.contrast.weight * losses.mean()


def two_views(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch with everything in it twice, so that one forward draws two dropout masks for each answer."""
    doubled = {name: torch.cat([value, value]) for name, value in inputs.items()}
    if "segments" in inputs:
        answers, rows = len(inputs["rows"]), len(inputs["input_ids"])
        doubled["rows"] = torch.cat([inputs["rows"], inputs["rows"] + rows])
        pairs = inputs["pairs"]
    else:
        answers = len(inputs["input_ids"])
        pairs = torch.stack(torch.arange(answers, device=inputs["input_ids"].device).chunk(2), dim=1)
    doubled["pairs"] = torch.cat([pairs, pairs + answers])
    return doubled


def set_dropout(model: nn.Module, probability: float) -> int:
    """Set dropout to a probability in every place that a model has for it, and return how many there are.

    Attention's dropout is a float that each layer copied from the configuration when it was built, so setting the
    configuration of a loaded model does nothing.
    """
    places = 0
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
            places += 1
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = probability
            places += 1
    return places


@contextmanager
def head_input(model: PreTrainedModel | PeftModel) -> Iterator[list[Tensor]]:
    """Collect what the head reads: the state of every token, or an encoder's pooled first one."""
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    head = inner.score if hasattr(inner, "score") else inner.classifier
    head_inputs: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: head_inputs.append(args[0]))
    try:
        yield head_inputs
    finally:
        hook.remove()
