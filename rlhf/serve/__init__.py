"""Servers: a reward model behind HTTP, and the labelling page."""
