"""Numbers with intervals: how good a reward model is, and how good a policy is."""
