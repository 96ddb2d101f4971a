"""What curvature costs, in time and memory, beside Adam: `python -m benchmarks.cost --help`."""
