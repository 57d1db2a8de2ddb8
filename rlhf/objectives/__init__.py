"""The mathematics: small pure functions on tensors. No model, no trainer, no file; imports torch and nothing else."""
