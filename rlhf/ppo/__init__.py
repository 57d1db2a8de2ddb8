"""Proximal policy optimisation on current TRL: the maintained successor of the trainer that TRL removed."""
