"""The LAMA-Adam paper's experiment on `make_moons`: `python -m benchmarks.moons --help`."""
