"""A gate: how much each of several scores counts for a prompt, by what the prompt is about. It never sees an answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf.data.rows import Pair
from rlhf.models.batching import batches_by_length, pad_batch, run_batches
from rlhf.objectives.pairwise import pair_loss

GATE = "gate.safetensors"


@dataclass
class Gate:
    """Weights of E scores by prompt: softmax(W z + b), where z are the prompt's standardised features.

    Attributes:
        mean, scale: [h] mean and deviation of the training prompts' features.
        weight, bias: [E, h], [E].
        radius: the root mean square of z that 99.9 % of the training prompts stay within.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    radius: Tensor

    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights [n, E] of prompts with features [n, h], and which are unlike any seen in training, [n] bool."""
        z = (features - self.mean) / self.scale
        is_unfamiliar = z.pow(2).mean(dim=1).sqrt() > self.radius
        return torch.softmax(z @ self.weight.T + self.bias, dim=1), is_unfamiliar


def fit_gate(
    features: Tensor,
    differences: Tensor,
    *,
    confidence: Tensor | float = 1.0,
    weight: Tensor | float = 1.0,
    decay: float = 0.01,
) -> tuple[Gate, float]:
    """Fit the gate under which the mixture of scores explains the pairs best: Bradley-Terry on s · Σ_e w_e d_e.

    Args:
        features: [n, h] features of each pair's prompt.
        differences: [n, E] how much higher each score is for the chosen answer than for the rejected one.
        confidence, weight: [n] how likely each label is right, and what it counts (`rlhf.objectives.pairwise.pair_loss`).
        decay: penalty on W, times its squared length; b and s are free.

    Returns:
        the gate, and s: nats per unit of the scores.
    """
    mean, scale = features.mean(dim=0), features.std(dim=0, correction=0).clamp(min=1e-6)
    z = (features - mean) / scale
    matrix = torch.zeros(differences.shape[1], z.shape[1], requires_grad=True)
    bias = torch.zeros(differences.shape[1], requires_grad=True)
    log_sharpness = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([matrix, bias, log_sharpness], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        mixed = (torch.softmax(z @ matrix.T + bias, dim=1) * differences).sum(dim=1)
        nats = mixed * log_sharpness.exp()
        losses = pair_loss(nats, torch.zeros_like(nats), confidence=confidence, weight=weight)
        value = losses.mean() + decay * matrix.pow(2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    radius = z.pow(2).mean(dim=1).sqrt().quantile(0.999)
    return Gate(mean, scale, matrix.detach(), bias.detach(), radius), log_sharpness.exp().item()


def label_columns(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Return confidence and weight of pairs, [n] each, as `fit_gate` takes them; 1 where a pair has none."""
    confidence = torch.tensor([1.0 if (value := row.get("confidence")) is None else value for row in pairs])
    weight = torch.tensor([1.0 if (value := row.get("weight")) is None else value for row in pairs])
    return confidence, weight


@torch.no_grad()
def mean_states(backbone: nn.Module, rows: Sequence[Sequence[int]], batch_size: int) -> Tensor:
    """Return the mean of a backbone's last hidden states over the tokens of each row, [n, h] float32 on the CPU."""
    device = next(backbone.parameters()).device

    def of_batch(batch: list[int]) -> Tensor:
        ids, mask = pad_batch([rows[i] for i in batch], pad_token_id=0)
        hidden = backbone(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
        return (hidden.float().cpu() * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)

    return torch.stack(run_batches(of_batch, batches_by_length([len(row) for row in rows], batch_size)))
