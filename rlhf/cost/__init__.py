"""What a recipe will take, before it runs: rows, tokens, memory, seconds."""
