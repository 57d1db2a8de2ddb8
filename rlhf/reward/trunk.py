"""Members of a vote on a shared frozen trunk: the lower layers are run once, the upper layers and a head are each member's own."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_scheduler

from rlhf.errors import TrainingError, UserError
from rlhf.models.load import score_head
from rlhf.objectives.pairwise import bradley_terry

FEATURES = "features.npy"
TOLERANCE = 1e-4
SCORING_BATCH = 128


class _Reached(Exception):
    """Unwinds the forward at the trunk's end: what lies above is not needed."""


class _PassThrough(nn.Module):
    """Stands where a member's embeddings were: its input is the trunk's output already."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Tensor:
        return inputs_embeds


@dataclass
class Features:
    """Hidden states at the trunk's end, of every text, on disk.

    Attributes:
        values: [tokens, hidden] memory-mapped.
        starts: [texts + 1] where each text begins.
    """

    values: Any
    starts: list[int]

    def batch(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Padded on the right: hidden states [b, t, hidden] and attention mask [b, t]."""
        lengths = [self.starts[i + 1] - self.starts[i] for i in index]
        hidden = torch.zeros(len(index), max(lengths), self.values.shape[1])
        mask = torch.zeros(len(index), max(lengths), dtype=torch.long)
        for place, (i, length) in enumerate(zip(index, lengths, strict=True)):
            hidden[place, :length] = torch.from_numpy(np.asarray(self.values[self.starts[i] : self.starts[i + 1]]))
            mask[place, :length] = 1
        return hidden, mask


