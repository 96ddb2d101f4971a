"""Experiments: `python -m benchmarks.NAME`; they use the public face of lama_optax only."""
