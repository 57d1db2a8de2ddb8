"""Models: load, build, check, read, sample from, save. Text, batches and log-probabilities, the same for every stage."""