class Trunk:
    """The lower layers of a one-label classifier, frozen, and a pattern for its members.

    Args:
        model: as `build_reward_model` makes it, without an adapter, in float32.
        top_layers: how many layers are each member's own, at least 1.

    Raises:
        UserError: an architecture whose layers can't be told apart, too few layers, or an adapter.
    """

    def __init__(self, model: PreTrainedModel, *, top_layers: int):
        if not isinstance(model, PreTrainedModel) or getattr(model, "is_loaded_in_4bit", False):
            raise UserError(
                "vote.trunk: members on a shared trunk train whole layers; leave out use_peft and load_in_4bit."
            )
        self.model = model.eval().requires_grad_(False)
        depth = model.config.get_text_config().num_hidden_layers
        if not 1 <= top_layers < depth:
            raise UserError(
                f"vote.trunk is {top_layers}; this model has {depth} layers, so it must be 1 to {depth - 1}."
            )
        self.depth, self.top_layers = depth, top_layers
        self._layers(model)  # refuses what it does not know

    def _layers(self, model: Any) -> tuple[nn.Module, str, nn.ModuleList]:
        """The list of layers, with its parent and name there."""
        found = [
            (parent, name, child)
            for parent in getattr(model, model.base_model_prefix).modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == self.depth
        ]
        if len(found) != 1:
            raise UserError(
                f"vote.trunk: the layers of a {type(model).__name__} can't be told apart; leave vote.trunk out."
            )
        return found[0]

    @torch.no_grad()
    def features(self, rows: Sequence[Sequence[int]], folder: Path, *, pad_token_id: int) -> Features:
        """Run the trunk over token rows once and keep its output on disk."""
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).tolist()
        width = self.model.config.get_text_config().hidden_size
        values = np.lib.format.open_memmap(folder / FEATURES, "w+", dtype=np.float32, shape=(starts[-1], width))
        first_own = self._layers(self.model)[2][-self.top_layers]
        reached: list[Tensor] = []

        def stop(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            reached.append(positional[0] if positional else named["hidden_states"])
            raise _Reached

        hook = first_own.register_forward_pre_hook(stop, with_kwargs=True)
        device = next(self.model.parameters()).device
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        try:
            for begin in tqdm(range(0, len(order), SCORING_BATCH), desc="vote: trunk", disable=None):
                index = order[begin : begin + SCORING_BATCH]
                ids, mask = _padded([rows[i] for i in index], pad_token_id)
                try:
                    self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
                except _Reached:
                    hidden = reached.pop().float().cpu().numpy()
                for place, i in enumerate(index):
                    values[starts[i] : starts[i + 1]] = hidden[place, : len(rows[i])]
        finally:
            hook.remove()
        values.flush()
        return Features(values, starts)

    def member(self) -> "Member":
        """A fresh member: the upper layers as the base has them, and a head with new random weights."""
        trunk_layers = self._layers(self.model)[2]
        kept = {id(layer): None for layer in trunk_layers[: -self.top_layers]}  # a copy would only be thrown away
        embeddings = self.model.get_input_embeddings()
        kept[id(embeddings)] = None
        model = copy.deepcopy(self.model, memo={key: nn.Identity() for key in kept})
        parent, name, layers = self._layers(model)
        setattr(parent, name, layers[-self.top_layers :])
        for number, layer in enumerate(getattr(parent, name)):
            if hasattr(layer, "self_attn") and hasattr(layer.self_attn, "layer_idx"):
                layer.self_attn.layer_idx = number
        config: Any = model.config.get_text_config()
        config.num_hidden_layers = self.top_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[-self.top_layers :]
        backbone = getattr(model, model.base_model_prefix)
        if hasattr(backbone, "embeddings"):
            backbone.embeddings = _PassThrough()
        for module in _heads(model):
            module.reset_parameters()
            nn.init.normal_(module.weight, std=(module.in_features + 1) ** -0.5)
        return Member(model.requires_grad_(True))

    @torch.no_grad()
    def check(self, features: Features, rows: Sequence[Sequence[int]], *, pad_token_id: int) -> None:
        """Compare a member that has not been trained with the whole model under the same head.

        Raises:
            UserError: they differ, so this architecture does something to its input that a member leaves out.
        """
        member = self.member()
        for mine, theirs in zip(_heads(member.model), _heads(self.model), strict=True):
            mine.load_state_dict(theirs.state_dict())
        index = list(range(min(8, len(rows))))
        ids, mask = _padded([rows[i] for i in index], pad_token_id)
        device = next(self.model.parameters()).device
        expected = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.squeeze(-1).cpu()
        found = member.scores(*features.batch(index))
        difference = (found - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise UserError(
                f"vote.trunk: on a {type(self.model).__name__} a member's scores differ from the whole model's by "
                f"{difference:.2g}; leave vote.trunk out."
            )


class Member:
    """Upper layers and head of one voter."""

    def __init__(self, model: Any):
        self.model = model
        self.is_decoder = score_head(model) is not None

    def scores(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Scores [b] from the trunk's hidden states [b, t, hidden] and their mask."""
        if not self.is_decoder:
            outputs: Tensor = self.model(inputs_embeds=hidden, attention_mask=mask).logits.squeeze(-1)
            return outputs
        backbone = getattr(self.model, self.model.base_model_prefix)
        states = backbone(inputs_embeds=hidden, attention_mask=mask, use_cache=False).last_hidden_state
        last = states[torch.arange(len(states)), mask.sum(dim=1) - 1]
        scores: Tensor = self.model.score(last).squeeze(-1)
        return scores

    def train(self, features: Features, pairs: Sequence[int], args: Any, *, label: str) -> None:
        """Bradley-Terry on some pairs: text 2i is the chosen answer of pair i, text 2i + 1 the rejected one.

        Of the arguments it reads learning rate and schedule, batch size times accumulation, epochs, weight decay,
        clipping and seed; the rest is a Trainer's.

        Raises:
            TrainingError: the loss is not finite.
        """
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        batches_an_epoch = -(-len(pairs) // size)
        steps = max(1, round(args.num_train_epochs * batches_an_epoch))
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps)
        order: list[int] = []
        self.model.eval()  # dropout off, as in the reward trainers
        bar = tqdm(range(steps), desc=label, disable=None)
        for step in bar:
            if step % batches_an_epoch == 0:
                generator = torch.Generator().manual_seed(args.seed + 7919 * (step // batches_an_epoch))
                order = torch.randperm(len(pairs), generator=generator).tolist()
            start = step % batches_an_epoch * size
            chosen = [pairs[i] for i in order[start : start + size]]
            hidden, mask = features.batch([2 * i for i in chosen] + [2 * i + 1 for i in chosen])
            scores = self.scores(hidden, mask)
            loss = bradley_terry(*scores.chunk(2)).mean()
            if not torch.isfinite(loss):
                raise TrainingError(f"{label}: the loss is {loss.item()} at step {step}; lower learning_rate.")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def differences(self, features: Features) -> Tensor:
        """Reward of the chosen answer minus that of the rejected one, of every pair [n]."""
        count = len(features.starts) - 1
        lengths = np.diff(features.starts)
        order = np.argsort(lengths, kind="stable").tolist()
        scores = torch.empty(count)
        for begin in range(0, count, SCORING_BATCH):
            index = order[begin : begin + SCORING_BATCH]
            scores[index] = self.scores(*features.batch(index))
        return scores[0::2] - scores[1::2]


def _heads(model: Any) -> list[nn.Linear]:
    """The last linear layer, or layers, that make the score."""
    head = score_head(model)
    if head is not None:
        return [head]
    return [module for module in model.classifier.modules() if isinstance(module, nn.Linear)]


def _padded(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    return ids, mask
