"""The codes of a bottleneck's reward model, and whether new answers still lie among those of the SFT policy (InfoRM's alarm)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.models.open import one_sentence
from rlhf.objectives.cloud import Cloud, border, distance, fit_cloud, most_outside

CLOUD = "cloud.safetensors"
SHARE = 0.05  # of the SFT policy's answers that may lie beyond the border
FALSE_ALARMS = 1e-4  # a rollout


@dataclass(frozen=True)
class LatentCloud:
    """Where the codes of the SFT policy's answers lie.

    Attributes:
        code: [d, h] takes what the head reads to the mean of its code; the reward is linear in both.
        cloud: of the codes.
    """

    code: Tensor
    cloud: Cloud

    def is_outside(self, features: Tensor) -> Tensor:
        """Tell which answers lie beyond the border, by what the head reads of them, [n, h] → [n] bool."""
        return distance(self.cloud, features @ self.code.T) > border(self.cloud, share=SHARE)

    def most_outside(self, answers: int) -> int:
        """Return how many of so many answers may lie beyond the border, before the policy must have changed."""
        return most_outside(len(self.cloud.distances), answers, share=SHARE, false_alarms=FALSE_ALARMS)


def latent_cloud(code: Tensor, features: Tensor) -> LatentCloud:
    """Return the cloud of the answers whose features are given, [n, h]; they are shuffled, for files are often sorted."""
    code = code.detach().float().cpu()
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    return LatentCloud(code, fit_cloud(features[order] @ code.T))


def save_cloud(folder: Path, latent: LatentCloud) -> None:
    """Write a cloud beside its reward model."""
    tensors = {"code": latent.code, **latent.cloud._asdict()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / CLOUD)


def read_cloud(folder: Path) -> LatentCloud | None:
    """Read the cloud of a reward model's folder; None where it has none."""
    if not (folder / CLOUD).is_file():
        return None
    with one_sentence(folder):
        tensors = load_file(folder / CLOUD)
    return LatentCloud(tensors.pop("code"), Cloud(**tensors))
