"""A small generated world whose true reward is known, so that RLHF's failures can be measured rather than guessed."""

from rlhf.lab.build import LabSettings, build_lab
from rlhf.lab.world import gold

__all__ = ["LabSettings", "build_lab", "gold"]
