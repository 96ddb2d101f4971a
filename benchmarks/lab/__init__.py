"""What `benchmarks.cost` and `benchmarks.traces` share: models, timing, the store of results."""
