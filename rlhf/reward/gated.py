"""ArmoRM (arXiv:2406.12845): attributes on frozen features, freed of length, and a gate that reads the prompt and weighs them."""

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.ratings import ratings_of
from rlhf.data.rows import SIDES, TIE, Pair, Prompt, Rated, completion, has_ended
from rlhf.errors import UserError
from rlhf.models.heads import combine_labels, label_layer
from rlhf.models.load import load_scorer
from rlhf.models.open import one_sentence
from rlhf.objectives.gated import gated_score, length_multiple, ridge, spearman
from rlhf.reward.gate import GATE, Gate, fit_gate, label_columns, mean_states
from rlhf.reward.model import Network, RewardModel
from rlhf.reward.sides import side_features
from rlhf.reward.weighed import WeighedByPrompt

GATED = "gated.json"
FEWEST_RATINGS = 2  # through which a line can be laid


@dataclass(frozen=True)
class Attributes:
    """What the k labels of a network are, and how one score is made of them.

    Attributes:
        names: of the attributes, in the order of the labels.
        offsets: [k] what is added to each label: a decoder's head has no constant of its own.
        gate: weights by prompt, at least 0, with sum 1.
        usual: [k] the mean weights over the training prompts, for prompts unlike all of them.
    """

    names: tuple[str, ...]
    offsets: Tensor
    gate: Gate
    usual: Tensor


