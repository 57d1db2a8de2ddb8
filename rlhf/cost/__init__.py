"""What a run will take, before it starts: rows, tokens, steps, memory and seconds. What the stages do is told by the pipeline."""
