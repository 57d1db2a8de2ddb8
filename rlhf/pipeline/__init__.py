"""Stages, the folders they write, and the order they run in."""
