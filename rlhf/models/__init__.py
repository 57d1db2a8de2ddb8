"""Models: load, build, check, generate, save, and the four roles of PPO. Everything that touches weights lives here."""
