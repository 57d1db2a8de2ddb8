"""Reward models: TRL `RewardTrainer` subclasses that declare an objective, and trained models as they are used.

The table is what a recipe's `reward.objective` may say. An objective is a declaration: which trainer class, which
columns it needs.
"""

OBJECTIVES = {
    "bt": "PairRewardTrainer",
    "margin": "MarginRewardTrainer",
    "smoothing": "LabelSmoothingRewardTrainer",
    "soft": "SoftLabelRewardTrainer",
}
