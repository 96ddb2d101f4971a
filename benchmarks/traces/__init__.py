"""Work to a layer's trace of given accuracy, beside every peer: `python -m benchmarks.traces`."""
