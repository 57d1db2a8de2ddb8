"""Reward models: subclasses of TRL's `RewardTrainer`, corrections of noisy labels by a vote, and trained models in use."""
