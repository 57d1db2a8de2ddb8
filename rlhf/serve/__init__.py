"""Servers: a reward model behind HTTP."""