class GatedRewards(WeighedByPrompt):
    """A network of k attributes behind the interface of one reward model: Σ_a g_a(prompt) r'_a(prompt, answer).

    r' are freed of length already: the network's head holds the debiased attributes and no others.

    Attributes:
        attributes: what the labels are.
    """

    kind = "gated"
    unlike = "the mean weights over those"

    def __init__(self, model: Network, tokenizer: PreTrainedTokenizerBase, attributes: Attributes, **arguments: Any):
        super().__init__(model, tokenizer, **arguments)
        self.attributes = attributes

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> Tensor:
        """Return the weighted scores [n], float32 on the CPU, in the order given."""
        return gated_score(self.score_each(prompts, responses, ended=ended), self.weights_of(prompts))

    def score_texts(self, texts: Sequence[str], *, ended: Sequence[bool] | None = None) -> Tensor:
        """Refuse texts that hold prompt and answer in one: attributes are weighed by the prompt.

        Raises:
            UserError: always.
        """
        raise UserError("a gated reward model needs prompt and answer apart; send `prompts` and `responses`.")

    def score_each(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> Tensor:
        """Return what the model says of each answer in each attribute, freed of length, [n, k] nats."""
        return self.score_rows(self.encode(prompts, responses, ended)) + self.attributes.offsets

    def weights_of(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return how much each attribute counts for each prompt, [n, k]; rows sum to 1.

        Of a prompt that is further from the training prompts than 99.9 % of these are, nothing is known: it has their mean
        weights. Such prompts are counted and said.
        """
        weights, is_unfamiliar = self.attributes.gate(prompt_features(self, prompts))
        self.note_unfamiliar(is_unfamiliar)
        return torch.where(is_unfamiliar[:, None], self.attributes.usual, weights)

    def copy_of_network(self) -> Network:
        """Return a copy of the network whose only label is the score at the mean weights, for a critic to start from."""
        network = copy.deepcopy(self.model)
        combine_labels(network, self.attributes.usual)
        return network

    def scale_of_copy(self, mean: float, std: float) -> tuple[float, float]:
        """Return the copy's scale: it says the score at the mean weights without the attributes' offsets."""
        return mean - (self.attributes.usual @ self.attributes.offsets).item(), std


def prompt_features(reward: RewardModel, prompts: Sequence[Prompt]) -> Tensor:
    """Return the mean of a network's last hidden states over each prompt's tokens, [n, h]; no answer is read."""
    with reward.uncounted():  # prompts count where they are read with an answer
        rows = reward.encode(prompts, [""] * len(prompts), [False] * len(prompts))
    inner: Any = reward.model.base_model.model if isinstance(reward.model, PeftModel) else reward.model
    return mean_states(getattr(inner, inner.base_model_prefix), rows, reward.batch_size)


@dataclass(frozen=True)
class Fitted:
    """What was found out while attributes and gate were fitted.

    Attributes:
        attributes: how one score is made of the labels.
        length_before, length_after: by attribute, Spearman's correlation with length over the rated answers.
        multiples: by attribute, how much of the length attribute was taken off; 0 where none of it frees the attribute.
        weights: by attribute, the mean over training prompts.
    """

    attributes: Attributes
    length_before: dict[str, float]
    length_after: dict[str, float]
    multiples: dict[str, float]
    weights: dict[str, float]

    def facts(self) -> dict[str, dict[str, float]]:
        """Return what a manifest keeps of it: weights, and correlations with length."""
        return {"weights": self.weights, "length_before": self.length_before, "length_after": self.length_after}

    def sentence(self) -> str:
        """Say which attribute counts how much, and what was left of the length in it."""
        parts = [
            f"{name} {self.weights[name]:.2f} ({self.length_before[name]:+.2f} → {self.length_after[name]:+.2f})"
            for name in self.attributes.names
        ]
        return "mean weight of each attribute (its rank correlation with length before → after): " + ", ".join(parts)


def fit_gated(
    network: Network,
    tokenizer: PreTrainedTokenizerBase,
    rated: Sequence[Rated],
    pairs: Sequence[Pair],
    signs: Mapping[str, float],
) -> Fitted:
    """Fit attributes, their freedom of length, and the gate, on a frozen decoder; the network's head becomes theirs, in place.

    Args:
        network: with a head of as many labels as there are attributes.
        rated: answers with ratings; every attribute of at least two.
        pairs: what the gate is fitted to.
        signs: of each attribute above or below 0: below, it is a fault.

    Raises:
        UserError: an attribute that fewer than two answers are rated in; nothing but ties.
    """
    reward = RewardModel(network.eval(), tokenizer, conversational=True)
    responses = [completion(row) for row in rated]

    # 1. Every attribute, and length itself, by ridge regression on what the head reads.
    ended = [has_ended(row["completion"]) for row in rated]
    features = reward.features([row["prompt"] for row in rated], responses, ended=ended).double()
    lengths = torch.tensor([len(ids) for ids in tokenizer(responses, add_special_tokens=False)["input_ids"]])
    length = ridge(features, lengths.clamp(min=1).log())
    length_scores = features @ length.weight
    weights, before, after, multiples = [], {}, {}, {}
    for name, sign in signs.items():
        ratings = torch.tensor([ratings_of(row["attributes"], [name]) for row in rated], dtype=torch.float64)[:, 0]
        is_rated = ~ratings.isnan()
        if is_rated.sum() < FEWEST_RATINGS:
            raise UserError(f"reward: fewer than two answers are rated in {name}; take it out of the attributes.")
        fitted = ridge(features[is_rated], ratings[is_rated])
        scores = features @ fitted.weight

        # 2. Without length: the multiple of the length attribute is taken off the weights, so nobody can forget to do it.
        multiple = length_multiple(scores, length_scores, lengths)
        if multiple is None:
            warnings.warn(
                f"reward: the features say too little of length to free {name} of it; it stays as it is.", stacklevel=2
            )
        multiples[name] = multiple or 0.0
        freed = fitted.weight - multiples[name] * length.weight
        before[name], after[name] = spearman(scores, lengths), spearman(features @ freed, lengths)
        weights.append(freed if sign > 0 else -freed)
    head = torch.stack(weights)
    offsets = -(head @ features.mean(dim=0))  # so that each attribute's mean over the rated answers is 0

    # 3. The gate, by Bradley-Terry on the pairs, of which ties say nothing; its scale makes the attributes' unit nats.
    pairs = [row for row in pairs if row.get("confidence") != TIE]
    if not pairs:
        raise UserError("reward: all pairs are ties, so there is nothing to fit the gate to.")
    chosen, rejected = (side_features(reward, pairs, side).double() for side in SIDES)
    of_prompts = prompt_features(reward, [row["prompt"] for row in pairs])
    confidence, weight = label_columns(pairs)
    differences = ((chosen - rejected) @ head.T).float()
    gate, sharpness = fit_gate(of_prompts, differences, confidence=confidence, weight=weight)
    usual = gate(of_prompts)[0].mean(dim=0)

    # 4. The head.
    layer = label_layer(network, len(signs))
    layer.weight.data.copy_(sharpness * head)
    attributes = Attributes(tuple(signs), (sharpness * offsets).float(), gate, usual)
    by_name = dict(zip(signs, usual.tolist(), strict=True))
    return Fitted(attributes, before, after, multiples, by_name)


def save_gated(folder: Path, fitted: Fitted) -> None:
    """Write beside a saved network of k labels what its labels are and how they are weighed."""
    attributes = fitted.attributes
    facts = {
        "attributes": list(attributes.names),
        "offsets": attributes.offsets.tolist(),
        "mean_weights": attributes.usual.tolist(),
        "length_multiples": list(fitted.multiples.values()),
    }
    (folder / GATED).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    save_file({name: value.contiguous() for name, value in vars(attributes.gate).items()}, folder / GATE)


def is_gated(folder: str | Path) -> bool:
    """Tell whether a gate weighs the labels of the reward model in a folder."""
    return (Path(folder).expanduser() / GATED).is_file()


def open_gated(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, conversational: bool, load_in_4bit: bool = False
) -> GatedRewards:
    """Read a network and its gate, as `save_gated` wrote them.

    Raises:
        UserError: as `load_scorer` says; the files beside the network are damaged.
    """
    with one_sentence(folder):
        facts = json.loads((folder / GATED).read_text(encoding="utf-8"))
        names, usual = tuple(facts["attributes"]), torch.tensor(facts["mean_weights"])
        attributes = Attributes(names, torch.tensor(facts["offsets"]), Gate(**load_file(folder / GATE)), usual)
        model = load_scorer(folder, load_in_4bit=load_in_4bit, labels=len(names))
    return GatedRewards(model, tokenizer, attributes, conversational=conversational)
