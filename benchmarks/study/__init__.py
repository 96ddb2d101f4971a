"""Does layer-adaptive momentum help? A tuned-against-tuned study: `python -m benchmarks.study`."""
