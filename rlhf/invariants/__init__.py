"""What a run checks about itself while it runs: each check has a statistic, a bound, and a sentence that names likely causes."""
