"""A small generated world whose true reward is known, so that RLHF's failures can be measured rather than guessed."""
