"""Reward models: TRL `RewardTrainer` subclasses that declare an objective, and trained models as they are used.

The table is what a recipe's `reward.objective` may say. An objective is a declaration: which trainer class, which
columns it needs.
"""

OBJECTIVES = {
    "bt": "PairRewardTrainer",
    "margin": "MarginRewardTrainer",
    "smoothing": "LabelSmoothingRewardTrainer",
    "soft": "SoftLabelRewardTrainer",
    # Made of a vote (`rlhf.reward.noise.corrected`), which writes the columns that the general pair loss reads.
    "flip": "PairRewardTrainer",
    "adaptive_margin": "MarginRewardTrainer",
    "flip_margin": "MarginRewardTrainer",
    "soft_margin": "SoftLabelRewardTrainer",
    "vote_soft": "SoftLabelRewardTrainer",
    "posterior": "PairRewardTrainer",
    "drop": "PairRewardTrainer",
}
