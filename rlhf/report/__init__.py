"""One self-contained HTML page per run, from summary.json, metrics.jsonl and samples.jsonl and nothing else."""
