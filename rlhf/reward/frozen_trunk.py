"""Members of a vote on a shared frozen trunk: the lower layers run once; each member has upper layers and a head of its own."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments, get_scheduler

from rlhf.errors import TrainingError, UserError
from rlhf.models.batching import TOKENS_TOGETHER, batches_by_length, run_batches
from rlhf.models.packing import Packed, attention_bias, obstacle, order_by_length, pack, unpack
from rlhf.models.scalar_head import score_head
from rlhf.progress import track

FEATURES = "features.npy"
TOLERANCE = 1e-4
SCORING_BATCH = 128


class _Reached(Exception):
    """Unwinds the forward at the trunk's end: what lies above is not needed."""


class _PassThrough(nn.Module):
    """Stands where a member's embeddings were: its input is already the trunk's output."""

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> Tensor:
        return inputs_embeds


class Batch(NamedTuple):
    """Some pairs at the trunk's end.

    Attributes:
        hidden: [b, t, hidden] hidden states, padded on the right.
        packed: which token lies where; its answers are chosen, rejected, chosen, rejected, …
        attention: what `attention_mask` takes: additive [b, 1, t, t] where pairs share a row, else [b, t].
    """

    hidden: Tensor
    packed: Packed
    attention: Tensor


@dataclass
class Features:
    """Hidden states at the trunk's end, on disk: a row for each pair where its answers share a prompt, else one for each answer.

    Attributes:
        values: [tokens, hidden] float32, memory-mapped.
        starts: [rows + 1] where each row begins.
        rows: the token sequences of each row, two or one.
        shares: whether the two answers of a pair share a row.
        pad_token_id: what fills the rows of a batch.
    """

    values: np.memmap[Any, np.dtype[np.float32]]
    starts: list[int]
    rows: list[list[Sequence[int]]]
    shares: bool
    pad_token_id: int

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each pair: of its row, or of the longer one of its two."""
        of_rows = np.diff(self.starts)
        of_pairs: list[int] = (of_rows if self.shares else of_rows.reshape(-1, 2).max(axis=1)).tolist()
        return of_pairs

    def batch(self, pairs: Sequence[int]) -> Batch:
        """Read some pairs from disk."""
        rows = pairs if self.shares else [row for pair in pairs for row in (2 * pair, 2 * pair + 1)]
        packed, attention = self.inputs(rows)
        hidden = torch.zeros(*packed.input_ids.shape, self.values.shape[1])
        for place, i in enumerate(rows):
            values = self.values[self.starts[i] : self.starts[i + 1]]
            hidden[place, : len(values)] = torch.from_numpy(np.asarray(values))
        return Batch(hidden, packed, attention)

    def inputs(self, rows: Sequence[int]) -> tuple[Packed, Tensor]:
        """Return the tokens of some rows, and their attention."""
        packed = pack([self.rows[i] for i in rows], pad_token_id=self.pad_token_id)
        if self.shares:
            return packed, attention_bias(packed, torch.float32)
        return packed, (packed.segments >= 0).long()


class Trunk:
    """The lower layers of a one-label classifier, frozen, and a pattern for its members.

    Args:
        model: as `build_reward_model` makes it, without an adapter, in float32; members live on its device.
        top_layers: how many layers each member has of its own, at least 1.

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

    def _layers(self, model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
        """Find the list of layers: its parent, its name there, and the list."""
        candidates = [
            (parent, name, child)
            for parent in getattr(model, model.base_model_prefix).modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == self.depth
        ]
        if len(candidates) != 1:
            raise UserError(
                f"vote.trunk: the layers of a {type(model).__name__} can't be told apart; leave vote.trunk out."
            )
        return candidates[0]

    @torch.no_grad()
    def features(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], folder: Path, *, pad_token_id: int
    ) -> Features:
        """Run the trunk over the tokens of both answers of every pair once, and keep its output in a folder."""
        shares = obstacle(self.model) is None
        rows = [list(pair) for pair in pairs] if shares else [[answer] for pair in pairs for answer in pair]
        lengths = [int((pack([row], pad_token_id=0).segments >= 0).sum()) for row in rows]
        starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        width = self.model.config.get_text_config().hidden_size
        values = np.lib.format.open_memmap(folder / FEATURES, "w+", dtype=np.float32, shape=(starts[-1], width))
        features = Features(values, starts, rows, shares, pad_token_id)
        first_of_member = self._layers(self.model)[2][-self.top_layers]
        reached: list[Tensor] = []

        def stop(_: nn.Module, positional: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            reached.append(positional[0] if positional else named["hidden_states"])
            raise _Reached

        hook = first_of_member.register_forward_pre_hook(stop, with_kwargs=True)
        device = next(self.model.parameters()).device
        read = batches_by_length(lengths, SCORING_BATCH, most_tokens=TOKENS_TOGETHER)
        try:
            for batch in track(read, "vote: trunk"):
                packed, attention = features.inputs(batch)
                positions = {"position_ids": packed.position_ids.to(device)} if shares else {}
                try:
                    self.model(input_ids=packed.input_ids.to(device), attention_mask=attention.to(device), **positions)
                except _Reached:
                    hidden = reached.pop().float().cpu().numpy()
                for place, i in enumerate(batch):
                    values[starts[i] : starts[i + 1]] = hidden[place, : lengths[i]]
        finally:
            hook.remove()
        values.flush()
        return features

    def member(self) -> "Member":
        """Build a fresh member: the upper layers as the base has them, and a head with new random weights."""
        below = [*self._layers(self.model)[2][: -self.top_layers], self.model.get_input_embeddings()]
        # What lies below is not copied, since a member has no use for it.
        model = copy.deepcopy(self.model, memo={id(module): nn.Identity() for module in below})
        parent, name, layers = self._layers(model)
        setattr(parent, name, layers[-self.top_layers :])
        for number, layer in enumerate(layers[-self.top_layers :]):
            if hasattr(layer, "self_attn") and hasattr(layer.self_attn, "layer_idx"):
                layer.self_attn.layer_idx = number
        config = model.config.get_text_config()
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
    def check(self, features: Features) -> None:
        """Check that an untrained member scores as the whole model does under the same head, on plain rows.

        Raises:
            UserError: they differ, so this architecture does something to its input that a member leaves out.
        """
        member = self.member()
        for member_head, whole_head in zip(_heads(member.model), _heads(self.model), strict=True):
            member_head.load_state_dict(whole_head.state_dict())
        batch = features.batch(range(min(4, len(features.lengths))))
        ids, mask = unpack(batch.packed, pad_token_id=features.pad_token_id)
        device = next(self.model.parameters()).device
        expected = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.squeeze(-1)
        difference = (member.scores(batch) - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise UserError(
                f"vote.trunk: on a {type(self.model).__name__} a member's scores differ from the whole model's by "
                f"{difference:.2g}; leave vote.trunk out."
            )


class Member:
    """Upper layers and head of one voter."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.is_decoder = score_head(model) is not None

    def scores(self, batch: Batch) -> Tensor:
        """Return scores [2b] on the member's device: chosen, rejected, chosen, rejected, …"""
        packed = batch.packed
        device = next(self.model.parameters()).device
        hidden, attention, positions = (x.to(device) for x in (batch.hidden, batch.attention, packed.position_ids))
        if not self.is_decoder:
            outputs: Tensor = self.model(inputs_embeds=hidden, attention_mask=attention).logits.squeeze(-1)
            return outputs
        backbone = getattr(self.model, self.model.base_model_prefix)
        states = backbone(
            inputs_embeds=hidden, attention_mask=attention, position_ids=positions, use_cache=False
        ).last_hidden_state
        scores: Tensor = self.model.score(states[packed.rows, packed.ends]).squeeze(-1)
        return scores

    def train(
        self,
        features: Features,
        pairs: Sequence[int],
        args: TrainingArguments,
        *,
        objective: Callable[[Tensor, Tensor, list[int]], Tensor],
        label: str,
    ) -> None:
        """Train on some pairs, in batches of similar length.

        Args:
            features: the trunk's output.
            pairs: which of them to train on.
            args: read are learning rate and schedule, batch size times accumulation, epochs, AdamW's numbers, weight decay,
                clipping and seed; the rest is for a Trainer.
            objective: (rewards_chosen, rewards_rejected, which pairs) → loss of each, [b] nats.
            label: what people know the member by.

        Raises:
            TrainingError: the loss is not finite.
        """
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        batches_an_epoch = -(-len(pairs) // size)
        steps = max(1, round(args.num_train_epochs * batches_an_epoch))
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        warmup, more = args.get_warmup_steps(steps), args.lr_scheduler_kwargs
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, scheduler_specific_kwargs=more)
        lengths = [features.lengths[i] for i in pairs]
        order: list[int] = []
        self.model.eval()  # dropout off, as in the reward trainers
        for step in track(range(steps), label, unit="steps"):
            epoch, place = divmod(step, batches_an_epoch)
            if place == 0:
                order = [pairs[i] for i in order_by_length(lengths, size, seed=args.seed, epoch=epoch)]
            in_batch = order[place * size : (place + 1) * size]
            scores = self.scores(features.batch(in_batch))
            loss = objective(scores[0::2], scores[1::2], in_batch).mean()
            if not torch.isfinite(loss):
                raise TrainingError(f"{label}: the loss is {loss.item()} at step {step}; lower learning_rate.")
            loss.backward()
            if args.max_grad_norm > 0:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def differences(self, features: Features, pairs: Sequence[int]) -> Tensor:
        """Return chosen minus rejected reward [n] of some pairs, in the order given, float32 on the CPU."""
        lengths = features.lengths

        def differences(batch: list[int]) -> list[float]:
            scores = self.scores(features.batch([pairs[place] for place in batch]))
            return (scores[0::2] - scores[1::2]).tolist()

        batches = batches_by_length([lengths[pair] for pair in pairs], SCORING_BATCH, most_tokens=TOKENS_TOGETHER)
        return torch.tensor(run_batches(differences, batches))


def _heads(model: PreTrainedModel) -> list[nn.Linear]:
    """Return the last linear layer, or layers, that make the score."""
    head = score_head(model)
    if head is not None:
        return [head]
    return [module for module in model.classifier.modules() if isinstance(module, nn.Linear)]
