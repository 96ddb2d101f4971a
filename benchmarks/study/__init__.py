"""Does LAMA help? Tuned against tuned, over independent studies (`python -m benchmarks.study`)."""
