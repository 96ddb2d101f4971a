"""How well the tracked noise scale is known, and what it predicts of the batch size."""
